"""The gateway's HTTP: V2 for clients; for the administrator /admin, /metrics, and the OpenAPI page at /docs."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.errors import BadRequest, Unanswered
from serving.gateway import admin, openapi, protocol
from serving.gateway.door import refused, respond
from serving.gateway.gateway import Gateway
from serving.gateway.upstream import Reply
from serving.protocol.oip import error_body

_ERROR = 500
_PROBLEMS_SHOWN = 5
_JSON = {"Content-Type": "application/json"}
_PAGES = re.compile(r"/(metrics|docs|redoc|openapi\.json|static-offline-docs)(/|$)")


def application(gateway: Gateway) -> FastAPI:
    """Return the application of a gateway that is not yet open; it opens with the application, and closes with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with gateway:
            app.state.gateway = gateway
            yield

    app: FastAPI = FastAPIOffline(
        title="Overnight gateway",
        version=protocol.SERVER_VERSION,
        lifespan=lifespan,
        responses=openapi.ERRORS,
        redirect_slashes=False,
    )
    app.include_router(protocol.router)
    app.include_router(admin.router)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(BadRequest, _refused)
    app.add_exception_handler(Unanswered, _refused)
    app.add_exception_handler(Exception, _failed)
    app.add_middleware(ReadByAdministrator)
    app.add_middleware(protocol.InferFirst)
    openapi.document(app)
    return app


class ReadByAdministrator:
    """Keeps the pages about the gateway from everybody but its administrator: metrics, and the API's description."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request, unless it is for such a page and carries another key."""
        if scope["type"] == "http" and _PAGES.match(scope["path"]):
            request = Request(scope, receive)
            try:
                protocol.opened(request).keys.check_reader(request.headers.get("authorization"))
            except BadRequest as error:
                response = respond(refused(error))
                response.headers["WWW-Authenticate"] = 'Basic realm="Overnight gateway", Bearer'
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


# Starlette has handlers take any exception, and calls each with its own.


async def _http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - see above
    headers = {**_JSON, **(error.headers or {})}
    message = f"{error.detail}. The page at /docs says what there is."
    return respond(Reply(status=error.status_code, content=error_body(message), headers=headers))


async def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, BadRequest | Unanswered)  # noqa: S101 - see above
    return respond(refused(error))


async def _invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - see above
    told = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:_PROBLEMS_SHOWN])
    return respond(refused(BadRequest(f"The request must be as /docs says, got {told}.")))


async def _failed(_request: Request, _error: Exception) -> Response:
    """Answer for a mistake of the gateway's own; its traceback is in the log."""
    message = "The gateway failed on this request, which is a mistake of its own; its log says where."
    return respond(Reply(status=_ERROR, content=error_body(message), headers=_JSON))
