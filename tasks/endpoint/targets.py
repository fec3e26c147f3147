"""The model servers that an endpoint may have: what a user writes of each."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, TypeAdapter

from serving.gateway.route import HOST_PORT
from serving.model.contract import Frozen
from serving.targets.kubernetes_cluster import Cluster

URL = r"^https?://[^\s@]+$"


class _TargetSpec(Frozen):
    """What the model servers differ in, beside their fields."""

    chains_models: ClassVar[bool] = False
    unloads_models: ClassVar[bool] = False
    # Whether a release is put on the server, and taken down there.
    deploys: ClassVar[bool] = True

    @property
    def environment_obstacle(self) -> str | None:
        """Why a model can't run in an environment of its own on this server, None where it can."""
        return None


class Triton(_TargetSpec):
    """NVIDIA Triton, which loads and unloads models of a repository on request (--model-control-mode=explicit).

    It runs the least replicas, unless `python -m serving.targets.triton_autoscale` runs beside it.
    """

    chains_models = unloads_models = True

    kind: Literal["triton"] = Field(default="triton", description="Tells this target from others.")
    repository: str = Field(
        default_factory=lambda: str(_data_folder() / "triton"),
        min_length=1,
        description="The server's model repository, as a folder of this machine or one that both have mounted.",
    )
    url: str = Field(default="http://127.0.0.1:8000", pattern=URL, description="The URL of its HTTP port.")
    grpc: str = Field(
        default="127.0.0.1:8001",
        pattern=HOST_PORT,
        description="Its gRPC port, HOST:PORT. Models are loaded through it, which delays no other request.",
    )

    @property
    def environment_obstacle(self) -> str | None:
        """Its backend is one process."""
        return "Triton's backend runs the model in its own process"


class RayServe(_TargetSpec):
    """Ray Serve on a running Ray cluster."""

    chains_models = unloads_models = True

    kind: Literal["ray-serve"] = Field(default="ray-serve", description="Tells this target from others.")
    dashboard: str = Field(
        default="http://127.0.0.1:8265", pattern=URL, description="The cluster's dashboard, which takes applications."
    )
    url: str = Field(default="http://127.0.0.1:8000", pattern=URL, description="The URL of the cluster's HTTP proxies.")
    folder: str = Field(
        default_factory=lambda: str(_data_folder() / "ray-serve"),
        min_length=1,
        description="A folder for the releases, which every node of the cluster reaches by this very path.",
    )
    token_secret: str | None = Field(
        default=None,
        description="A Prefect Secret block that holds the cluster's token. Without: the environment variable "
        "RAY_AUTH_TOKEN of the machine this runs on, if it is set.",
    )


class FolderTarget(_TargetSpec):
    """A folder that a controller watches: it starts and stops a server for each release that lies in it."""

    folder: str = Field(min_length=1, description="The folder, of this machine or one that both have mounted.")
    cluster: Cluster | None = Field(
        default=None,
        description="A Kubernetes cluster to render the rollout for too, in FOLDER/NAME/kubernetes/rollout.yaml.",
    )

    @property
    def environment_obstacle(self) -> str | None:
        """Pods have an image."""
        return "the pods of a cluster run the model with the packages of their image" if self.cluster else None


class BentoML(FolderTarget):
    """BentoML, one service for each release, started by a controller that watches a folder."""

    kind: Literal["bentoml"] = Field(default="bentoml", description="Tells this target from others.")
    python: str = Field(
        min_length=1,
        description="The interpreter of an environment that has bentoml, as infra/local/bentoml.txt lists it.",
    )


class KServe(FolderTarget):
    """KServe, by InferenceService manifests in a folder that a controller (or a GitOps operator) watches."""

    kind: Literal["kserve"] = Field(default="kserve", description="Tells this target from others.")
    python: str = Field(
        min_length=1,
        description="The interpreter of an environment that has kserve, as infra/local/kserve.txt lists it.",
    )


class Seldon(FolderTarget):
    """Seldon's MLServer, by Seldon Core manifests and settings in a folder that a controller watches."""

    chains_models = True

    kind: Literal["seldon"] = Field(default="seldon", description="Tells this target from others.")
    python: str = Field(
        min_length=1,
        description="The interpreter of an environment that has mlserver, as infra/local/mlserver.txt lists it.",
    )


class External(_TargetSpec):
    """A model that others serve by the Open Inference Protocol: it is asked, and never deployed nor taken down."""

    deploys = False

    kind: Literal["external"] = Field(default="external", description="Tells this target from others.")
    url: str = Field(pattern=URL, description="The base URL of its server, below which /v2 is.")
    model: str | None = Field(
        default=None, min_length=1, description="The model's name on the server. Without: the endpoint's name."
    )
    version: str | None = Field(
        default=None, min_length=1, description="Its version there. Without: the one that the server answers by."
    )

    @property
    def environment_obstacle(self) -> str | None:
        """It runs already."""
        return "others run the model's server"


AnyTarget = Triton | RayServe | BentoML | KServe | Seldon | External


def default_target() -> AnyTarget:
    """Return Triton where its binaries run, which is Linux on x86-64, else Ray Serve."""
    return Triton() if (platform.system(), platform.machine()) == ("Linux", "x86_64") else RayServe()


def _data_folder() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME", Path.home() / ".local" / "share")) / "overnight"


Target = Annotated[
    AnyTarget,
    Field(discriminator="kind", description="The model server. Without: Triton on Linux x86-64, Ray Serve elsewhere."),
]


def read_target(document: object) -> AnyTarget:
    """Return the target that a document describes. Raises pydantic's ValidationError."""
    adapter: TypeAdapter[AnyTarget] = TypeAdapter(Target)
    return adapter.validate_python(document)
