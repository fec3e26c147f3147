"""The gateway in front of the real Triton: tritonclient, scale to zero, and a server that is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from infra.local.gateway import GatewayServer
from infra.local.triton import TritonServer
from serving.gateway.client import GatewayClient
from serving.gateway.route import Route, ServedVersion, SleepRule
from serving.model.batching import BatchingConfig
from serving.model.registry import resolve_model
from serving.model.release import Release
from serving.targets.triton import TritonHost
from tests.eventually import eventually
from tests.leftovers import keep_running
from tests.servers import triton_or_skip
from tests.serving.gateway.conftest import FIXED_KEY, Put
from tests.serving.gateway.support import EndpointClient, read_metrics

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
    deployed = Deployed(server=server, route=None, scores=X[:, 0])  # type: ignore[arg-type]
    try:
        host = TritonHost(repository=server.repository, url=server.url, grpc=server.grpc)
        address = host.deploy(release, resolved.folder)
        served = ServedVersion.from_address(address, version=release.version, weight=100)
        deployed.route = Route(versions=(served,), contract=release.contract)
        yield deployed
    finally:
        deployed.server.stop()


def infer_scores(endpoint: EndpointClient) -> np.ndarray:
    answer = endpoint.infer(ROWS)
    assert answer.status_code == 200, answer.text
    return np.array(answer.json()["outputs"][0]["data"], np.float32)


def test_tritonclient_gets_the_models_scores(put: Put, deployed: Deployed, gateway: GatewayServer) -> None:
    client = pytest.importorskip("tritonclient.http")
    endpoint = put(deployed.route)
    with client.InferenceServerClient(gateway.url.removeprefix("http://")) as triton:
        assert triton.is_server_live()
        assert triton.is_server_ready()
        assert triton.is_model_ready(endpoint.name)
        assert triton.is_model_ready(endpoint.name, deployed.route.versions[0].version)
        assert not triton.is_model_ready("strange")
        assert "overnight-gateway" == triton.get_server_metadata()["name"]
        metadata = triton.get_model_metadata(endpoint.name)
        assert [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}] == metadata["inputs"]
        for binary_in, binary_out in ((True, True), (False, False), (True, False), (False, True)):
            x = client.InferInput("x", list(X.shape), "FP32")
            x.set_data_from_numpy(X, binary_data=binary_in)
            outputs = [client.InferRequestedOutput("score", binary_data=binary_out)]
            answer = triton.infer(endpoint.name, [x], outputs=outputs, request_id="r-7")

            assert "r-7" == answer.get_response()["id"]
            np.testing.assert_allclose(answer.as_numpy("score").ravel(), deployed.scores.ravel(), atol=1e-6)


def test_tritonclient_understands_the_errors(put: Put, deployed: Deployed, gateway: GatewayServer) -> None:
    client = pytest.importorskip("tritonclient.http")
    from tritonclient.utils import InferenceServerException

    endpoint = put(deployed.route)
    with client.InferenceServerClient(gateway.url.removeprefix("http://")) as triton:
        x = client.InferInput("x", [1, 4], "FP32")
        x.set_data_from_numpy(np.zeros((1, 4), np.float32))
        with pytest.raises(InferenceServerException, match=r"\[400\] .*unexpected shape for input 'x'"):
            triton.infer(endpoint.name, [x])
        with pytest.raises(InferenceServerException, match=r"\[404\] The model must be an endpoint"):
            triton.infer("strange", [x])
        with pytest.raises(InferenceServerException, match=r"\[404\] The version of"):
            triton.get_model_metadata(endpoint.name, "99")


def test_a_missing_number_is_nan_and_null_is_refused(put: Put, deployed: Deployed, gateway: GatewayServer) -> None:
    client = pytest.importorskip("tritonclient.http")
    endpoint = put(deployed.route)
    x = client.InferInput("x", [1, 3], "FP32")
    x.set_data_from_numpy(np.array([[1.0, np.nan, 3.0]], np.float32))
    with client.InferenceServerClient(gateway.url.removeprefix("http://")) as triton:
        assert [1.0] == triton.infer(endpoint.name, [x]).as_numpy("score").ravel().tolist()

    in_json = b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1.0, NaN, 3.0]}]}'
    refused = endpoint.infer(in_json.replace(b"NaN", b"null"))
    assert [1.0] == endpoint.infer(in_json).json()["outputs"][0]["data"]
    assert (500, "Unable to parse 'data'") == (refused.status_code, refused.json()["error"].partition(":")[0])


def infer_by_grpc(gateway: GatewayServer, endpoint: str, model: str, rows: np.ndarray, **options: Any) -> Any:
    client = pytest.importorskip("tritonclient.grpc")
    address = gateway.url.removeprefix("http://")
    headers = {"overnight-endpoint": endpoint, **options.pop("headers", {})}
    with client.InferenceServerClient(address) as triton:
        x = client.InferInput("x", list(rows.shape), "FP32")
        x.set_data_from_numpy(rows)
        return triton.infer(model, [x], headers=headers, **options)


def test_a_grpc_caller_names_the_endpoint_by_metadata(put: Put, deployed: Deployed, gateway: GatewayServer) -> None:
    client = pytest.importorskip("tritonclient.grpc")
    endpoint = put(deployed.route)
    answer = infer_by_grpc(gateway, endpoint.name, endpoint.name, X, request_id="r-7")

    assert "r-7" == answer.get_response().id
    np.testing.assert_allclose(answer.as_numpy("score").ravel(), deployed.scores.ravel(), atol=1e-6)
    headers = {"overnight-endpoint": endpoint.name}
    with client.InferenceServerClient(gateway.url.removeprefix("http://")) as triton:
        assert triton.is_server_ready(headers=headers)
        assert triton.is_model_ready(endpoint.name, headers=headers)
        assert "x" == triton.get_model_metadata(endpoint.name, headers=headers).inputs[0].name


def test_grpc_requests_are_metered_with_their_rows(
    put: Put, deployed: Deployed, gateway: GatewayServer, admin: GatewayClient
) -> None:
    endpoint = put(deployed.route)
    infer_by_grpc(gateway, endpoint.name, "any name", X)
    series = f'overnight_rows_total{{endpoint="{endpoint.name}",version="{deployed.route.versions[0].version}"}} 5.0'

    eventually(lambda: series in read_metrics(gateway))


def test_a_grpc_caller_reaches_only_the_endpoint_that_its_key_is_for(
    put: Put, deployed: Deployed, gateway: GatewayServer
) -> None:
    from tritonclient.utils import InferenceServerException

    closed = put(deployed.route.model_copy(update={"keys": ("fixed",)}))
    bearer = {"authorization": f"Bearer {FIXED_KEY}"}

    with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
        infer_by_grpc(gateway, closed.name, closed.name, X)
    assert 5 == len(infer_by_grpc(gateway, closed.name, closed.name, X, headers=bearer).as_numpy("score"))


def test_grpc_calls_that_the_gateway_does_not_have_are_refused(
    put: Put, deployed: Deployed, gateway: GatewayServer
) -> None:
    client = pytest.importorskip("tritonclient.grpc")
    from tritonclient.utils import InferenceServerException

    endpoint = put(deployed.route)
    with client.InferenceServerClient(gateway.url.removeprefix("http://")) as triton:
        with pytest.raises(InferenceServerException, match="must name an endpoint of this gateway"):
            triton.is_model_ready(endpoint.name)
        with pytest.raises(InferenceServerException, match="UNIMPLEMENTED"):
            triton.unload_model("churn", headers={"overnight-endpoint": endpoint.name})
    with pytest.raises(InferenceServerException, match="named by the metadata overnight-version"):
        infer_by_grpc(gateway, endpoint.name, endpoint.name, X, model_version="99")


def is_ready(deployed: Deployed) -> bool:
    return httpx.get(f"{deployed.server.url}/v2/models/churn/ready").status_code == 200


def test_triton_unloads_an_idle_model_and_a_request_loads_it(
    put: Put, deployed: Deployed, admin: GatewayClient
) -> None:
    endpoint = put(
        deployed.route.model_copy(
            update={"sleep": SleepRule(keep_warm_s=0.3, hold_s_max=120, grpc=deployed.server.grpc)}
        )
    )
    np.testing.assert_allclose(infer_scores(endpoint), deployed.scores.ravel(), atol=1e-6)
    admin.wait_until(endpoint.name, lambda state: state.models == "asleep", timeout_s=60)

    # Triton answers an unload before it has ended.
    eventually(lambda: not is_ready(deployed))
    np.testing.assert_allclose(infer_scores(endpoint), deployed.scores.ravel(), atol=1e-6)
    admin.put(endpoint.name, deployed.route)


def read_states(deployed: Deployed) -> set[str]:
    return {each.get("state", "") for each in httpx.post(f"{deployed.server.url}/v2/repository/index").json()}


def test_a_request_in_the_middle_of_an_unload_waits_for_the_next_load(
    put: Put, deployed: Deployed, admin: GatewayClient
) -> None:
    endpoint = put(
        deployed.route.model_copy(
            update={"sleep": SleepRule(keep_warm_s=0.3, hold_s_max=120, grpc=deployed.server.grpc)}
        )
    )
    np.testing.assert_allclose(infer_scores(endpoint), deployed.scores.ravel(), atol=1e-6)
    eventually(lambda: "READY" not in read_states(deployed))

    np.testing.assert_allclose(infer_scores(endpoint), deployed.scores.ravel(), atol=1e-6)
    admin.put(endpoint.name, deployed.route)


def test_the_gateway_loads_its_model_into_a_restarted_triton(put: Put, deployed: Deployed) -> None:
    endpoint = put(deployed.route.model_copy(update={"sleep": SleepRule(keep_warm_s=600, hold_s_max=120)}))
    np.testing.assert_allclose(infer_scores(endpoint), deployed.scores.ravel(), atol=1e-6)
    os.kill(deployed.server.process.pid, signal.SIGKILL)
    refused = endpoint.infer(ROWS)

    assert 503 == refused.status_code
    assert "The model server of the endpoint" in refused.json()["error"]
    # The fixture of the module ends it.
    with keep_running():
        deployed.server = deployed.server.restart()
    assert not is_ready(deployed)
    np.testing.assert_allclose(infer_scores(endpoint), deployed.scores.ravel(), atol=1e-6)
