"""Opening what runs have published: nothing, or everything."""

from __future__ import annotations

from datetime import timedelta

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serving.errors import NoCompleteRun
from serving.model.contract import Output
from tasks.batch.manifest import find_newest_run, open_predictions, open_rejects
from tasks.batch.options import BatchOptions
from tasks.batch.plan import Plan
from tasks.batch.publish import audit_parts, claim_order_number, publish
from tasks.batch.run_records import save_plan
from tasks.storage import Storage, open_storage
from tests.tasks.batch.small import a_contract, a_part, a_plan, numbers, put, put_parts


@pytest.fixture
def destination(place: str) -> Storage:
    return open_storage(f"{place}/out put [1]")


@pytest.fixture
def plan(place: str, destination: Storage) -> Plan:
    put(f"{place}/in", {"a.parquet": numbers(0, 25)})
    outputs = (Output(name="score", dtype="float32"), Output(name="wide", dtype="float32", shape=(2,)))
    return a_plan(f"{place}/in", destination.url, contract=a_contract("a", "b", outputs=outputs))


def done(destination: Storage, plan: Plan, rejects: tuple[int, ...] = (0,)) -> Plan:
    """Score and publish a run."""
    put_parts(plan, destination, rejects=rejects)
    publish(destination, plan, audit_parts(destination, plan))
    return plan


def another(plan: Plan, run: str, *, order: int = 0, seconds: int = 0) -> Plan:
    """Return another run over the same rows, of that number, planned so many seconds later by its planner's clock."""
    key = run * 32
    planned_at = plan.planned_at + timedelta(seconds=seconds)
    return plan.model_copy(update={"run": run, "key": key[:32], "order": order, "planned_at": planned_at})


def rows(plan: Plan) -> list[dict[str, object]]:
    tables = [pq.read_table(pa.BufferReader(a_part(plan, chunk, rejects=[0]))) for chunk in plan.chunks]
    return pa.concat_tables(tables).to_pylist()


def test_every_row_of_the_dataset_is_there_in_order(destination: Storage, plan: Plan) -> None:
    done(destination, plan)
    frame = open_predictions(destination.url)

    assert isinstance(frame, pl.LazyFrame)
    assert rows(plan) == frame.collect().to_dicts()
    assert list(range(25)) == frame.collect()["source_row"].to_list()
    assert rows(plan) == open_predictions(destination.url, plan.run).collect().to_dicts()


def test_rejects_are_the_rows_without_predictions(destination: Storage, plan: Plan) -> None:
    done(destination, plan)
    expected = [row for row in rows(plan) if row["reject_reason"] is not None]

    assert expected == open_rejects(destination.url).collect().to_dicts()
    assert expected == open_rejects(destination.url, plan.run).collect().to_dicts()
    assert all(row["score"] is None and row["wide"] is None for row in expected)
    assert len(expected) == len(plan.chunks)


@pytest.mark.parametrize("unit", ["order", "seconds"], ids=["numbered", "of earlier releases, by their clocks"])
def test_the_newest_run_is_the_one_that_was_planned_last(destination: Storage, plan: Plan, unit: str) -> None:
    plan = a_quick(plan)
    done(destination, another(plan, "b", **{unit: 7}), rejects=(0, 1, 2))
    done(destination, another(plan, "z", **{unit: 3}), rejects=(0, 1))
    done(destination, another(plan, "a", **{unit: 5}), rejects=(0,))
    put_parts(another(plan, "c", **{unit: 86_400}), destination, rejects=())

    assert [0, 1, 2] == open_rejects(destination.url).collect()["source_row"].to_list()
    assert plan.rows == open_predictions(destination.url).collect().height


def test_a_planner_whose_clock_is_fast_hides_no_later_run(destination: Storage, plan: Plan) -> None:
    plan = a_quick(plan)
    for run, seconds in (("a", 300), ("b", 0), ("c", -86_400)):
        done(destination, another(plan, run, order=claim_order_number(destination, run), seconds=seconds))

        assert run == published_run(destination)


def test_a_numbered_run_is_newer_than_any_of_an_earlier_release(destination: Storage, plan: Plan) -> None:
    plan = a_quick(plan)
    done(destination, another(plan, "a", seconds=86_400))
    done(destination, another(plan, "b", order=claim_order_number(destination, "b")))

    assert "b" == published_run(destination)


def published_run(destination: Storage) -> str:
    newest = find_newest_run(destination)
    assert newest is not None
    return newest.run


def a_quick(plan: Plan) -> Plan:
    """Return a plan of the first chunk alone."""
    chunk = plan.chunks[0, 0]
    files = (plan.snapshot.files[0].model_copy(update={"row_groups": (chunk.rows,)}),)
    snapshot = plan.snapshot.model_copy(update={"files": files})
    return plan.model_copy(update={"shards": ((chunk,),), "rows": chunk.rows, "snapshot": snapshot})


def test_a_run_is_opened_by_its_name(destination: Storage, plan: Plan) -> None:
    done(destination, another(plan, "newer", order=9), rejects=())
    named = done(destination, another(plan, "nightly"))

    assert rows(named) == open_predictions(destination.url, "nightly").collect().to_dicts()


def test_a_run_that_is_not_complete_is_not_there(destination: Storage, plan: Plan) -> None:
    put_parts(plan, destination)
    with pytest.raises(NoCompleteRun, match=rf"must hold run {plan.run} that is complete, got none"):
        open_predictions(destination.url, plan.run)
    with pytest.raises(NoCompleteRun, match=r"must hold a run that is complete, got none\. Call batch_inference first"):
        open_predictions(destination.url)
    with pytest.raises(NoCompleteRun):
        open_rejects(destination.url)


def test_the_rejects_of_a_run_that_is_not_complete_are_there(destination: Storage, plan: Plan) -> None:
    save_plan(destination, plan)
    put_parts(plan, destination, [(0, 1), (0, 0)])

    assert [0, 8] == open_rejects(destination.url, plan.run).collect()["source_row"].to_list()


def test_a_run_without_parts_has_no_rejects_to_open(destination: Storage) -> None:
    with pytest.raises(NoCompleteRun, match="must hold parts of run none, got none"):
        open_rejects(destination.url, "none")


def test_what_a_torn_write_or_an_older_attempt_left_beside_the_parts_is_not_read(
    destination: Storage, plan: Plan
) -> None:
    done(destination, plan)
    for name in (".part-00000-0000.parquet.ab.aside", "part-00009-0000.parquet", "notes.txt"):
        destination.put_new(f"run={plan.run}/{name}", b"not read")

    assert rows(plan) == open_predictions(destination.url).collect().to_dicts()


def test_keys_of_categories_are_text(destination: Storage, place: str) -> None:
    table = numbers(0, 25).append_column("kind", pa.array(["x", "y", None, "x", "z"] * 5).dictionary_encode())
    put(f"{place}/kinds", {"a.parquet": table.slice(0, 12), "b.parquet": table.slice(12)})
    plan = a_plan(f"{place}/kinds", destination.url, BatchOptions(rows_per_chunk=10, key_columns=("kind", "id")))
    done(destination, plan)
    frame = open_predictions(destination.url).collect()

    assert frame.schema["kind"] == pl.String
    assert ["x", "y", None, "x", "z"] * 5 == frame["kind"].to_list()
