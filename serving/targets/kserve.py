"""KServe: an InferenceService for a cluster, and the same model under KServe's own Python server on this machine.

On a cluster Triton serves the model, and batches by the configuration in its repository. KServe's own batcher is never
asked for: it speaks version 1 of the protocol alone. KServe's Python server has no versions in its routes, and does not
batch.

A rollout on a cluster is an InferenceService with a predictor for each version, and HTTPRoutes of this project's own
before their Services: KServe 0.20 makes the predictors of `canary`, but its own HTTPRoute has no weights before the
release after that, and none copies requests to a shadow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from serving.errors import BadInput
from serving.gateway.route import Route
from serving.model.release import Release
from serving.targets import ReleaseFiles
from serving.targets.folder import render_folder, resolve_interpreter
from serving.targets.kubernetes_cluster import Cluster, Manifest, make_metadata, place_versions
from serving.targets.kubernetes_routes import render_gateway_api

_HOST = "127.0.0.1"
_REQUIREMENTS = "infra/local/kserve.txt"
# KServe takes a list of canaries in this mode alone, in which plain Deployments serve.
_PERCENT_ERROR_MAX = 1e-6
_STANDARD = {"serving.kserve.io/deploymentMode": "Standard"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one replica may use, as Kubernetes counts it."""

    cpu: str = "1"
    memory: str = "2Gi"
    gpus: int = 0

    def manifest(self) -> dict[str, Any]:
        """Return the resources of a container: what it asks for is what it gets."""
        amounts = {"cpu": self.cpu, "memory": self.memory}
        limits = {**amounts, **({"nvidia.com/gpu": str(self.gpus)} if self.gpus else {})}
        return {"requests": amounts, "limits": limits}


@dataclass(frozen=True, slots=True, kw_only=True)
class KServeCanary:
    """A release that gets some percent of the traffic; 0 deploys it without any."""

    release: Release
    percent: int

    def __post_init__(self) -> None:
        """Raise ValueError for a percentage outside of 0 to 100."""
        if not 0 <= self.percent <= 100:  # noqa: PLR2004 - percent
            message = f"A canary must get 0 to 100 percent of the traffic, got {self.percent}."
            raise ValueError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class KServeTarget:
    """The target KServe.

    `python` is the interpreter of an environment made from infra/local/kserve.txt. Below `storage_uri` the cluster
    finds <endpoint>/<version>/, Triton's repository of a release. `canary_as` is how KServe takes a canary: "list"
    from 0.20 on, "percent" before, where the canary is the next revision of the same InferenceService.
    """

    python: Path
    storage_uri: str = "pvc://endpoints"
    namespace: str = "default"
    resources: Resources = field(default_factory=Resources)
    canary_as: Literal["list", "percent"] = "list"

    def render(self, release: Release, model: Path) -> ReleaseFiles:
        """Return predictor.py for KServe's Python server, and inferenceservice.yaml for a cluster.

        Raises EndpointFailed where the interpreter is missing, with the command that makes its environment.
        """
        arguments = ("--http_port", "{port}", "--enable_grpc", "false", "--configure_logging", "false")
        files = {
            "predictor.py": _PREDICTOR.encode(),
            "inferenceservice.yaml": yaml.safe_dump(self.render_inference_service(release), sort_keys=False).encode(),
        }
        return render_folder(
            release,
            model,
            files,
            argv=(resolve_interpreter(self.python, _REQUIREMENTS), "predictor.py", *arguments),
            environment={"LISTEN_HOST": _HOST},
            ready_path=f"/v2/models/{release.endpoint}/ready",
        )

    def render_inference_service(self, release: Release, canary: KServeCanary | None = None) -> dict[str, Any]:
        """Return the InferenceService of an endpoint at a release, with a canary of another one where there is one.

        Raises BadInput where the canaries are a list and the release may have no replica: KServe's have a fixed number.
        """
        if canary is not None and self.canary_as == "list":
            return self._render_versions(release, [canary], {})
        predictor = self._render_predictor(release)
        if canary is not None:
            predictor = {"canaryTrafficPercent": canary.percent, **self._render_predictor(canary.release)}
        return {
            "apiVersion": "serving.kserve.io/v1beta1",
            "kind": "InferenceService",
            "metadata": {"name": release.endpoint, "namespace": self.namespace},
            "spec": {"predictor": predictor},
        }

    def render_rollout(
        self, endpoint: str, route: Route, releases: Mapping[str, Release], cluster: Cluster
    ) -> tuple[Manifest, ...]:
        """Return the InferenceService with a predictor for each version, and what divides the requests among them.

        KServe itself exposes none of it, since nothing there would ask for a key. Raises BadInput for a route that
        KServe or a cluster's Envoy cannot have.
        """
        placed = place_versions(route, endpoint, cluster.namespace, "{endpoint}-v{version}-predictor")
        divided = render_gateway_api(endpoint, placed, cluster)
        stable = _find_stable(route)
        canaries = [
            KServeCanary(release=releases[version], percent=percent)
            for version, percent in _count_percents(route).items()
            if version != stable
        ]
        metadata = make_metadata(endpoint, endpoint, cluster.namespace)
        metadata["labels"]["networking.kserve.io/visibility"] = "cluster-local"
        return (self._render_versions(releases[stable], canaries, metadata), *divided)

    def _render_versions(
        self, stable: Release, canaries: Sequence[KServeCanary], metadata: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return an InferenceService whose predictors are named by versions, so that a promotion restarts none."""
        if canaries and not stable.scaling.replicas_min:
            message = (
                f"KServe gives canaries a fixed number of replicas, at most that of the version beside them, but "
                f"version {stable.version} of {stable.endpoint} may have none. Set replicas_min to 1."
            )
            raise BadInput(message)
        spec: dict[str, Any] = {"predictor": self._render_named(stable)}
        for canary in canaries:
            predictor = self._render_named(canary.release)
            # KServe refuses both: a canary that scales, and one with more replicas than the version beside it.
            del predictor["maxReplicas"]
            predictor["minReplicas"] = max(1, min(predictor["minReplicas"], stable.scaling.replicas_min))
            spec.setdefault("canary", []).append({"trafficPercent": canary.percent, "predictor": predictor})
        return {
            "apiVersion": "serving.kserve.io/v1beta1",
            "kind": "InferenceService",
            "metadata": {
                **(metadata or {"name": stable.endpoint, "namespace": self.namespace}),
                "annotations": dict(_STANDARD),
            },
            "spec": spec,
        }

    def _render_named(self, release: Release) -> dict[str, Any]:
        return {"name": f"v{release.version}", **self._render_predictor(release)}

    def _render_predictor(self, release: Release) -> dict[str, Any]:
        return {
            "minReplicas": release.scaling.replicas_min,
            "maxReplicas": release.scaling.replicas_max,
            "model": {
                # The container's; the list of canaries has it required.
                "name": "kserve-container",
                "modelFormat": {"name": "triton", "version": "2"},
                "runtime": "kserve-tritonserver",
                "protocolVersion": "v2",
                "storageUri": f"{self.storage_uri}/{release.endpoint}/{release.version}",
                "resources": self.resources.manifest(),
            },
        }


def _find_stable(route: Route) -> str:
    """Return the version that a canary stands beside: of those that are none, the one with the most requests."""
    canary = None if route.rollout is None else route.rollout.version
    return max((served for served in route.versions if served.version != canary), key=lambda each: each.weight).version


def _count_percents(route: Route) -> dict[str, int]:
    """Return the shares of versions in percent. Raises BadInput where one is not whole, which KServe could not take."""
    total = sum(served.weight for served in route.versions)
    percents = {served.version: 100 * served.weight / total for served in route.versions}
    for version, percent in percents.items():
        if abs(percent - round(percent)) > _PERCENT_ERROR_MAX:
            message = (
                f"A version on KServe must get a whole percentage of the requests, got {percent:g} for version "
                f"{version}. Give the canary another share."
            )
            raise BadInput(message)
    return {version: round(percent) for version, percent in percents.items()}


_PREDICTOR = '''"""The model of this folder under KServe's server: `python predictor.py --http_port 8080` serves it."""

import logging
import os
import uuid
from pathlib import Path

from kserve import Model, ModelServer
from kserve.errors import InvalidInput

from serving.errors import BadRequest
from serving.model.release import open_predictor, unwrap_prediction
from serving.targets.documents import dump_tensors, read_request, write_response


class Predictor(Model):
    def __init__(self, folder):
        self.predictor = open_predictor(folder)
        self.release = self.predictor.release
        super().__init__(self.release.endpoint)
        self.ready = True

    def get_input_types(self):
        return dump_tensors(self.release.contract)[0]

    def get_output_types(self):
        return dump_tensors(self.release.contract)[1]

    async def predict(self, payload, headers=None):
        inputs = [
            {"name": each.name, "shape": each.shape, "datatype": each.datatype, "data": each.data}
            for each in payload.inputs
        ]
        outputs = [each.name for each in payload.request_outputs or ()]
        try:
            request = read_request(inputs, outputs, self.release)
        except BadRequest as error:
            raise InvalidInput(str(error)) from None
        (prediction,) = await self.predictor.predict_requests([request.inputs])
        answer = write_response(request, unwrap_prediction(prediction), self.release)
        # KServe requires an id, and writes null, which the protocol has not, for parameters that are not there.
        outputs = [{**each, "parameters": {}} for each in answer["outputs"]]
        return {**answer, "id": payload.id or str(uuid.uuid4()), "parameters": {}, "outputs": outputs}


def is_bad_request(record):
    return bool(record.exc_info) and isinstance(record.exc_info[1], InvalidInput)


class Server(ModelServer):
    async def _serve(self):
        # KServe listens on every address, as a pod must.
        if host := os.environ.get("LISTEN_HOST"):
            self._rest_server.config.host = host
        await super()._serve()


if __name__ == "__main__":
    # A bad request would otherwise leave a traceback in the log, each of them.
    logging.getLogger("kserve").addFilter(lambda record: not is_bad_request(record))
    Server().start([Predictor(Path(__file__).parent)])
'''
