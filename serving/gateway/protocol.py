"""The routes of the Open Inference Protocol, V2, and Prometheus's page."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import PlainTextResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import Field
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.gateway import openapi
from serving.gateway.door import infer
from serving.gateway.gateway import Gateway
from serving.model.contract import Frozen
from serving.protocol.oip import ModelMetadata, RequestDocument, ServerMetadata, model_metadata

SERVER_NAME, SERVER_VERSION = "overnight-gateway", "0.1.0"
_PLATFORM = "overnight"
_OK, _UNAVAILABLE = 200, 503


class Live(Frozen):
    """Whether the gateway runs."""

    live: bool = Field(description="Always true: a gateway that does not run does not answer.")


class Ready(Frozen):
    """Whether the gateway takes requests."""

    ready: bool = Field(description="Whether it does.")


class ModelReady(Frozen):
    """Whether a request to a model would be answered."""

    name: str = Field(description="The model's name.")
    ready: bool = Field(description="Whether it would; the status is 503 where not.")


def opened(request: Request) -> Gateway:
    """Return the gateway that a request came to."""
    gateway: Gateway = request.app.state.gateway
    return gateway


def _allowed(name: str, request: Request) -> None:
    """Raise BadRequest unless whoever asks may ask this endpoint."""
    gateway = opened(request)
    if keys := gateway.endpoint(name).route.keys:
        gateway.keys.check(request.headers.get("authorization"), keys)


Open = Annotated[Gateway, Depends(opened)]
# The page at /docs says by it where a key is needed; the keys themselves are checked by hand.
Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False, scheme_name="API key"))]

administrator_bearer = HTTPBearer(auto_error=False, scheme_name="Administrator's key")

router = APIRouter(tags=["Open Inference Protocol"])


@router.get("/v2")
async def server() -> ServerMetadata:
    """Return the name, version and extensions of the gateway."""
    return ServerMetadata(name=SERVER_NAME, version=SERVER_VERSION)


@router.get("/v2/health/live")
async def live() -> Live:
    """Say that the gateway runs."""
    return Live(live=True)


@router.get("/v2/health/ready")
async def ready() -> Ready:
    """Say that the gateway takes requests."""
    return Ready(ready=True)


@router.get("/v2/models/{name}", dependencies=[Depends(_allowed)])
async def model(name: str, gateway: Open, _: Bearer) -> ModelMetadata:
    """Return what a model takes and gives, and its versions."""
    route = gateway.endpoint(name).route
    versions = [each.version for each in route.versions]
    return model_metadata(name, route.contract, versions=versions, platform=_PLATFORM)


@router.get("/v2/models/{name}/versions/{version}", dependencies=[Depends(_allowed)])
async def model_version(name: str, version: str, gateway: Open, _: Bearer) -> ModelMetadata:
    """Return what a version of a model takes and gives."""
    endpoint = gateway.endpoint(name)
    versions = [endpoint.named(version).version]
    return model_metadata(name, endpoint.route.contract, versions=versions, platform=_PLATFORM)


@router.get("/v2/models/{name}/ready", dependencies=[Depends(_allowed)])
async def model_ready(name: str, gateway: Open, response: Response, _: Bearer) -> ModelReady:
    """Say whether a request to a model would be answered; one whose models sleep is."""
    return _ready(name, response, ready=await gateway.endpoint(name).ready())


@router.get("/v2/models/{name}/versions/{version}/ready", dependencies=[Depends(_allowed)])
async def version_ready(name: str, version: str, gateway: Open, response: Response, _: Bearer) -> ModelReady:
    """Say the same of one version."""
    return _ready(name, response, ready=await gateway.endpoint(name).version_ready(version))


@router.post("/v2/models/{name}/infer", openapi_extra=openapi.body(RequestDocument))
async def infer_any(name: str, request: Request) -> Response:
    """Predict, by a version that the gateway chooses."""
    return await infer(opened(request), request, name, None)


@router.post("/v2/models/{name}/versions/{version}/infer", openapi_extra=openapi.body(RequestDocument))
async def infer_version(name: str, version: str, request: Request) -> Response:
    """Predict, by this version."""
    return await infer(opened(request), request, name, version)


@router.get(
    "/metrics", tags=["Operations"], response_class=PlainTextResponse, dependencies=[Depends(administrator_bearer)]
)
async def metrics(gateway: Open) -> Response:
    """Return the metrics in Prometheus's text format, to the administrator alone."""
    return Response(gateway.metrics_page(), media_type=CONTENT_TYPE_LATEST)


_INFER = re.compile(r"/v2/models/(?P<name>[^/]+)(?:/versions/(?P<version>[^/]+))?/infer")


class InferFirst:
    """Finds the way of inference requests before the router does, which tries its routes one by one.

    That and its handling of parameters would take as long as all the rest that the gateway does for a request.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer an inference request; pass on everything else."""
        match = _INFER.fullmatch(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if match is None:
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        response = await infer(opened(request), request, match["name"], match["version"])
        await response(scope, receive, send)


def _ready(name: str, response: Response, *, ready: bool) -> ModelReady:
    response.status_code = _OK if ready else _UNAVAILABLE
    return ModelReady(name=name, ready=ready)
