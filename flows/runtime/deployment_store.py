"""The deployments on the Prefect server that serve a workload: created, checked, rolled back, removed."""

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
from tasks.scheduler.deployment_plan import DesiredDeployment, workload_tag
from tasks.spot import work_pools


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentChange:
    """A deployment that was created or changed, and the one of its name before."""

    id: UUID
    name: str
    before: DeploymentResponse | None
    runs_before: tuple[UUID, ...]


def put_deployment(desired: DesiredDeployment) -> DeploymentChange:
    """Create a deployment, or change the one of that name, and check that the server has it as desired.

    It gets pool, settings and entrypoint of its template.

    Raises:
        DeploymentMissing: The template or its work pool is missing.
        BadInput: A deployment of that name does not belong to the workload.
        ApplyFailed: The server does not take the deployment. The one before is restored.
    """
    with get_client(sync_client=True) as client:
        work_pools.find_pool(client, desired.template)
        template = client.read_deployment_by_name(desired.template)
        name = f"{desired.template.split('/')[0]}/{desired.name}"
        before = _find_deployment(client, name)
        if before is not None and workload_tag(desired.name) not in before.tags:
            message = (
                f"The name of a workload must be free for its deployment, but {name} is there already, and does not "
                "belong to the workload. Give the workload another name."
            )
            raise BadInput(message)
        runs_before = tuple(run.id for run in flow_runs.read_unfinished_runs(client, before.id)) if before else ()
        try:
            deployment_id = _create_deployment(client, template, desired)
        except (PrefectHTTPStatusError, ObjectAlreadyExists) as error:
            message = f"The Prefect server must take the deployment {name}, got: {error}"
            raise ApplyFailed(message) from error
        change = DeploymentChange(id=deployment_id, name=name, before=before, runs_before=runs_before)
        created = client.read_deployment(deployment_id)
        active = [each.schedule for each in created.schedules if each.active]
        if created.parameters != dict(desired.parameters) or len(active) != len(desired.schedules) or created.paused:
            roll_back(change)
            message = f"Deployment {name} must be as it was sent, but the server has it otherwise. Look at it there."
            raise ApplyFailed(message)
    return change


def _create_deployment(client: SyncPrefectClient, template: DeploymentResponse, desired: DesiredDeployment) -> UUID:
    return client.create_deployment(
        flow_id=template.flow_id,
        name=desired.name,
        description=desired.description,
        parameters=dict(desired.parameters),
        tags=sorted({*template.tags, *desired.tags}),
        schedules=list(desired.schedules),
        paused=False,
        **_copied_fields(template),
    )


def _copied_fields(template: DeploymentResponse) -> dict[str, Any]:
    return {
        "entrypoint": template.entrypoint,
        "path": template.path,
        "pull_steps": template.pull_steps,
        "work_pool_name": template.work_pool_name,
        "work_queue_name": template.work_queue_name,
        "job_variables": template.job_variables,
        "parameter_openapi_schema": template.parameter_openapi_schema,
        "enforce_parameter_schema": template.enforce_parameter_schema,
    }


def roll_back(change: DeploymentChange) -> None:
    """Restore the deployment before, with its schedules, and end the runs of the new one."""
    with get_client(sync_client=True) as client:
        started = [
            run.id for run in flow_runs.read_unfinished_runs(client, change.id) if run.id not in change.runs_before
        ]
        flow_runs.end_runs(started, "Its deployment was rolled back.")
        if change.before is None:
            client.delete_deployment(change.id)
            return
        before = change.before
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
            **_copied_fields(before),
        )


def find_deployments(workload: str) -> list[DeploymentResponse]:
    """Return the deployments that serve a workload, by their tag."""
    tagged = DeploymentFilter(tags=DeploymentFilterTags(all_=[workload_tag(workload)]))
    with get_client(sync_client=True) as client:
        return client.read_deployments(deployment_filter=tagged)


def read_full_name(deployment: DeploymentResponse) -> str:
    """Return FLOW/NAME of a deployment."""
    with get_client(sync_client=True) as client:
        return f"{client.read_flow(deployment.flow_id).name}/{deployment.name}"


def remove_deployment(deployment: DeploymentResponse, *, end_runs: bool) -> bool:
    """Pause a deployment, end the runs that have begun where asked to, and delete it.

    Returns False where a run goes on: the deployment stays paused then, and may be deleted later.
    """
    with get_client(sync_client=True) as client:
        client.pause_deployment(deployment.id)
        begun = []
        for run in flow_runs.read_unfinished_runs(client, deployment.id):
            # A run that waits for its next attempt has begun too.
            if end_runs or run.run_count or (run.state and run.state.type is not StateType.SCHEDULED):
                begun.append(run.id)
            else:
                # Pausing deletes the runs of the schedule at the same time.
                with suppress(ObjectNotFound):
                    client.delete_flow_run(run.id)
    if begun and not (end_runs and flow_runs.end_runs(begun, "Another mode serves its workload now.")):
        return False
    with get_client(sync_client=True) as client:
        client.delete_deployment(deployment.id)
    return True


def _find_deployment(client: SyncPrefectClient, name: str) -> DeploymentResponse | None:
    try:
        return client.read_deployment_by_name(name)
    except ObjectNotFound:
        return None


def check_deployments(names: Mapping[str, str]) -> None:
    """Raise DeploymentMissing where a deployment or its work pool is missing; the keys say what it is for."""
    with get_client(sync_client=True) as client:
        for purpose, name in names.items():
            try:
                work_pools.find_pool(client, name)
            except DeploymentMissing as error:
                message = f"{error} It is {purpose}."
                raise DeploymentMissing(message) from error
