"""Whole runs of a model whose outputs may be null: nulls are published, and rows without predictions are rejects."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serving.errors import ModelFailed
from serving.model.batching import BatchingConfig
from serving.model.release import MODEL_FOLDER, RELEASE_FILE, open_release
from tasks.batch.gate_rules import Gate
from tasks.batch.manifest import open_predictions, open_rejects
from tasks.batch.options import BatchOptions
from tasks.batch.verify import verify_run
from tasks.endpoint.deploy import make_release
from tasks.endpoint.resolve import load_endpoint_model
from tasks.endpoint.spec import EndpointSpec
from tasks.storage import open_storage
from tests.support import register_nullable
from tests.tasks.batch.iceberg_tables import configure, open_lake
from tests.tasks.batch.small import forget_digests

pytestmark = pytest.mark.usefixtures("serverless")

ROWS, NO_INPUT = 60, 11
OUTPUTS = ("count", "flag", "score", "word", "sure")
REJECTS = {7: ("score", "prediction is not finite"), 9: ("sure", "prediction is null"), NO_INPUT: ("a", "null")}


@pytest.fixture(scope="module")
def nullable(registry: Path) -> str:
    return register_nullable("nullable")


def expect_row(row: int) -> dict[str, Any]:
    if row in REJECTS:
        return dict.fromkeys(OUTPUTS) | dict(zip(("reject_column", "reject_reason"), REJECTS[row], strict=True))
    values = (2**63 - 1 - row, row % 2 == 0, row / 2, f"n{row}", row)
    given = {name: value for at, (name, value) in enumerate(zip(OUTPUTS, values, strict=True), 1) if row % 5 != at}
    return dict.fromkeys((*OUTPUTS, "reject_column", "reject_reason")) | given


@pytest.mark.parametrize("output", ["parquet", "delta", "iceberg"])
def test_nulls_are_published_and_only_rows_that_fail_are_rejects(
    output: str, nullable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.batch import batch_inference

    configure(monkeypatch, str(tmp_path))
    lake = open_lake(str(tmp_path))
    (tmp_path / "in").mkdir()
    inputs = [None if row == NO_INPUT else float(row) for row in range(ROWS)]
    table = pa.table({"id": range(ROWS), "a": pa.array(inputs, pa.float32())})
    pq.write_table(table, tmp_path / "in" / "rows.parquet", row_group_size=20)
    into = {"output": output, "iceberg_table": "lake.sales.nulls" if output == "iceberg" else None}
    into |= {"delta_mode": "upsert"} if output == "delta" else {}
    options = BatchOptions(key_columns=("id",), batch_size=7, rows_per_chunk=20, experiment=None, gate=Gate(), **into)
    report = batch_inference(nullable, str(tmp_path / "in"), str(tmp_path / "scores"), options)
    expected = [{"id": row, **expect_row(row)} for row in range(ROWS)]
    files = sorted((tmp_path / "scores").glob("run=*/*.parquet"))
    readers = {
        "parquet": lambda: open_predictions(str(tmp_path / "scores")).collect(),
        "delta": lambda: pl.read_delta(str(tmp_path / "scores")),
        "iceberg": lambda: pl.DataFrame(lake.load_table("sales.nulls").scan().to_arrow()),
    }

    assert (ROWS, len(REJECTS)) == (report.rows, report.rows_rejected)
    assert expected == readers[output]().sort("id").to_dicts()
    assert output != "parquet" or expected == pa.concat_tables(map(pq.read_table, files)).sort_by("id").to_pylist()
    assert sorted(REJECTS) == open_rejects(str(tmp_path / "scores")).collect()["id"].sort().to_list()
    if output == "parquet":
        # So that its rows are read, too.
        forget_digests(tmp_path / "scores")
    assert () == verify_run(open_storage(str(tmp_path / "scores")), report.run).damages


def test_an_endpoint_refuses_the_request_that_its_protocol_has_no_answer_for(nullable: str, tmp_path: Path) -> None:
    spec = EndpointSpec(name="nullable", model=nullable)
    subject = load_endpoint_model(spec)
    shutil.copytree(subject.resolved.folder, tmp_path / MODEL_FOLDER)
    release = make_release(spec, subject, BatchingConfig(batch_size_max=16))
    (tmp_path / RELEASE_FILE).write_text(release.model_dump_json())
    with open_release(tmp_path) as runtime:
        answers = runtime.predict_requests([{"a": np.array([row], np.float32)} for row in (0, 1, 3, 5)])

    told = [str(answer) if isinstance(answer, ModelFailed) else answer["count"].tolist() for answer in answers]
    assert "required" not in release.contract.model_dump_json(include={"outputs"})
    assert [[2**63 - 1], [2**63 - 6]] == told[::3]
    assert "got none for row 0 (count): prediction is null." in told[1]
    assert "got none for row 0 (score): prediction is not finite." in told[2]
