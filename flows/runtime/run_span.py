"""The span of a batch run: what it says of the run, and its link to the run's first attempt."""

from __future__ import annotations

from opentelemetry import propagate, trace
from opentelemetry.trace import SpanContext
from prefect.logging import get_logger
from pydantic import Field

from serving.errors import StorageFault
from serving.model.contract import Frozen
from tasks.batch.plan import Plan
from tasks.batch.run_records import read_record
from tasks.storage import Storage

_TRACE_FILE = "trace.json"


class TraceStart(Frozen):
    """Where the trace of a run begins: the flow span of its first attempt, as W3C's traceparent."""

    traceparent: str = Field(description="Version, trace, span and flags, in hexadecimal digits.")


def describe_run_span(plan: Plan, storage: Storage) -> None:
    """Say on the span of the flow run which run it scores, and link it to the first attempt of that run."""
    span = trace.get_current_span()
    if not span.is_recording():
        return
    span.set_attributes(
        {
            "overnight.run": plan.run,
            "overnight.run_key": plan.key,
            "overnight.model": plan.model.uri,
            "overnight.source": plan.source.title,
            "overnight.destination": storage.url,
            "overnight.output": plan.options.output,
            "overnight.rows": plan.rows,
            "overnight.chunks": len(plan.chunks),
            "overnight.shards": len(plan.shards),
        }
    )
    first = _find_first_attempt(plan, storage, span.get_span_context())
    if first is not None:
        span.add_link(first, {"overnight.link": "first attempt of this run"})


def _find_first_attempt(plan: Plan, storage: Storage, this: SpanContext) -> SpanContext | None:
    """Return the flow span of the first attempt that was traced; None where this is it, or it is not known."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier, trace.set_span_in_context(trace.NonRecordingSpan(this)))
    path = f"{plan.folder}/{_TRACE_FILE}"
    try:
        start = TraceStart(traceparent=carrier.get("traceparent", ""))
        if storage.put_new(path, start.model_dump_json().encode()):
            return None
        found = read_record(storage, path, TraceStart)
    except StorageFault as error:
        get_logger("overnight").warning("The trace must be linked to earlier attempts, got: %s", error)
        return None
    context = propagate.extract({"traceparent": found.traceparent}) if found else None
    first = trace.get_current_span(context).get_span_context()
    return first if first.is_valid and first.span_id != this.span_id else None
