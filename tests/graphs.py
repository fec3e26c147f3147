"""What tests put on model servers as graphs: registered steps, and what they answer one by one."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

from serving.model.batching import BatchingConfig
from serving.model.graph import Combine, Graph, number_graph, share_batching
from serving.model.interface import Tunable
from serving.model.loading import load_model
from serving.model.registry import resolve_model
from serving.model.release import Release, Scaling
from serving.protocol.oip import HEADER_LENGTH, decode_response, encode_request, read_header_length
from serving.targets import Address
from tests.releases import model_url
from tests.serving.targets.triton_models import register_code
from tests.support import register_network

_TIMEOUT_S = 240.0
_MODEL = """
import mlflow
import numpy as np


class Step(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        return {answer}


mlflow.models.set_model(Step())
"""


def tensor(name: str, dtype: str, width: int) -> TensorSpec:
    """Return the description of a tensor [N, width]."""
    return TensorSpec(np.dtype(dtype), (-1, width), name)


def register_step(name: str, answer: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> str:
    """Register a model whose answer is an expression over `model_input`, its tensors by name; return its address."""
    return register_code(name, _MODEL.format(answer=answer), ModelSignature(Schema([*inputs]), Schema([*outputs])))


def register_prep(name: str = "graph-prep", scale: float = 2.0) -> str:
    """Register a step that makes the tensor x of the tensor raw."""
    answer = f'{{"x": (model_input["raw"] * {scale} - 1).astype("float32")}}'
    return register_step(name, answer, [tensor("raw", "float64", 3)], [tensor("x", "float32", 3)])


def register_post(name: str = "graph-post") -> str:
    """Register a step that makes a probability, a whole number and a word of a score."""
    score = 'model_input["score"]'
    answer = (
        f'{{"probability": 1 / (1 + np.exp(-{score})), "rank": np.floor({score} * 100).astype("int64"), '
        f'"word": np.where({score} > 0, "yes", "nö").astype(object)}}'
    )
    outputs = [
        tensor("probability", "float32", 1),
        tensor("rank", "int64", 1),
        TensorSpec(np.dtype(str), (-1, 1), "word"),
    ]
    return register_step(name, answer, [tensor("score", "float32", 1)], outputs)


def register_chain() -> tuple[str, str, str]:
    """Register three steps: the first makes x of raw, a network a score of x, the last three outputs of the score."""
    return register_prep(), register_network("graph-network", seed=0), register_post()


@functools.cache
def load_once(uri: str) -> Tunable:
    """Return a loaded model."""
    resolved = resolve_model(uri)
    return load_model(resolved, resolved.contract({}, {}))


@dataclass(frozen=True, slots=True, kw_only=True)
class PutGraph:
    """A graph and the folders of its steps' files, as a host takes them."""

    graph: Graph
    models: tuple[Path, ...]

    def predict(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the models answer one by one."""
        answers: list[dict[str, Any]] = []
        for step in self.graph.steps:
            if answers and self.graph.combine == "chain":
                inputs = {each.name: answers[-1][each.name].reshape(-1, *each.shape) for each in step.contract.inputs}
            model = load_once(step.pin.uri)
            with model.slot():
                answers.append(model.predict(inputs))
        if self.graph.combine == "chain":
            return answers[-1]
        return {name: np.mean([each[name] for each in answers], axis=0) for name in answers[0]}

    def post(self, address: Address, inputs: Mapping[str, Any], *, binary: bool = False) -> httpx.Response:
        """Return the server's answer as it comes."""
        body = encode_request(self.graph.contract, inputs, binary=binary)
        return httpx.post(f"{model_url(address)}/infer", content=body.content, headers=body.headers, timeout=_TIMEOUT_S)

    def ask(self, address: Address, inputs: Mapping[str, Any], *, binary: bool = False) -> dict[str, Any]:
        """Return the outputs that the server answers with."""
        answer = self.post(address, inputs, binary=binary)
        assert 200 == answer.status_code, answer.text
        length = read_header_length(answer.headers.get(HEADER_LENGTH))
        return decode_response(answer.content, self.graph.contract, header_length=length)

    def check_answers(self, address: Address, inputs: Mapping[str, Any], *, binary: bool = False) -> None:
        """Hold the server's answer against the models' own: floats to 1e-6, all else exactly."""
        expected, found = self.predict(inputs), self.ask(address, inputs, binary=binary)
        for each in self.graph.contract.outputs:
            if np.dtype(each.dtype).kind == "f":
                np.testing.assert_allclose(expected[each.name], found[each.name], rtol=0, atol=1e-6)
            else:
                assert expected[each.name].tolist() == found[each.name].tolist()


def graph_of(
    uris: Sequence[str],
    endpoint: str,
    *,
    combine: Combine = "chain",
    batching: BatchingConfig | None = None,
    scaling: Scaling | None = None,
) -> PutGraph:
    """Return a graph of registered models under an endpoint's name."""
    resolved = [resolve_model(uri) for uri in uris]
    whole = batching or BatchingConfig(batch_size_max=16, wait_ms_max=1)
    steps = tuple(
        Release(
            endpoint=endpoint,
            pin=each.pin,
            contract=each.contract({}, {}),
            batching=share_batching(combine, whole, position),
            scaling=scaling or Scaling(),
        )
        for position, each in enumerate(resolved)
    )
    version = number_graph(combine, [(each.pin, {}) for each in resolved])
    graph = Graph(endpoint=endpoint, version=version, combine=combine, steps=steps)
    return PutGraph(graph=graph, models=tuple(each.folder for each in resolved))


def raw_rows(rows: int, seed: int = 0) -> dict[str, Any]:
    """Return seeded rows for the first step of `register_chain`."""
    return {"raw": np.random.default_rng(seed).standard_normal((rows, 3))}
