"""The flow run that a call belongs to."""

from __future__ import annotations

from uuid import uuid4

from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext


def flow_run() -> FlowRun | None:
    """Return the flow run that this is called in, None outside of one."""
    context = FlowRunContext.get()
    return None if context is None else context.flow_run


def flow_run_id() -> str:
    """Return the id of the flow run that this is called in, or a new one outside of one."""
    run = flow_run()
    return str(uuid4()) if run is None else str(run.id)
