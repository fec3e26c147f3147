"""The OpenAPI page where bodies are read by hand: after the keys are checked, and bounded while they stream in."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, Field

from serving.model.contract import Frozen

_REF = "#/components/schemas/{model}"
_bodies: dict[str, type[BaseModel]] = {}


class Refused(Frozen):
    """What every answer is that is none."""

    error: str = Field(description="What must hold, what arrived, and what to do next.")


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Refused, "description": "The request must change."},
    "5XX": {"model": Refused, "description": "No answer can be given now."},
}


def body(model: type[BaseModel]) -> dict[str, Any]:
    """Return what documents a JSON body that a route reads by hand."""
    _bodies[model.__name__] = model
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def document(app: FastAPI) -> None:
    """Have the OpenAPI document of an application hold the schemas of those bodies too."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, routes=app.routes)
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            for name, model in _bodies.items():
                schema = model.model_json_schema(ref_template=_REF)
                schemas.update(schema.pop("$defs", {}))
                schemas[name] = schema
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
