"""One row has one score: in a batch run, and on every model server that its release is put on."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from infra.local.controller import local_controller
from infra.local.prefect_server import PrefectServer
from serving.model.batching import BatchingConfig
from tasks.batch.manifest import open_predictions
from tasks.batch.options import BatchOptions
from tasks.endpoint.client import InferClient
from tasks.endpoint.deploy import make_host, make_release
from tasks.endpoint.resolve import load_endpoint_model
from tasks.endpoint.spec import AnyTarget, BentoML, EndpointSpec, KServe, RayServe, Seldon, Triton
from tests.ray_cluster import ray_cluster
from tests.servers import python_or_skip, triton_or_skip
from tests.support import write_customers

# Sums of the same float32 products in another order, as batches of other sizes make them; scores here are below 1.
TOLERANCE = 1e-6
ROWS = 300
OTHERS = ("ray-serve", "bentoml", "kserve", "seldon")
TARGETS = ("triton", *(pytest.param(kind, marks=pytest.mark.machines) for kind in OTHERS))


@pytest.fixture(scope="module")
def scored(prefect: PrefectServer, linear: str, tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    """Customers with their score out of a batch run."""
    from flows.batch import batch_inference

    folder = tmp_path_factory.mktemp("scored")
    customers = write_customers(folder / "customers", rows=ROWS, files=1, rows_per_group=ROWS)
    options = BatchOptions(key_columns=("customer",), experiment=None)
    batch_inference(linear, str(customers), str(folder / "scores"), options)
    scores = open_predictions(str(folder / "scores")).collect()
    return pl.read_parquet(customers / "*.parquet").join(scores, on="customer")


@contextmanager
def running(kind: str, folder: Path) -> Generator[AnyTarget]:
    """A real server of a kind, as a target; skips where it is missing here."""
    if kind == "triton":
        with triton_or_skip(folder) as server:
            yield Triton(repository=str(server.repository), url=server.url, grpc=server.grpc)
    elif kind == "ray-serve":
        pytest.importorskip("ray.serve", reason="pip install 'overnight[ray]' brings it")
        with ray_cluster(folder / "ray") as cluster, pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_AUTH_TOKEN", cluster.token)
            url, releases = cluster.serve_url, str(folder / "releases")
            yield RayServe(dashboard=cluster.dashboard_url, url=url, folder=releases)
    else:
        target = _by_folder(kind, str(folder / "releases"))
        with local_controller(folder / "releases"):
            yield target


def _by_folder(kind: str, folder: str) -> AnyTarget:
    name, make = {"bentoml": ("bentoml", BentoML), "kserve": ("kserve", KServe), "seldon": ("mlserver", Seldon)}[kind]
    return make(folder=folder, python=str(python_or_skip(name)))


@pytest.mark.parametrize("kind", TARGETS)
def test_a_row_scores_the_same_in_a_batch_run_and_on_every_target(
    kind: str, scored: pl.DataFrame, linear: str, tmp_path: Path
) -> None:
    x_NF, expected_N = scored.select("a", "b", "c").to_numpy().astype(np.float32), scored["score"].to_numpy()
    with running(kind, tmp_path) as target:
        spec = EndpointSpec(name="same-score", model=linear, target=target)
        subject = load_endpoint_model(spec)
        release = make_release(spec, subject, BatchingConfig(batch_size_max=16, wait_ms_max=1))
        address = make_host(target).deploy(release, subject.resolved.folder)
        with InferClient(address, subject.contract) as ask:
            together = ask({"x": x_NF})["score"]
            alone = np.concatenate([ask({"x": x_NF[at : at + 1]})["score"] for at in range(10)])
        make_host(target).remove(release)

    np.testing.assert_allclose(together, expected_N, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(alone, expected_N[:10], rtol=0, atol=TOLERANCE)
