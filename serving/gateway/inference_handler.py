"""What Envoy asks the control plane in the course of an inference: to load models, to compare a copy, to answer.

Most requests never come here. Envoy has checked the key, the rate and the size of those that do.
"""

from __future__ import annotations

from functools import partial
from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from serving.errors import BadRequest, Unanswered
from serving.gateway.endpoint import Endpoint
from serving.gateway.envoy.messages import ACTIVATOR_REFUSED, CHOSEN_HEADER, ENDPOINT_HEADER
from serving.gateway.gateway import Gateway
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


async def activate_endpoint(gateway: Gateway, name: str) -> Response:
    """Answer once the models of an endpoint are loaded: 200 has Envoy send the request to them, an error refuse it."""
    try:
        await gateway.activate(name)
    except (BadRequest, Unanswered) as error:
        seconds = error.retry_after_s if isinstance(error, Unanswered) else None
        headers = {} if seconds is None else {"Retry-After": str(seconds)}
        # Envoy makes {"error": ...} of it.
        status = ACTIVATOR_REFUSED if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR else error.status
        return PlainTextResponse(str(error), status, headers)
    return Response()


async def compare_copy(gateway: Gateway, request: Request, name: str) -> Response:
    """Compare the answers of the shadow and of the version that served a request, of which Envoy sent a copy."""
    try:
        endpoint = gateway.endpoint(name)
        checked = await _read_request(gateway, endpoint, request)
        await endpoint.compare_shadow(checked, request.headers.get(CHOSEN_HEADER, ""))
    except (BadRequest, Unanswered):
        # The caller has the same answer from the version that serves.
        return Response(status_code=HTTPStatus.NO_CONTENT)
    return Response(status_code=HTTPStatus.NO_CONTENT)


async def answer_inference(gateway: Gateway, request: Request, name: str, version: str | None) -> Response:
    """Answer a request that Envoy can't send to a model server; every error is {"error": ...} with its status."""
    try:
        endpoint = gateway.endpoint(name)
        _check_path(request, endpoint, version)
        reply = await endpoint.infer(await _read_request(gateway, endpoint, request), version)
    except (BadRequest, Unanswered) as error:
        reply = build_error_reply(error)
    return build_response(reply)


def _check_path(request: Request, endpoint: Endpoint, version: str | None) -> None:
    """Raise BadRequest for a request that Envoy has not checked, since its path names no version as routes have it."""
    if request.headers.get(ENDPOINT_HEADER) == endpoint.name:
        return
    if version is not None:
        endpoint.find_version(version)
    message = f"A request must be a POST to /v2/models/{endpoint.name}/infer, exactly so written, got another path."
    raise BadRequest(message, status=HTTPStatus.NOT_FOUND)


async def _read_request(gateway: Gateway, endpoint: Endpoint, request: Request) -> CheckedRequest:
    limits = endpoint.route.limits
    header_length = read_header_length(request.headers.get(HEADER_LENGTH))
    async with read_body(request, gateway.memory, bytes_max=limits.bytes_max) as content:
        body = Body(content=content, header_length=header_length)
        decode = partial(decode_request_to_forward, body, endpoint.route.contract, rows_max=limits.rows_max)
        decoded, forwarded = await decode_without_blocking(decode, len(content))
        return CheckedRequest(body=forwarded, request=decoded)


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
