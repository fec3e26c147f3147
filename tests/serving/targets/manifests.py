"""Pieces of strict JSON schemas for the few fields of manifests that are rendered here, and releases to render."""

from __future__ import annotations

from typing import Any

from serving.model.registry import ModelPin
from serving.model.release import Release
from tests.serving.toys import matrix

STABLE, NEW = (
    Release(
        endpoint="scores",
        pin=ModelPin(name="scores", version=version, model_id=None, source="", digest=version * 64),
        contract=matrix(3),
    )
    for version in "12"
)
KUBERNETES_NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}
QUANTITY = {"type": "string", "pattern": r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti|k|M|G|T)?$"}


def closed(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    """An object that may have these properties and no other."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def quantities() -> dict[str, Any]:
    """What a container may use."""
    return closed(dict.fromkeys(("cpu", "memory", "nvidia.com/gpu"), QUANTITY), "cpu", "memory")
