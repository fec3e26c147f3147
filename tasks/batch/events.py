"""The events of a batch run: published, refused, a challenger promoted or not. Each concerns its model and data."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import NAMESPACE_URL, uuid5

from serving.errors import Interrupted, OvernightError
from serving.redaction import hide_secrets
from tasks.batch.comparison import Promotion
from tasks.batch.gate import Finding
from tasks.batch.plan import Plan
from tasks.batch.report import BatchReport
from tasks.common.events import (
    MODEL_NOT_PROMOTED,
    MODEL_PROMOTED,
    RUN_DRIFTED,
    RUN_PUBLISHED,
    RUN_REFUSED,
    Labels,
    describe_model_resource,
    describe_resource,
    send_event,
)

_MESSAGE_CHARACTERS_MAX = 1_000


@dataclass(slots=True, kw_only=True)
class RunCall:
    """The call of a run, as its events tell it: the key of the run once it is planned, and what the run concerns.

    `first_worker` is the flow run that has started or is joined by others on the same run, None where there is one.
    """

    model: str
    source: str
    destination: str
    key: str = ""
    first_worker: str | None = None

    def describe_run(self, **labels: str) -> Labels:
        """Return the labels of the run; one that was not planned has no key."""
        return describe_resource("run", self.key or "unplanned", role=False, **labels)

    def list_related(self) -> list[Labels]:
        """Return the labels of destination, source and model."""
        return [
            describe_resource("destination", self.destination.rstrip("/")),
            describe_resource("source", self.source.rstrip("/")),
            describe_model_resource(self.model),
        ]


def emit_published(plan: Plan, report: BatchReport) -> None:
    """Send the event that a run is published. Sent by two workers, or again by a later call, it is one event."""
    call = RunCall(model=report.model, source=report.source, destination=report.destination, key=plan.key)
    payload = {
        "run": report.run,
        "model": report.model,
        "model_digest": report.model_digest,
        "source": hide_secrets(report.source),
        "destination": hide_secrets(report.destination),
        "output": report.output,
        "rows": report.rows,
        "rows_rejected": report.rows_rejected,
        "rows_scored": report.rows_scored,
    }
    event_id = uuid5(NAMESPACE_URL, f"{RUN_PUBLISHED}/{report.destination}/{report.run}/{report.plan_digest}")
    send_event(RUN_PUBLISHED, call.describe_run(output=report.output), call.list_related(), payload, event_id)


def emit_findings(plan: Plan, destination: str, baseline: str, findings: Sequence[Finding]) -> None:
    """Send an event for each rule of the gate that a run breaks. Sent by two workers, each is one event."""
    call = RunCall(model=plan.model.uri, source=plan.source.title, destination=destination, key=plan.key)
    for finding in findings:
        if finding.outcome != "broken":
            continue
        payload = {
            "run": plan.run,
            "baseline": hide_secrets(baseline),
            **finding.model_dump(mode="json", include={"rule", "severity", "subject", "text"}),
        }
        event_id = uuid5(NAMESPACE_URL, f"{RUN_DRIFTED}/{destination}/{plan.run}/{plan.digest}/{finding}")
        resource = call.describe_run(rule=finding.rule, severity=finding.severity)
        send_event(RUN_DRIFTED, resource, call.list_related(), payload, event_id)


def emit_promotion(plan: Plan, destination: str, promotion: Promotion) -> None:
    """Send the event that a challenger was promoted, or not. Sent by two workers, it is one event."""
    call = RunCall(model=plan.model.uri, source=plan.source.title, destination=destination, key=plan.key)
    event = MODEL_PROMOTED if promotion.outcome == "promoted" else MODEL_NOT_PROMOTED
    payload = {"run": plan.run, "destination": hide_secrets(destination), **promotion.model_dump(mode="json")}
    payload["why"] = hide_secrets(promotion.why)[:_MESSAGE_CHARACTERS_MAX]
    event_id = uuid5(NAMESPACE_URL, f"{event}/{destination}/{plan.run}/{plan.digest}/{promotion.alias}")
    resource = describe_resource("model", plan.model.name, role=False, alias=promotion.alias, model=plan.model.uri)
    related = [call.describe_run() | {"prefect.resource.role": "run"}, *call.list_related()[:2]]
    send_event(event, resource, related, payload, event_id)


@contextmanager
def emit_refusal(call: RunCall) -> Generator[RunCall]:
    """Send the event that a run is refused where an error of Overnight ends the block; one of an interruption is none.

    The block may set what becomes known of the call: its key, its resolved model. Several workers of one run that end
    for the same reason are one event, so that what it starts is started once.
    """
    try:
        yield call
    except Interrupted:
        raise
    except OvernightError as error:
        kind = type(error).__name__
        payload = {
            "error": kind,
            "message": hide_secrets(str(error))[:_MESSAGE_CHARACTERS_MAX],
            "model": call.model,
            "source": hide_secrets(call.source),
            "destination": hide_secrets(call.destination),
        }
        one = f"{RUN_REFUSED}/{call.first_worker}/{kind}"
        event_id = uuid5(NAMESPACE_URL, one) if call.first_worker else None
        send_event(RUN_REFUSED, call.describe_run(error=kind), call.list_related(), payload, event_id)
        raise
