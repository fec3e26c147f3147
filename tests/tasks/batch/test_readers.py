"""What was written is read by the tools that people read lakes with, each to the same rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from deltalake import DeltaTable

from serving.model.contract import Output
from tasks.batch.manifest import open_predictions
from tasks.batch.options import BatchOptions
from tasks.batch.parts import part_glob
from tasks.batch.plan import Plan
from tasks.batch.publish import audit_parts, publish
from tasks.batch.run_records import save_plan
from tasks.storage import open_storage
from tests.pages import ROOT, read_blocks
from tests.tasks.batch.iceberg_tables import configure, open_lake
from tests.tasks.batch.small import a_contract, a_plan, numbers, put, put_parts

NAME = "lake.sales.scores"
OUTPUTS = (
    Output(name="score", dtype="float32"),
    Output(name="label", dtype="str"),
    Output(name="count", dtype="uint16"),
    Output(name="half", dtype="float16"),
    Output(name="wide", dtype="float64", shape=(3,)),
)
Rows = list[dict[str, object]]


def published(folder: Path, output: str, **options: object) -> Plan:
    """Publish two runs of one destination; the second one is the newest."""
    for start, stop in ((0, 40), (40, 65)):
        source = put(f"{folder}/in-{start}", {"a.parquet": numbers(start, stop)})
        chosen = BatchOptions.model_validate(
            {"rows_per_chunk": 10, "key_columns": ("id",), "output": output, **options}
        )
        plan = a_plan(source, f"{folder}/out", chosen, contract=a_contract("a", "b", outputs=OUTPUTS))
        plan = plan.model_copy(update={"order": start + 1})
        storage = open_storage(f"{folder}/out")
        save_plan(storage, plan)
        put_parts(plan, storage)
        publish(storage, plan, audit_parts(storage, plan))
    return plan


def ours(folder: Path, plan: Plan) -> Rows:
    return open_predictions(f"{folder}/out", plan.run).collect().sort("id").to_dicts()


def by_id(rows: Rows) -> Rows:
    return sorted(rows, key=lambda row: int(str(row["id"])))


def parts_glob(folder: Path, plan: Plan) -> str:
    return f"{folder}/out/{part_glob(plan.run, plan.digest)}"


PARQUET: dict[str, Callable[[Path, Plan], Rows]] = {
    "duckdb": lambda folder, plan: duckdb.read_parquet(parts_glob(folder, plan)).arrow().read_all().to_pylist(),
    "polars": lambda folder, plan: pl.read_parquet(parts_glob(folder, plan)).to_dicts(),
    "pyarrow": lambda folder, plan: ds.dataset(f"{folder}/out/run={plan.run}").to_table().to_pylist(),
}


@pytest.mark.parametrize("reader", PARQUET)
def test_parts_are_read(tmp_path: Path, reader: str) -> None:
    plan = published(tmp_path, "parquet")
    expected = ours(tmp_path, plan)

    assert 25 == len(expected)
    assert expected == by_id([{name: row[name] for name in expected[0]} for row in PARQUET[reader](tmp_path, plan)])


def test_what_the_docs_say_of_other_readers_gives_the_newest_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ours(tmp_path, published(tmp_path, "parquet"))
    (tmp_path / "out").rename(tmp_path / "scores")
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "batch.md"
    section = page.read_text().partition("## Read it elsewhere")[2].partition("\n## ")[0]
    in_sql, in_python = (block.text for block in read_blocks(page, section))
    with duckdb.connect() as connection:
        connection.execute(in_sql)
        assert expected == by_id(connection.sql("FROM predictions").arrow().read_all().to_pylist())
    found: dict[str, Any] = {}
    exec(in_python, found)  # noqa: S102 - it is the text of our own page

    assert expected == by_id(pa.Table.from_pandas(found["predictions"], preserve_index=False).to_pylist())


DELTA: dict[str, Callable[[str], Rows]] = {
    "duckdb": lambda table: duckdb.arrow(DeltaTable(table).to_pyarrow_dataset()).arrow().read_all().to_pylist(),
    "polars": lambda table: pl.scan_delta(table).collect().to_dicts(),
    "deltalake": lambda table: DeltaTable(table).to_pyarrow_table().to_pylist(),
}


@pytest.mark.parametrize("reader", DELTA)
@pytest.mark.parametrize("mode", ["append", "replace"])
def test_a_delta_table_is_read(tmp_path: Path, reader: str, mode: str) -> None:
    plan = published(tmp_path, "delta", delta_mode=mode)
    found = by_id(DELTA[reader](f"{tmp_path}/out"))

    assert 25 == len(ours(tmp_path, plan))
    assert ours(tmp_path, plan) == found[-25:]
    assert (65 if mode == "append" else 25) == len(found)


@pytest.mark.parametrize("reader", ["duckdb", "polars", "polars by pyiceberg", "pyiceberg"])
@pytest.mark.parametrize("mode", ["append", "replace"])
def test_an_iceberg_table_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str, mode: str) -> None:
    configure(monkeypatch, str(tmp_path))
    # Without a package of its own for it, polars would warn.
    monkeypatch.setenv("POLARS_ICEBERG_PLANNER", "pyiceberg")
    plan = published(tmp_path, "iceberg", iceberg_table=NAME, iceberg_mode=mode)
    table = open_lake(str(tmp_path)).load_table("sales.scores")
    readers: dict[str, Callable[[], Rows]] = {
        "duckdb": lambda: table.scan().to_duckdb("scores").table("scores").arrow().read_all().to_pylist(),
        "polars": lambda: pl.scan_iceberg(table.metadata_location, reader_override="native").collect().to_dicts(),
        "polars by pyiceberg": lambda: pl.scan_iceberg(table, reader_override="pyiceberg").collect().to_dicts(),
        "pyiceberg": lambda: table.scan().to_arrow().to_pylist(),
    }
    found = by_id(readers[reader]())

    assert 25 == len(ours(tmp_path, plan))
    assert ours(tmp_path, plan) == found[-25:]
    assert (65 if mode == "append" else 25) == len(found)
