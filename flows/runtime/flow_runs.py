"""Flow runs of the deployments that serve a workload: started, waited for, and told to end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectNotFound

from serving.errors import ApplyFailed
from tasks.spot import work_pools

_POLL_SECONDS = 0.5
_DRAIN_SECONDS_MAX = 120.0
_UNFINISHED = [
    StateType.SCHEDULED,
    StateType.PENDING,
    StateType.RUNNING,
    StateType.PAUSED,
    StateType.CANCELLING,
]
# What a stream shows once both of its ends are open and its dial is set.
_SCORING = "stream-progress"


def start(deployment: UUID, count: int) -> list[UUID]:
    """Start so many runs of a deployment."""
    with get_client(sync_client=True) as client:
        return [client.create_flow_run_from_deployment(deployment).id for _ in range(count)]


def wait_until_scoring(runs: Sequence[UUID], seconds: float) -> None:
    """Return once every run of a stream scores. Raises ApplyFailed with the first that ended, or where it is late."""
    _wait(runs, seconds, _scores, "have opened both ends and score")


def wait_until_complete(runs: Sequence[UUID], seconds: float) -> None:
    """Return once every run is complete. Raises ApplyFailed with the first that ended otherwise, or is late."""
    _wait(runs, seconds, lambda _, run: _stage(run) == "done", "be complete")


def _scores(client: SyncPrefectClient, run: UUID) -> bool:
    stage = _stage(run)
    shown = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run]), key=ArtifactFilterKey(any_=[_SCORING]))
    # One with a limit may be through already.
    return stage == "done" or (stage == "running" and bool(client.read_artifacts(artifact_filter=shown)))


def _stage(run: UUID) -> str:
    with get_client(sync_client=True) as client:
        return work_pools.read_status(client, run).stage


def _wait(runs: Sequence[UUID], seconds: float, holds: Callable[[SyncPrefectClient, UUID], bool], what: str) -> None:
    until, left = time.monotonic() + seconds, list(runs)
    with get_client(sync_client=True) as client:
        while left := [run for run in left if not holds(client, run)]:
            seen = {run: work_pools.read_status(client, run) for run in left}
            for run, each in seen.items():
                if each.stage in ("failed", "lost"):
                    message = f"Flow run {run} must {what}, but ended: {each.message}"
                    raise ApplyFailed(message)
            if time.monotonic() > until:
                stages = ", ".join(f"{run} is {each.stage}" for run, each in seen.items())
                message = (
                    f"Each flow run must {what} within {seconds:g} s, but {stages}. Look whether its work pool has a "
                    "worker that is free."
                )
                raise ApplyFailed(message)
            time.sleep(_POLL_SECONDS)


def end(runs: Sequence[UUID], why: str) -> bool:
    """Tell runs to end and drain, and say whether they did within two minutes."""
    with get_client(sync_client=True) as client:
        for run in runs:
            work_pools.end_flow_run(client, run, why, lost=False)
        until = time.monotonic() + _DRAIN_SECONDS_MAX
        while any(_stands(client, run) for run in runs):
            if time.monotonic() > until:
                return False
            time.sleep(_POLL_SECONDS)
    return True


def _stands(client: SyncPrefectClient, run: UUID) -> bool:
    try:
        state = client.read_flow_run(run).state
    except ObjectNotFound:
        return False
    return state is not None and not state.is_final()


def unfinished(client: SyncPrefectClient, deployment: UUID) -> list[FlowRun]:
    """Return the runs of a deployment that have not ended, those that its schedule has made among them."""
    not_ended = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_UNFINISHED)))
    of = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
    return client.read_flow_runs(flow_run_filter=not_ended, deployment_filter=of)
