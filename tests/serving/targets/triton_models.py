"""What the tests put on Triton: releases, steady requests, and what models themselves answer."""

from __future__ import annotations

import tempfile
import threading
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import mlflow
import numpy as np
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, Schema, TensorSpec

from infra.local.triton import TritonServer
from infra.worker import list_process_tree
from serving.model.batching import BatchingConfig
from serving.model.loading import load_model
from serving.model.registry import resolve_model
from serving.model.release import Release, Scaling
from serving.protocol import oip
from serving.targets import Address

_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A release, the folder of its model's files, and requests to where it answers."""

    release: Release
    model: Path

    def predict(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the model itself answers."""
        loaded = load_model(resolve_model(self.release.pin.uri), self.release.contract)
        with ExitStack() as stack:
            stack.enter_context(loaded.slot())
            return loaded.predict(inputs)

    def post(self, address: Address, inputs: Mapping[str, Any], *, binary: bool = False) -> httpx.Response:
        """Return the server's answer as it comes."""
        body = oip.encode_request(self.release.contract, inputs, binary=binary)
        return httpx.post(infer_url(address), content=body.content, headers=body.headers, timeout=_TIMEOUT_S)

    def ask(self, address: Address, inputs: Mapping[str, Any], *, binary: bool = False) -> dict[str, Any]:
        """Return the outputs that the server answers with."""
        answer = self.post(address, inputs, binary=binary)
        assert 200 == answer.status_code, answer.text
        length = answer.headers.get(oip.HEADER_LENGTH)
        header_length = None if length is None else int(length)
        return oip.decode_response(answer.content, self.release.contract, header_length=header_length)


def served(
    uri: str, endpoint: str, *, batching: BatchingConfig | None = None, scaling: Scaling | None = None
) -> Served:
    """Return a registered model as a release of an endpoint."""
    resolved = resolve_model(uri)
    contract = resolved.contract({}, {})
    release = Release(
        endpoint=endpoint,
        pin=resolved.pin,
        contract=contract,
        batching=batching or BatchingConfig(batch_size_max=16, wait_ms_max=1),
        scaling=scaling or Scaling(),
    )
    return Served(release=release, model=resolved.folder)


def list_instances(triton: TritonServer, model: str) -> list[int]:
    """Return the processes of a model's instances."""
    return [
        pid
        for pid in list_process_tree(triton.process.pid)
        if f"{triton.repository}/{model}/".encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def infer_url(address: Address) -> str:
    """Return where a version is asked."""
    return f"{address.url}/v2/models/{address.model}/versions/{address.version}/infer"


def random_rows(rows: int, features: int = 3) -> dict[str, Any]:
    """Return seeded rows for the input x."""
    return {"x": np.random.default_rng(0).standard_normal((rows, features), dtype=np.float32)}


class SteadyLoad:
    """Some hundred requests a second, from several threads; a context manager that ends them.

    `lost` is every answer but 200, and `answered` how many were that.
    """

    def __init__(self, asked: Served, address: Address, *, threads: int = 4) -> None:
        self.lost: list[str] = []
        self.answered = 0
        self._url = infer_url(address)
        self._body = oip.encode_request(
            asked.release.contract, random_rows(1, asked.release.contract.inputs[0].shape[0])
        )
        self._end, self._counting = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._ask) for _ in range(threads)]

    def _ask(self) -> None:
        with httpx.Client(timeout=_TIMEOUT_S) as client:
            while not self._end.wait(0.02):
                try:
                    answer = client.post(self._url, content=self._body.content, headers=self._body.headers)
                    lost = None if answer.status_code == 200 else answer.text
                except httpx.HTTPError as error:
                    lost = repr(error)
                with self._counting:
                    self.answered += lost is None
                    self.lost += [lost] if lost else []

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()


_WORDS = """
import mlflow
import pandas as pd


class Words(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        texts = model_input["text"]
        if (texts == "bad").any():
            raise ValueError("no such word")
        return pd.DataFrame(
            {
                "length": texts.str.len().astype("int64"),
                "upper": texts.str.upper(),
                "long": texts.str.len() > 3,
                "half": model_input["number"] / 2,
            }
        )


mlflow.models.set_model(Words())
"""


def register_words(name: str) -> str:
    """Register a model that makes a whole number, a text, a boolean and a float of a text and a number."""
    inputs = Schema([ColSpec(DataType.string, "text"), ColSpec(DataType.integer, "number")])
    kinds = {"length": DataType.long, "upper": DataType.string, "long": DataType.boolean, "half": DataType.double}
    outputs = Schema([ColSpec(kind, output) for output, kind in kinds.items()])
    return register_code(name, _WORDS, ModelSignature(inputs, outputs))


_MIRROR = """
import mlflow


class Mirror(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        return {f"{name}_back": value for name, value in model_input.items()}


mlflow.models.set_model(Mirror())
"""


def register_mirror(name: str, dtypes: Sequence[str]) -> str:
    """Register a model that gives back a tensor [N, 2] of each dtype; return its address."""
    shape = (-1, 2)
    inputs = Schema([TensorSpec(np.dtype(dtype), shape, dtype) for dtype in dtypes])
    outputs = Schema([TensorSpec(np.dtype(dtype), shape, f"{dtype}_back") for dtype in dtypes])
    return register_code(name, _MIRROR, ModelSignature(inputs, outputs))


def register_code(name: str, code: str, signature: ModelSignature) -> str:
    """Register a pyfunc model as code; return its address."""
    with tempfile.TemporaryDirectory() as folder, mlflow.start_run(), warnings.catch_warnings():
        # MLflow advises on type hints and examples, which this model has no use for.
        warnings.simplefilter("ignore", UserWarning)
        script = Path(folder) / "scripted.py"
        script.write_text(code)
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(script),
            signature=signature,
            pip_requirements=["mlflow"],
            registered_model_name=name,
        )
    return f"models:/{name}/{logged.registered_model_version}"
