"""Flow runs of the deployments that serve a workload: starts them, waits for them, ends them."""

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
# The artifact of a stream that scores.
_SCORING_ARTIFACT = "stream-progress"


def start_runs(deployment: UUID, count: int) -> list[UUID]:
    """Start so many runs of a deployment."""
    with get_client(sync_client=True) as client:
        return [client.create_flow_run_from_deployment(deployment).id for _ in range(count)]


def wait_until_scoring(runs: Sequence[UUID], seconds: float) -> None:
    """Return once every run of a stream scores. Raises ApplyFailed where a run ended, or takes longer than this."""
    _wait_until(runs, seconds, _is_scoring, "have opened source and sink, and score")


def wait_until_complete(runs: Sequence[UUID], seconds: float) -> None:
    """Return once every run is complete. Raises ApplyFailed where a run ended otherwise, or takes longer than this."""
    _wait_until(runs, seconds, lambda _, run: _read_stage(run) == "done", "be complete")


def _is_scoring(client: SyncPrefectClient, run: UUID) -> bool:
    stage = _read_stage(run)
    shown = ArtifactFilter(
        flow_run_id=ArtifactFilterFlowRunId(any_=[run]), key=ArtifactFilterKey(any_=[_SCORING_ARTIFACT])
    )
    # A stream with a limit may be complete already.
    return stage == "done" or (stage == "running" and bool(client.read_artifacts(artifact_filter=shown)))


def _read_stage(run: UUID) -> str:
    with get_client(sync_client=True) as client:
        return work_pools.read_status(client, run).stage


def _wait_until(
    runs: Sequence[UUID], seconds: float, is_reached: Callable[[SyncPrefectClient, UUID], bool], goal: str
) -> None:
    until, left = time.monotonic() + seconds, list(runs)
    with get_client(sync_client=True) as client:
        while left := [run for run in left if not is_reached(client, run)]:
            statuses = {run: work_pools.read_status(client, run) for run in left}
            for run, each in statuses.items():
                if each.stage in ("failed", "lost"):
                    message = f"Flow run {run} must {goal}, but ended: {each.message}"
                    raise ApplyFailed(message)
            if time.monotonic() > until:
                stages = ", ".join(f"{run} is {each.stage}" for run, each in statuses.items())
                message = (
                    f"Each flow run must {goal} within {seconds:g} s, but {stages}. Check that its work pool has a "
                    "free worker."
                )
                raise ApplyFailed(message)
            time.sleep(_POLL_SECONDS)


def end_runs(runs: Sequence[UUID], why: str) -> bool:
    """Have runs drain and end; return whether they did within two minutes."""
    with get_client(sync_client=True) as client:
        for run in runs:
            work_pools.end_flow_run(client, run, why, lost=False)
        until = time.monotonic() + _DRAIN_SECONDS_MAX
        while any(_is_unfinished(client, run) for run in runs):
            if time.monotonic() > until:
                return False
            time.sleep(_POLL_SECONDS)
    return True


def _is_unfinished(client: SyncPrefectClient, run: UUID) -> bool:
    try:
        state = client.read_flow_run(run).state
    except ObjectNotFound:
        return False
    return state is not None and not state.is_final()


def read_unfinished_runs(client: SyncPrefectClient, deployment: UUID) -> list[FlowRun]:
    """Return the runs of a deployment that have not ended, those of its schedule included."""
    not_ended = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_UNFINISHED)))
    of_deployment = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
    return client.read_flow_runs(flow_run_filter=not_ended, deployment_filter=of_deployment)
