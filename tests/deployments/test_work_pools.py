"""The work pools that the deployments name, and the template of those on Kubernetes."""

from __future__ import annotations

import asyncio
import copy
import json
import uuid
from pathlib import Path
from typing import Any

import httpx
import kubernetes_validate
import prefect
import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.workers.base import BaseJobConfiguration

from deployments.apply import PREFECT_FILE, make_work_pools
from infra.local.prefect_server import PrefectServer

TEMPLATE = Path(__file__).parents[2] / "infra/kubernetes/work-pool.json"
SHIPPED = Path(prefect.__file__).parent / "server/api/collections_data/views/aggregate-worker-metadata.json"


def read_job_variables() -> dict[str, Any]:
    """The job variables of every deployment."""
    (same,) = {
        json.dumps(each["work_pool"]["job_variables"])
        for each in yaml.safe_load(PREFECT_FILE.read_text())["deployments"]
    }
    return dict(json.loads(same))


def test_the_deployments_name_these_pools_and_no_others() -> None:
    named = {each["work_pool"]["name"] for each in yaml.safe_load(PREFECT_FILE.read_text())["deployments"]}

    assert named == {pool.name for pool in make_work_pools()}


def test_the_description_of_a_pool_states_how_a_machine_takes_work_from_it() -> None:
    assert all(f"overnight worker --pool {pool.name}" in str(pool.description) for pool in make_work_pools())


def test_the_template_for_kubernetes_is_prefects_own_with_time_to_drain_and_no_second_pod() -> None:
    ours = json.loads(TEMPLATE.read_text())
    theirs = json.loads(SHIPPED.read_text())["prefect-kubernetes"]["kubernetes"]["default_base_job_configuration"]

    assert {
        *("termination_grace_period_seconds", "gpu_limit", "secret_name", "user"),
        *("affinity", "node_selector", "tolerations"),
    } == set(ours["variables"]["properties"]) - set(theirs["variables"]["properties"])
    assert set(theirs["variables"]["properties"]) <= set(ours["variables"]["properties"])
    assert theirs["job_configuration"].keys() == ours["job_configuration"].keys()
    assert ours["variables"]["properties"]["env"]["default"] == read_job_variables()["env"]


@pytest.mark.usefixtures("deployed")  # Prefect fills no template without the address of a server
def test_the_template_for_kubernetes_makes_a_job_that_is_never_run_twice() -> None:
    template = json.loads(TEMPLATE.read_text())
    # The manifest is what the worker of prefect-kubernetes adds to the base configuration.
    manifest = template["job_configuration"]["job_manifest"]

    class Configuration(BaseJobConfiguration):
        job_manifest: dict[str, Any]

    filled = asyncio.run(
        Configuration.from_template_and_values(
            {**template, "job_configuration": {"job_manifest": manifest, "env": "{{ env }}"}},
            {**read_job_variables(), "image": "registry/overnight:1", "finished_job_ttl": 600},
        )
    )

    (container,) = filled.job_manifest["spec"]["template"]["spec"]["containers"]
    split = {**filled.job_manifest, "spec": copy.deepcopy(filled.job_manifest["spec"])}
    # As the worker splits it.
    split["spec"]["template"]["spec"]["containers"][0]["args"] = container["args"].split()
    kubernetes_validate.validate(split, kubernetes_validate.latest_version(), strict=True)
    assert 0 == filled.job_manifest["spec"]["backoffLimit"]
    assert ("prefect flow-run execute", "registry/overnight:1") == (container["args"], container["image"])
    assert "{{" not in json.dumps(filled.job_manifest)


def test_the_server_takes_the_template_and_the_deployments_job_variables_fit_it(deployed: PrefectServer) -> None:
    name = f"kubernetes-{uuid.uuid4()}"
    with get_client(sync_client=True) as client:
        client.create_work_pool(
            WorkPoolCreate(name=name, type="kubernetes", base_job_template=json.loads(TEMPLATE.read_text()))
        )
        flow = client.create_flow_from_name("any")
        fits = client.create_deployment(flow, "fits", work_pool_name=name, job_variables=read_job_variables())
        with pytest.raises(httpx.HTTPStatusError, match="422"):
            client.create_deployment(flow, "not", work_pool_name=name, job_variables={"env": "text"})

    assert fits
