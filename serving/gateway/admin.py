"""The administrator's door: routes and keys, with the administrator's key alone."""

from __future__ import annotations

from typing import Annotated, TypeVar

from fastapi import APIRouter, Depends, Path, Request
from pydantic import BaseModel, Field, ValidationError

from serving.errors import BadRequest
from serving.gateway import openapi
from serving.gateway.body import body
from serving.gateway.keys import Digest
from serving.gateway.protocol import Open, administrator_bearer, opened
from serving.gateway.route import ENDPOINT_PATTERN, KEY_PATTERN, Route
from serving.gateway.state import EndpointState
from serving.gateway.store import told_to_whoever_asks
from serving.model.contract import Frozen

BYTES_MAX = 8 << 20
_NO_CONTENT, _UNPROCESSABLE = 204, 422
_PROBLEMS_SHOWN = 5

EndpointPath = Annotated[str, Path(pattern=ENDPOINT_PATTERN, description="The endpoint's name.")]
KeyPath = Annotated[str, Path(pattern=KEY_PATTERN, description="The key's name.")]


class KeyDigest(Frozen):
    """An API key as it is handed over: its digest, never the key."""

    sha256: Digest


class Names(Frozen):
    """What there is."""

    endpoints: tuple[str, ...] = Field(description="The names of all endpoints.")
    keys: tuple[str, ...] = Field(description="The names of all API keys.")


def _administrator(request: Request) -> None:
    """Raise BadRequest unless it is the administrator who asks."""
    opened(request).keys.check_admin(request.headers.get("authorization"))


router = APIRouter(
    prefix="/admin",
    tags=["Administration"],
    dependencies=[Depends(administrator_bearer), Depends(_administrator)],
)


@router.get("/endpoints")
async def names(gateway: Open) -> Names:
    """Return the names of all endpoints and keys."""
    return Names(endpoints=tuple(gateway.names), keys=tuple(sorted(gateway.keys.names)))


@router.put("/endpoints/{name}", openapi_extra=openapi.body(Route))
async def put(name: EndpointPath, gateway: Open, request: Request) -> EndpointState:
    """Put a route in force, and keep it. Idempotent: a trial whose rule stays the same goes on."""
    route = await _read(request, Route)
    with told_to_whoever_asks():
        return await gateway.put(name, route)


@router.get("/endpoints/{name}")
async def get(name: str, gateway: Open) -> EndpointState:
    """Return a route, its trial, and what goes on."""
    return gateway.state(name)


@router.delete("/endpoints/{name}", status_code=_NO_CONTENT)
async def delete(name: str, gateway: Open) -> None:
    """Take an endpoint out, and answer once its requests are answered, or 20 s later. Idempotent."""
    with told_to_whoever_asks():
        await gateway.delete(name)


@router.put("/keys/{name}", status_code=_NO_CONTENT, openapi_extra=openapi.body(KeyDigest))
async def put_key(name: KeyPath, gateway: Open, request: Request) -> None:
    """Keep the digest of an API key under a name."""
    key = await _read(request, KeyDigest)
    with told_to_whoever_asks():
        gateway.keys.put(name, key.sha256)


@router.delete("/keys/{name}", status_code=_NO_CONTENT)
async def delete_key(name: str, gateway: Open) -> None:
    """Forget an API key. Idempotent."""
    with told_to_whoever_asks():
        gateway.keys.delete(name)


Body = TypeVar("Body", bound=BaseModel)


async def _read(request: Request, model: type[Body]) -> Body:
    async with body(request, opened(request).memory, bytes_max=BYTES_MAX) as content:
        try:
            return model.model_validate_json(content)
        except ValidationError as error:
            raise _invalid(model, error) from None


def _invalid(model: type[BaseModel], error: ValidationError) -> BadRequest:
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    told = "; ".join(
        f"{'.'.join(map(str, each['loc'])) or 'the body'}: {each['msg']}" for each in problems[:_PROBLEMS_SHOWN]
    )
    malformed = any(each["type"] == "json_invalid" for each in problems)
    message = f"The body must be a {model.__name__}, got {told}."
    return BadRequest(message, status=400 if malformed else _UNPROCESSABLE)
