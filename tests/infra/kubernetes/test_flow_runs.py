"""The Job of a flow run as Prefect's own worker for Kubernetes makes it, in an environment with that package."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from deployments.apply import PREFECT_FILE
from deployments.kubernetes_pools import read_kubernetes_pools
from tests.infra.kubernetes.cluster import FOLDER, is_selected
from tests.infra.kubernetes.schemas import KUBERNETES
from tests.servers import python_or_skip

CHILD = Path(__file__).with_name("job_child.py")
AUTH = "user:hunter2"


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter of an environment with prefect-kubernetes, made where it is not there yet."""
    return python_or_skip("prefect-kubernetes")


def read_worker_settings() -> dict[str, str]:
    """The environment of prefect-worker, but for what is of the place it runs in."""
    documents = yaml.safe_load_all((FOLDER / "base/prefect-worker.yaml").read_text())
    (deployment,) = [each for each in documents if each["kind"] == "Deployment"]
    (container, *_) = deployment["spec"]["template"]["spec"]["containers"]
    settings = {each["name"]: each["value"] for each in container["env"] if "value" in each}
    return {**settings, "PREFECT_API_AUTH_STRING": AUTH}


def make_job(python: Path, pool: str, folder: Path) -> dict[str, Any]:
    (found,) = [
        each for each in read_kubernetes_pools(FOLDER / "base/pools", "registry/overnight:1") if each.name == pool
    ]
    deployments = yaml.safe_load(PREFECT_FILE.read_text())["deployments"]
    variables = deployments[0]["work_pool"]["job_variables"]
    (folder / "pool.json").write_text(json.dumps({"template": found.base_job_template, "variables": variables}))
    settings = read_worker_settings() | {"HOME": str(folder), "PREFECT_HOME": str(folder)}
    command = [python, CHILD, folder / "pool.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=settings, timeout=300)
    assert 0 == done.returncode, done.stderr[-2000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.machines
@pytest.mark.parametrize("pool", ["overnight", "overnight-spot", "overnight-on-demand"])
def test_prefects_worker_makes_a_job_that_the_network_policies_know_and_that_holds_no_secret(
    python: Path, pool: str, tmp_path: Path
) -> None:
    job = make_job(python, pool, tmp_path)
    kubernetes_validate.validate(job, KUBERNETES, strict=True)
    template = job["spec"]["template"]
    (container,) = template["spec"]["containers"]
    env = {each["name"]: each.get("value", each.get("valueFrom")) for each in container["env"]}
    policies = yaml.safe_load_all((FOLDER / "base/network-policies.yaml").read_text())
    (policy,) = [each for each in policies if each["metadata"]["name"] == "flow-run"]

    # Prefect puts labels of its own over those of the template.
    assert is_selected(template["metadata"]["labels"], policy["spec"]["podSelector"])
    assert AUTH not in json.dumps(job)
    assert {"secretKeyRef": {"name": "prefect-auth", "key": "auth-string"}} == env["PREFECT_API_AUTH_STRING"]
    assert ("reschedule", "30") == (
        env["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"],
        env["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"],
    )
    assert ["prefect", "flow-run", "execute"] == container["args"]
    assert (0, "registry/overnight:1") == (job["spec"]["backoffLimit"], container["image"])
    assert "overnight" == job["metadata"]["namespace"]
