"""The routes of the Open Inference Protocol for one release, for model servers that have none of their own."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from serving.errors import BadRequest, DependencyFault, ModelFailed
from serving.model.graph import AnyRelease
from serving.model.interface import Arrays, Predictions
from serving.protocol.oip import (
    HEADER_LENGTH,
    ModelMetadata,
    RequestDocument,
    ServerMetadata,
    decode_request,
    decode_without_blocking,
    encode_response,
    make_model_metadata,
    read_header_length,
)

Predict = Callable[[Arrays], Awaitable[Predictions]]
Ready = Callable[[], Awaitable[bool]]

_MODEL = "/models/{model}"
_VERSION = "/models/{model}/versions/{version}"
_BODY_BYTES_MAX = 16 << 20
_ERROR_LENGTH_MAX = 500
_log = logging.getLogger(__name__)


class Overloaded(Exception):
    """The server is too busy to take another request now."""


async def _is_always_ready() -> bool:
    return True


def create_v2_app(
    release: AnyRelease,
    predict: Predict,
    server: ServerMetadata,
    *,
    ready: Ready = _is_always_ready,
    body_bytes_max: int = _BODY_BYTES_MAX,
) -> FastAPI:
    """Return an app with the routes below /v2 for one release.

    Every response other than 2xx is {"error": "..."}: 4xx for a wrong request, 503 where `predict` raises Overloaded or
    DependencyFault, 500 where it raises anything else.

    Args:
        release: The release that is served.
        predict: Called with the rows of one request at a time.
        server: The metadata of the server.
        ready: Whether requests can be answered now.
        body_bytes_max: The size of a request's body, at most.
    """
    routes = _Routes(release, predict, server, ready, body_bytes_max)
    app = FastAPI(title=f"{release.endpoint} version {release.version}", version=release.version)
    app.include_router(routes.router())
    app.add_exception_handler(BadRequest, _handle_bad_request)
    app.add_exception_handler(HTTPException, _handle_unknown_route)
    return app


@dataclass(frozen=True, slots=True)
class _Routes:
    release: AnyRelease
    predict: Predict
    server: ServerMetadata
    is_ready: Ready
    body_bytes_max: int
    metadata: ModelMetadata = field(init=False)

    def __post_init__(self) -> None:
        metadata = make_model_metadata(
            *(self.release.endpoint, self.release.contract),
            versions=[self.release.version],
            platform=self.server.name,
        )
        object.__setattr__(self, "metadata", metadata)

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v2")
        body = {"content": {"application/json": {"schema": RequestDocument.model_json_schema()}}, "required": True}
        router.add_api_route("", self.describe_server, tags=["server"])
        router.add_api_route("/health/live", self.live, tags=["server"])
        router.add_api_route("/health/ready", self.ready, tags=["server"], response_class=JSONResponse)
        for path in (_MODEL, _VERSION):
            router.add_api_route(path, self.describe_model, tags=["model"])
            router.add_api_route(f"{path}/ready", self.model_ready, tags=["model"], response_class=JSONResponse)
            router.add_api_route(
                *(f"{path}/infer", self.infer),
                methods=["POST"],
                tags=["model"],
                response_class=JSONResponse,
                openapi_extra={"requestBody": body},
            )
        return router

    async def describe_server(self) -> ServerMetadata:
        """Return the server's name, version and extensions."""
        return self.server

    async def live(self) -> dict[str, bool]:
        """Return that the server runs."""
        return {"live": True}

    async def ready(self) -> Response:
        """Return 200 where the server answers requests, else 503."""
        if await self.is_ready():
            return JSONResponse({"ready": True})
        return _make_error_response(
            HTTPStatus.SERVICE_UNAVAILABLE, "The server must have its model loaded; ask again in a second."
        )

    async def describe_model(self, model: str, version: str | None = None) -> ModelMetadata:
        """Return the metadata of the model."""
        self.check_known(model, version)
        return self.metadata

    async def model_ready(self, model: str, version: str | None = None) -> Response:
        """Return 200 where the model answers requests, else 503."""
        self.check_known(model, version)
        return await self.ready()

    async def infer(self, request: Request, model: str, version: str | None = None) -> Response:
        """Return the predictions of a request, in JSON or as binary data."""
        self.check_known(model, version)
        body = await _read_body(request, self.body_bytes_max)
        decode = partial(
            decode_request,
            body,
            self.release.contract,
            header_length=read_header_length(request.headers.get(HEADER_LENGTH)),
            rows_max=self.release.rows_max,
        )
        decoded = await decode_without_blocking(decode, len(body))
        try:
            outputs = await self.predict(decoded.inputs)
            answer = encode_response(
                *(decoded, outputs, self.release.contract),
                model=self.release.endpoint,
                version=self.release.version,
            )
        except (Overloaded, DependencyFault) as error:
            return _make_error_response(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
        except ModelFailed as error:
            return _make_error_response(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
        except Exception as error:  # noqa: BLE001 - the model is somebody else's code
            _log.exception("The model failed on a request of %d rows.", decoded.rows)
            message = f"The model must predict every row, got {type(error).__name__}: {error}"
            return _make_error_response(HTTPStatus.INTERNAL_SERVER_ERROR, message)
        return Response(answer.content, headers=answer.headers)

    def check_known(self, model: str, version: str | None) -> None:
        if model != self.release.endpoint:
            message = f"The model must be {self.release.endpoint!r}, got {model[:100]!r}."
            raise BadRequest(message, status=HTTPStatus.NOT_FOUND)
        if version not in (None, self.release.version):
            message = f"The version of {model!r} must be {self.release.version!r}, got {version[:100]!r}."
            raise BadRequest(message, status=HTTPStatus.NOT_FOUND)


async def _read_body(request: Request, bytes_max: int) -> bytes:
    """Return the body of a request. Reading ends where it is too large."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > bytes_max:
            message = f"The body must have at most {bytes_max} bytes, got more; send several requests."
            raise BadRequest(message, status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        parts.append(part)
    return b"".join(parts)


async def _handle_bad_request(_request: Request, error: Exception) -> Response:
    return _make_error_response(error.status if isinstance(error, BadRequest) else HTTPStatus.BAD_REQUEST, str(error))


async def _handle_unknown_route(_request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else HTTPStatus.NOT_FOUND
    detail = error.detail if isinstance(error, HTTPException) else str(error)
    return _make_error_response(status, f"{detail}. The routes are those of the Open Inference Protocol below /v2.")


def _make_error_response(status: int, message: str) -> Response:
    return JSONResponse({"error": message[:_ERROR_LENGTH_MAX]}, status_code=status)
