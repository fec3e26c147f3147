"""MLflow's own scoring server, which does not speak V2, behind the gateway."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import orjson
import pandas as pd
import pytest
from mlflow.models import ModelSignature, infer_signature
from mlflow.pyfunc.scoring_server import _SERVER_MODEL_PATH
from mlflow.types import Schema, TensorSpec

from infra.local.process import ServerCommand, ServerProcess, base_environment, send_request, start_on_free_ports
from serving.errors import Unanswered
from serving.gateway.mlflow_scoring import MlflowUpstream
from serving.gateway.route import Route, ServedVersion
from serving.gateway.upstreams import CheckedRequest, HttpClient, HttpResponse
from serving.model.contract import Column, Contract, Input, Output
from serving.model.registry import Resolved, resolve_model
from serving.protocol.oip import Body, InferRequest, OutputChoice, decode_response, encode_request
from tests.leftovers import keep_running
from tests.serving.gateway.conftest import Put
from tests.serving.gateway.support import EndpointClient, error

_SCRIPT = """
import mlflow
import numpy as np


class Scripted(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        {line}


mlflow.models.set_model(Scripted())
"""
# A table of numbers and text to one score, and two tensors to two outputs.
COLUMNS = 'return np.array([len(text) for text in model_input["name"]], "float64") * model_input["a"].to_numpy()'
TENSORS = 'x = model_input["x"]; return {"sum": x.sum(axis=1) + model_input["n"], "twice": 2 * x}'


def register(name: str, line: str, **options: Any) -> Resolved:
    with tempfile.TemporaryDirectory() as folder, mlflow.start_run(), warnings.catch_warnings():
        # MLflow advises type hints and examples, which this model does not need.
        warnings.simplefilter("ignore", UserWarning)
        script = Path(folder) / "script.py"
        script.write_text(_SCRIPT.format(line=line))
        logged = mlflow.pyfunc.log_model(
            name="model", python_model=str(script), registered_model_name=name, pip_requirements=["mlflow"], **options
        )
    return resolve_model(f"models:/{name}/{logged.registered_model_version}")


def scoring_server(model: Resolved, folder: Path) -> tuple[ServerProcess, str]:
    folder.mkdir()

    def command(ports: Sequence[int]) -> ServerCommand:
        return ServerCommand(
            argv=(
                # The command that `mlflow models serve` runs.
                *(sys.executable, "-m", "uvicorn", "mlflow.pyfunc.scoring_server.app:app"),
                *("--host", "127.0.0.1", "--port", str(ports[0])),
            ),
            environment={
                **base_environment(),
                "MLFLOW_DISABLE_TELEMETRY": "true",
                _SERVER_MODEL_PATH: str(model.folder),
            },
            folder=folder,
            log_path=folder / "scoring.log",
            ready=lambda: send_request("GET", ports[0], "/health").ok,
            ready_s_max=120,
        )

    process, (port,) = start_on_free_ports(1, command)
    return process, f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def columns(registry: Path) -> Resolved:
    example = pd.DataFrame({"a": [1.5], "name": ["x"]})
    return register("scored-columns", COLUMNS, signature=infer_signature(example, np.zeros(1)))


@pytest.fixture(scope="module")
def tensors(registry: Path) -> Resolved:
    inputs = [TensorSpec(np.dtype("float32"), (-1, 2), "x"), TensorSpec(np.dtype("int64"), (-1,), "n")]
    outputs = [TensorSpec(np.dtype("float32"), (-1,), "sum"), TensorSpec(np.dtype("float32"), (-1, 2), "twice")]
    return register("scored-tensors", TENSORS, signature=ModelSignature(Schema(inputs), Schema(outputs)))


Serve = Callable[[Resolved], str]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Generator[Serve]:
    with ExitStack() as stack:
        urls: dict[str, str] = {}

        def serve(model: Resolved) -> str:
            if model.pin.name not in urls:
                with keep_running():
                    process, url = scoring_server(model, tmp_path_factory.mktemp("scoring") / model.pin.name)
                stack.callback(process.stop)
                urls[model.pin.name] = url
            return urls[model.pin.name]

        yield serve


def put_endpoint(put: Put, url: str, model: Resolved, speaks: Any) -> EndpointClient:
    version = ServedVersion(version="1", url=url, upstream_model=model.pin.name, speaks=speaks, weight=1)
    return put(Route(versions=(version,), contract=model.contract({}, {})))


def predict(endpoint: EndpointClient, model: Resolved, inputs: dict[str, Any], *, binary: bool) -> dict[str, Any]:
    contract = model.contract({}, {})
    wanted = tuple(OutputChoice(name=value.name, binary=binary) for value in contract.outputs)
    body = encode_request(contract, inputs, identity="r1", binary=binary, outputs=wanted)
    answer = endpoint.infer(body.content, headers=body.headers)
    assert answer.status_code == 200, answer.text
    length = answer.headers.get("Inference-Header-Content-Length")
    return decode_response(answer.content, contract, header_length=None if length is None else int(length))


@pytest.mark.parametrize("binary", [False, True])
def test_a_model_of_columns_gets_a_table(put: Put, serve: Serve, columns: Resolved, *, binary: bool) -> None:
    endpoint = put_endpoint(put, serve(columns), columns, "mlflow-columns")
    inputs = {"a": np.array([1.5, 2.0]), "name": np.array(["ab", "c"], dtype=object)}

    assert {"prediction": [3.0, 2.0]} == {
        name: values.tolist() for name, values in predict(endpoint, columns, inputs, binary=binary).items()
    }
    assert {"name": endpoint.name, "ready": True} == endpoint.get("/ready").json()


@pytest.mark.parametrize("binary", [False, True])
def test_a_model_of_tensors_gets_tensors(put: Put, serve: Serve, tensors: Resolved, *, binary: bool) -> None:
    endpoint = put_endpoint(put, serve(tensors), tensors, "mlflow-tensors")
    inputs = {"x": np.array([[1, 2], [3, 4]], np.float32), "n": np.array([10, 20])}

    assert {"sum": [13, 27], "twice": [[2, 4], [6, 8]]} == {
        name: values.tolist() for name, values in predict(endpoint, tensors, inputs, binary=binary).items()
    }


def test_the_answer_has_the_id_and_the_version(put: Put, serve: Serve, columns: Resolved) -> None:
    endpoint = put_endpoint(put, serve(columns), columns, "mlflow-columns")
    inputs = {"a": np.array([1.0]), "name": np.array(["ab"], dtype=object)}
    body = encode_request(columns.contract({}, {}), inputs, identity="r1")
    answer = endpoint.infer(body.content, headers=body.headers).json()

    assert ("r1", "1") == (answer["id"], answer["model_version"])


def test_values_without_json_are_refused(put: Put, serve: Serve, columns: Resolved) -> None:
    endpoint = put_endpoint(put, serve(columns), columns, "mlflow-columns")
    inputs = {"a": np.array([np.nan]), "name": np.array(["ab"], dtype=object)}
    body = encode_request(columns.contract({}, {}), inputs, binary=True)
    status, message = error(endpoint.infer(body.content, headers=body.headers))

    assert 400 == status
    assert "'a' holds NaN" in message


def test_a_server_of_another_model_is_an_error(put: Put, serve: Serve, columns: Resolved, tensors: Resolved) -> None:
    endpoint = put_endpoint(put, serve(columns), tensors, "mlflow-tensors")
    inputs = {"x": np.zeros((1, 2), np.float32), "n": np.array([1])}
    body = encode_request(tensors.contract({}, {}), inputs)

    assert error(endpoint.infer(body.content, headers=body.headers))[0] in (400, 500, 502)


def test_a_long_text_among_short_ones_costs_only_its_own_memory_and_keeps_its_zeros() -> None:
    column = Column(name="text", dtype="str")
    contract = Contract(
        inputs=(Input(name="text", dtype="str", columns=(column,)),), outputs=(Output(name="score", dtype="float32"),)
    )
    texts = np.array(["a" * (1 << 20), *["b\0"] * 100_000], dtype=object)
    sent: list[bytes] = []

    class RecordingClient(HttpClient):
        async def send(self, method: str, url: str, content: bytes | None, headers: Any) -> HttpResponse:
            sent.append(content or b"")
            return HttpResponse(status=200, content=b'{"predictions": []}', headers={})

    async def run() -> None:
        http = RecordingClient()
        served = ServedVersion(
            version="1", url="http://127.0.0.1:9", upstream_model="m", speaks="mlflow-tensors", weight=1
        )
        request = InferRequest(id=None, inputs={"text": texts}, outputs=())
        with pytest.raises(Unanswered):
            await MlflowUpstream(http, served, contract).infer(CheckedRequest(body=Body(content=b""), request=request))
        await http.close()

    asyncio.run(run())

    assert {"inputs": {"text": texts.tolist()}} == orjson.loads(sent[0])
