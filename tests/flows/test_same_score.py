"""One row has one score: in a batch run, of the model itself, and on a model server that its release is put on.

Answers of the other servers are held against the model itself by the tests that have these servers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from infra.local.prefect_server import PrefectServer
from serving.model.batching import BatchingConfig
from tasks.batch.manifest import open_predictions
from tasks.batch.options import BatchOptions
from tasks.endpoint.client import InferClient
from tasks.endpoint.deploy import make_host, make_release
from tasks.endpoint.resolve import load_endpoint_model
from tasks.endpoint.spec import EndpointSpec
from tasks.endpoint.targets import Triton
from tests.servers import triton_or_skip
from tests.support import write_customers

# Sums of the same float32 products in another order, as batches of other sizes make them; scores here are below 1.
TOLERANCE = 1e-6
ROWS = 300


def test_a_row_scores_the_same_in_a_batch_run_in_the_model_itself_and_on_triton(
    prefect: PrefectServer, linear: str, tmp_path: Path
) -> None:
    from flows.batch import batch_inference

    customers = write_customers(tmp_path / "customers", rows=ROWS, files=1, rows_per_group=ROWS)
    options = BatchOptions(key_columns=("customer",), experiment=None)
    batch_inference(linear, str(customers), str(tmp_path / "scores"), options)
    scores = open_predictions(str(tmp_path / "scores")).collect()
    scored = pl.read_parquet(customers / "*.parquet").join(scores, on="customer")
    x_NF, expected_N = scored.select("a", "b", "c").to_numpy().astype(np.float32), scored["score"].to_numpy()
    with triton_or_skip(tmp_path) as server:
        target = Triton(repository=str(server.repository), url=server.url, grpc=server.grpc)
        spec = EndpointSpec(name="same-score", model=linear, target=target)
        subject = load_endpoint_model(spec)
        release = make_release(spec, subject, BatchingConfig(batch_size_max=16, wait_ms_max=1))
        address = make_host(target).deploy(release, subject.resolved.folder)
        with InferClient(address, subject.contract) as ask:
            together = ask({"x": x_NF})["score"]
            alone = np.concatenate([ask({"x": x_NF[at : at + 1]})["score"] for at in range(10)])
        make_host(target).remove(release)
    with subject.model.slot():
        itself = subject.model.predict({"x": x_NF})["score"]

    np.testing.assert_allclose(itself.reshape(-1), expected_N, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(together.reshape(-1), expected_N, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(alone.reshape(-1), expected_N[:10], rtol=0, atol=TOLERANCE)
