"""Targets: the model servers that an endpoint is deployed on. No model server is written here.

A `Target` renders a release as files that a person could have written by hand; a `Host` deploys releases on a running
server. Triton is in `triton`, Ray Serve in `ray_serve`. BentoML, KServe and Seldon (MLServer) render folders that the
host in `folder` deploys: each has a serve.json, by which a controller runs the server. To add a target, write a module
with its `render`, a class in `tasks.endpoint.spec`, and a case in `tasks.endpoint.deploy`.

`bento_service`, `ray_application` and `triton_model` are copied into releases and run by those servers alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    # It imports MLflow, which takes seconds; the gateway starts without it.
    from serving.model.release import Release


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseFiles:
    """The files of a release: contents by relative path, and folders that are copied as they are."""

    files: Mapping[str, bytes]
    trees: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a release answers: a base URL, and the model's name and version there, as /v2 takes them."""

    url: str
    model: str
    version: str | None


class Target(Protocol):
    """A model server, as files that a person could have written by hand."""

    def render(self, release: Release, model: Path) -> ReleaseFiles:
        """Return the files that have the server serve a release whose model's files lie in `model`."""
        ...


class Host(Protocol):
    """A running server, or what starts servers: it deploys and removes releases while others serve."""

    def deploy(self, release: Release, model: Path) -> Address:
        """Deploy a release beside those that are there, and return once it answers. Raises EndpointFailed."""
        ...

    def remove(self, release: Release) -> None:
        """Take a release down. Idempotent; others serve on."""
        ...
