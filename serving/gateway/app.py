"""The gateway's web application: its routes, the checks before them, the format of errors, and the OpenAPI page."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi_offline import FastAPIOffline
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.errors import BadRequest, Unanswered
from serving.gateway.envoy.messages import ENDPOINT_HEADER, SHADOW_HEADER
from serving.gateway.gateway import Gateway
from serving.gateway.inference_handler import (
    activate_endpoint,
    build_error_reply,
    build_response,
    compare_copy,
)
from serving.gateway.routes import (
    BODY_MODELS,
    PROBLEMS_SHOWN,
    SCHEMA_REFERENCE,
    SERVER_VERSION,
    admin_router,
    get_gateway,
    v2_router,
)
from serving.gateway.upstreams import Reply
from serving.model.contract import Frozen
from serving.protocol.oip import encode_error

_JSON = {"Content-Type": "application/json"}


class Refusal(Frozen):
    """The body of every error."""

    error: str = Field(description="What must hold, what arrived, and what to do next.")


def build_app(gateway: Gateway) -> FastAPI:
    """Return the application of a gateway that is not yet open; it opens and closes with the application."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with gateway:
            app.state.gateway = gateway
            yield

    app: FastAPI = FastAPIOffline(
        title="Overnight gateway",
        version=SERVER_VERSION,
        lifespan=lifespan,
        responses={
            "4XX": {"model": Refusal, "description": "The request must change."},
            "5XX": {"model": Refusal, "description": "The gateway cannot answer now."},
        },
        redirect_slashes=False,
    )
    app.include_router(v2_router)
    app.include_router(admin_router)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid_request)
    app.add_exception_handler(BadRequest, _answer_own_error)
    app.add_exception_handler(Unanswered, _answer_own_error)
    app.add_exception_handler(Exception, _answer_unexpected_error)
    app.add_middleware(AdminPagesMiddleware)
    app.add_middleware(EnvoyMiddleware)
    _add_body_schemas(app)
    return app


class EnvoyMiddleware:
    """Answers what Envoy itself asks: to load models for a request that it holds, and to compare a copy of one.

    Envoy removes the headers by which they are known from the requests of clients.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer Envoy; pass on the requests of clients."""
        if scope["type"] == "http":
            request = Request(scope, receive)
            name = request.headers.get(ENDPOINT_HEADER)
            if name is not None and scope["path"].startswith("/activator/"):
                response = await activate_endpoint(get_gateway(request), name)
            elif name is not None and SHADOW_HEADER in request.headers:
                response = await compare_copy(get_gateway(request), request, name)
            else:
                await self._app(scope, receive, send)
                return
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)


class AdminPagesMiddleware:
    """Reserves the metrics and the OpenAPI pages for the administrator."""

    _PATH = re.compile(r"/(metrics|docs|redoc|openapi\.json|static-offline-docs)(/|$)")

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request for such a page without the administrator's key; pass on all others."""
        if scope["type"] == "http" and self._PATH.match(scope["path"]):
            request = Request(scope, receive)
            try:
                get_gateway(request).keys.check_admin_key_or_password(request.headers.get("authorization"))
            except BadRequest as error:
                response = build_response(build_error_reply(error))
                response.headers["WWW-Authenticate"] = 'Basic realm="Overnight gateway", Bearer'
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


# Starlette types its handlers for any exception, and calls each one only with its own.


async def _answer_http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - see above
    headers = {**_JSON, **(error.headers or {})}
    message = f"{error.detail}. The page at /docs lists the paths and methods."
    return build_response(Reply(status=error.status_code, content=encode_error(message), headers=headers))


async def _answer_own_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, BadRequest | Unanswered)  # noqa: S101 - see above
    return build_response(build_error_reply(error))


async def _answer_invalid_request(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - see above
    problems = error.errors()[:PROBLEMS_SHOWN]
    found = "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in problems)
    return build_response(build_error_reply(BadRequest(f"The request must be as described at /docs, got {found}.")))


async def _answer_unexpected_error(_request: Request, _error: Exception) -> Response:
    """Answer for a mistake of the gateway's own; its traceback is in the log."""
    message = "The gateway failed on this request because of an error of its own. Its log has the traceback."
    return build_response(Reply(status=HTTPStatus.INTERNAL_SERVER_ERROR, content=encode_error(message), headers=_JSON))


def _add_body_schemas(app: FastAPI) -> None:
    """Add the schemas of the bodies that routes read themselves to the OpenAPI document."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, routes=app.routes)
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            for model in BODY_MODELS:
                schema = model.model_json_schema(ref_template=SCHEMA_REFERENCE)
                schemas.update(schema.pop("$defs", {}))
                schemas[model.__name__] = schema
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
