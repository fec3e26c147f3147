"""A decision put into effect: the new mode is made and verified, then what served the workload before is retired."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from uuid import UUID

from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import PrefectHTTPStatusError

from flows.endpoint import online_endpoint, retire_endpoint
from flows.runtime import deployment_store, flow_runs
from flows.runtime.deployment_store import Placed
from flows.runtime.steps import Steps
from serving.errors import ApplyFailed, OvernightError
from tasks.batch.resolve import resolve_request
from tasks.common.artifacts import Logger
from tasks.endpoint.spec import EndpointSpec
from tasks.scheduler.decision import Decision
from tasks.scheduler.effect import (
    Applied,
    Standing,
    Wanted,
    batch_deployment,
    check_terms,
    endpoint_spec,
    online_deployment,
    standing_of,
    stream_deployment,
)
from tasks.scheduler.terms import BatchTerms, StreamTerms, Terms
from tasks.storage import open_storage


def apply_decision(stages: Steps, decision: Decision, terms: Terms, logger: Logger) -> Applied:
    """Have a workload served in the way that was decided, and retire what served it before, once that is verified.

    The same decision again changes what differs alone. Where the new one can't be made or verified it is taken down
    again, and what served before serves on: raises BadInput's kinds, ApplyFailed, DeploymentMissing or EndpointFailed.
    What can't be retired is said in `left`, and fails nothing.
    """
    check_terms(decision, terms)
    before = deployment_store.serving(decision.workload.name)
    make: dict[str, Callable[[], tuple[UUID, str, str]]] = {
        "batch": lambda: _batch(decision, terms),
        "online": lambda: _online(decision, terms),
        "streaming": lambda: _stream(decision, terms, logger),
    }
    kept, what, verified = stages.run("apply", make[decision.chosen.mode])
    old = [each for each in before if each.id != kept]
    retired, left = stages.run("retire", lambda: _retire(old, logger))
    return Applied(
        workload=decision.workload.name,
        mode=decision.chosen.mode,
        what=what,
        verified=verified,
        retired=retired,
        left=left,
    )


def find_standing(workload: str) -> Standing | None:
    """Return how a workload is served now, None where choose_mode has deployed nothing of its name."""
    found = [each for each in deployment_store.serving(workload) if not each.paused]
    return standing_of(max(found, key=lambda each: str(each.updated)).tags) if found else None


def _batch(decision: Decision, terms: Terms) -> tuple[UUID, str, str]:
    wanted = batch_deployment(decision, terms, datetime.now(UTC))
    assert terms.batch is not None, "the terms were checked"  # noqa: S101 - our own mistake, not a caller's
    batch = terms.batch
    deployment_store.check_deployments({f"made like it: {wanted.name}": wanted.like} | _night(wanted, batch))
    verified = [_planned(wanted, batch)]
    placed = deployment_store.place(wanted)
    with _taken_back_on_failure(placed):
        if wanted.runs or batch.first_run_seconds is not None:
            begun = flow_runs.start(placed.id, 1)
        if batch.first_run_seconds is not None:
            flow_runs.wait_until_complete(begun, batch.first_run_seconds)
            verified.append("a first run is complete")
    words = f"deployment {placed.name}, {_when(wanted)}, on {decision.chosen.machines} machines at most"
    return placed.id, words, ", ".join(verified)


def _night(wanted: Wanted, batch: BatchTerms) -> dict[str, str]:
    """Return the deployments that a night sends runs of; a plain run has none."""
    if "buying" not in wanted.parameters:
        return {}
    return {"what a night on spot sends runs of": batch.spot, "what it goes on with on-demand": batch.on_demand}


def _planned(wanted: Wanted, batch: BatchTerms) -> str:
    """Hold model, source and destination against each other, as a run does at its begin; returns that in words."""
    model = str(wanted.parameters["model"])
    call = resolve_request(model, batch.source, open_storage(batch.destination).url, batch.options)
    return (
        f"{call.resolved.pin.uri} takes the {len(call.snapshot.files):,} files of {batch.source}, the pools are there"
    )


def _when(wanted: Wanted) -> str:
    if not wanted.schedules:
        return "one run, begun now"
    schedule = wanted.schedules[0].schedule
    cron = getattr(schedule, "cron", None)
    return f"at {cron} (cron, UTC)" if cron else f"every {getattr(schedule, 'interval', '')}"


def _online(decision: Decision, terms: Terms) -> tuple[UUID, str, str]:
    spec = endpoint_spec(decision, terms)
    wanted = online_deployment(decision, terms, spec)
    deployment_store.check_deployments({f"made like it: {wanted.name}": wanted.like})
    endpoint = online_endpoint(spec)
    placed = deployment_store.place(wanted)
    held = endpoint.verification
    verified = f"{held.rows_example + held.rows_random} rows are answered as the model itself answers them"
    return placed.id, endpoint.summary, verified


def _stream(decision: Decision, terms: Terms, logger: Logger) -> tuple[UUID, str, str]:
    wanted = stream_deployment(decision, terms)
    assert terms.stream is not None, "the terms were checked"  # noqa: S101 - our own mistake, not a caller's
    stream: StreamTerms = terms.stream
    placed = deployment_store.place(wanted)
    with _taken_back_on_failure(placed):
        flow_runs.wait_until_scoring(flow_runs.start(placed.id, wanted.runs), stream.begin_seconds)
    if placed.runs_before and not flow_runs.end(placed.runs_before, "Later runs of the same stream score now."):
        logger.warning("Earlier runs of %s must end, and have not yet.", placed.name)
    return placed.id, f"deployment {placed.name}, {wanted.runs} runs of it", "both ends are open, and its runs score"


@contextmanager
def _taken_back_on_failure(placed: Placed) -> Generator[None]:
    """Take a deployment back where the block fails, whatever with; an ApplyFailed then also says what serves on."""
    try:
        yield
    except ApplyFailed as error:
        deployment_store.take_back(placed)
        message = f"{error} The deployment {placed.name} is taken back, and what served before serves on."
        raise ApplyFailed(message) from error
    except BaseException:
        deployment_store.take_back(placed)
        raise


def _retire(old: list[DeploymentResponse], logger: Logger) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Take out of service what served a workload before; return what is gone, and what is left for a person to do."""
    gone, left = [], []
    for each in old:
        name = deployment_store.full_name(each)
        try:
            words = _retire_one(each, name)
        except (OvernightError, PrefectHTTPStatusError) as error:
            logger.warning("What served before, %s, must be retired, got: %s", name, error)
            left.append(f"retire {name}: {error}")
            continue
        if words is None:
            left.append(f"a run of {name} goes on; its schedule rests, delete it when that is done")
        else:
            gone.append(words)
    return tuple(gone), tuple(left)


def _retire_one(each: DeploymentResponse, name: str) -> str | None:
    mode = standing_of(each.tags).mode
    words = f"{mode}, deployment {name}"
    if mode == "online":
        spec = EndpointSpec.model_validate(each.parameters["spec"])
        versions = retire_endpoint(spec.name, spec.target, spec.gateway, spec.admin_secret)
        words += f", with versions {', '.join(versions)} of its endpoint" if versions else ""
    # A stream never ends by itself; a batch run is let through to its end.
    return words if deployment_store.remove(each, end=mode == "streaming") else None
