"""Seldon: the settings of MLServer, which serves the model here and on a cluster, and Seldon Core 2's manifests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from serving.model.batching import BatchingConfig
from serving.model.release import Release
from serving.targets import ReleaseFiles
from serving.targets.documents import dump_tensors
from serving.targets.folder import render_folder, resolve_interpreter

_HOST = "127.0.0.1"
_REQUIREMENTS = "infra/local/mlserver.txt"
# MLServer takes a wait of 0 for no batching; this wait collects the requests that have arrived already.
_WAIT_S_MIN = 0.0001


@dataclass(frozen=True, slots=True, kw_only=True)
class Seldon:
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
        files = {
            "settings.json": json.dumps(make_settings(), indent=2).encode(),
            "model-settings.json": json.dumps(make_model_settings(release), indent=2).encode(),
            "runtime.py": _RUNTIME.encode(),
            "model.yaml": yaml.safe_dump(self.render_model(release), sort_keys=False).encode(),
        }
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

    def render_experiment(
        self, default: Release, weights: Mapping[Release, int], *, shadow: Release | None = None
    ) -> dict[str, Any]:
        """Return the Experiment that splits an endpoint's traffic over releases by their weights.

        `shadow` gets a copy of every request, and its answers go nowhere. Raises ValueError where the default has no
        weight, or no weight is above 0.
        """
        if default not in weights or min(weights.values()) < 0 or not any(weights.values()):
            given = {release.version: weight for release, weight in weights.items()}
            message = f"The default, version {default.version}, must be among the weights, some above 0, got {given}."
            raise ValueError(message)
        spec: dict[str, Any] = {
            "default": make_model_name(default),
            "candidates": [{"name": make_model_name(each), "weight": weight} for each, weight in weights.items()],
        }
        if shadow is not None:
            spec["mirror"] = {"name": make_model_name(shadow), "percent": 100}
        return self._manifest("Experiment", default.endpoint, spec)

    def _manifest(self, kind: str, name: str, spec: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "apiVersion": "mlops.seldon.io/v1alpha1",
            "kind": kind,
            "metadata": {"name": name, "namespace": self.namespace},
            "spec": dict(spec),
        }


def make_model_name(release: Release) -> str:
    """Return the name of a release among the Models of a cluster."""
    return f"{release.endpoint}-v{release.version}"


def make_settings() -> dict[str, Any]:
    """Return the settings of MLServer itself; its host and ports come by its environment."""
    # The runtime holds requests against the contract before they are collected, which only its own process can.
    return {"debug": False, "parallel_workers": 0}


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
