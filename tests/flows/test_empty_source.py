"""A source without rows: refused by default, or published as a table that has its columns and no rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from flows import BatchOptions, Gate, batch_inference, open_predictions
from serving.errors import ApprovalNeeded, SourceEmpty
from tasks.batch.runs import list_runs
from tasks.batch.verify import verify_run
from tasks.storage import open_storage
from tests.support import write_customers
from tests.tasks.batch.iceberg_tables import configure, open_lake

pytestmark = pytest.mark.usefixtures("serverless")

OPTIONS = BatchOptions(key_columns=("customer",), experiment=None, on_empty="publish", sample_rows=2)
COLUMNS = ["customer", "score", "reject_column", "reject_reason"]
SCHEMA = pa.schema([("customer", pa.int64()), *((name, pa.float32()) for name in "abc")])


def write_arrow(folder: Path, table: pa.Table) -> None:
    with pa.ipc.new_file(folder / "day.arrow", table.schema) as writer:
        writer.write_table(table)


def write_delta(folder: Path, table: pa.Table) -> None:
    from deltalake import DeltaTable

    DeltaTable.create(str(folder), table.schema)


WRITERS: dict[str, Callable[[Path, pa.Table], object]] = {
    "parquet": lambda folder, table: pq.write_table(table, folder / "day.parquet"),
    "arrow": write_arrow,
    "csv": lambda folder, _: (folder / "day.csv").write_text("customer,a,b,c\n"),
    "jsonl": lambda folder, _: (folder / "day.jsonl").write_text(""),
    "avro": lambda folder, table: pl.DataFrame(table).write_avro(folder / "day.avro"),
    "delta": write_delta,
    "iceberg": lambda folder, table: open_lake(str(folder)).create_table("sales.customers", table.schema),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_day_without_rows_is_refused_or_published_as_a_table_of_the_right_columns(
    kind: str, linear: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, scores = tmp_path / "in", str(tmp_path / "scores")
    folder.mkdir()
    configure(monkeypatch, str(folder))
    WRITERS[kind](folder, SCHEMA.empty_table())
    source = "iceberg:lake.sales.customers" if kind == "iceberg" else str(folder)
    refused = OPTIONS.model_copy(update={"on_empty": "refuse"})
    with pytest.raises(SourceEmpty, match="on_empty='publish' in the options"):
        batch_inference(linear, source, scores, refused)
    first = batch_inference(linear, source, scores, OPTIONS)
    (part,) = Path(scores).glob("run=*/*.parquet")
    content = part.read_bytes()
    part.unlink()
    repaired = batch_inference(linear, source, scores, OPTIONS)
    again = batch_inference(linear, source, scores, OPTIONS)
    predictions = open_predictions(scores).collect()
    duck = duckdb.sql(f"from read_parquet('{scores}/run=*/*.parquet', hive_partitioning = false)")
    key = pa.int64() if kind not in ("csv", "jsonl") else pa.string()

    assert ("scored", 0, "scored", "already complete") == (first.status, first.rows, repaired.status, again.status)
    assert (COLUMNS, 0) == (predictions.columns, predictions.height)
    assert (COLUMNS, 0) == (duck.columns, len(duck.fetchall()))
    assert key == pq.read_schema(part).field("customer").type
    assert content == part.read_bytes()
    assert "complete" == verify_run(open_storage(scores), first.run).state


@pytest.mark.parametrize(("mode", "rows"), [("replace", [300, 0, 200]), ("upsert", [300, 300, 300])])
@pytest.mark.parametrize("output", ["delta", "iceberg"])
def test_a_day_without_rows_empties_a_table_that_is_replaced_and_leaves_one_that_is_upserted_into(
    output: str, mode: str, rows: list[int], linear: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltalake import DeltaTable

    configure(monkeypatch, str(tmp_path))
    lake = open_lake(str(tmp_path))
    table = {"output": output, f"{output}_mode": mode} | (
        {"iceberg_table": "lake.sales.scores"} if output == "iceberg" else {}
    )
    options, scores, source = OPTIONS.model_copy(update=table), str(tmp_path / "scores"), tmp_path / "in"
    found = []
    for written in (300, 0, 200):
        write_customers(source, rows=written, files=1, rows_per_group=100)
        batch_inference(linear, str(source), scores, options)
        read = (
            DeltaTable(scores).to_pyarrow_table()
            if output == "delta"
            else lake.load_table("sales.scores").scan().to_arrow()
        )
        found.append((read.column_names, read.num_rows))

    assert [(COLUMNS, each) for each in rows] == found
    assert [200, 0, 300] == [run.rows for run in list_runs(open_storage(scores))]


def test_a_gate_refuses_a_day_without_rows_beside_one_with_rows_and_never_takes_it_for_its_baseline(
    linear: str, tmp_path: Path
) -> None:
    source, scores = tmp_path / "in", str(tmp_path / "scores")
    gated = OPTIONS.model_copy(update={"gate": Gate()})

    def score(rows: int, options: BatchOptions) -> str:
        write_customers(source, rows=rows, files=1, rows_per_group=100)
        return batch_inference(linear, str(source), scores, options).run

    full = score(2_000, gated)
    with pytest.raises(ApprovalNeeded, match="rows: 0 rows, in the baseline 2,000"):
        score(0, gated)
    score(0, OPTIONS)
    with pytest.raises(ApprovalNeeded, match=f"beside run {full} .*\n.*rows: 200 rows, in the baseline 2,000"):
        score(200, gated)
