"""HTTP to the upstreams: one pool of connections, and a request that is sent a second time only where that is safe.

aiohttp and not httpx: its client takes a fraction of the time for each request.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import aiohttp

from serving.errors import Unanswered
from serving.gateway.upstream import log_upstream, no_answer

ANSWER_BYTES_MAX = 256 << 20
_CONNECT_S_MAX, _HEALTH_S_MAX = 5.0, 5.0
_OK = 200
_BLOCK, _AT_ONCE_BYTES_MAX = 1 << 16, 1 << 20
_NEVER_THERE = (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError)
_GONE = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, *_NEVER_THERE)
_CUT_OFF = (*_GONE, aiohttp.ClientPayloadError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What a server sent back."""

    status: int
    content: bytes
    headers: Mapping[str, str]


class Http:
    """The connections to all upstreams. To be made and closed in the event loop that uses it."""

    def __init__(self) -> None:
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_mark_reused)
        self._pooled = _session(aiohttp.TCPConnector(limit=0, ttl_dns_cache=30), trace)
        self._fresh = _session(aiohttp.TCPConnector(limit=0, force_close=True))

    async def close(self) -> None:
        """Close every connection."""
        await self._pooled.close()
        await self._fresh.close()

    async def send(self, method: str, url: str, content: bytes | None, headers: Mapping[str, str]) -> Answered:
        """Send a request and return what comes back. Raises Unanswered, with the reason.

        A server may close an idle connection at the moment that it is used again, and then has not seen the request.
        Where a connection that was used before breaks before a byte of the answer, the request is sent once more, on
        one of its own; inference changes nothing, should the server have seen it after all.
        """
        used = SimpleNamespace(reused=False)
        try:
            return await _exchange(self._pooled, method, url, content, headers, used)
        except _GONE as error:
            if not used.reused or isinstance(error, _NEVER_THERE):
                raise no_answer(url, error) from None
        except aiohttp.ClientError as error:
            raise _unanswered(url, error) from None
        try:
            return await _exchange(self._fresh, method, url, content, headers, None)
        except aiohttp.ClientError as error:
            raise _unanswered(url, error) from None

    async def healthy(self, url: str) -> bool:
        """Say whether a server answers a GET with 200, within five seconds."""
        try:
            async with asyncio.timeout(_HEALTH_S_MAX):
                answered = await self.send("GET", url, None, {})
        except (Unanswered, TimeoutError):
            return False
        return answered.status == _OK


def _session(connector: aiohttp.TCPConnector, *traces: aiohttp.TraceConfig) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        # An answer goes back as it comes, and the client asked this server for nothing.
        headers={"Accept-Encoding": "identity"},
        # The caller's deadline is the time-out; what is bounded here is how long a dead host can hold a connection.
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S_MAX),
        trace_configs=list(traces),
    )


async def _exchange(
    session: aiohttp.ClientSession,
    method: str,
    url: str,
    content: bytes | None,
    headers: Mapping[str, str],
    used: SimpleNamespace | None,
) -> Answered:
    # A large body is written in blocks, between which the event loop serves others.
    data = io.BytesIO(content) if content is not None and len(content) > _AT_ONCE_BYTES_MAX else content
    async with session.request(
        method, url, data=data, headers=headers, allow_redirects=False, trace_request_ctx=used
    ) as response:
        if (response.content_length or 0) > ANSWER_BYTES_MAX:
            raise _too_long(url)
        received = await _read(response, url)
        return Answered(status=response.status, content=received, headers=response.headers)


async def _read(response: aiohttp.ClientResponse, url: str) -> bytes:
    if response.content_length is not None:
        return await response.read()
    parts = bytearray()
    async for block in response.content.iter_chunked(_BLOCK):
        parts += block
        if len(parts) > ANSWER_BYTES_MAX:
            raise _too_long(url)
    return bytes(parts)


def _unanswered(url: str, error: aiohttp.ClientError) -> Unanswered:
    return no_answer(url, error, status=503 if isinstance(error, _CUT_OFF) else 502)


def _too_long(url: str) -> Unanswered:
    log_upstream(url, f"more than {ANSWER_BYTES_MAX} bytes")
    message = f"The answer of the model server must have at most {ANSWER_BYTES_MAX} bytes, got more."
    return Unanswered(message, status=502)


async def _mark_reused(_session: aiohttp.ClientSession, context: SimpleNamespace, _params: object) -> None:
    context.trace_request_ctx.reused = True
