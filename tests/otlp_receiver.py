"""A receiver of OTLP over HTTP on loopback, which decodes the protobuf that exporters send."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.servers import serve_http


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivedSpan:
    """A span as it arrived: ids in hexadecimal digits, and its attributes by name."""

    name: str
    trace: str
    id: str
    parent: str
    links: tuple[str, ...]
    failed: bool
    message: str
    attributes: dict[str, Any]
    events: tuple[tuple[str, dict[str, Any]], ...]
    resource: dict[str, Any]
    seconds: float


@dataclass(slots=True, kw_only=True)
class OtlpReceiver:
    """What a receiver was sent, and where it listens."""

    endpoint: str = ""
    spans: list[ReceivedSpan] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which a process sends its spans here."""
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": self.endpoint}

    def find(self, name: str) -> ReceivedSpan:
        """Return the only span of a name."""
        (found,) = (span for span in self.spans if span.name == name)
        return found

    def list_children(self, parent: ReceivedSpan) -> list[str]:
        """Return the names of the spans below another one, in order."""
        return sorted(span.name for span in self.spans if span.parent == parent.id)


def read_attributes(pairs: Sequence[KeyValue]) -> dict[str, Any]:
    """Return attributes as Python's values."""
    return {pair.key: read_value(pair.value) for pair in pairs}


def read_value(value: AnyValue) -> Any:
    """Return a value as Python's."""
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [read_value(each) for each in value.array_value.values]
    return getattr(value, kind) if kind else None


def read_span(span: Span, resource: dict[str, Any]) -> ReceivedSpan:
    """Return a span of the protocol."""
    return ReceivedSpan(
        name=span.name,
        trace=span.trace_id.hex(),
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        links=tuple(link.span_id.hex() for link in span.links),
        failed=span.status.code == Status.StatusCode.STATUS_CODE_ERROR,
        message=span.status.message,
        attributes=read_attributes(span.attributes),
        events=tuple((event.name, read_attributes(event.attributes)) for event in span.events),
        resource=resource,
        seconds=(span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
    )


@contextmanager
def otlp_receiver() -> Generator[OtlpReceiver]:
    """Receive spans while the block runs."""
    received = OtlpReceiver()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if self.path != "/v1/traces" or self.headers["Content-Type"] != "application/x-protobuf":
                self.send_error(404)
                return
            request = ExportTraceServiceRequest.FromString(body)
            with lock:
                received.bodies.append(body)
                for of_resource in request.resource_spans:
                    resource = read_attributes(of_resource.resource.attributes)
                    received.spans += (
                        read_span(span, resource) for scope in of_resource.scope_spans for span in scope.spans
                    )
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

    with serve_http(Handler) as port:
        received.endpoint = f"http://127.0.0.1:{port}"
        yield received
