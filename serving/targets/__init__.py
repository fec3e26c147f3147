"""Targets: the model servers that an endpoint is deployed on. No model server is written here.

A `Target` renders a release as files that a person could have written by hand; a `Host` deploys releases on a running
server, and a `GraphHost` graphs too. Triton is in `triton`, Ray Serve in `ray_serve`. BentoML, KServe and Seldon
(MLServer) render folders that the host in `folder` deploys: each has a serve.json, by which a controller runs the
server. `external` is a model that others serve, whose host deploys nothing. To add a target, write a module with its
host, a class in `tasks.endpoint.targets`, and its line in `tasks.endpoint.deploy`; docs/architecture.md says the rest.
`kubernetes_cluster` has the names of a Kubernetes cluster that serves an endpoint, and `kubernetes_routes` renders how
it divides the requests.

`bento_service`, `ray_application`, `triton_model` and `triton_mean` are copied into releases, and run by those servers
alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    # It imports MLflow, which takes seconds; the gateway starts without it.
    from serving.model.graph import Graph
    from serving.model.release import Release


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseFiles:
    """The files of a release: contents by relative path, and folders that are copied as they are."""

    files: Mapping[str, bytes]
    trees: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a release answers: a base URL, and the model's name and version there, as /v2 takes them.

    `grpc` is the address of the same server's gRPC service as HOST:PORT, None where it has none.
    """

    url: str
    model: str
    version: str | None
    grpc: str | None = None


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


@runtime_checkable
class GraphHost(Host, Protocol):
    """A running server that also chains models: it deploys graphs, and removes them as releases of their version."""

    def deploy_graph(self, graph: Graph, models: Sequence[Path]) -> Address:
        """Deploy a graph, as `deploy` does a release; `models` has the files of each step, in order."""
        ...
