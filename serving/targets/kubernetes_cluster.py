"""A Kubernetes cluster that serves an endpoint: the names that manifests refer to, and what all manifests have.

Every manifest is one that a person could have written by hand. `kubernetes_routes` renders how requests reach the
versions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import yaml
from pydantic import Field

from serving.errors import BadInput
from serving.gateway.route import Route
from serving.model.contract import Frozen
from serving.targets import Target

if TYPE_CHECKING:
    # It imports MLflow, which takes seconds.
    from serving.model.release import Release

Manifest = dict[str, Any]
KubernetesName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]

_LABEL = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")


class Cluster(Frozen):
    """A Kubernetes cluster with the Gateway API and Envoy Gateway, by the names that manifests refer to."""

    gateway: KubernetesName = Field(description="The Gateway that callers reach.")
    gateway_namespace: KubernetesName | None = Field(
        default=None, description="The namespace of the Gateway; null: that of the endpoint."
    )
    listener: KubernetesName | None = Field(
        default=None, description="The listener of the Gateway for HTTP, by its name; null: all of them."
    )
    grpc_listener: KubernetesName | None = Field(
        default=None, description="Its listener for gRPC, which must be another one; null: versions take no gRPC."
    )
    namespace: KubernetesName = Field(
        default="default", description="The namespace of the endpoint: of its manifests, its Services and its Secret."
    )
    secret: KubernetesName | None = Field(
        default=None, description="The Secret with the API keys of callers, an entry for each key; null: NAME-keys."
    )
    storage_uri: str | None = Field(
        default=None,
        pattern=r"^[a-z0-9]+://\S+$",
        description="Where the cluster finds the files of releases, as NAME/VERSION below it; null: the target's own.",
    )


class ClusterTarget(Target, Protocol):
    """A model server whose releases a cluster can run, with the traffic that a route gives them."""

    def render_rollout(
        self, endpoint: str, route: Route, releases: Mapping[str, Release], cluster: Cluster
    ) -> tuple[Manifest, ...]:
        """Return the manifests of an endpoint: what serves its releases, and what divides the requests among them.

        `releases` has the release of every version of the route, by its version. Raises BadInput for a route that the
        target or the cluster cannot have.
        """
        ...


def place_versions(route: Route, endpoint: str, namespace: str, service: str = "{endpoint}-v{version}") -> Route:
    """Return the route with each version at a Service of a cluster, port 80, that serves it under the endpoint's name.

    Args:
        route: The route.
        endpoint: The endpoint's name.
        namespace: The namespace of the Services.
        service: What the Services are called, with {endpoint} and {version} for the names of both.
    """
    return route.model_copy(
        update={
            "versions": tuple(
                served.model_copy(
                    update={
                        "url": f"http://{service.format(endpoint=endpoint, version=served.version)}.{namespace}.svc",
                        "upstream_model": endpoint,
                        "upstream_version": None,
                        "grpc": None,
                    }
                )
                for served in route.versions
            )
        }
    )


def make_metadata(name: str, endpoint: str, namespace: str) -> Manifest:
    """Return the metadata of a manifest, with the labels by which all those of an endpoint are found."""
    labels = {"app.kubernetes.io/part-of": endpoint, "app.kubernetes.io/managed-by": "overnight"}
    return {"name": name, "namespace": namespace, "labels": labels}


def make_version_name(endpoint: str, version: str) -> str:
    """Return what the manifests of a version are called. Raises BadInput where Kubernetes would not take that name."""
    name = f"{endpoint}-v{version}"
    if not _LABEL.fullmatch(name):
        message = (
            f"The name of a version on a cluster must be at most 63 lowercase letters, digits and hyphens, and begin "
            f"with a letter, got {name!r}. Give the endpoint another name."
        )
        raise BadInput(message)
    return name


def dump_manifests(manifests: Iterable[Manifest]) -> bytes:
    """Return manifests as one YAML file that kubectl applies."""
    # Through JSON, since values that occur twice would become YAML's references.
    documents = json.loads(json.dumps(list(manifests)))
    return str(yaml.safe_dump_all(documents, sort_keys=False, width=120)).encode()
