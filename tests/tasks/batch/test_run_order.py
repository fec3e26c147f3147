"""The order of runs is that of what they are committed to, whichever destinations feed it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import polars as pl
import pytest

from serving.errors import PublishRefused
from tasks.batch import delta
from tasks.batch.options import BatchOptions
from tasks.batch.plan import Plan
from tasks.batch.publish import audit_parts, claim_order_number, publish
from tasks.batch.run_records import confirm_plan
from tasks.storage import Storage, open_storage
from tests.tasks.batch.iceberg_tables import configure, open_lake
from tests.tasks.batch.test_reuse import OPTIONS, call, plan_call, score_plan, write

DELTA = {"output": "delta", "delta_mode": "replace"}
ICEBERG = {"output": "iceberg", "iceberg_table": "lake.sales.scores", "iceberg_mode": "replace"}


def plan_rows(folder: Path, destination: Path, start: int, options: BatchOptions) -> tuple[Storage, Plan]:
    """Plan and score a run over rows of its own."""
    write(folder / str(start) / "a.parquet", start, 24)
    plan = plan_call(folder / str(start), destination, options).plan
    storage = open_storage(str(destination))
    score_plan(plan, storage)
    return storage, plan


def publish_scored(storage: Storage, plan: Plan) -> None:
    publish(storage, confirm_plan(storage, plan), audit_parts(storage, plan))


@pytest.mark.parametrize(("output", "second"), [(DELTA, "one"), (ICEBERG, "one"), (ICEBERG, "two")])
def test_of_two_runs_planned_before_either_is_published_the_older_one_replaces_nothing(
    output: dict[str, str], second: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, str(tmp_path))
    lake = open_lake(str(tmp_path))
    options = OPTIONS.model_copy(update=output)

    def read() -> list[int]:
        if output is DELTA:
            return sorted(pl.read_delta(str(tmp_path / "one"))["id"])
        return sorted(lake.load_table("sales.scores").scan(selected_fields=("id",)).to_arrow()["id"].to_pylist())

    # The first destination has had other runs: its own numbers are higher than those of another.
    for run in ("x", "y"):
        claim_order_number(open_storage(str(tmp_path / "one")), run)
    older = plan_rows(tmp_path / "in", tmp_path / "one", 0, options)
    newer = plan_rows(tmp_path / "in", tmp_path / second, 100, options)
    publish_scored(*newer)
    with pytest.raises(PublishRefused, match=r"must not go back to an older run.*number 4.*number 3: it was planned"):
        publish_scored(*older)

    assert list(range(100, 124)) == read()
    call(tmp_path / "in" / "0", tmp_path / "one", options.model_copy(update={"rescore": "again"}))
    assert list(range(24)) == read()


def test_a_number_of_a_table_is_one_runs_whichever_destination_it_is_planned_at(place: str) -> None:
    table = open_storage(f"{place}/table")
    destinations = [open_storage(f"{place}/{at}") for at in range(3)] * 4
    claim_order_number(destinations[1], "other")
    with ThreadPoolExecutor(6) as pool:
        numbers = list(pool.map(lambda at: claim_order_number(at, "a", table=table), destinations))
    later = claim_order_number(open_storage(f"{place}/new"), "b", table=table)

    assert len(set(numbers)) == len(numbers)
    assert later > max(numbers)


@pytest.mark.parametrize("mode", ["append", "replace"])
def test_a_run_that_looked_before_a_newer_one_replaced_all_rows_looks_again(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, middle, newer = (
        plan_rows(tmp_path / "in", tmp_path / "out", start, OPTIONS.model_copy(update={**DELTA, "delta_mode": how}))
        for start, how in ((0, mode), (100, "append"), (200, "replace"))
    )
    publish_scored(*middle)
    real = delta._delta_table
    seen = [real(older[0])]
    publish_scored(*newer)
    # The older run looked before the newer one's commit.
    monkeypatch.setattr(delta, "_delta_table", lambda storage: seen.pop() if seen else real(storage))
    with pytest.raises(PublishRefused, match="must not go back to an older run"):
        publish_scored(*older)

    assert list(range(200, 224)) == sorted(pl.read_delta(str(tmp_path / "out"))["id"])
