"""Flow runs of deployments, as a person starts and watches them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment

from infra.local.prefect_server import PrefectServer
from tasks.batch.options import BatchOptions
from tests.eventually import eventually

SECONDS_MAX = 400.0


def start(deployment: str, model: str, source: Path | str, destination: Path | str, options: BatchOptions) -> FlowRun:
    """Start a batch run of a deployment."""
    return start_with(
        f"batch-inference/{deployment}",
        model=model,
        source=str(source),
        destination=str(destination),
        options=options.model_dump(mode="json"),
    )


def start_with(deployment: str, **parameters: Any) -> FlowRun:
    """Start a run of a deployment, FLOW/NAME, with just these parameters."""
    run = run_deployment(deployment, parameters=parameters, timeout=0)
    assert isinstance(run, FlowRun)
    return run


def read(flow_run: UUID) -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(flow_run)


def wait_for(flow_run: UUID, *names: str) -> FlowRun:
    """Wait until a flow run is in a state of one of these names."""
    with get_client(sync_client=True) as client:
        look = partial(client.read_flow_run, flow_run)
        return eventually(look, lambda run: state_of(run) in names, seconds=SECONDS_MAX, pause_max=0.5)


def machine_of(flow_run: UUID) -> str:
    """The name of the worker that took a flow run up last."""
    return str(read(flow_run).labels["prefect.worker.name"])


def state_of(flow_run: FlowRun) -> str:
    return flow_run.state.name if flow_run.state else ""


def states(server: PrefectServer, flow_run: UUID) -> list[tuple[str, str]]:
    """The names of all states that a flow run has been in, with their times."""
    found = httpx.get(f"{server.api_url}/flow_run_states/", params={"flow_run_id": str(flow_run)}).json()
    return [(state["name"], state["timestamp"]) for state in sorted(found, key=lambda state: state["timestamp"])]


def workers_of(flow_run: UUID) -> list[FlowRun]:
    """The flow runs that a flow run has started."""
    with get_client(sync_client=True) as client:
        wanted = FlowRunFilter.model_validate({"parent_flow_run_id": {"any_": [str(flow_run)]}})
        return client.read_flow_runs(flow_run_filter=wanted)


def table(server: PrefectServer, flow_run: UUID) -> dict[str, str]:
    """The table of a flow run's summary, as its artifact shows it; nothing for one that found all done."""
    wanted = {"artifacts": {"flow_run_id": {"any_": [str(flow_run)]}, "key": {"any_": ["batch-summary"]}}}
    found = httpx.post(f"{server.api_url}/artifacts/filter", json=wanted).json()
    if not found:
        return {}
    (data,) = (str(artifact["data"]) for artifact in found)
    rows = (line.strip("| ").split(" | ") for line in data.splitlines() if line.startswith("| ") and "---" not in line)
    return {row[0].strip(): row[1] for row in rows if len(row) > 1}
