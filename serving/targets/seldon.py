"""Seldon: the settings of MLServer, which serves the model here and on a cluster, and Seldon Core 2's manifests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from serving.gateway.route import Route
from serving.model.batching import BatchingConfig
from serving.model.graph import AnyRelease, Graph
from serving.model.release import MODEL_FOLDER, RELEASE_FILE, Release
from serving.targets import ReleaseFiles
from serving.targets.documents import dump_tensors
from serving.targets.folder import read_imported_modules, render_folder, resolve_interpreter
from serving.targets.kubernetes_cluster import Cluster, Manifest, make_metadata, make_version_name, place_versions
from serving.targets.kubernetes_routes import (
    make_http_route,
    make_timeouts,
    refuse_what_envoy_cannot,
    render_policies,
    spread_weights,
)

# The part of a graph that averages.
MEAN = "mean"
_HOST = "127.0.0.1"
_REQUIREMENTS = "infra/local/mlserver.txt"
# MLServer takes a wait of 0 for no batching; this wait collects the requests that have arrived already.
_WAIT_S_MIN = 0.0001
# Seldon's own Envoy, which divides the requests by the Experiment.
_MESH = {"name": "seldon-mesh", "port": 80}


@dataclass(frozen=True, slots=True, kw_only=True)
class SeldonTarget:
    """The target Seldon.

    `python` is the interpreter of an environment made from infra/local/mlserver.txt. Below `storage_uri` the cluster
    finds <endpoint>/<version>/, the files that `render` returns. `server` names the Server of the cluster that loads
    the models, whose image has that environment; None leaves the choice to Seldon.
    """

    python: Path
    storage_uri: str = "s3://endpoints"
    namespace: str = "seldon-mesh"
    memory: str = "1Gi"
    server: str | None = None

    def render(self, release: Release, model: Path) -> ReleaseFiles:
        """Return MLServer's settings and runtime, and model.yaml for a cluster.

        Raises EndpointFailed where the interpreter is missing, with the command that makes its environment.
        """
        ports = {"HTTP": "{port}", "GRPC": "{port2}", "METRICS": "{port3}"}
        files = {**_render_runtime(release), "model.yaml": _yaml(self.render_model(release))}
        return render_folder(
            release,
            model,
            files,
            argv=(resolve_interpreter(self.python, _REQUIREMENTS), "-c", _START_CODE, "start", "."),
            environment={
                "MLSERVER_HOST": _HOST,
                **{f"MLSERVER_{name}_PORT": port for name, port in ports.items()},
            },
            ready_path=f"/v2/models/{release.endpoint}/ready",
        )

    def render_model(self, release: Release) -> dict[str, Any]:
        """Return the Model of a release. Several releases of an endpoint are several Models."""
        spec = {
            "storageUri": f"{self.storage_uri}/{release.endpoint}/{release.version}",
            "requirements": ["mlserver", "python"],
            "memory": self.memory,
            "replicas": max(1, release.scaling.replicas_min),
            "minReplicas": release.scaling.replicas_min,
            "maxReplicas": release.scaling.replicas_max,
        }
        return self._manifest(
            "Model", make_model_name(release), spec | ({"server": self.server} if self.server else {})
        )

    def render_graph(self, graph: Graph, models: Sequence[Path]) -> ReleaseFiles:
        """Return pipeline.yaml and, below the number of each step, what `render` returns of a release.

        Seldon's dataflow engine, which only a cluster has, passes what a step gives on to the next one. So there is no
        serve.json for a controller. The mean of an ensemble is a model too.
        """
        steps = [*zip(range(1, len(graph.steps) + 1), graph.steps, models, strict=True)]
        files = {"pipeline.yaml": _yaml(self.render_pipeline(graph))}
        for number, step, _ in steps:
            manifest = {"model.yaml": _yaml(self._render_step_model(graph, str(number), step))}
            rendered = {**_render_runtime(step), **manifest, RELEASE_FILE: step.model_dump_json(indent=2).encode()}
            rendered |= read_imported_modules((_RUNTIME.encode(),))
            files |= {f"{number}/{path}": content for path, content in rendered.items()}
        if graph.combine == "mean":
            mean = {
                "model-settings.json": _json(make_mean_settings(graph)),
                "runtime.py": _MEAN_RUNTIME.encode(),
                "model.yaml": _yaml(self._render_step_model(graph, MEAN, graph.steps[0])),
            }
            files |= {f"{MEAN}/{path}": content for path, content in mean.items()}
        return ReleaseFiles(files=files, trees={f"{number}/{MODEL_FOLDER}": model for number, _, model in steps})

    def render_pipeline(self, graph: Graph) -> dict[str, Any]:
        """Return the Pipeline of a graph, whose steps are its Models."""
        names = [make_step_name(graph, str(number)) for number in range(1, len(graph.steps) + 1)]
        if graph.combine == "chain":
            steps: list[dict[str, Any]] = [
                {"name": names[0]},
                *({"name": name, "inputs": [before]} for before, name in pairwise(names)),
            ]
        else:
            mean = make_step_name(graph, MEAN)
            tensors = {
                f"{name}.outputs.{each.name}": f"{number}.{each.name}"
                for number, name in enumerate(names, start=1)
                for each in graph.contract.outputs
            }
            steps = [
                *({"name": name} for name in names),
                {"name": mean, "inputs": names, "inputsJoinType": "inner", "tensorMap": tensors},
            ]
        spec = {"steps": steps, "output": {"steps": [steps[-1]["name"]]}}
        return self._manifest("Pipeline", make_model_name(graph), spec)

    def _render_step_model(self, graph: Graph, part: str, release: Release) -> dict[str, Any]:
        manifest = self.render_model(release)
        spec = {**manifest["spec"], "storageUri": f"{self.storage_uri}/{graph.endpoint}/{graph.version}/{part}"}
        return self._manifest("Model", make_step_name(graph, part), spec)

    def render_experiment(
        self, default: AnyRelease, weights: Mapping[AnyRelease, int], *, shadow: AnyRelease | None = None
    ) -> dict[str, Any]:
        """Return the Experiment that splits an endpoint's traffic over releases, or over graphs, by their weights.

        `shadow` gets a copy of every request, and its answers go nowhere. Raises ValueError where the default has no
        weight, no weight is above 0, or the shadow has one.
        """
        if default not in weights or min(weights.values()) < 0 or not any(weights.values()):
            given = {release.version: weight for release, weight in weights.items()}
            message = f"The default, version {default.version}, must be among the weights, some above 0, got {given}."
            raise ValueError(message)
        if shadow is not None and shadow in weights:
            message = f"A shadow must have no weight, but version {shadow.version} has {weights[shadow]}."
            raise ValueError(message)
        spec: dict[str, Any] = {
            "default": make_model_name(default),
            "candidates": [{"name": make_model_name(each), "weight": weight} for each, weight in weights.items()],
        }
        if isinstance(default, Graph):
            spec["resourceType"] = "pipeline"
        if shadow is not None:
            spec["mirror"] = {"name": make_model_name(shadow), "percent": 100}
        return self._manifest("Experiment", default.endpoint, spec)

    def render_rollout(
        self, endpoint: str, route: Route, releases: Mapping[str, Release], cluster: Cluster
    ) -> tuple[Manifest, ...]:
        """Return the Models of an endpoint, their Experiment, and the HTTPRoutes that lead to Seldon's own Envoy.

        The Experiment has no default: Seldon would divide the requests that name that version, too. Raises BadInput
        for a route that a cluster's Envoy cannot have.
        """
        route = place_versions(route, endpoint, cluster.namespace)
        refuse_what_envoy_cannot(endpoint, route)
        names = {served.version: make_version_name(endpoint, served.version) for served in route.versions}
        shadow = None if route.shadow is None else route.shadow.version
        timeouts = make_timeouts(route.limits)

        def lead_to(name: str, path: str, upstream: str, model: str) -> Manifest:
            header = {"set": [{"name": "seldon-model", "value": model}]}
            filters = [{"type": "RequestHeaderModifier", "requestHeaderModifier": header}]
            rule = {"filters": filters, "backendRefs": [_MESH], "timeouts": timeouts}
            return make_http_route(name, endpoint, cluster, path, upstream, rule)

        path = f"/v2/models/{endpoint}"
        routes = [
            lead_to(endpoint, path, path, f"{endpoint}.experiment"),
            *(
                lead_to(name, f"{path}/versions/{version}", f"/v2/models/{name}", name)
                for version, name in names.items()
                if version != shadow
            ),
        ]
        models = [self.render_model(releases[served.version]) for served in route.versions]
        experiment = self._manifest("Experiment", endpoint, _divide_requests(route, names))
        labelled = [
            {**each, "metadata": make_metadata(each["metadata"]["name"], endpoint, cluster.namespace)}
            for each in (*models, experiment)
        ]
        return (*labelled, *routes, *render_policies(endpoint, route, cluster, routes))

    def _manifest(self, kind: str, name: str, spec: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "apiVersion": "mlops.seldon.io/v1alpha1",
            "kind": kind,
            "metadata": {"name": name, "namespace": self.namespace},
            "spec": dict(spec),
        }


def make_model_name(release: AnyRelease) -> str:
    """Return the name of a release among the Models of a cluster, or of a graph among its Pipelines."""
    return f"{release.endpoint}-v{release.version}"


def _divide_requests(route: Route, names: Mapping[str, str]) -> dict[str, Any]:
    """Return the spec of the Experiment that divides a route's requests among its versions' Models."""
    answering = [served for served in route.versions if served.weight]
    weights = spread_weights([served.weight for served in answering])
    spec: dict[str, Any] = {
        "candidates": [
            {"name": names[served.version], "weight": weight} for served, weight in zip(answering, weights, strict=True)
        ]
    }
    if route.shadow is not None:
        spec["mirror"] = {"name": names[route.shadow.version], "percent": 100}
    return spec


def make_step_name(graph: Graph, part: str) -> str:
    """Return the name of the Model of a part of a graph: the number of a step, or the mean."""
    return f"{make_model_name(graph)}-{part}"


def _render_runtime(release: Release) -> dict[str, bytes]:
    return {
        # MLServer's host and ports come by its environment. The runtime holds requests against the contract before they
        # are collected, which only its own process can.
        "settings.json": _json({"debug": False, "parallel_workers": 0}),
        "model-settings.json": _json(make_model_settings(release)),
        "runtime.py": _RUNTIME.encode(),
    }


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode()


def _yaml(value: Mapping[str, Any]) -> bytes:
    return str(yaml.safe_dump(dict(value), sort_keys=False)).encode()


def make_model_settings(release: Release) -> dict[str, Any]:
    """Return the settings of a model: what it takes and gives, and the batching as MLServer's adaptive batching."""
    inputs, outputs = dump_tensors(release.contract)
    return {
        "name": release.endpoint,
        "implementation": "runtime.Runtime",
        "platform": "overnight",
        "versions": [release.version],
        "inputs": inputs,
        "outputs": outputs,
        "parameters": {"version": release.version},
        **_batching(release.batching),
    }


def make_mean_settings(graph: Graph) -> dict[str, Any]:
    """Return the settings of the model that averages the outputs of an ensemble, named as its Pipeline names them."""
    _, outputs = dump_tensors(graph.contract)
    inputs = [
        {**each, "name": f"{number}.{each['name']}"} for number in range(1, len(graph.steps) + 1) for each in outputs
    ]
    return {
        "name": MEAN,
        "implementation": "runtime.Mean",
        "platform": "overnight",
        "versions": [graph.version],
        "inputs": inputs,
        "outputs": outputs,
        "parameters": {"version": graph.version},
        **_batching(BatchingConfig()),
    }


def _batching(batching: BatchingConfig) -> dict[str, Any]:
    if batching.batch_size_max == 1:
        return {"max_batch_size": 0, "max_batch_time": 0.0}
    return {"max_batch_size": batching.batch_size_max, "max_batch_time": max(batching.wait_ms_max / 1000, _WAIT_S_MIN)}


# The mlserver script has the path of its interpreter at install time; this works in an environment that was moved.
_START_CODE = "from mlserver.cli import main; main()"

_RUNTIME = '''"""The model of this folder under MLServer: `mlserver start .` serves it."""

from pathlib import Path

from mlserver import MLModel
from mlserver.errors import MLServerError
from mlserver.types import InferenceRequest, InferenceResponse

from serving.errors import BadRequest
from serving.model.release import count_rows, join_predictions, open_predictor, split_rows, unwrap_prediction
from serving.targets.documents import encode_inputs, read_request, write_response


class Runtime(MLModel):
    async def load(self):
        self.predictor = open_predictor(Path(__file__).parent)
        self.rows_max = self.predictor.release.batching.batch_size_max
        # By now `predict` is MLServer's batching around the method below.
        self.predict_batched, self.predict = self.predict, self.predict_checked
        return True

    async def unload(self):
        self.predictor.close()
        return True

    async def predict_checked(self, payload):
        """Refuse a bad request before it is batched with others, which would fail with it."""
        requested = {each.name for each in payload.outputs or ()} or {each.name for each in self.outputs}
        request = self.read(payload, requested)
        if count_rows(request.inputs) > self.rows_max:
            response = await self.answer(request, [request.inputs])
        else:
            plain = InferenceRequest.model_validate({"inputs": encode_inputs(request, self.predictor.release)})
            try:
                response = await self.predict_batched(plain)
            except MLServerError:
                # Some row of the batch made the model fail; which one shows when each passes alone.
                response = await self.answer(request, [request.inputs])
        response.outputs = [each for each in response.outputs if each.name in requested]
        return response

    async def predict(self, payload):
        """Answer requests that MLServer has joined: it counts them where the batching counts rows."""
        request = self.read(payload, (), requests_max=self.rows_max)
        return await self.answer(request, split_rows(request.inputs, self.rows_max))

    async def answer(self, request, passes):
        predictions = await self.predictor.predict_requests(passes)
        try:
            outputs = join_predictions([unwrap_prediction(each) for each in predictions])
            answer = write_response(request, outputs, self.predictor.release)
        except Exception as error:
            raise MLServerError(f"The model must predict every row, got: {error}", 500) from error
        return InferenceResponse.model_validate(answer)

    def read(self, payload, outputs, requests_max=1):
        inputs = [each.model_dump(include={"name", "shape", "datatype", "data"}) for each in payload.inputs]
        release = self.predictor.release
        # The bound on one request's rows is none on those of several.
        allowed = release.model_copy(update={"rows_max": release.rows_max * requests_max})
        try:
            return read_request(inputs, outputs, allowed)
        except BadRequest as error:
            raise MLServerError(str(error), error.status) from None
'''

_MEAN_RUNTIME = '''"""The mean of an ensemble under MLServer. Its input 1.score is the score of the first model."""

import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse


class Mean(MLModel):
    async def load(self):
        return True

    async def predict(self, payload):
        given = {each.name: NumpyCodec.decode_input(each) for each in payload.inputs}
        outputs = []
        for output in self.outputs:
            values = [value for name, value in given.items() if name.partition(".")[2] == output.name]
            mean = np.mean(values, axis=0, dtype=np.float64).astype(values[0].dtype)
            outputs.append(NumpyCodec.encode_output(output.name, mean))
        return InferenceResponse(model_name=self.name, outputs=outputs)
'''
