"""Params of a model's signature give one row one score: in a batch run, in a release, and by MLflow itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlflow
import numpy as np
import orjson
import pandas as pd
import polars as pl
import pytest

from infra.local.nats import NatsClient, NatsServer
from serving.errors import BadInput
from serving.model.batching import BatchingConfig
from serving.model.release import MODEL_FOLDER, RELEASE_FILE, open_release
from tasks.batch.manifest import open_predictions
from tasks.batch.options import BatchOptions
from tasks.batch.report import BatchReport
from tasks.endpoint.deploy import make_release
from tasks.endpoint.resolve import load_endpoint_model
from tasks.endpoint.spec import EndpointSpec
from tests.flows.streams import OPTIONS, as_json, fill_stream, source_and_sink
from tests.flows.streams import customers as make_customers
from tests.support import register_with_params

pytestmark = pytest.mark.usefixtures("serverless")

PARAMS = {"weight": 3, "offsets": [0.5, 0.25]}


@pytest.fixture(scope="module")
def weighted(registry: Path) -> str:
    return register_with_params("weighted-flow")


def infer(model: str, source: Path, destination: Path, **options: object) -> BatchReport:
    from flows.batch import batch_inference

    given = {"key_columns": ("customer",), "experiment": None, **options}
    return batch_inference(model, str(source), str(destination), BatchOptions.model_validate(given))


def test_a_batch_run_a_release_and_mlflow_agree(weighted: str, customers: Path, tmp_path: Path) -> None:
    infer(weighted, customers, tmp_path / "scores", params=PARAMS)
    scores = open_predictions(str(tmp_path / "scores")).collect()
    both = pl.read_parquet(customers / "*.parquet").join(scores, on="customer").sort("customer").head(100)
    a_N = both["a"].to_numpy()
    direct = mlflow.pyfunc.load_model(weighted).predict(pd.DataFrame({"a": a_N}), params=PARAMS)

    spec = EndpointSpec(name="weighted", model=weighted, params=PARAMS)
    subject = load_endpoint_model(spec)
    folder = tmp_path / "release"
    shutil.copytree(subject.resolved.folder, folder / MODEL_FOLDER)
    release = make_release(spec, subject, BatchingConfig(batch_size_max=16))
    (folder / RELEASE_FILE).write_text(release.model_dump_json())
    with open_release(folder) as runtime:
        served = runtime.predict({"a": a_N})["prediction"]

    np.testing.assert_allclose(a_N * 3 + 0.75, direct, rtol=1e-6)
    np.testing.assert_array_equal(direct.astype(np.float32), both["prediction"].to_numpy())
    np.testing.assert_array_equal(both["prediction"].to_numpy(), served)


def test_other_params_are_another_run_and_the_same_ones_the_same(
    weighted: str, customers: Path, tmp_path: Path
) -> None:
    without = infer(weighted, customers, tmp_path / "scores")
    one = infer(weighted, customers, tmp_path / "scores", params=PARAMS)
    again = infer(weighted, customers, tmp_path / "scores", params=PARAMS)
    other = infer(weighted, customers, tmp_path / "scores", params={"weight": 4})

    assert 3 == len({without.run, one.run, other.run})
    assert (one.run, "already complete") == (again.run, again.status)


def test_wrong_params_are_refused_before_anything_is_written(weighted: str, customers: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"which has weight \(double, by default 2.0\).*; got 'wait'"):
        infer(weighted, customers, tmp_path / "scores", params={"wait": 3})

    assert not (tmp_path / "scores").exists()


def test_a_stream_gives_the_same_scores(
    weighted: str, nats: NatsServer, nats_client: NatsClient, fresh: str, tmp_path: Path
) -> None:
    from flows.stream import stream_inference

    rows = make_customers(200)
    rows.write_parquet(tmp_path / "customers.parquet")
    infer(weighted, tmp_path / "customers.parquet", tmp_path / "scores", params=PARAMS)
    fill_stream(nats_client, fresh, as_json(rows))
    stream_inference(weighted, *source_and_sink(nats, fresh), OPTIONS.model_copy(update={"params": PARAMS}))
    streamed = [orjson.loads(each.payload) for each in nats_client.read(f"{fresh}-scores")]
    batch = open_predictions(str(tmp_path / "scores")).collect()

    assert dict(zip(batch["customer"], batch["prediction"], strict=True)) == {
        each["customer"]: pytest.approx(each["prediction"], rel=1e-6) for each in streamed
    }
