"""The connections of clients: limits on their number, on the headers of a request, and on the time for them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ClassVar

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from serving.protocol.oip import encode_error

# Bytes around a chunked body that are accepted for each byte of the body.
_CHUNK_OVERHEAD = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """Limits on the headers of a request (path included), on the time for them, and on the number of connections."""

    head_bytes_max: int = 32 << 10
    headers_max: int = 100
    head_s_max: float = 10.0
    connections_max: int = 4096


def build_protocol(limits: ConnectionLimits) -> type[LimitedHttpProtocol]:
    """Return uvicorn's protocol with these limits."""
    return type("LimitedHttpProtocol", (LimitedHttpProtocol,), {"limits": limits})


class LimitedHttpProtocol(HttpToolsProtocol):
    """Uvicorn's protocol, which has no limits of its own on the size of headers and the time for them.

    A client that has sent no complete headers within `head_s_max` is disconnected: on a new connection, in the middle
    of headers, and where a request was answered before its body came. The time for a body is limited by the endpoint,
    and the time that a connection may be idle after a request by uvicorn.
    """

    limits: ClassVar[ConnectionLimits] = ConnectionLimits()

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._refusal: tuple[int, str] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._is_receiving = self._is_in_head = False
        self._head_bytes = 0
        self._extra_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection, or close it where there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections_max:
            transport.abort()
            return
        self._start_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the deadline of a closed connection."""
        self._cancel_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse bytes, within the limits."""
        if self._is_receiving:
            self._extra_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        self._extra_bytes = max(0, self._extra_bytes)
        if self._extra_bytes > self.limits.head_bytes_max:
            # The headers do not end, or there is too much around the chunks of a body.
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, self._describe_head_limits())
        elif self._deadline is None and (self.cycle is None or self.cycle.response_complete):
            # There are bytes, but no complete request yet.
            self._start_deadline()

    def on_message_begin(self) -> None:
        """Start to count the bytes of a request."""
        super().on_message_begin()
        self._is_receiving = self._is_in_head = True
        self._head_bytes = self._extra_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Count a piece of the path."""
        super().on_url(url)
        self._count_head_bytes(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header, or a trailer after a chunked body."""
        super().on_header(name, value)
        self._count_head_bytes(len(name) + len(value))

    def on_headers_complete(self) -> None:
        """Cancel the deadline, and have the request answered."""
        self._cancel_deadline()
        self._is_in_head = False
        self._extra_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        super().on_body(body)
        self._extra_bytes -= _CHUNK_OVERHEAD * len(body)

    def on_message_complete(self) -> None:
        """Note that the request is complete."""
        self._is_receiving = False
        self._extra_bytes = 0
        self._cancel_deadline()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Limit the time for the rest of a request that is answered already."""
        super().on_response_complete()
        if self._is_receiving and not self.transport.is_closing():
            self._start_deadline()

    def send_400_response(self, msg: str) -> None:
        """Answer a request that cannot be parsed, in the format of the gateway's other errors."""
        status, message = self._refusal or (HTTPStatus.BAD_REQUEST, f"The request must be HTTP/1.1, got: {msg}")
        self._refuse(status, message)

    def _count_head_bytes(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self.limits.head_bytes_max or len(self.headers) > self.limits.headers_max:
            self._refusal = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, self._describe_head_limits()
            raise ValueError(self._refusal[1])

    def _describe_head_limits(self) -> str:
        limits = self.limits
        return f"A request may have {limits.headers_max} headers of {limits.head_bytes_max} bytes in all, got more."

    def _start_deadline(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.limits.head_s_max, self._disconnect)

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _disconnect(self) -> None:
        self._deadline = None
        if self._is_in_head:
            message = f"The headers must be complete within {self.limits.head_s_max:g} s, but are not."
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, message)
        else:
            self.transport.abort()

    def _refuse(self, status: int, message: str) -> None:
        self._cancel_deadline()
        if self.transport.is_closing():
            return
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering or (self._is_receiving and not self._is_in_head):
            # The request has an answer already, or gets one.
            self.transport.abort()
            return
        content = encode_error(message)
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(content)
        self.transport.write(STATUS_LINE[status] + head + content)
        self.transport.close()
