"""Traces of runs by OpenTelemetry: from the flow over its steps to its shards, where an exporter is set.

Prefect makes a span of each flow run and each task run, so of each step and each shard, and sends their context along
with tasks on Ray and with flow runs that a flow starts. Without a Prefect server the steps make these spans. This
module has them exported, adds what they are about, and hides secrets in them. Without an exporter in the environment
nothing is imported, and the spans are empty.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points, version
from typing import TYPE_CHECKING, Any

from opentelemetry import context as otel_context
from opentelemetry import propagate, trace
from prefect.context import TaskRunContext
from prefect.logging import get_logger
from prefect.telemetry.run_telemetry import LABELS_TRACEPARENT_KEY

from flows.runtime.steps import flow_run
from serving.redaction import hide_secrets

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.sdk.trace.export import SpanExporter

Attributes = Mapping[str, str | int | float | bool]

# The names by which OpenTelemetry's conventions tell what kind of error ended a span, and its message.
ERROR_TYPE, ERROR_MESSAGE = "error.type", "error.message"
_lock = threading.Lock()
_tried = threading.Event()


def start_tracing() -> None:
    """Have this process export its spans, where the environment names an exporter. Idempotent.

    The variables are those of OpenTelemetry: OTEL_TRACES_EXPORTER (otlp, console, none), OTEL_EXPORTER_OTLP_ENDPOINT
    and its relatives, OTEL_SERVICE_NAME, OTEL_SDK_DISABLED. Tracing never ends a run: an exporter that is not installed
    or can't be made is a warning. Where the program has a tracer provider already, its own one exports.
    """
    name = choose_exporter(os.environ)
    with _lock:
        if name is None or _tried.is_set():
            return
        _tried.set()
    try:
        _install_provider(name)
    except Exception as error:  # noqa: BLE001 - each exporter has errors of its own
        get_logger("overnight").warning(
            "Traces must be exported by %s, as the environment says, got: %s. Run: pip install 'overnight[traces]', or "
            "correct the variables OTEL_*. The run goes on without traces.",
            *(name, hide_secrets(str(error))),
        )


def choose_exporter(environment: Mapping[str, str]) -> str | None:
    """Return the exporter of spans that variables of OpenTelemetry ask for, as the SDK names it; None for none."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    name = environment.get("OTEL_TRACES_EXPORTER", "").strip()
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    if not name and any(environment.get(each, "").strip() for each in endpoints):
        name = "otlp"
    if name in ("", "none"):
        return None
    if name != "otlp":
        return name
    protocols = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    protocol = next((environment[each] for each in protocols if environment.get(each)), "http/protobuf")
    return "otlp_proto_grpc" if protocol == "grpc" else "otlp_proto_http"


def _install_provider(name: str) -> None:
    """Make the tracer provider of the process. Raises where the SDK or the exporter is missing."""
    from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource  # noqa: PLC0415 - an extra
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415 - the same

    if isinstance(trace.get_tracer_provider(), TracerProvider):
        return
    found = next(iter(entry_points(group="opentelemetry_traces_exporter", name=name)), None)
    if found is None:
        message = f"no exporter of the name {name} is installed"
        raise LookupError(message)
    resource = Resource.create({SERVICE_VERSION: version("overnight")})
    if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "overnight"}))
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(_make_processor(found.load()()))
    trace.set_tracer_provider(provider)


def _make_processor(exporter: SpanExporter) -> SpanProcessor:
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor  # noqa: PLC0415 - an extra

    from flows.runtime.span_exporter import RedactingExporter  # noqa: PLC0415 - the same

    hiding = RedactingExporter(exporter, error_type=ERROR_TYPE, error_message=ERROR_MESSAGE)
    # Ray ends its processes without letting them send what they still hold.
    return SimpleSpanProcessor(hiding) if is_ray_worker() else BatchSpanProcessor(hiding)


def is_ray_worker() -> bool:
    """Return whether Ray has started this process to run tasks."""
    ray = sys.modules.get("ray")
    return bool(ray and ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE)


def describe_span(attributes: Attributes) -> None:
    """Add attributes to the span of the flow run or task run that this is called in."""
    trace.get_current_span().set_attributes(attributes)


def note_error(error: BaseException) -> None:
    """Mark the span of the flow run as failed by an error.

    Prefect takes an error that is returned as a state for a success of the span, so the exporter reads this.
    """
    span = trace.get_current_span()
    if span.is_recording():
        span.record_exception(error)
        span.set_attributes({ERROR_TYPE: type(error).__name__, ERROR_MESSAGE: str(error)})


def end_span_interrupted(why: str) -> None:
    """End the span of a flow run that leaves by a notice."""
    _end_span("interrupted", why)


def end_span_paused(why: str) -> None:
    """End the span of a flow run that leaves its worker until a person has answered."""
    _end_span("paused", why)


def _end_span(event: str, why: str) -> None:
    """End the span of a flow run that Prefect's engine leaves open."""
    span = trace.get_current_span()
    if span.is_recording():
        span.add_event(event, {"overnight.reason": why})
        span.set_attribute(f"overnight.{event}", True)  # noqa: FBT003 - the API of OpenTelemetry
        span.end()


def send_trace_along() -> None:
    """Have Prefect send the trace of the step that this is called in along with tasks in other processes.

    Prefect leaves out fields of a task run that were not set when it was made, and sets the trace later.
    """
    context = TaskRunContext.get()
    if context is not None and LABELS_TRACEPARENT_KEY in context.task_run.labels:
        context.task_run.labels = dict(context.task_run.labels)


@contextmanager
def continue_trace(context: Mapping[str, Any]) -> Generator[None]:
    """Have spans of the block be in the trace of the step whose context Prefect has sent; without one, change nothing.

    Args:
        context: What prefect.context.serialize_context has made of the step.
    """
    labels = context.get("task_run_context", {}).get("task_run", {}).get("labels", {})
    traceparent = labels.get(LABELS_TRACEPARENT_KEY)
    token = otel_context.attach(propagate.extract({"traceparent": traceparent})) if traceparent else None
    try:
        yield
    finally:
        if token is not None:
            otel_context.detach(token)


def make_trace_labels() -> dict[str, str]:
    """Return the labels by which Prefect puts a flow run that this one starts into its trace; none without a trace."""
    run = flow_run()
    traceparent = run.labels.get(LABELS_TRACEPARENT_KEY) if run else None
    return {LABELS_TRACEPARENT_KEY: str(traceparent)} if traceparent else {}
