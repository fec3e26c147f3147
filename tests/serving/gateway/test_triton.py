"""The gateway in front of the real Triton: the common client, sleep and waking, and a server that is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest

from infra.local.gateway import GatewayServer
from infra.local.triton import TritonServer
from serving.gateway.client import GatewayClient
from serving.gateway.route import Route, Served, Sleep
from serving.model.batching import BatchingConfig
from serving.model.registry import resolve_model
from serving.model.release import Release
from serving.targets.triton import TritonHost
from tests.servers import triton_or_skip
from tests.serving.gateway.conftest import Put
from tests.serving.gateway.support import Door

X = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
ROWS = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [5, 3], "data": X.ravel().tolist()}]}


@dataclass(slots=True, kw_only=True)
class Deployed:
    server: TritonServer
    route: Route
    scores: np.ndarray


@pytest.fixture(scope="module")
def deployed(registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Deployed]:
    """A model of code that predicts the first feature, and loads faster than a network, on a Triton."""
    from deployments.demo.endpoint_versions import register_faulty

    server = triton_or_skip(tmp_path_factory.mktemp("triton"))
    number = register_faulty("", "gateway-triton", "x", ("a", "b", "c"), "score")
    resolved = resolve_model(f"models:/gateway-triton/{number}")
    release = Release(
        endpoint="churn",
        pin=resolved.pin,
        contract=resolved.contract({}, {}),
        batching=BatchingConfig(batch_size_max=8),
    )
    held = Deployed(server=server, route=None, scores=X[:, 0])  # type: ignore[arg-type]
    try:
        host = TritonHost(repository=server.repository, url=server.url, grpc=server.grpc)
        address = host.deploy(release, resolved.folder)
        served = Served.at(address, version=release.version, weight=100)
        held.route = Route(versions=(served,), contract=release.contract)
        yield held
    finally:
        held.server.stop()


def scores(door: Door) -> np.ndarray:
    answer = door.infer(ROWS)
    assert answer.status_code == 200, answer.text
    return np.array(answer.json()["outputs"][0]["data"], np.float32)


def test_the_common_client_gets_the_models_scores(put: Put, deployed: Deployed, gateway: GatewayServer) -> None:
    client = pytest.importorskip("tritonclient.http")
    door = put(deployed.route)
    with client.InferenceServerClient(gateway.url.removeprefix("http://")) as asked:
        assert asked.is_server_live()
        assert asked.is_server_ready()
        assert asked.is_model_ready(door.name)
        assert asked.is_model_ready(door.name, deployed.route.versions[0].version)
        assert not asked.is_model_ready("strange")
        assert "overnight-gateway" == asked.get_server_metadata()["name"]
        metadata = asked.get_model_metadata(door.name)
        assert [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}] == metadata["inputs"]
        for binary_in, binary_out in ((True, True), (False, False), (True, False), (False, True)):
            given = client.InferInput("x", list(X.shape), "FP32")
            given.set_data_from_numpy(X, binary_data=binary_in)
            wanted = [client.InferRequestedOutput("score", binary_data=binary_out)]
            got = asked.infer(door.name, [given], outputs=wanted, request_id="r-7")

            assert "r-7" == got.get_response()["id"]
            np.testing.assert_allclose(got.as_numpy("score").ravel(), deployed.scores.ravel(), atol=1e-6)


def test_the_common_client_can_read_the_errors(put: Put, deployed: Deployed, gateway: GatewayServer) -> None:
    client = pytest.importorskip("tritonclient.http")
    from tritonclient.utils import InferenceServerException

    door = put(deployed.route)
    with client.InferenceServerClient(gateway.url.removeprefix("http://")) as asked:
        given = client.InferInput("x", [1, 4], "FP32")
        given.set_data_from_numpy(np.zeros((1, 4), np.float32))
        with pytest.raises(InferenceServerException, match=r"\[400\] The shape of 'x' must be \[N, 3\]"):
            asked.infer(door.name, [given])
        with pytest.raises(InferenceServerException, match=r"\[404\] The model must be an endpoint"):
            asked.infer("strange", [given])
        with pytest.raises(InferenceServerException, match=r"\[404\] The version of"):
            asked.get_model_metadata(door.name, "99")


def ready(deployed: Deployed) -> bool:
    return httpx.get(f"{deployed.server.url}/v2/models/churn/ready").status_code == 200


def test_triton_unloads_the_model_when_idle_and_a_request_wakes_it(
    put: Put, deployed: Deployed, admin: GatewayClient
) -> None:
    door = put(
        deployed.route.model_copy(update={"sleep": Sleep(keep_warm_s=0.3, hold_s_max=120, grpc=deployed.server.grpc)})
    )
    np.testing.assert_allclose(scores(door), deployed.scores.ravel(), atol=1e-6)
    admin.wait(door.name, lambda state: state.models == "asleep", timeout_s=60)

    assert not ready(deployed)
    np.testing.assert_allclose(scores(door), deployed.scores.ravel(), atol=1e-6)
    assert ready(deployed)
    admin.put(door.name, deployed.route)


def test_a_triton_that_is_killed_and_started_anew_gets_its_model_back_from_the_gateway(
    put: Put, deployed: Deployed
) -> None:
    door = put(deployed.route.model_copy(update={"sleep": Sleep(keep_warm_s=600, hold_s_max=120)}))
    np.testing.assert_allclose(scores(door), deployed.scores.ravel(), atol=1e-6)
    os.kill(deployed.server.process.pid, signal.SIGKILL)
    refused = door.infer(ROWS)

    assert 503 == refused.status_code
    assert "The model server of the endpoint" in refused.json()["error"]
    deployed.server = deployed.server.started_again()
    assert not ready(deployed)
    np.testing.assert_allclose(scores(door), deployed.scores.ravel(), atol=1e-6)
