"""Prefect's work pools: the workers that are alive in them, and the flow runs that are sent to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Any, Literal, Protocol
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterIdempotencyKey,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, State, StateType, Worker
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Cancelled, Cancelling

from serving.errors import DeploymentMissing

# Every worker of Prefect labels the runs that it takes up.
_WORKER_LABEL = "prefect.worker.name"
# Prefect takes a worker for dead after as many missing heartbeats.
_HEARTBEATS_LOST = 3
_HEARTBEAT_SECONDS = 30.0

FlowRunStage = Literal["waiting", "running", "done", "failed", "lost"]

_STAGES: dict[StateType, FlowRunStage] = {
    StateType.COMPLETED: "done",
    StateType.FAILED: "failed",
    StateType.CRASHED: "lost",
    StateType.CANCELLED: "lost",
    StateType.CANCELLING: "lost",
    StateType.RUNNING: "running",
}


class WorkerPool(Protocol):
    """Machines of one kind, as many as are available."""

    def list_live_workers(self) -> frozenset[str]:
        """Return the names of those that are available now: one of them begins the work that is sent."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefectWorkerPool:
    """Machines whose workers take flow runs from one Prefect work pool."""

    pool: str

    def list_live_workers(self) -> frozenset[str]:
        """Return the names of the pool's live workers; raises DeploymentMissing where there is no such pool."""
        try:
            with get_client(sync_client=True) as client:
                workers = client.read_workers_for_work_pool(self.pool)
        except PrefectHTTPStatusError as error:
            if error.response.status_code != HTTPStatus.NOT_FOUND:
                raise
            message = f"The work pool {self.pool} must exist, got none of that name. Create it: overnight deploy."
            raise DeploymentMissing(message) from error
        return filter_live_workers(workers, datetime.now(UTC))


def filter_live_workers(workers: Sequence[Worker], now: datetime) -> frozenset[str]:
    """Return the names of the workers that have not missed three heartbeats in a row."""
    return frozenset(
        worker.name
        for worker in workers
        if worker.last_heartbeat_time is not None
        and now - worker.last_heartbeat_time
        < timedelta(seconds=_HEARTBEATS_LOST * (worker.heartbeat_interval_seconds or _HEARTBEAT_SECONDS))
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowRunStatus:
    """A flow run as Prefect knows it: its stage, its last message, and the worker that has taken it up."""

    stage: FlowRunStage
    message: str
    worker: str | None = None


def find_pool(client: SyncPrefectClient, deployment: str) -> str:
    """Return the work pool of a deployment named FLOW/NAME; raises DeploymentMissing where either does not exist."""
    return _find_deployment(client, deployment)[1]


def _find_deployment(client: SyncPrefectClient, deployment: str) -> tuple[UUID, str]:
    """Return the id of a deployment and the name of its work pool."""
    try:
        found = client.read_deployment_by_name(deployment)
    except ObjectNotFound as error:
        message = f"The deployment {deployment} must exist, got none of that name. Create it: overnight deploy."
        raise DeploymentMissing(message) from error
    if found.work_pool_name is None:
        message = f"The deployment {deployment} must have a work pool, got none. Give it one: overnight deploy."
        raise DeploymentMissing(message)
    try:
        client.read_work_pool(found.work_pool_name)
    except ObjectNotFound as error:
        message = (
            f"The work pool {found.work_pool_name} of {deployment} must exist, got none. Create it: overnight deploy."
        )
        raise DeploymentMissing(message) from error
    return found.id, found.work_pool_name


def submit_flow_run(
    client: SyncPrefectClient,
    deployment: str,
    parameters: Mapping[str, Any],
    key: str,
    name: str | None = None,
    labels: Mapping[str, str] | None = None,
) -> FlowRun:
    """Start a flow run of a deployment, or return the one that was started with the same key before."""
    found, _ = _find_deployment(client, deployment)
    return client.create_flow_run_from_deployment(
        found, parameters=dict(parameters), name=name, idempotency_key=key, labels=dict(labels or {})
    )


def find_flow_run(client: SyncPrefectClient, keys: Sequence[str]) -> FlowRun | None:
    """Return the flow run that was started with one of these keys, None where none was."""
    having_key = FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=list(keys)))
    return next(iter(client.read_flow_runs(flow_run_filter=having_key)), None)


def read_status(client: SyncPrefectClient, flow_run_id: UUID) -> FlowRunStatus:
    """Return the status of a flow run; one that Prefect does not know is lost."""
    try:
        run = client.read_flow_run(flow_run_id)
    except ObjectNotFound:
        return FlowRunStatus(stage="lost", message="Prefect no longer knows this flow run.")
    if run.state is None:
        return FlowRunStatus(stage="waiting", message="")
    # One that waits to be run again still names the worker that it was on.
    taken_up = run.state.type in (StateType.PENDING, StateType.RUNNING)
    worker = run.labels.get(_WORKER_LABEL) if taken_up else None
    return FlowRunStatus(
        stage=_STAGES.get(run.state.type, "waiting"),
        message=run.state.message or run.state.name or "",
        worker=str(worker) if worker else None,
    )


def end_flow_run(client: SyncPrefectClient, flow_run_id: UUID, why: str, *, lost: bool) -> None:
    """End a flow run for good: one that runs gets SIGTERM from its worker and drains, any other never begins.

    Nothing resumes it afterwards. One that has ended already stays as it is. Where its machine is `lost`, no worker
    is left to pass the signal on.
    """
    stage = read_status(client, flow_run_id).stage
    if stage in ("done", "failed"):
        return
    drains = stage == "running" and not lost
    state: State[Any] = Cancelling(message=why) if drains else Cancelled(message=why)
    client.set_flow_run_state(flow_run_id, state, force=not drains)


def list_runs_in_progress(client: SyncPrefectClient, pools: Sequence[str]) -> list[str]:
    """Return the names of the flow runs that workers of these pools have taken up and not ended yet."""
    in_progress = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
    runs = client.read_flow_runs(
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=list(pools))),
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=in_progress))),
    )
    return [run.name for run in runs]
