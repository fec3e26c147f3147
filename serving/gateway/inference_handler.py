"""The handler of inference requests: authentication, limits, contract, then the endpoint; every request is metered."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import Response

from serving.errors import BadRequest, Unanswered
from serving.gateway.endpoint import Endpoint
from serving.gateway.gateway import Gateway
from serving.gateway.metering import MeteredRequest
from serving.gateway.request_body import read_body
from serving.gateway.upstreams import CheckedRequest, Reply
from serving.protocol.oip import (
    HEADER_LENGTH,
    Body,
    decode_request_to_forward,
    decode_without_blocking,
    encode_error,
    read_header_length,
)

_VERSION_HEADER = "Overnight-Version"


@dataclass(slots=True, kw_only=True)
class _RequestSize:
    """What is known of a request's size so far."""

    rows: int = 0
    bytes: int = 0


async def handle_inference(gateway: Gateway, request: Request, name: str, version: str | None) -> Response:
    """Answer POST /v2/models/NAME[/versions/VERSION]/infer; every error is {"error": ...} with its status."""
    at_us, began = time.time_ns() // 1000, time.perf_counter()
    try:
        endpoint = gateway.endpoint(name)
    except BadRequest as error:
        return build_response(build_error_reply(error))
    size = _RequestSize()
    try:
        reply = await _answer(gateway, endpoint, request, version, size)
    except (BadRequest, Unanswered) as error:
        reply = build_error_reply(error)
    seconds = time.perf_counter() - began
    gateway.metrics.requests.labels(name, reply.status).inc()
    gateway.metrics.seconds.labels(name).observe(seconds)
    gateway.metering_log.add(
        MeteredRequest(
            at_us=at_us,
            endpoint=name,
            version=reply.version,
            rows=size.rows,
            size=size.bytes,
            status=reply.status,
            latency_ms=round(seconds * 1000, 3),
        )
    )
    return build_response(reply)


async def _answer(
    gateway: Gateway, endpoint: Endpoint, request: Request, version: str | None, size: _RequestSize
) -> Reply:
    # The checks come in the order of their cost, the cheapest first.
    route = endpoint.route
    if route.keys:
        gateway.keys.check_api_key(request.headers.get("authorization"), route.keys)
    header_length = read_header_length(request.headers.get(HEADER_LENGTH))
    with endpoint.admit_request():
        body_timeout = asyncio.timeout(route.limits.timeout_s)
        try:
            async with body_timeout, read_body(request, gateway.memory, bytes_max=route.limits.bytes_max) as content:
                body_timeout.reschedule(None)
                size.bytes = len(content)
                body = Body(content=content, header_length=header_length)
                decode = partial(decode_request_to_forward, body, route.contract, rows_max=route.limits.rows_max)
                decoded, forwarded = await decode_without_blocking(decode, len(content))
                size.rows = decoded.rows
                return await endpoint.infer(CheckedRequest(body=forwarded, request=decoded), version)
        except TimeoutError:
            message = f"The body must be complete within {route.limits.timeout_s:g} s, but is not."
            raise BadRequest(message, status=HTTPStatus.REQUEST_TIMEOUT) from None


def build_error_reply(error: BadRequest | Unanswered) -> Reply:
    """Return the reply for an error of this project."""
    headers = {"Content-Type": "application/json"}
    if isinstance(error, Unanswered) and error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.REQUEST_ENTITY_TOO_LARGE):
        # The rest of the body is not read.
        headers["Connection"] = "close"
    return Reply(status=error.status, content=encode_error(str(error)), headers=headers)


def build_response(reply: Reply) -> Response:
    """Return a reply as an HTTP response, with the version that answered in a header."""
    headers = dict(reply.headers)
    if reply.version is not None:
        headers[_VERSION_HEADER] = reply.version
    return Response(reply.content, reply.status, headers)
