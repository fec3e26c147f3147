"""What a server has is made what the files say, once: on a real server."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.objects import DeploymentSchedule

from deployments.apply import PREFECT_FILE, Change, DeployFailed, deploy, find_differences, read_deployments
from infra.local.prefect_server import PrefectServer
from tests.deployments.conftest import AUTOMATIONS

NIGHTLY = "batch-inference/nightly"


def changed(changes: list[Change]) -> dict[str, str]:
    return {change.name: change.what for change in changes if change.what != "unchanged"}


def test_applied_again_it_changes_nothing(deployed: PrefectServer) -> None:
    changes = asyncio.run(deploy(automations=AUTOMATIONS))

    assert {} == changed(changes)
    assert {"block type": 3, "work pool": 3, "deployment": 13, "automation": 3} == Counter(
        change.kind for change in changes
    )


def test_what_was_changed_in_the_ui_is_named_and_set_back(deployed: PrefectServer) -> None:
    with get_client(sync_client=True) as client:
        standing = client.read_deployment_by_name(NIGHTLY)
        client.update_deployment(standing.id, DeploymentUpdate(tags=["mine"], parameters={"model": "models:/mine/1"}))
        (automation,) = client.read_automations_by_name(AUTOMATIONS[1].name)
        client.pause_automation(automation.id)
    first, again = asyncio.run(deploy(automations=AUTOMATIONS)), asyncio.run(deploy(automations=AUTOMATIONS))

    assert {NIGHTLY: "changed: tags, parameters", AUTOMATIONS[1].name: "changed: enabled"} == changed(first)
    assert {} == changed(again)


def test_a_schedule_differs_only_by_what_the_file_states_of_it(deployed: PrefectServer) -> None:
    fields = read_deployments()[NIGHTLY]
    with get_client(sync_client=True) as client:
        standing = client.read_deployment_by_name(NIGHTLY)
    (schedule,) = standing.schedules
    active = standing.model_copy(update={"schedules": [schedule.model_copy(update={"active": True})]})

    assert isinstance(schedule, DeploymentSchedule)
    assert [] == find_differences(fields, standing)
    assert ["schedules"] == find_differences(fields, active)
    assert ["schedules"] == find_differences(fields, standing.model_copy(update={"schedules": []}))
    assert ["schedules"] == find_differences(fields, standing.model_copy(update={"schedules": [schedule, schedule]}))


def test_a_missing_work_pool_is_named(deployed: PrefectServer, tmp_path: Path) -> None:
    file = tmp_path / "prefect.yaml"
    file.write_text(PREFECT_FILE.read_text().replace("name: overnight-spot", "name: elsewhere"))

    with pytest.raises(DeployFailed, match="work pool 'elsewhere' of deployment batch-inference/spot must exist"):
        asyncio.run(deploy(file, AUTOMATIONS))


@pytest.mark.parametrize(
    ("address", "said"),
    [(None, "PREFECT_API_URL must name the Prefect server"), ("http://127.0.0.1:9/api", "127.0.0.1:9/api must answer")],
)
def test_no_server_is_an_error_that_states_what_to_do(address: str | None, said: str, tmp_path: Path) -> None:
    without = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment = without | {"PREFECT_HOME": str(tmp_path)} | ({"PREFECT_API_URL": address} if address else {})
    done = subprocess.run(
        [sys.executable, "-m", "deployments.apply"], env=environment, capture_output=True, text=True, check=False
    )

    assert 1 == done.returncode
    assert said in done.stderr
    assert "Traceback" not in done.stderr
