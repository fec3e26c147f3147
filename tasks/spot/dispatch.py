"""Flow runs of deployments: sent to a pool, looked at, and told to drain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterIdempotencyKey
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Cancelling

from serving.errors import DeploymentMissing

# Every worker of Prefect labels the runs that it takes up.
_WORKER_LABEL = "prefect.worker.name"

Stage = Literal["waiting", "running", "done", "failed", "lost"]

_STAGES: dict[StateType, Stage] = {
    StateType.COMPLETED: "done",
    StateType.FAILED: "failed",
    StateType.CRASHED: "lost",
    StateType.CANCELLED: "lost",
    StateType.CANCELLING: "lost",
    StateType.RUNNING: "running",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What Prefect says of a flow run: how far it is, its last word, and the machine whose worker has taken it up."""

    stage: Stage
    message: str
    machine: str | None = None


def find_pool(client: SyncPrefectClient, deployment: str) -> str:
    """Return the work pool of a deployment named FLOW/NAME; raises DeploymentMissing where one of them is."""
    return _find(client, deployment)[1]


def _find(client: SyncPrefectClient, deployment: str) -> tuple[UUID, str]:
    """Return the id of a deployment and the name of its work pool."""
    try:
        found = client.read_deployment_by_name(deployment)
    except ObjectNotFound as error:
        message = f"The deployment {deployment} must exist, got none of that name. Create it: make deploy."
        raise DeploymentMissing(message) from error
    if found.work_pool_name is None:
        message = f"The deployment {deployment} must have a work pool, got none. Give it one: make deploy."
        raise DeploymentMissing(message)
    try:
        client.read_work_pool(found.work_pool_name)
    except ObjectNotFound as error:
        message = f"The work pool {found.work_pool_name} of {deployment} must exist, got none. Create it: make deploy."
        raise DeploymentMissing(message) from error
    return found.id, found.work_pool_name


def send(client: SyncPrefectClient, deployment: str, parameters: Mapping[str, Any], key: str) -> FlowRun:
    """Start a flow run of a deployment; one that was started with the same key before is returned instead."""
    found, _ = _find(client, deployment)
    return client.create_flow_run_from_deployment(found, parameters=dict(parameters), idempotency_key=key)


def find(client: SyncPrefectClient, keys: Sequence[str]) -> FlowRun | None:
    """Return the flow run that was started with one of these keys, None where none was."""
    wanted = FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=list(keys)))
    return next(iter(client.read_flow_runs(flow_run_filter=wanted)), None)


def look_at(client: SyncPrefectClient, flow_run_id: UUID) -> Seen:
    """Return what Prefect says of a flow run; one that it does not know is lost."""
    try:
        run = client.read_flow_run(flow_run_id)
    except ObjectNotFound:
        return Seen(stage="lost", message="Prefect does not know it any more.")
    if run.state is None:
        return Seen(stage="waiting", message="")
    # One that waits to be run again still names the machine that it was on.
    taken_up = run.state.type in (StateType.PENDING, StateType.RUNNING)
    machine = run.labels.get(_WORKER_LABEL) if taken_up else None
    return Seen(
        stage=_STAGES.get(run.state.type, "waiting"),
        message=run.state.message or run.state.name or "",
        machine=str(machine) if machine else None,
    )


def drain(client: SyncPrefectClient, flow_run_id: UUID, why: str, *, lost: bool) -> None:
    """Tell a flow run to end: one that runs gets SIGTERM from its worker and drains, others never begin.

    Nothing resumes it afterwards. One that is at its end already is left as it is. Where its machine is `lost`, no
    worker is left that could tell it.
    """
    stage = look_at(client, flow_run_id).stage
    if stage in ("done", "failed"):
        return
    told = stage == "running" and not lost
    state: State[Any] = Cancelling(message=why) if told else Cancelled(message=why)
    client.set_flow_run_state(flow_run_id, state, force=not told)
