"""Puts a decision into effect: deploys and verifies the new mode, then retires what served the workload before."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import PrefectHTTPStatusError

from flows.endpoint import online_endpoint, retire_endpoint
from flows.runtime import deployment_store, flow_runs
from flows.runtime.deployment_store import DeploymentChange
from flows.runtime.steps import Steps
from serving.errors import ApplyFailed, BudgetBroken, OvernightError
from tasks.batch.run_request import resolve_request
from tasks.common.artifacts import Logger
from tasks.endpoint.report import Endpoint
from tasks.endpoint.spec import EndpointSpec
from tasks.scheduler.decision import Decision
from tasks.scheduler.deployment_plan import (
    AppliedDecision,
    ApplyConfig,
    CurrentDeployment,
    DesiredDeployment,
    check_apply_config,
    make_endpoint_spec,
    plan_batch_deployment,
    plan_online_deployment,
    plan_stream_deployment,
    read_current_deployment,
)
from tasks.scheduler.report import emit_mode_changed
from tasks.storage import open_storage


@dataclass(frozen=True, slots=True, kw_only=True)
class _Deployed:
    """The deployment that serves the workload now, in words, and what was verified."""

    id: UUID
    summary: str
    verified: str


def apply_decision(steps: Steps, decision: Decision, config: ApplyConfig, logger: Logger) -> AppliedDecision:
    """Deploy and verify the decided mode, and then retire what served the workload before.

    The same decision again changes only what differs. Where the new deployment can't be made or verified, it is removed
    again, and what served before serves on. What can't be retired is listed in `to_do`.

    Raises:
        BadInput: The configuration lacks the mode, or does not fit; or one of its kinds.
        ApplyFailed: The new deployment was not verified.
        DeploymentMissing: A template or its work pool is missing.
        EndpointFailed: The model server did not answer as it must. BudgetBroken, a kind of it: not within the promise.
    """
    check_apply_config(decision, config)
    before = deployment_store.find_deployments(decision.workload.name)
    deploy: dict[str, Callable[[], _Deployed]] = {
        "batch": lambda: _deploy_batch(decision, config),
        "online": lambda: _deploy_online(decision, config),
        "streaming": lambda: _deploy_stream(decision, config, logger),
    }
    deployed = steps.run("apply", deploy[decision.chosen.mode])
    old = [each for each in before if each.id != deployed.id]
    retired, to_do = steps.run("retire", lambda: _retire_all(old, logger))
    applied = AppliedDecision(
        workload=decision.workload.name,
        mode=decision.chosen.mode,
        summary=deployed.summary,
        verified=deployed.verified,
        retired=retired,
        to_do=to_do,
    )
    current = _find_newest(before)
    if current is None or current.mode != applied.mode:
        emit_mode_changed(decision, applied, current.mode if current else None)
    return applied


def find_current_deployment(workload: str) -> CurrentDeployment | None:
    """Return how a workload is served now, None where choose_mode has deployed nothing for it."""
    return _find_newest(deployment_store.find_deployments(workload))


def _find_newest(deployments: Sequence[DeploymentResponse]) -> CurrentDeployment | None:
    found = [each for each in deployments if not each.paused]
    return read_current_deployment(max(found, key=lambda each: str(each.updated)).tags) if found else None


def _deploy_batch(decision: Decision, config: ApplyConfig) -> _Deployed:
    desired = plan_batch_deployment(decision, config, datetime.now(UTC))
    assert config.batch is not None, "the configuration was checked"  # noqa: S101 - our own mistake, not a caller's
    batch = config.batch
    deployment_store.check_deployments({f"the template of {desired.name}": desired.template})
    if "buying" in desired.parameters:
        deployment_store.check_deployments(
            {"the deployment of runs on spot": batch.spot, "the deployment of runs on-demand": batch.on_demand}
        )
    # Model, source and destination are checked as a run does at its start.
    model, destination = str(desired.parameters["model"]), open_storage(batch.destination).url
    request = resolve_request(model, batch.source, destination, batch.options)
    files = f"{len(request.snapshot.files):,} files of {batch.source}"
    verified = [f"{request.resolved.pin.uri} takes the {files}, the pools are there"]
    change = deployment_store.put_deployment(desired)
    with _roll_back_on_failure(change):
        if desired.runs or batch.first_run_seconds is not None:
            runs = flow_runs.start_runs(change.id, 1)
        if batch.first_run_seconds is not None:
            flow_runs.wait_until_complete(runs, batch.first_run_seconds)
            verified.append("a first run is complete")
    machines = f"on {decision.chosen.machines} machines at most"
    return _Deployed(
        id=change.id,
        summary=f"deployment {change.name}, {_describe_schedule(desired)}, {machines}",
        verified=", ".join(verified),
    )


def _describe_schedule(desired: DesiredDeployment) -> str:
    if not desired.schedules:
        return "one run, started now"
    schedule = desired.schedules[0].schedule
    cron = getattr(schedule, "cron", None)
    return f"at {cron} (cron, UTC)" if cron else f"every {getattr(schedule, 'interval', '')}"


def _deploy_online(decision: Decision, config: ApplyConfig) -> _Deployed:
    spec = make_endpoint_spec(decision, config)
    desired = plan_online_deployment(decision, config, spec)
    deployment_store.check_deployments({f"the template of {desired.name}": desired.template})
    try:
        endpoint = online_endpoint(spec)
    except BudgetBroken as error:
        message = (
            f"{error} The simulation had expected that this batching keeps the budget: have the model measured on this "
            "model server, by ProfileOptions(target=...), and decide again."
        )
        raise BudgetBroken(message) from error
    change = deployment_store.put_deployment(desired)
    rows = endpoint.verification.rows_example + endpoint.verification.rows_random
    return _Deployed(
        id=change.id,
        summary=endpoint.summary,
        verified=f"{rows} rows are answered as the model itself answers them, {_describe_checked_budget(endpoint)}",
    )


def _describe_checked_budget(endpoint: Endpoint) -> str:
    if endpoint.budget is None:
        return "no latency is promised"
    promised = f"{endpoint.budget.latency_ms:g} ms are promised"
    # A release that served already gets no load beside its traffic.
    return f"{promised}: {endpoint.checked.describe() if endpoint.checked else 'not measured this time'}"


def _deploy_stream(decision: Decision, config: ApplyConfig, logger: Logger) -> _Deployed:
    desired = plan_stream_deployment(decision, config)
    assert config.stream is not None, "the configuration was checked"  # noqa: S101 - our own mistake, not a caller's
    change = deployment_store.put_deployment(desired)
    with _roll_back_on_failure(change):
        runs = flow_runs.start_runs(change.id, desired.runs)
        flow_runs.wait_until_scoring(runs, config.stream.start_seconds_max)
    if change.runs_before and not flow_runs.end_runs(change.runs_before, "Later runs of the same stream score now."):
        logger.warning("Earlier runs of %s must end, and have not yet.", change.name)
    return _Deployed(
        id=change.id,
        summary=f"deployment {change.name}, {desired.runs} runs of it",
        verified="source and sink are open, and its runs score",
    )


@contextmanager
def _roll_back_on_failure(change: DeploymentChange) -> Generator[None]:
    """Roll a deployment back where the block fails for any reason. An ApplyFailed then also says what serves on."""
    try:
        yield
    except ApplyFailed as error:
        deployment_store.roll_back(change)
        message = f"{error} The deployment {change.name} is rolled back, and what served before serves on."
        raise ApplyFailed(message) from error
    except BaseException:
        deployment_store.roll_back(change)
        raise


def _retire_all(old: list[DeploymentResponse], logger: Logger) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Take out of service what served a workload before; return what is retired, and what is left for a person."""
    retired, to_do = [], []
    for each in old:
        name = deployment_store.read_full_name(each)
        try:
            words = _retire(each, name)
        except (OvernightError, PrefectHTTPStatusError) as error:
            logger.warning("What served before, %s, must be retired, got: %s", name, error)
            to_do.append(f"retire {name}: {error}")
            continue
        if words is None:
            to_do.append(f"a run of {name} goes on; its schedule is paused, delete it when that is done")
        else:
            retired.append(words)
    return tuple(retired), tuple(to_do)


def _retire(deployment: DeploymentResponse, name: str) -> str | None:
    """Take a deployment out of service; return that in words, None where a run of it goes on."""
    mode = read_current_deployment(deployment.tags).mode
    words = f"{mode}, deployment {name}"
    if mode == "online":
        spec = EndpointSpec.model_validate(deployment.parameters["spec"])
        versions = retire_endpoint(spec.name, spec.target, spec.gateway, spec.admin_secret)
        words += f", with versions {', '.join(versions)} of its endpoint" if versions else ""
    # A stream never ends by itself; a batch run is waited for.
    return words if deployment_store.remove_deployment(deployment, end_runs=mode == "streaming") else None
