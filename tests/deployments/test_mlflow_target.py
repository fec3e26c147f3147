"""The target `overnight` of mlflow.deployments, on a real Triton behind the real gateway."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Generator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import httpx
import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient, MlflowException
from mlflow.deployments import BaseDeploymentClient, get_deploy_client

from deployments import mlflow_target
from deployments.mlflow_target import OvernightDeploymentClient, serve_locally, target_help
from flows import EndpointSpec, online_endpoint
from infra.local.gateway import GatewayServer, gateway_server
from infra.local.prefect_server import PrefectServer
from infra.local.triton import TritonServer, triton_server
from serving.errors import BadInput
from serving.gateway.client import GatewayClient
from serving.model.contract import Column, ColumnPolicy, Contract, Input, Output
from tests.support import register_with_params
from tests.tasks.endpoint.values import route, served

KEY = "a-key-of-the-tests-0123456789abcdef"
ROWS = pd.DataFrame({"a": [1.0, 2.0, 3.0], "unused": ["x", "y", "z"]})


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Generator[GatewayServer]:
    with gateway_server(tmp_path_factory.mktemp("gateway")) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OVERNIGHT_ADMIN_KEY", server.admin_key)
        patch.setenv("OVERNIGHT_GATEWAY", server.url)
        patch.setenv("WEIGHTED_KEY", KEY)
        patch.setenv("OVERNIGHT_API_KEY", KEY)
        yield server


@pytest.fixture
def client(gateway: GatewayServer) -> OvernightDeploymentClient:
    return OvernightDeploymentClient("overnight")


@pytest.fixture(scope="module")
def weighted(registry: Path) -> list[str]:
    """Two versions of a model with params."""
    return [register_with_params("weighted-target") for _ in range(2)]


@pytest.fixture
def config(triton: TritonServer) -> dict[str, Any]:
    target = {"kind": "triton", "repository": str(triton.repository), "url": triton.url, "grpc": triton.grpc}
    # The command line gives every value as text.
    return {"target": json.dumps(target), "access": '{"environment": ["WEIGHTED_KEY"]}', "params": {"weight": 3}}


def test_mlflow_finds_the_target_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]

    assert {"overnight": "deployments.mlflow_target"} == project["entry-points"]["mlflow.deployments"]
    if not entry_points(group="mlflow.deployments", name="overnight"):
        pytest.skip("this checkout is not what is installed: pip install -e .")
    assert isinstance(get_deploy_client("overnight"), BaseDeploymentClient)


def test_a_deployment_from_its_creation_to_its_end(
    server: PrefectServer,
    client: OvernightDeploymentClient,
    config: dict[str, Any],
    weighted: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, two = weighted
    monkeypatch.setenv("OVERNIGHT_TARGET", config.pop("target"))
    made = client.create_deployment("weighted", one, config=config)

    assert {"name": "weighted", "flavor": "python_function", "version": one[-1]}.items() <= made.items()
    assert "Callers need the key WEIGHTED_KEY." == made["callers"]
    assert [3.0, 6.0, 9.0] == client.predict("weighted", ROWS)["predictions"]
    assert [3.0, 6.0, 9.0] == client.predict("weighted", {"a": [1, 2, 3]}).get_predictions("ndarray").tolist()
    direct = mlflow.pyfunc.load_model(one).predict(ROWS[["a"]].astype(np.float32), params={"weight": 3})
    assert direct.tolist() == client.predict("weighted", ROWS)["predictions"]
    with monkeypatch.context() as caller:
        caller.delenv("OVERNIGHT_ADMIN_KEY")
        assert [3.0, 6.0, 9.0] == client.predict("weighted", ROWS)["predictions"]
    with pytest.raises(MlflowException, match=r"serves already\. Update it"):
        client.create_deployment("weighted", one, config=config)

    assert "weighted" in [each["name"] for each in client.list_deployments()]
    found = client.get_deployment("weighted")
    assert (one, {one[-1]: 100.0}) == (found["model_uri"], found["versions"])
    assert KEY not in json.dumps(found)

    updated = client.update_deployment("weighted", two)
    assert (two[-1], {two[-1]: 100.0}) == (updated["version"], client.get_deployment("weighted")["versions"])
    assert [3.0, 6.0, 9.0] == client.predict("weighted", ROWS)["predictions"]

    client.update_deployment("weighted", config={"params": '{"weight": 5}'})
    assert [5.0, 10.0, 15.0] == client.predict("weighted", ROWS)["predictions"]

    with monkeypatch.context() as patch:
        patch.setenv("OVERNIGHT_API_KEY", "another-key-of-some-length")
        with pytest.raises(MlflowException, match="401"):
            client.predict("weighted", ROWS)
    with pytest.raises(MlflowException, match="column 'a'"):
        client.predict("weighted", pd.DataFrame({"b": [1.0]}))

    client.delete_deployment("weighted")
    client.delete_deployment("weighted")
    assert "weighted" not in [each["name"] for each in client.list_deployments()]
    with pytest.raises(MlflowException, match="must exist"):
        client.get_deployment("weighted")
    with pytest.raises(MlflowException, match="must exist"):
        client.update_deployment("weighted", one)


def test_an_endpoint_that_mlflow_has_not_created_is_asked_as_it_was_put_online(
    server: PrefectServer,
    client: OvernightDeploymentClient,
    gateway: GatewayServer,
    config: dict[str, Any],
    weighted: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {"target": json.loads(config["target"]), "params": {"weight": 3}, "policies": {"a": {"null": 2}}}
    online_endpoint(
        EndpointSpec.model_validate({"name": "put-online", "model": weighted[0], "gateway": gateway.url, **given})
    )
    rows = pd.DataFrame({"a": [1.0, None]})

    assert [3.0, 6.0] == client.predict("put-online", rows)["predictions"]
    monkeypatch.delenv("OVERNIGHT_ADMIN_KEY")
    with pytest.raises(MlflowException, match="must have been made by `mlflow deployments create`"):
        client.predict("put-online", rows)


@pytest.mark.parametrize("trust", [{}, {"allow_pickle": True}])
def test_an_update_trusts_its_caller_and_no_tag_of_the_registry(
    client: OvernightDeploymentClient,
    gateway: GatewayServer,
    registry: Path,
    monkeypatch: pytest.MonkeyPatch,
    trust: dict[str, bool],
) -> None:
    deployed: list[EndpointSpec] = []

    def deploy(spec: EndpointSpec) -> Any:
        deployed.append(spec)
        message = "nothing is deployed in this test"
        raise BadInput(message)

    monkeypatch.setattr("flows.online_endpoint", deploy)
    kept = {"model": "models:/mine/1", "rollout": {"kind": "canary", "percent": 20}, "allow_pickle": True}
    name = f"trusting-{len(trust)}"
    planted = MlflowClient().create_registered_model(f"planted-for-{name}").name
    config = {"allow_pickle": True, "target": {"kind": "bentoml", "folder": "f", "python": "code-of-another"}}
    tag = json.dumps({"model": f"models:/{planted}/1", "config": config})
    MlflowClient().set_registered_model_tag(planted, f"{mlflow_target.TAG}.{name}", tag)
    with GatewayClient(gateway.url, gateway.admin_key) as admin:
        admin.put(name, route(served("1", 100), spec=kept))

    with pytest.raises(MlflowException, match="nothing is deployed"):
        client.update_deployment(name, config={"tolerance": "0.1", **trust})

    assert [
        {"name": name, "model": "models:/mine/1", "gateway": gateway.url, "tolerance": 0.1, **trust}
        | {"rollout": {"kind": "canary", "percent": 20}}
    ] == [each.model_dump(exclude_unset=True) for each in deployed]


@pytest.mark.parametrize(
    ("model", "arguments", "said"),
    [
        ("runs:/abc/model", {}, r"must be models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("models:/none-such/1", {}, r"none-such"),
        (None, {"config": {"gateway": "http://127.0.0.1:1"}}, r"gateway is the variable OVERNIGHT_GATEWAY"),
        (None, {"config": {"budgte": 1}}, r"budgte: Extra inputs"),
        (None, {"flavor": "sklearn"}, r"flavor must be left out"),
        (None, {"endpoint": "other"}, r"endpoint must be left out"),
    ],
)
def test_what_can_not_be_created_is_refused_by_name(
    server: PrefectServer,
    client: OvernightDeploymentClient,
    weighted: list[str],
    model: str | None,
    arguments: dict[str, Any],
    said: str,
) -> None:
    with pytest.raises(MlflowException, match=said):
        client.create_deployment("refused", model or weighted[0], **arguments)


GIVEN = {"visits": 2, "spend": 0.1, "city": "x"}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([GIVEN, {**GIVEN, "visits": 1.5}], "got row 1 with visits: "),
        ([{**GIVEN, "visits": None}], "got row 0 with visits: null"),
        ([GIVEN, {**GIVEN, "city": None}], "got row 1 with city: null, which requests do not have of text"),
        ([{**GIVEN, "city": None}], "got row 0 with city: null, which"),
        (pd.DataFrame({"visits": [2], "spend": [0.1]}), "got row 0 with city: null, which"),
        (pd.DataFrame([GIVEN])[:0], "must have a row, got none"),
        ({"visits": [2, 2], "spend": [0.1, 0.1], "city": ["x", None]}, "got row 1 with city: null, which"),
        # These are sent, to a server that is not there.
        ([{**GIVEN, "visits": 2.0}], "must answer"),
        ({"visits": [2], "spend": [0.1], "city": ["x"]}, "must answer"),
    ],
)
def test_rows_that_a_request_does_not_hold_are_refused_by_number_and_column(
    client: OvernightDeploymentClient, gateway: GatewayServer, rows: Any, said: str
) -> None:
    columns = (
        *(Column(name="visits", dtype="int64"), Column(name="spend", dtype="float32")),
        Column(name="city", dtype="str", required=False, policy=ColumnPolicy(null="keep")),
    )
    inputs = tuple(Input(name=each.name, dtype=each.dtype, columns=(each,)) for each in columns)
    contract = Contract(inputs=inputs, outputs=(Output(name="score", dtype="float32"),))
    with GatewayClient(gateway.url, gateway.admin_key) as admin:
        admin.put("by-columns", route(served("1", 100), contract=contract))
    with pytest.raises(MlflowException, match=said):
        client.predict("by-columns", rows)


def test_the_gateway_is_no_part_of_the_target() -> None:
    with pytest.raises(MlflowException, match="OVERNIGHT_GATEWAY"):
        OvernightDeploymentClient("overnight://127.0.0.1:8080")


def test_without_a_gateway_the_error_says_so(
    client: OvernightDeploymentClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OVERNIGHT_GATEWAY", "http://127.0.0.1:1")

    with pytest.raises(MlflowException, match=r"The gateway must answer at http://127\.0\.0\.1:1"):
        client.list_deployments()


def test_the_help_names_every_variable_and_a_command_that_is_right() -> None:
    for name in (
        mlflow_target.GATEWAY,
        mlflow_target.API_KEY,
        mlflow_target.TARGET,
        "OVERNIGHT_ADMIN_KEY",
        "-t overnight",
    ):
        assert name in target_help()


def test_a_model_is_served_locally_for_as_long_as_asked(
    server: PrefectServer, triton: TritonServer, gateway: GatewayServer, weighted: list[str]
) -> None:
    with serve_locally("local", weighted[0], config={"params": {"weight": 4}}) as url:
        answer = ask_two_rows(url)

    assert [4.0, 8.0] == answer


def ask_two_rows(url: str) -> list[float]:
    document = {"inputs": [{"name": "a", "datatype": "FP32", "shape": [2, 1], "data": [1, 2]}]}
    return list(httpx.post(url, json=document).json()["outputs"][0]["data"])


def test_a_triton_that_ends_by_a_fault_of_its_own_is_started_again_once(
    server: PrefectServer,
    triton: TritonServer,
    gateway: GatewayServer,
    weighted: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[TritonServer] = []

    def start(repository: Path, folder: Path) -> TritonServer:
        started.append(triton_server(repository, folder))
        return started[-1]

    def serve(spec: EndpointSpec) -> Any:
        if started[0].running:
            os.kill(started[0].process.pid, signal.SIGSEGV)
        return online_endpoint(spec)

    monkeypatch.setattr("infra.local.triton.triton_server", start)
    monkeypatch.setattr("flows.online_endpoint", serve)
    with serve_locally("crashed", weighted[0], config={"params": {"weight": 4}}) as url:
        answer = ask_two_rows(url)

    assert [4.0, 8.0] == answer
    assert started[0].process.exit_code in (134, 139)
