"""The manifests of an endpoint for a cluster, as the flow writes them at each step of a rollout."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml

from deployments.demo.endpoint import Callers
from infra.local.controller import Controller, local_controller
from infra.local.gateway import GatewayServer, gateway_server
from infra.local.prefect_server import PrefectServer
from serving.errors import BadInput, RolledBack
from serving.gateway.client import GatewayClient
from serving.gateway.route import Rollout, Route, ServedVersion
from serving.model.registry import resolve_model
from serving.protocol.oip import encode_request
from tasks.endpoint.spec import EndpointSpec
from tasks.endpoint.targets import KServe
from tests.pages import ROOT, read_blocks
from tests.serving.targets.manifests import check_all
from tests.serving.toys import matrix

if TYPE_CHECKING:
    from tasks.endpoint.report import Endpoint

KEY, VARIABLE = "a-key-of-the-tests-0123456789abcdef", "CHURN_API_KEY"
FEATURES = ("late", "b", "c")
CANARY = {"kind": "canary", "percent": 10, "requests_min": 5, "seconds_max": 60}
Put = Callable[..., "Endpoint"]
# The version of each backend, with its weight.
Split = list[tuple[str, int]]


@pytest.fixture(scope="module")
def versions(registry: Path) -> tuple[str, str]:
    """Two good versions of a model."""
    from deployments.demo.endpoint_versions import register_faulty

    numbers = [register_faulty("", "rollout-churn", "x", FEATURES, "score") for _ in range(2)]
    return f"models:/rollout-churn/{numbers[0]}", f"models:/rollout-churn/{numbers[1]}"


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Generator[Controller]:
    with local_controller(tmp_path_factory.mktemp("releases")) as controller:
        yield controller


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Generator[GatewayServer]:
    with gateway_server(tmp_path_factory.mktemp("gateway")) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OVERNIGHT_ADMIN_KEY", server.admin_key)
        patch.setenv(VARIABLE, KEY)
        yield server


@pytest.fixture(scope="module")
def target(controller: Controller, tmp_path_factory: pytest.TempPathFactory) -> KServe:
    """KServe, with a small server in the place of its own."""
    python = tmp_path_factory.mktemp("python") / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("v2_server_child.py")} "$@"\n')
    python.chmod(0o755)
    cluster = {"gateway": "public", "namespace": "models", "storage_uri": "s3://lake/endpoints/"}
    return KServe.model_validate({"folder": str(controller.folder), "python": str(python), "cluster": cluster})


@pytest.fixture(scope="module")
def put(prefect: PrefectServer, gateway: GatewayServer, target: KServe) -> Put:
    from flows.endpoint import online_endpoint

    def run(model: str, **changes: Any) -> Endpoint:
        given = {
            "name": "churn",
            "model": model,
            "gateway": gateway.url,
            "target": target,
            "access": {"environment": [VARIABLE]},
        }
        return online_endpoint(EndpointSpec.model_validate({**given, **changes}))

    return run


def manifests_of(controller: Controller) -> dict[str, list[dict[str, Any]]]:
    return check_all(yaml.safe_load_all((controller.folder / "churn/kubernetes/rollout.yaml").read_bytes()))


def split_of(controller: Controller) -> Split:
    (route,) = [each for each in manifests_of(controller)["HTTPRoute"] if each["metadata"]["name"] == "churn"]
    infer = route["spec"]["rules"][0]
    return [(each["name"], each["weight"]) for each in infer["backendRefs"]]


class Watcher:
    """Reads the manifests while a flow runs, and keeps every split that it has seen, in order."""

    def __init__(self, controller: Controller) -> None:
        self.splits: list[Split] = []
        self._controller = controller
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> list[Split]:
        self._thread.start()
        return self.splits

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            stopped = self._stop.wait(0.02)
            try:
                split = split_of(self._controller)
            except FileNotFoundError:  # It is replaced as a folder.
                split = self.splits[-1] if self.splits else []
            if self.splits[-1:] != [split]:
                self.splits.append(split)
            if stopped:
                return


def calling(gateway: GatewayServer, model: str) -> Callers:
    contract = resolve_model(model).contract({}, {})
    body = encode_request(contract, {"x": np.zeros((1, 3), np.float32)}).content
    headers = {"Authorization": f"Bearer {KEY}"}
    return Callers(url=f"{gateway.url}/v2/models/churn/infer", bodies=[body], rate=100, headers=headers)


def test_each_step_of_a_rollout_is_written_for_the_cluster_until_the_endpoint_is_retired(
    controller: Controller, gateway: GatewayServer, target: KServe, versions: tuple[str, str], put: Put
) -> None:
    from flows.endpoint import retire_endpoint

    first, second = (f"churn-v{model.rpartition('/')[2]}-predictor" for model in versions)
    put(versions[0])
    found = manifests_of(controller)

    assert [(first, 100)] == split_of(controller)
    assert [{"name": "churn-keys"}] == found["SecurityPolicy"][0]["spec"]["apiKeyAuth"]["credentialRefs"]
    uri = found["InferenceService"][0]["spec"]["predictor"]["model"]["storageUri"]
    assert f"s3://lake/endpoints/churn/{versions[0].rpartition('/')[2]}" == uri
    before = (controller.folder / "churn/kubernetes/rollout.yaml").stat()

    put(versions[0])
    assert before == (controller.folder / "churn/kubernetes/rollout.yaml").stat()

    with pytest.raises(BadInput, match=r"must get a whole percentage of the requests, got 87\.5"):
        put(versions[1], rollout={**CANARY, "percent": 12.5})
    assert before == (controller.folder / "churn/kubernetes/rollout.yaml").stat()

    with Watcher(controller) as splits, pytest.raises(RolledBack):
        put(versions[1], rollout={**CANARY, "seconds_max": 0.5})
    assert [[(first, 100)], [(first, 90), (second, 10)], [(first, 100)]] == splits

    with Watcher(controller) as splits, calling(gateway, versions[0]) as callers:
        put(versions[1], rollout=CANARY)
    assert 0 == callers.lost
    assert [[(first, 100)], [(first, 90), (second, 10)], [(second, 100)]] == splits
    assert KEY.encode() not in (controller.folder / "churn/kubernetes/rollout.yaml").read_bytes()

    retire_endpoint("churn", target, gateway.url)
    assert not (controller.folder / "churn").exists()


def test_a_route_of_the_gateway_is_rendered_as_the_docs_say(
    gateway: GatewayServer, capsys: pytest.CaptureFixture[str]
) -> None:
    section = (ROOT / "docs/endpoints.md").read_text().partition("\n## On Kubernetes\n")[2]
    spec_block, code, shown = (each.text for each in read_blocks(ROOT / "docs/endpoints.md", section))
    versions = [
        ServedVersion(version=version, url="http://127.0.0.1:9", upstream_model="churn", weight=weight)
        for version, weight in (("1", 90), ("2", 10))
    ]
    route = Route(versions=tuple(versions), contract=matrix(3), rollout=Rollout(version="2"))
    with GatewayClient(gateway.url, gateway.admin_key) as client:
        client.put("churn", route)
        try:
            exec(compile(code.replace("http://127.0.0.1:8080", gateway.url), "endpoints.md", "exec"), {})  # noqa: S102 - the page is the project's own
        finally:
            client.delete("churn")

    printed = check_all(yaml.safe_load_all(capsys.readouterr().out))
    assert yaml.safe_load(shown) == printed["HTTPRoute"][0]["spec"]["rules"][0]
    given: dict[str, Any] = {}
    exec(compile(spec_block.replace("online_endpoint(", "dict(spec="), "endpoints.md", "exec"), given)  # noqa: S102 - the same
    assert "models" == given["endpoint"]["spec"].target.cluster.namespace


@pytest.mark.machines
def test_a_shadow_and_its_copies_are_on_the_cluster_too(
    controller: Controller, gateway: GatewayServer, target: KServe, versions: tuple[str, str], put: Put
) -> None:
    from flows.endpoint import retire_endpoint

    put(versions[0])
    put(versions[1], rollout={"kind": "shadow"})
    found = manifests_of(controller)
    rule = found["HTTPRoute"][0]["spec"]["rules"][0]

    second = f"churn-v{versions[1].rpartition('/')[2]}-predictor"
    assert second == rule["filters"][0]["requestMirror"]["backendRef"]["name"]
    assert [0] == [each["trafficPercent"] for each in found["InferenceService"][0]["spec"]["canary"]]
    with GatewayClient(gateway.url, gateway.admin_key) as client:
        state = client.get("churn")
    assert state is not None
    assert 2 == len(state.route.versions)
    retire_endpoint("churn", target, gateway.url)
