"""Events that automations and other programs act on: what of a run, an endpoint or a workload has changed.

Prefect queues an event and sends it from a thread. Nothing waits for that, and no failure of it ends a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from prefect.events import emit_event
from prefect.exceptions import EventTooLarge
from prefect.logging import get_logger

from serving.redaction import hide_secrets
from tasks.common.names import find_model_name
from tasks.common.prefect_server import has_prefect_server

RUN_PUBLISHED = "overnight.run.published"
RUN_REFUSED = "overnight.run.refused"
RUN_DRIFTED = "overnight.run.drifted"
MODEL_PROMOTED = "overnight.model.promoted"
MODEL_NOT_PROMOTED = "overnight.model.not-promoted"
ENDPOINT_CHANGED = "overnight.endpoint.changed"
MODE_CHANGED = "overnight.mode.changed"

Labels = dict[str, str]


def send_event(
    event: str,
    resource: Labels,
    related: Sequence[Labels],
    payload: Mapping[str, Any],
    event_id: UUID | None = None,
) -> None:
    """Send an event to Prefect, which adds the flow run, its deployment and their tags to what is related.

    Without a Prefect server nothing is sent.

    Args:
        event: Its name, one of those above.
        resource: The labels of what the event is about; `prefect.resource.id` is one of them.
        related: The labels of what else it concerns, each with a `prefect.resource.role`.
        payload: Further values, which JSON can hold; a few hundred bytes.
        event_id: Events with the same id are one event. Without: a new one.
    """
    if not has_prefect_server():
        return
    try:
        emit_event(event, resource, related=list(related), payload=dict(payload), id=event_id)
    except EventTooLarge as error:
        get_logger("overnight").warning(
            "Prefect must take the event %s, got: %s. The run goes on without.", event, error
        )


def describe_resource(kind: str, name: str, *, role: bool = True, **labels: str) -> Labels:
    """Return the labels of a resource: its id overnight.KIND.NAME, and its role, which is the kind."""
    name = hide_secrets(name)
    found = {"prefect.resource.id": f"overnight.{kind}.{name}", "prefect.resource.name": name}
    found |= {"prefect.resource.role": kind} if role else {}
    return found | {f"overnight.{label}": value for label, value in labels.items() if value}


def describe_model_resource(model: str) -> Labels:
    """Return the labels of a model as a related resource: overnight.model.NAME, with its whole address."""
    return describe_resource("model", find_model_name(model) or model, model=model)
