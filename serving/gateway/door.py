"""The door of an endpoint: from an HTTP request to the answer, and what is written down of it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from serving.errors import BadRequest, Unanswered
from serving.gateway.body import body
from serving.gateway.endpoint import Endpoint
from serving.gateway.gateway import Gateway
from serving.gateway.metering import Metered
from serving.gateway.upstream import Call, Reply
from serving.protocol.oip import (
    HEADER_LENGTH,
    Body,
    decode_request_to_forward,
    error_body,
    read_header_length,
    run_aside,
)

VERSION_HEADER = "Overnight-Version"
_REQUEST_TIMEOUT, _TOO_LARGE, _UNAUTHORIZED = 408, 413, 401
_JSON = "application/json"


@dataclass(slots=True, kw_only=True)
class _Seen:
    """What is known of a request so far."""

    rows: int = 0
    size: int = 0


async def infer(gateway: Gateway, request: Request, name: str, version: str | None) -> Response:
    """Answer POST /v2/models/NAME[/versions/VERSION]/infer; every error is {"error": ...} with its status."""
    at_us, began = time.time_ns() // 1000, time.perf_counter()
    try:
        endpoint = gateway.endpoint(name)
    except BadRequest as error:
        return respond(refused(error))
    seen = _Seen()
    try:
        reply = await _answered(gateway, endpoint, request, version, seen)
    except (BadRequest, Unanswered) as error:
        reply = refused(error)
    seconds = time.perf_counter() - began
    gateway.metrics.requests.labels(name, reply.status).inc()
    gateway.metrics.seconds.labels(name).observe(seconds)
    gateway.meter.add(
        Metered(
            at_us=at_us,
            endpoint=name,
            version=reply.version,
            rows=seen.rows,
            size=seen.size,
            status=reply.status,
            latency_ms=round(seconds * 1000, 3),
        )
    )
    return respond(reply)


async def _answered(gateway: Gateway, endpoint: Endpoint, request: Request, version: str | None, seen: _Seen) -> Reply:
    """From the cheapest check to the dearest: who asks, how often, how much, what; then the servers."""
    route = endpoint.route
    if route.keys:
        gateway.keys.check(request.headers.get("authorization"), route.keys)
    header_length = read_header_length(request.headers.get(HEADER_LENGTH))
    with endpoint.admitted():
        receiving = asyncio.timeout(route.limits.timeout_s)
        try:
            async with receiving, body(request, gateway.memory, bytes_max=route.limits.bytes_max) as content:
                receiving.reschedule(None)
                seen.size = len(content)
                given = Body(content=content, header_length=header_length)
                decode = partial(decode_request_to_forward, given, route.contract, rows_max=route.limits.rows_max)
                asked, checked = await run_aside(decode, seen.size)
                seen.rows = asked.rows
                return await endpoint.infer(Call(body=checked, request=asked), version)
        except TimeoutError:
            message = f"The body must come in within {route.limits.timeout_s:g} s, and did not."
            raise BadRequest(message, status=_REQUEST_TIMEOUT) from None


def refused(error: BadRequest | Unanswered) -> Reply:
    """Return the reply for an error of this project."""
    headers = {"Content-Type": _JSON}
    if isinstance(error, Unanswered) and error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.status == _UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in (_REQUEST_TIMEOUT, _TOO_LARGE):
        # The rest of the body is not read.
        headers["Connection"] = "close"
    return Reply(status=error.status, content=error_body(str(error)), headers=headers)


def respond(reply: Reply) -> Response:
    """Return a reply as HTTP has it."""
    headers = dict(reply.headers)
    if reply.version is not None:
        headers[VERSION_HEADER] = reply.version
    return Response(reply.content, reply.status, headers)
