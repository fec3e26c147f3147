"""The model servers behind the gateway: the HTTP client to them, and the adapter for V2 servers.

Triton, Ray Serve, BentoML, KServe and MLServer speak V2. A request is forwarded to them as it came, binary data
included. The adapter for MLflow's scoring server is in `mlflow_scoring`.
"""

from __future__ import annotations

import asyncio
import io
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import aiohttp
import orjson

from serving.errors import Unanswered
from serving.gateway.route import ServedVersion
from serving.protocol.oip import HEADER_LENGTH, Body, InferRequest, encode_error, read_header_length

_ANSWER_BYTES_MAX = 256 << 20
_CONNECT_S_MAX, _HEALTH_S_MAX = 5.0, 5.0
_BLOCK_BYTES, _UNBLOCKED_BYTES_MAX = 1 << 16, 1 << 20
_ERROR_CHARACTERS_MAX = 2000
_LOG_INTERVAL_S, _LOGGED_URLS_MAX = 1.0, 1000

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRequest:
    """A request that satisfies the contract: its values, and a body that every JSON parser reads as these values."""

    body: Body
    request: InferRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What the client gets: a V2 answer, or {"error": ...} with its status; and the version that answered."""

    status: int
    content: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    version: str | None = None

    @property
    def header_length(self) -> int | None:
        """How many bytes of the content are JSON, None for all. Raises BadRequest where the header is no number."""
        return read_header_length(self.headers.get(HEADER_LENGTH))


class V2Upstream:
    """One version on a server that speaks V2; the adapter for another protocol has the same methods."""

    def __init__(self, http: HttpClient, served: ServedVersion) -> None:
        self._http = http
        self._url = f"{served.url.rstrip('/')}/v2/models/{quote(served.upstream_model, safe='')}"
        if served.upstream_version is not None:
            self._url += f"/versions/{quote(served.upstream_version, safe='')}"

    async def infer(self, request: CheckedRequest) -> Reply:
        """Forward the bytes of a request, and return those of the answer, errors included. Raises Unanswered.

        The caller limits the time: cancelling the call closes its connection.
        """
        response = await self._http.send("POST", f"{self._url}/infer", request.body.content, request.body.headers)
        if response.status != HTTPStatus.OK:
            return convert_error(response, self._url)
        headers = {"Content-Type": response.headers.get("Content-Type", "application/json")}
        if length := response.headers.get(HEADER_LENGTH):
            headers[HEADER_LENGTH] = length
        return Reply(status=response.status, content=response.content, headers=headers)

    async def is_ready(self) -> bool:
        """Return whether the server has this version of the model ready."""
        return await self._http.is_healthy(f"{self._url}/ready")


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpResponse:
    """What a server sent back."""

    status: int
    content: bytes
    headers: Mapping[str, str]


class HttpClient:
    """The connections to all model servers. To be created and closed in the event loop that uses it.

    It uses aiohttp, whose client takes a fraction of httpx's time for each request.
    """

    def __init__(self) -> None:
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_mark_reused)
        self._pooled = _make_session(aiohttp.TCPConnector(limit=0, ttl_dns_cache=30), trace)
        self._fresh = _make_session(aiohttp.TCPConnector(limit=0, force_close=True))

    async def close(self) -> None:
        """Close every connection."""
        await self._pooled.close()
        await self._fresh.close()

    async def send(self, method: str, url: str, content: bytes | None, headers: Mapping[str, str]) -> HttpResponse:
        """Send a request and return the response. Raises Unanswered, with the reason.

        A server may close an idle connection at the moment of its next use, and has not seen the request then. Where
        a reused connection breaks before the first byte of the response, the request is sent once more, on a
        connection of its own. Should the server have seen it after all: inference changes nothing.
        """
        connection = SimpleNamespace(is_reused=False)
        try:
            return await _exchange(self._pooled, method, url, content, headers, connection)
        except _DISCONNECTED as error:
            if not connection.is_reused or isinstance(error, _NEVER_CONNECTED):
                raise _log_unanswered(url, error) from None
        except aiohttp.ClientError as error:
            raise _convert_client_error(url, error) from None
        try:
            return await _exchange(self._fresh, method, url, content, headers, None)
        except aiohttp.ClientError as error:
            raise _convert_client_error(url, error) from None

    async def is_healthy(self, url: str, *, timeout_s: float = _HEALTH_S_MAX) -> bool:
        """Return whether a server answers a GET with 200 in time."""
        try:
            async with asyncio.timeout(timeout_s):
                response = await self.send("GET", url, None, {})
        except (Unanswered, TimeoutError):
            return False
        return response.status == HTTPStatus.OK


_NEVER_CONNECTED = (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError)
_DISCONNECTED = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, *_NEVER_CONNECTED)


def _make_session(connector: aiohttp.TCPConnector, *traces: aiohttp.TraceConfig) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        # Answers are forwarded unchanged, and the client did not ask this server for compression.
        headers={"Accept-Encoding": "identity"},
        # The caller limits the time of a request. This limits how long a dead host can hold a connection.
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S_MAX),
        trace_configs=list(traces),
    )


async def _exchange(
    session: aiohttp.ClientSession,
    method: str,
    url: str,
    content: bytes | None,
    headers: Mapping[str, str],
    connection: SimpleNamespace | None,
) -> HttpResponse:
    # A large body is written in blocks, between which the event loop serves other requests.
    data = io.BytesIO(content) if content is not None and len(content) > _UNBLOCKED_BYTES_MAX else content
    async with session.request(
        method, url, data=data, headers=headers, allow_redirects=False, trace_request_ctx=connection
    ) as response:
        if (response.content_length or 0) > _ANSWER_BYTES_MAX:
            raise _too_large(url)
        received = await _read_content(response, url)
        return HttpResponse(status=response.status, content=received, headers=response.headers)


async def _read_content(response: aiohttp.ClientResponse, url: str) -> bytes:
    if response.content_length is not None:
        return await response.read()
    received = bytearray()
    async for block in response.content.iter_chunked(_BLOCK_BYTES):
        received += block
        if len(received) > _ANSWER_BYTES_MAX:
            raise _too_large(url)
    return bytes(received)


def _convert_client_error(url: str, error: aiohttp.ClientError) -> Unanswered:
    is_cut_off = isinstance(error, (*_DISCONNECTED, aiohttp.ClientPayloadError))
    return _log_unanswered(url, error, status=HTTPStatus.SERVICE_UNAVAILABLE if is_cut_off else HTTPStatus.BAD_GATEWAY)


def _too_large(url: str) -> Unanswered:
    log_upstream_error(url, f"more than {_ANSWER_BYTES_MAX} bytes")
    message = f"The answer of the model server must have at most {_ANSWER_BYTES_MAX} bytes, got more."
    return Unanswered(message, status=HTTPStatus.BAD_GATEWAY)


async def _mark_reused(_session: aiohttp.ClientSession, context: SimpleNamespace, _params: object) -> None:
    context.trace_request_ctx.is_reused = True


# Statuses that mean the same to the client from a model server as from the gateway. All others become 502.
_FORWARDED_STATUSES = frozenset({400, 413, 422, 429, 500, 502, 503, 504})


def convert_error(response: HttpResponse, url: str) -> Reply:
    """Return the reply for an error of a model server: {"error": ...}, whatever the format of the server's error."""
    reason = _read_reason(response.content)
    message = remove_addresses(reason)
    if response.status >= HTTPStatus.INTERNAL_SERVER_ERROR or response.status == HTTPStatus.NOT_FOUND:
        log_upstream_error(url, f"{response.status}: {reason}")
    status = response.status if response.status in _FORWARDED_STATUSES else HTTPStatus.BAD_GATEWAY
    if response.status == HTTPStatus.NOT_FOUND:
        status = HTTPStatus.SERVICE_UNAVAILABLE
        message = f"The model server must have the model, got 404: {message}. Deploy the version again."
    headers = {"Content-Type": "application/json"}
    if seconds := response.headers.get("Retry-After"):
        headers["Retry-After"] = seconds
    return Reply(status=status, content=encode_error(message), headers=headers)


def _read_reason(content: bytes) -> str:
    try:
        reason: Any = orjson.loads(content)
    except orjson.JSONDecodeError:
        reason = content.decode(errors="replace")
    if isinstance(reason, dict):
        reason = reason.get("error", reason.get("detail", reason))
    text = reason if isinstance(reason, str) else orjson.dumps(reason).decode()
    return text[:_ERROR_CHARACTERS_MAX] or "The model server gave no reason."


def _log_unanswered(url: str, error: Exception, *, status: int = HTTPStatus.SERVICE_UNAVAILABLE) -> Unanswered:
    """Log that a model server gave no answer, and return the error for the client, which does not name the server."""
    log_upstream_error(url, f"{type(error).__name__}: {error}")
    message = f"The model server of the endpoint must answer, got {type(error).__name__}. Try again later."
    return Unanswered(message, status=status)


_logged_at_s: dict[str, float] = {}


def log_upstream_error(url: str, found: str) -> None:
    """Log an error of a model server with its address, at most once a second for each address."""
    now_s = time.monotonic()
    if now_s - _logged_at_s.get(url, -_LOG_INTERVAL_S) < _LOG_INTERVAL_S:
        return
    if len(_logged_at_s) >= _LOGGED_URLS_MAX:
        _logged_at_s.clear()
    _logged_at_s[url] = now_s
    _log.warning("The model server at %s must answer, got %s", url, found)


_ADDRESS = re.compile(
    r"(?P<url>\b[a-z][a-z0-9+.-]*://[^\s'\"]+)"
    r"|(?P<host>\b[\w-]+(?:\.[\w-]+)*:\d{2,5}\b|\b\d{1,3}(?:\.\d{1,3}){3}\b|\[[0-9a-f]*:[0-9a-f:]+\](?::\d+)?)"
    r"|(?P<path>(?<![\w.<])/(?:[\w.@+-]+/)+[\w.@+-]*)",
    re.IGNORECASE,
)


def remove_addresses(text: str) -> str:
    """Return a server's message without addresses and paths, which clients must not see."""
    return _ADDRESS.sub("(left out)", text)
