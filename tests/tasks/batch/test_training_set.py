"""The training set of a model, found in a real MLflow registry, is the baseline of a gate."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serving.errors import BadInput
from serving.model.contract import Output
from serving.model.pin import ModelPin
from tasks.batch.chunk_statistics import describe_table
from tasks.batch.gate import list_refusing
from tasks.batch.gate_records import FoundBaseline, judge_run, open_baseline
from tasks.batch.gate_rules import RowCountRule, TrainingSet
from tasks.batch.plan import Plan
from tasks.batch.training_set import find_training_statistics, log_training_statistics
from tasks.storage import Storage, open_storage
from tests.support import log_training_dataset
from tests.tasks.batch.small import PIN, a_contract, a_plan, numbers, put

pytestmark = pytest.mark.usefixtures("registry")

FRAME = pd.DataFrame({"id": range(10), "a": np.arange(10.0), "b": [None, *range(9)], "score": np.ones(10)})

Log = Callable[[], None]


def write(path: Path, frame: pd.DataFrame = FRAME) -> str:
    """Write a training set as one Parquet file, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), path)
    return str(path)


def log_dataset(source: str | None, name: str | None = None, context: str = "training") -> None:
    """Log a dataset with the active run, under a name of its own."""
    log_training_dataset(FRAME, source, name or f"t{uuid.uuid4().hex[:8]}", context)


def register(*logged: Log) -> ModelPin:
    """Register a model version whose run has logged these; return its pin."""
    name, client = f"m{uuid.uuid4().hex[:8]}", mlflow.MlflowClient()
    client.create_registered_model(name)
    with mlflow.start_run() as run:
        for log in logged:
            log()
    version = client.create_model_version(name, "file:///nowhere", run_id=run.info.run_id)
    return PIN.model_copy(update={"name": name, "version": str(version.version)})


def plan_of(pin: ModelPin, folder: Path, **changes: Any) -> tuple[Plan, Storage]:
    """Return the plan of a run of a model over a and b, and its destination."""
    source = folder / "in"
    if not source.exists():
        put(str(source), {"a.parquet": numbers(0, 25)})
    plan = a_plan(str(source), f"{folder}/out", contract=a_contract("a", "b", **changes), pin=pin)
    return plan, open_storage(f"{folder}/out")


def read_kept(folder: Path) -> list[Path]:
    return list((folder / "out" / "_overnight").glob("training-*.json"))


class TestADataset:
    @pytest.mark.parametrize("source", ["{folder}/t/a.parquet", "file://{folder}/t/a.parquet", "{folder}/t"])
    def test_of_parquet_is_described_as_its_table_is_columns_by_their_names(self, source: str, tmp_path: Path) -> None:
        write(tmp_path / "t" / "a.parquet")
        pin = register(lambda: log_dataset(source.format(folder=tmp_path)))
        plan, storage = plan_of(pin, tmp_path)
        found = find_training_statistics(storage, plan)
        expected = describe_table(pa.Table.from_pandas(FRAME[["a", "b", "score"]], preserve_index=False), "score")

        assert expected == found.statistics
        assert f"the training set of {pin.uri} ({source.format(folder=tmp_path)})" == found.title
        assert 1 == found.statistics.inputs["b"].nulls

    def test_in_s3_is_described_as_well(self, s3: object, tmp_path: Path) -> None:
        address = put(f"s3://lake/{uuid.uuid4().hex}", {"a.parquet": numbers(0, 10), "b.parquet": numbers(10, 30)})
        plan, storage = plan_of(register(lambda: log_dataset(address)), tmp_path)
        statistics = find_training_statistics(storage, plan).statistics

        assert (30, {"a", "b"}, {}) == (statistics.rows, set(statistics.inputs), statistics.outputs)
        assert (0, 29) == (statistics.inputs["a"].minimum, statistics.inputs["a"].maximum)

    def test_of_many_chunks_and_partitions_is_described_block_by_block(self, tmp_path: Path) -> None:
        tables = {f"b={at}/a.parquet": pa.table({"a": np.arange(at, 300_000.0)}) for at in range(2)}
        plan, storage = plan_of(register(lambda: log_dataset(put(f"{tmp_path}/t", tables))), tmp_path)
        statistics = find_training_statistics(storage, plan).statistics

        assert (599_999, "number", "text") == (
            statistics.rows,
            statistics.inputs["a"].kind,
            statistics.inputs["b"].kind,
        )
        assert 299_999 * 300_000 / 599_999 == pytest.approx(statistics.inputs["a"].mean)

    def test_is_read_once_for_each_model(self, tmp_path: Path) -> None:
        path = write(tmp_path / "t.parquet")
        pin = register(lambda: log_dataset(path))
        plan, storage = plan_of(pin, tmp_path)
        first = find_training_statistics(storage, plan)
        Path(path).unlink()

        assert first == find_training_statistics(storage, plan)
        assert 1 == len(read_kept(tmp_path))
        other, _ = plan_of(pin.model_copy(update={"digest": "e" * 64}), tmp_path)
        with pytest.raises(BadInput, match="must be Parquet that can be read"):
            find_training_statistics(storage, other)

    def test_is_named_where_there_are_several(self, tmp_path: Path) -> None:
        old, new = (write(tmp_path / f"{name}.parquet", FRAME[:rows]) for name, rows in (("old", 4), ("new", 8)))
        pin = register(
            lambda: log_dataset(old, "old"),
            lambda: log_dataset(new, "new", context="train"),
            lambda: log_dataset(new, "check", context="validation"),
        )
        plan, storage = plan_of(pin, tmp_path)

        assert [4, 8] == [find_training_statistics(storage, plan, name).statistics.rows for name in ("old", "new")]
        with pytest.raises(BadInput, match=r"must have one dataset for training for the gate, got 2: 'old', 'new'\."):
            find_training_statistics(storage, plan)
        with pytest.raises(BadInput, match=r"the dataset 'nwe' for training for the gate, got .*did you mean 'new'\?"):
            find_training_statistics(storage, plan, "nwe")

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            (None, "must have a path or an address of Parquet files as its source, got a source of the kind 'code'"),
            ("https://example.org/t.parquet", "got a source of the kind 'http'"),
            ("{folder}/none.parquet", "must be Parquet that can be read at .*none.parquet, got: The source must name"),
            ("{folder}/t.csv", "must be Parquet that can be read at .*t.csv, got: files of the format csv"),
            ("{folder}/broken.parquet", "must be Parquet that can be read at .*broken.parquet, got: .*broken.parquet"),
            ("{folder}/others.parquet", r"must have a column that the model reads \(a, b\), but the training set of "),
        ],
    )
    def test_that_is_no_baseline_is_named_and_nothing_is_kept(
        self, source: str | None, message: str, tmp_path: Path
    ) -> None:
        (tmp_path / "t.csv").write_text("a,b\n1,2\n")
        (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing more PAR1")
        write(tmp_path / "others.parquet", FRAME[["id", "score"]])
        pin = register(lambda: log_dataset(source and source.format(folder=tmp_path)))
        plan, storage = plan_of(pin, tmp_path)

        with pytest.raises(BadInput, match=message) as refused:
            find_training_statistics(storage, plan)
        assert pin.uri in str(refused.value)
        assert [] == read_kept(tmp_path)


def test_a_version_without_a_run_and_a_run_without_a_dataset_are_named(tmp_path: Path) -> None:
    client = mlflow.MlflowClient()
    pin = register()
    client.create_model_version(pin.name, "file:///nowhere")
    client.create_model_version(pin.name, "file:///nowhere", run_id="0" * 32)
    for version, message in (
        ("1", "must have one dataset for training for the gate, got none. Log one with the model"),
        ("2", "must say what the model was trained on, got: a version without a run. Log"),
        ("3", "must say what the model was trained on, got: Run with id=0+ not found"),
    ):
        plan, storage = plan_of(pin.model_copy(update={"version": version, "model_id": None}), tmp_path)
        with pytest.raises(BadInput, match=message):
            find_training_statistics(storage, plan)


def test_statistics_that_the_run_has_logged_come_first(tmp_path: Path) -> None:
    pin = register(lambda: log_dataset(f"{tmp_path}/gone.parquet"), lambda: log_training_statistics(FRAME) and None)
    plan, storage = plan_of(pin, tmp_path)
    found = find_training_statistics(storage, plan)

    assert f"the training set of {pin.uri} (logged with its MLflow run)" == found.title
    assert (10, {"a", "b"}, {"score"}) == (
        *(found.statistics.rows, set(found.statistics.inputs)),
        set(found.statistics.outputs),
    )
    assert [] == read_kept(tmp_path)


def test_statistics_that_are_none_are_named(tmp_path: Path) -> None:
    pin = register(lambda: mlflow.log_text("{}", "overnight/statistics.json"))
    plan, storage = plan_of(pin, tmp_path)
    with pytest.raises(BadInput, match=r"runs:/\w+/overnight/statistics.json must hold statistics that Overnight"):
        find_training_statistics(storage, plan)


def test_statistics_are_logged_with_a_run() -> None:
    with pytest.raises(BadInput, match="must go with an MLflow run, got no active one"):
        log_training_statistics(FRAME)


def test_an_input_of_the_name_of_a_prediction_is_an_input(tmp_path: Path) -> None:
    pin = register(lambda: log_training_statistics(pa.table({"a": [1.0], "b": [2.0]})) and None)
    outputs = (Output(name="a", dtype="float32"), Output(name="score", dtype="float32"))
    plan, storage = plan_of(pin, tmp_path)
    plan = plan.model_copy(update={"contract": a_contract("a", "b", outputs=outputs)})
    statistics = find_training_statistics(storage, plan).statistics

    assert ({"a", "b"}, {}) == (set(statistics.inputs), statistics.outputs)


def test_the_rows_of_a_training_set_say_nothing_of_those_of_a_run(tmp_path: Path) -> None:
    pin = register(lambda: log_training_statistics(FRAME) and None)
    plan, storage = plan_of(pin, tmp_path)
    baseline = open_baseline(storage, TrainingSet(), plan)()
    run = describe_table(pa.Table.from_pandas(pd.concat([FRAME] * 9)[["a", "b"]], preserve_index=False))
    rules = [RowCountRule(severity="refuse"), RowCountRule(severity="refuse", min_rows=100)]
    judged = judge_run(storage, plan.run, plan.digest, rules, baseline, run)

    assert isinstance(baseline, FoundBaseline)
    assert ["rows: 90 rows, 100 or more allowed"] == [str(finding) for finding in list_refusing(judged.findings)]
