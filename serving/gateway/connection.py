"""What one connection may ask of the gateway before a request of it is there: bytes, headers and time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, ClassVar

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from serving.protocol.oip import error_body

_BAD_REQUEST, _TIMEOUT, _TOO_LARGE = 400, 408, 431
# Bytes around a body in chunks, for each byte of it, that are taken without a question.
_CHUNK_OVERHEAD = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """What a connection may take: bytes of headers and their number, seconds for them, connections at once."""

    head_bytes_max: int = 32 << 10
    headers_max: int = 100
    head_s_max: float = 10.0
    connections_max: int = 4096


class BoundedProtocol(HttpToolsProtocol):
    """Uvicorn's protocol, which by itself waits for headers as long, and holds as many, as a client likes.

    A client that has sent no request within `head_s_max` is sent away: on a connection that is new, in the middle of
    headers, and where a request was answered before its body was there. How long a request waits for its own body,
    and how long a connection may be idle after it, others say.
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
        self._receiving = self._in_head = False
        self._head_bytes = 0
        self._extra_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or close it at once where there are as many as may be."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections_max:
            transport.abort()
            return
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on, within the limits."""
        if self._receiving:
            self._extra_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        self._extra_bytes = max(0, self._extra_bytes)
        if self._extra_bytes > self.limits.head_bytes_max:
            # Headers that do not end, or what else stands around a body.
            self._refuse(_TOO_LARGE, self._too_large())
        elif self._deadline is None and (self.cycle is None or self.cycle.response_complete):
            # Something came, and it is no request yet.
            self._wait()

    def on_message_begin(self) -> None:
        """Begin to count."""
        super().on_message_begin()
        self._receiving = self._in_head = True
        self._head_bytes = self._extra_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Take a piece of the path."""
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, or a trailer behind a body in chunks."""
        super().on_header(name, value)
        self._count(len(name) + len(value))

    def on_headers_complete(self) -> None:
        """Have the request answered."""
        self._stop_waiting()
        self._in_head = False
        self._extra_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        super().on_body(body)
        self._extra_bytes -= _CHUNK_OVERHEAD * len(body)

    def on_message_complete(self) -> None:
        """Note that the request is there in full."""
        self._receiving = False
        self._extra_bytes = 0
        self._stop_waiting()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Wait for the rest of a request that is answered already, as long as for a new one."""
        super().on_response_complete()
        if self._receiving and not self.transport.is_closing():
            self._wait()

    def send_400_response(self, msg: str) -> None:
        """Say what was wrong with what came, as every error of the gateway is said."""
        status, message = self._refusal or (_BAD_REQUEST, f"The request must be HTTP/1.1, got: {msg}")
        self._refuse(status, message)

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self.limits.head_bytes_max or len(self.headers) > self.limits.headers_max:
            self._refusal = _TOO_LARGE, self._too_large()
            raise ValueError(self._refusal[1])

    def _too_large(self) -> str:
        limits = self.limits
        return f"A request may have {limits.headers_max} headers of {limits.head_bytes_max} bytes in all, got more."

    def _wait(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.limits.head_s_max, self._give_up)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        if self._in_head:
            message = f"The headers must be there within {self.limits.head_s_max:g} s, and were not."
            self._refuse(_TIMEOUT, message)
        else:
            self.transport.abort()

    def _refuse(self, status: int, message: str) -> None:
        self._stop_waiting()
        if self.transport.is_closing():
            return
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering or (self._receiving and not self._in_head):
            # A request has one answer.
            self.transport.abort()
            return
        content = error_body(message)
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(content)
        self.transport.write(STATUS_LINE[status] + head + content)
        self.transport.close()


def bounded_protocol(limits: ConnectionLimits) -> type[BoundedProtocol]:
    """Return the protocol with these limits, as uvicorn takes it."""
    return type("BoundedProtocol", (BoundedProtocol,), {"limits": limits})
