"""Whole runs from one lake table into another: rows that were deleted stay out, and every other one is there once."""

from __future__ import annotations

import datetime as dt
import shlex
import shutil
import subprocess
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from deployments.command_line import app
from serving.errors import DestinationUnusable, PublishRefused
from tasks.batch.comparison_records import compare_challengers, open_challenger
from tasks.batch.manifest import open_predictions
from tasks.batch.options import BatchOptions
from tasks.batch.report import BatchReport
from tasks.batch.resolve import find_run
from tasks.batch.run_request import resolve_request
from tasks.batch.runs import list_runs
from tasks.storage import open_storage
from tests.support import digests, register_script, write_customers
from tests.tasks.batch.iceberg_tables import configure, delete_rows, open_lake

pytestmark = pytest.mark.usefixtures("serverless")

OPTIONS = BatchOptions(key_columns=("customer",), batch_size=64, rows_per_chunk=512, experiment=None)


def test_a_run_from_an_iceberg_table_into_another_leaves_out_deleted_rows_and_is_published_once(
    linear: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.batch import batch_inference

    configure(monkeypatch, str(tmp_path))
    lake = open_lake(str(tmp_path))
    folder = write_customers(tmp_path / "files", rows=4_000, files=2, rows_per_group=1_000)
    files = [pq.read_table(path) for path in sorted(folder.glob("*.parquet"))]
    table = lake.create_table("sales.customers", files[0].schema)
    for each in files:
        table.append(each)
    path = next(iter(table.scan().plan_files())).file.file_path
    delete_rows(table, path, range(0, 2_000, 10))
    kept = sorted(table.refresh().scan().to_arrow()["customer"].to_pylist())
    options = OPTIONS.model_copy(update={"output": "iceberg", "iceberg_table": "lake.sales.scores"})

    def run() -> tuple[str, int]:
        report = batch_inference(linear, "iceberg:lake.sales.customers", str(tmp_path / "scores"), options)
        return report.status, report.rows

    before = run()
    parts = digests(tmp_path / "scores")
    again = run()
    scores = lake.load_table("sales.scores")
    loose = batch_inference(linear, f"{folder}/*.parquet", str(tmp_path / "plain"), OPTIONS)
    expected = pl.read_parquet(f"{tmp_path}/plain/run={loose.run}/*.parquet").filter(pl.col("customer").is_in(kept))
    found = pl.DataFrame(scores.scan().to_arrow())

    assert 3_800 == len(kept)
    assert (("scored", 3_800), ("already complete", 3_800)) == (before, again)
    assert parts == digests(tmp_path / "scores")
    assert 1 == len(scores.snapshots())
    assert kept == found["customer"].sort().to_list()
    assert (expected.sort("customer")["score"] - found.sort("customer")["score"]).abs().max() < 1e-5


def test_a_delta_table_is_scored_as_it_was(linear: str, tmp_path: Path) -> None:
    from flows.batch import batch_inference

    folder = write_customers(tmp_path / "files", rows=400, files=2, rows_per_group=100)
    first, second = (pl.read_parquet(path) for path in sorted(folder.glob("*.parquet")))
    first.write_delta(str(tmp_path / "table"))
    then = dt.datetime.now(dt.UTC)
    second.write_delta(str(tmp_path / "table"), mode="overwrite")
    runs = [
        batch_inference(
            linear, str(tmp_path / "table"), str(tmp_path / "scores"), OPTIONS.model_copy(update={name: value})
        )
        for name, value in (("source_version", 0), ("source_timestamp", then), ("source_version", None))
    ]

    assert ["scored", "already complete", "scored"] == [run.status for run in runs]
    assert runs[0].run == runs[1].run != runs[2].run
    found = pl.read_parquet(f"{tmp_path}/scores/run={runs[0].run}/*.parquet")
    assert first["customer"].to_list() == found["customer"].sort().to_list()


@pytest.mark.parametrize(
    ("output", "mode"), [("delta", "append"), ("delta", "replace"), ("delta", "upsert"), ("iceberg", "upsert")]
)
def test_challengers_lie_beside_a_table_which_is_that_of_the_model_alone(
    output: str, mode: str, registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.batch import batch_inference

    configure(monkeypatch, str(tmp_path))
    lake = open_lake(str(tmp_path))
    model, challenger = (register_script("beside-a-table", f"time.sleep({at} / 1000)") for at in range(2))
    source = write_customers(tmp_path / "in", rows=2_000, files=2, rows_per_group=500)

    def run(to: str, night: int, *challengers: str) -> BatchReport:
        table = f"lake.sales.{to}" if output == "iceberg" else None
        into = {"output": output, f"{output}_mode": mode, "iceberg_table": table, "other_source": "replace"}
        options = OPTIONS.model_copy(update={**into, "challengers": challengers})
        return batch_inference(model, f"{source}/customers-{night:02d}.parquet", str(tmp_path / to), options)

    def read(to: str) -> pl.DataFrame:
        if output == "delta":
            return pl.read_delta(str(tmp_path / to)).sort("customer")
        return pl.DataFrame(lake.load_table(f"sales.{to}").scan().to_arrow()).sort("customer")

    for night in range(2):
        run("alone", night)
        report = run("both", night, challenger)
    again = run("both", 1, challenger)
    theirs = open_challenger(str(tmp_path / "both"), challenger).collect().sort("customer")
    later = compare_challengers(str(tmp_path / "both")).challengers

    assert read("alone").equals(read("both"))
    assert (2_000 if mode != "replace" else 1_000) == read("both").height
    assert read("both").tail(1_000)["prediction"].equals(theirs["prediction"])
    assert [(1_000, 1_000)] == [(each.rows, each.outputs[0].equal) for each in report.challengers]
    assert ("already complete", report.challengers, report.challengers) == (again.status, again.challengers, later)


@pytest.mark.parametrize(("output", "mode"), [("delta", "replace"), ("delta", "upsert"), ("iceberg", "upsert")])
def test_a_run_that_a_newer_one_has_overtaken_is_refused_before_a_row_is_scored(
    output: str, mode: str, linear: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.batch import batch_inference

    configure(monkeypatch, str(tmp_path))
    open_lake(str(tmp_path))
    table = "lake.sales.scores" if output == "iceberg" else None
    into = {"output": output, f"{output}_mode": mode, "iceberg_table": table, "other_source": "replace"}
    options = OPTIONS.model_copy(update=into)
    older, newer = (
        str(write_customers(tmp_path / name, rows=rows, files=1, rows_per_group=500))
        for name, rows in (("older", 1_000), ("newer", 2_000))
    )
    storage = open_storage(str(tmp_path / "scores"))
    planned = find_run(resolve_request(linear, older, storage.url, options), storage, "another-flow-run").plan
    published = batch_inference(linear, newer, storage.url, options)
    with pytest.raises(PublishRefused, match=rf"must not go back to an older run.*run {planned.run} is number 1"):
        batch_inference(linear, older, storage.url, options)

    assert published.run != planned.run
    assert not (tmp_path / "scores" / f"run={planned.run}").exists()


class ScoredLake:
    """2,000 customers, scored into a folder of Parquet files, a Delta table or an Iceberg table."""

    def __init__(self, folder: Path, model: str, output: str) -> None:
        self._model, self._output, self.lake = model, output, open_lake(str(folder))
        self._source = str(write_customers(folder / "in", rows=2_000, files=1, rows_per_group=500))
        self.scores = folder / "scores"

    def score(self) -> BatchReport:
        from flows.batch import batch_inference

        table = "lake.sales.scores" if self._output == "iceberg" else None
        options = OPTIONS.model_copy(update={"output": self._output, "iceberg_table": table})
        return batch_inference(self._model, self._source, str(self.scores), options)

    def read(self) -> pl.DataFrame:
        if self._output == "iceberg":
            return pl.DataFrame(self.lake.load_table("sales.scores").scan().to_arrow()).sort("customer")
        opened = pl.scan_delta(str(self.scores)) if self._output == "delta" else open_predictions(str(self.scores))
        return opened.collect().sort("customer")


@pytest.fixture
def scored_lake(output: str, linear: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ScoredLake:
    configure(monkeypatch, str(tmp_path))
    return ScoredLake(tmp_path, linear, output)


@pytest.mark.parametrize("output", ["delta", "iceberg"])
def test_a_complete_run_whose_table_is_gone_is_refused_with_what_commits_it_again(
    output: str, scored_lake: ScoredLake
) -> None:
    first = scored_lake.score()
    if output == "iceberg":
        scored_lake.lake.drop_table("sales.scores")
    else:
        shutil.rmtree(scored_lake.scores / "_delta_log")
    (listed,) = list_runs(open_storage(str(scored_lake.scores)))
    with pytest.raises(DestinationUnusable, match=rf"must hold run {first.run}, but there is no table") as refused:
        scored_lake.score()
    manifest = str(refused.value).partition("Delete ")[2].partition(" below the destination")[0]
    (scored_lake.scores / manifest).unlink()
    again = scored_lake.score()

    assert ("damaged", 0) == (listed.state, listed.rows_done)
    assert listed.note.startswith("Its table is gone.")
    assert (2_000, first.run, 0) == (scored_lake.read().height, again.run, again.rows_scored)
    assert "already complete" == scored_lake.score().status


@pytest.mark.parametrize("output", ["parquet", "delta", "iceberg"])
def test_what_verify_says_of_a_damaged_run_repairs_it(scored_lake: ScoredLake) -> None:
    scores = scored_lake.scores
    scored_lake.score()
    before, parts = scored_lake.read(), digests(scores)
    changed, gone, *_ = sorted(scores.glob("run=*/*.parquet"))
    changed.write_bytes(changed.read_bytes()[:60] + b"x" * 20 + changed.read_bytes()[80:])
    gone.unlink()
    told = CliRunner().invoke(app, ["verify", str(scores)])
    (advice,) = (line for line in told.stdout.splitlines() if "Delete the damaged files:" in line)
    subprocess.run(shlex.split(advice.partition(":")[2]), check=True)

    assert ("scored", "already complete") == (scored_lake.score().status, scored_lake.score().status)
    assert parts == digests(scores)
    assert before.equals(scored_lake.read())
    assert 0 == CliRunner().invoke(app, ["verify", str(scores)]).exit_code
