"""The HTTP routes: the Open Inference Protocol V2 for clients, /metrics and /admin for the administrator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Path, Request, Response
from fastapi.responses import PlainTextResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field, ValidationError

from serving.errors import BadRequest, Unanswered
from serving.gateway.gateway import Gateway
from serving.gateway.inference_handler import answer_inference
from serving.gateway.keys import Digest
from serving.gateway.request_body import read_body
from serving.gateway.route import ENDPOINT_PATTERN, KEY_PATTERN, EndpointState, Route
from serving.model.contract import Frozen
from serving.protocol.oip import ModelMetadata, RequestDocument, ServerMetadata, make_model_metadata

SERVER_VERSION = "0.1.0"
SCHEMA_REFERENCE = "#/components/schemas/{model}"
PROBLEMS_SHOWN = 5
_SERVER_NAME, _PLATFORM = "overnight-gateway", "overnight"
_ADMIN_BYTES_MAX = 8 << 20


def get_gateway(request: Request) -> Gateway:
    """Return the gateway of the application that got a request."""
    gateway: Gateway = request.app.state.gateway
    return gateway


def _check_api_key(name: str, request: Request) -> None:
    """Raise BadRequest unless the request has a key that the endpoint accepts."""
    gateway = get_gateway(request)
    if keys := gateway.endpoint(name).route.keys:
        gateway.keys.check_api_key(request.headers.get("authorization"), keys)


def _check_admin_key(request: Request) -> None:
    """Raise BadRequest unless the request has the administrator's key."""
    get_gateway(request).keys.check_admin_key(request.headers.get("authorization"))


def _describe_body(model: type[BaseModel]) -> dict[str, Any]:
    """Return the OpenAPI description of a JSON body that a route reads itself."""
    schema = {"$ref": SCHEMA_REFERENCE.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


Opened = Annotated[Gateway, Depends(get_gateway)]
# These describe the keys on the OpenAPI page; the functions above check them.
Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False, scheme_name="API key"))]
_admin_bearer = Depends(HTTPBearer(auto_error=False, scheme_name="Administrator's key"))

v2_router = APIRouter(tags=["Open Inference Protocol"])


class Live(Frozen):
    """Whether the gateway runs."""

    live: bool = Field(description="Always true: a gateway that does not run does not answer.")


class Ready(Frozen):
    """Whether the gateway accepts requests."""

    ready: bool = Field(description="Whether the gateway accepts requests.")


class ModelReady(Frozen):
    """Whether a request to a model would be answered."""

    name: str = Field(description="The model's name.")
    ready: bool = Field(description="Whether a request would be answered; where not, the status is 503.")


@v2_router.get("/v2")
async def get_server() -> ServerMetadata:
    """Return the name, version and extensions of the gateway."""
    return ServerMetadata(name=_SERVER_NAME, version=SERVER_VERSION)


@v2_router.get("/v2/health/live")
async def get_live() -> Live:
    """Return that the gateway runs."""
    return Live(live=True)


@v2_router.get("/v2/health/ready")
async def get_ready() -> Ready:
    """Return that the gateway accepts requests."""
    return Ready(ready=True)


@v2_router.get("/v2/models/{name}", dependencies=[Depends(_check_api_key)])
async def get_model(name: str, gateway: Opened, _: Bearer) -> ModelMetadata:
    """Return the inputs, outputs and versions of a model."""
    route = gateway.endpoint(name).route
    versions = [served.version for served in route.versions]
    return make_model_metadata(name, route.contract, versions=versions, platform=_PLATFORM)


@v2_router.get("/v2/models/{name}/versions/{version}", dependencies=[Depends(_check_api_key)])
async def get_version(name: str, version: str, gateway: Opened, _: Bearer) -> ModelMetadata:
    """Return the inputs and outputs of a version of a model."""
    endpoint = gateway.endpoint(name)
    versions = [endpoint.find_version(version).version]
    return make_model_metadata(name, endpoint.route.contract, versions=versions, platform=_PLATFORM)


@v2_router.get("/v2/models/{name}/ready", dependencies=[Depends(_check_api_key)])
async def get_model_ready(name: str, gateway: Opened, response: Response, _: Bearer) -> ModelReady:
    """Return whether a request to a model would be answered; a model that is unloaded while idle counts as ready."""
    return _set_ready(name, response, ready=await gateway.endpoint(name).is_ready())


@v2_router.get("/v2/models/{name}/versions/{version}/ready", dependencies=[Depends(_check_api_key)])
async def get_version_ready(name: str, version: str, gateway: Opened, response: Response, _: Bearer) -> ModelReady:
    """Return whether a request to a version would be answered."""
    return _set_ready(name, response, ready=await gateway.endpoint(name).is_version_ready(version))


def _set_ready(name: str, response: Response, *, ready: bool) -> ModelReady:
    response.status_code = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
    return ModelReady(name=name, ready=ready)


@v2_router.post("/v2/models/{name}/infer", openapi_extra=_describe_body(RequestDocument))
async def infer(name: str, request: Request) -> Response:
    """Predict with a version that the gateway chooses."""
    return await answer_inference(get_gateway(request), request, name, None)


@v2_router.post("/v2/models/{name}/versions/{version}/infer", openapi_extra=_describe_body(RequestDocument))
async def infer_version(name: str, version: str, request: Request) -> Response:
    """Predict with this version."""
    return await answer_inference(get_gateway(request), request, name, version)


@v2_router.get("/metrics", tags=["Operations"], response_class=PlainTextResponse, dependencies=[_admin_bearer])
async def get_metrics(gateway: Opened) -> Response:
    """Return the metrics in Prometheus's text format, to the administrator only."""
    return Response(await gateway.render_metrics(), media_type=CONTENT_TYPE_LATEST)


EndpointPath = Annotated[str, Path(pattern=ENDPOINT_PATTERN, description="The endpoint's name.")]
KeyPath = Annotated[str, Path(pattern=KEY_PATTERN, description="The key's name.")]


class KeyDigest(Frozen):
    """An API key as the gateway gets it: its digest, never the key."""

    sha256: Digest


class Names(Frozen):
    """All names that the gateway knows."""

    endpoints: tuple[str, ...] = Field(description="The names of all endpoints.")
    keys: tuple[str, ...] = Field(description="The names of all API keys.")


# The bodies that routes read themselves: after the key is checked, and limited while they arrive.
BODY_MODELS: tuple[type[BaseModel], ...] = (RequestDocument, Route, KeyDigest)
admin_router = APIRouter(
    prefix="/admin", tags=["Administration"], dependencies=[_admin_bearer, Depends(_check_admin_key)]
)


@admin_router.get("/endpoints")
async def list_names(gateway: Opened) -> Names:
    """Return the names of all endpoints and keys."""
    return Names(endpoints=tuple(gateway.names), keys=tuple(sorted(gateway.keys.names)))


@admin_router.put("/endpoints/{name}", openapi_extra=_describe_body(Route))
async def put_endpoint(name: EndpointPath, gateway: Opened, request: Request) -> EndpointState:
    """Put a route in force, and store it. Idempotent: a canary whose rule stays the same keeps its tally."""
    route = await _read_model(request, Route)
    with _answer_write_errors():
        return await gateway.put(name, route)


@admin_router.get("/endpoints/{name}")
async def get_endpoint(name: str, gateway: Opened) -> EndpointState:
    """Return a route, its canary, and the requests and models of the moment."""
    return await gateway.describe(name)


@admin_router.delete("/endpoints/{name}", status_code=HTTPStatus.NO_CONTENT)
async def delete_endpoint(name: str, gateway: Opened) -> None:
    """Delete an endpoint, and answer once its requests are answered, or after 20 s. Idempotent."""
    with _answer_write_errors():
        await gateway.delete(name)


@admin_router.put("/keys/{name}", status_code=HTTPStatus.NO_CONTENT, openapi_extra=_describe_body(KeyDigest))
async def put_key(name: KeyPath, gateway: Opened, request: Request) -> None:
    """Store the digest of an API key under a name."""
    key = await _read_model(request, KeyDigest)
    with _answer_write_errors():
        await gateway.put_key(name, key.sha256)


@admin_router.delete("/keys/{name}", status_code=HTTPStatus.NO_CONTENT)
async def delete_key(name: str, gateway: Opened) -> None:
    """Delete an API key. Idempotent."""
    with _answer_write_errors():
        await gateway.delete_key(name)


@contextmanager
def _answer_write_errors() -> Iterator[None]:
    """Turn an OSError into an answer. Raises Unanswered, with 503."""
    try:
        yield
    except OSError as error:
        found = error.strerror or type(error).__name__
        message = (
            f"The gateway must be able to write its files, got: {found}. Free space or grant access, then send the "
            "request again."
        )
        raise Unanswered(message) from error


Model = TypeVar("Model", bound=BaseModel)


async def _read_model(request: Request, model: type[Model]) -> Model:
    async with read_body(request, get_gateway(request).memory, bytes_max=_ADMIN_BYTES_MAX) as content:
        try:
            return model.model_validate_json(content)
        except ValidationError as error:
            raise _convert_validation_error(model, error) from None


def _convert_validation_error(model: type[BaseModel], error: ValidationError) -> BadRequest:
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    found = "; ".join(
        f"{'.'.join(map(str, problem['loc'])) or 'the body'}: {problem['msg']}" for problem in problems[:PROBLEMS_SHOWN]
    )
    is_malformed = any(problem["type"] == "json_invalid" for problem in problems)
    message = f"The body must be a {model.__name__}, got {found}."
    return BadRequest(message, status=HTTPStatus.BAD_REQUEST if is_malformed else HTTPStatus.UNPROCESSABLE_ENTITY)
