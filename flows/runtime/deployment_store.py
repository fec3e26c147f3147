"""What serves a workload, as deployments of the Prefect server: put up, held against what was wanted, taken down."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound, PrefectHTTPStatusError

from flows.runtime import flow_runs
from serving.errors import ApplyFailed, BadInput, DeploymentMissing
from tasks.scheduler.effect import Wanted, tag_of
from tasks.spot import work_pools


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A deployment that was put up, and the one of its name that stood before."""

    id: UUID
    name: str
    before: DeploymentResponse | None
    runs_before: tuple[UUID, ...]


def place(wanted: Wanted) -> Placed:
    """Create a deployment, or change the one of that name, and hold what the server has against what was wanted.

    It gets pool, settings and entrypoint of the one that it is made like. Raises DeploymentMissing where that one or
    its work pool is, BadInput where a deployment of that name is none of the workload's, ApplyFailed where the server
    does not take it, with what stood before put back.
    """
    with get_client(sync_client=True) as client:
        work_pools.find_pool(client, wanted.like)
        like = client.read_deployment_by_name(wanted.like)
        name = f"{wanted.like.split('/')[0]}/{wanted.name}"
        before = _find(client, name)
        if before is not None and tag_of(wanted.name) not in before.tags:
            message = (
                f"The name of a workload must be free for its deployment, but {name} is there already, and is none of "
                "the workload's. Give the workload another name."
            )
            raise BadInput(message)
        runs_before = tuple(run.id for run in flow_runs.unfinished(client, before.id)) if before else ()
        try:
            made = _create(client, like, wanted)
        except (PrefectHTTPStatusError, ObjectAlreadyExists) as error:
            message = f"The Prefect server must take the deployment {name}, got: {error}"
            raise ApplyFailed(message) from error
        placed = Placed(id=made, name=name, before=before, runs_before=runs_before)
        has = client.read_deployment(made)
        active = [each.schedule for each in has.schedules if each.active]
        if has.parameters != dict(wanted.parameters) or len(active) != len(wanted.schedules) or has.paused:
            take_back(placed)
            message = (
                f"Deployment {name} must be as it was asked for, but the server has it otherwise. Look at it there."
            )
            raise ApplyFailed(message)
    return placed


def _create(client: SyncPrefectClient, like: DeploymentResponse, wanted: Wanted) -> UUID:
    return client.create_deployment(
        flow_id=like.flow_id,
        name=wanted.name,
        description=wanted.description,
        parameters=dict(wanted.parameters),
        tags=sorted({*like.tags, *wanted.tags}),
        schedules=list(wanted.schedules),
        paused=False,
        **_made_like(like),
    )


def _made_like(like: DeploymentResponse) -> dict[str, Any]:
    return {
        "entrypoint": like.entrypoint,
        "path": like.path,
        "pull_steps": like.pull_steps,
        "work_pool_name": like.work_pool_name,
        "work_queue_name": like.work_queue_name,
        "job_variables": like.job_variables,
        "parameter_openapi_schema": like.parameter_openapi_schema,
        "enforce_parameter_schema": like.enforce_parameter_schema,
    }


def take_back(placed: Placed) -> None:
    """Undo a deployment: the one that stood before stands again, with its schedules; runs of the new one are ended."""
    with get_client(sync_client=True) as client:
        started = [run.id for run in flow_runs.unfinished(client, placed.id) if run.id not in placed.runs_before]
        flow_runs.end(started, "What it was started for was given up.")
        if placed.before is None:
            client.delete_deployment(placed.id)
            return
        before = placed.before
        client.create_deployment(
            flow_id=before.flow_id,
            name=before.name,
            description=before.description,
            parameters=before.parameters,
            tags=before.tags,
            schedules=[
                DeploymentScheduleCreate(schedule=each.schedule, active=each.active, slug=each.slug)
                for each in before.schedules
            ],
            paused=before.paused,
            **_made_like(before),
        )


def serving(workload: str) -> list[DeploymentResponse]:
    """Return the deployments that serve a workload, by their tag."""
    tagged = DeploymentFilter(tags=DeploymentFilterTags(all_=[tag_of(workload)]))
    with get_client(sync_client=True) as client:
        return client.read_deployments(deployment_filter=tagged)


def full_name(deployment: DeploymentResponse) -> str:
    """Return FLOW/NAME of a deployment."""
    with get_client(sync_client=True) as client:
        return f"{client.read_flow(deployment.flow_id).name}/{deployment.name}"


def remove(deployment: DeploymentResponse, *, end: bool) -> bool:
    """Take a deployment out of service: its schedules rest, what has begun is ended or let through, then it is deleted.

    False where a run still goes on: the deployment rests then, and may be deleted later.
    """
    with get_client(sync_client=True) as client:
        client.pause_deployment(deployment.id)
        begun = []
        for run in flow_runs.unfinished(client, deployment.id):
            # One that waits to be run again has begun too, and its work is half done.
            if end or run.run_count or (run.state and run.state.type is not StateType.SCHEDULED):
                begun.append(run.id)
            else:
                # Those of its schedule go as it rests.
                with suppress(ObjectNotFound):
                    client.delete_flow_run(run.id)
    if begun and not (end and flow_runs.end(begun, "Another mode serves its workload now.")):
        return False
    with get_client(sync_client=True) as client:
        client.delete_deployment(deployment.id)
    return True


def _find(client: SyncPrefectClient, name: str) -> DeploymentResponse | None:
    try:
        return client.read_deployment_by_name(name)
    except ObjectNotFound:
        return None


def check_deployments(names: Mapping[str, str]) -> None:
    """Raise DeploymentMissing where one of these is, or its work pool; the keys say what it is for."""
    with get_client(sync_client=True) as client:
        for what, name in names.items():
            try:
                work_pools.find_pool(client, name)
            except DeploymentMissing as error:
                message = f"{error} It is {what}."
                raise DeploymentMissing(message) from error
