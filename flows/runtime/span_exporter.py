"""What leaves the process of its spans: no secrets, and an error status where a flow run has failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import Link, Status, StatusCode

from serving.redaction import hide_secrets


class RedactingExporter(SpanExporter):
    """An exporter that hides secrets in every text of a span before another one sends it.

    A span that names the kind of its error has the status of an error, whatever was set last.

    Args:
        exporter: Sends the spans.
        error_type: The attribute that names the kind of an error.
        error_message: The attribute that has its message.
    """

    def __init__(self, exporter: SpanExporter, *, error_type: str, error_message: str) -> None:
        self._exporter, self._error_type, self._error_message = exporter, error_type, error_message

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Export the spans without their secrets."""
        return self._exporter.export([self._redact_span(span) for span in spans])

    def shutdown(self) -> None:
        """End the exporter."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Send what the exporter holds."""
        return self._exporter.force_flush(timeout_millis)

    def _redact_span(self, span: ReadableSpan) -> ReadableSpan:
        attributes = _redact_attributes(span.attributes)
        return ReadableSpan(
            name=hide_secrets(span.name),
            context=span.context,
            parent=span.parent,
            resource=span.resource,
            attributes=attributes,
            events=[Event(each.name, _redact_attributes(each.attributes), each.timestamp) for each in span.events],
            links=[Link(each.context, _redact_attributes(each.attributes)) for each in span.links],
            kind=span.kind,
            status=self._choose_status(span.status, attributes),
            start_time=span.start_time,
            end_time=span.end_time,
            instrumentation_scope=span.instrumentation_scope,
        )

    def _choose_status(self, status: Status, attributes: Mapping[str, Any]) -> Status:
        kind = attributes.get(self._error_type)
        if kind and status.status_code is not StatusCode.ERROR:
            return Status(StatusCode.ERROR, str(attributes.get(self._error_message, kind)))
        return Status(status.status_code, hide_secrets(status.description) if status.description else None)


def _redact_attributes(attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: _redact_value(value) for name, value in (attributes or {}).items()}


def _redact_value(value: Any) -> Any:
    if isinstance(value, str):
        return hide_secrets(value)
    return tuple(_redact_value(each) for each in value) if isinstance(value, tuple | list) else value
