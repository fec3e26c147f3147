"""An inference graph: an endpoint whose answer comes from two or three models, each of them a release of its own.

A chain passes the outputs of each step to the next one. An ensemble passes the same inputs to every step, and answers
with the mean of their outputs.

Shapes: N rows; every input and output is [N, *shape] of its contract.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, TypeAdapter, model_validator

from serving.errors import ModelFailed, SchemaMismatch
from serving.model.batching import BatchingConfig
from serving.model.contract import Contract, Frozen, Input, Output
from serving.model.encoding import Encoded, Flags
from serving.model.interface import Arrays, Model, Predictions
from serving.model.outputs import find_missing
from serving.model.pin import ModelPin
from serving.model.release import RELEASE_FILE, Release, Scaling
from serving.protocol.tensors import describe_tensor

STEPS_MIN, STEPS_MAX = 2, 3
Combine = Literal["chain", "mean"]

_VERSION_MIN, _VERSION_COUNT = 100_000_000, 900_000_000


class Graph(Frozen):
    """Two or three releases under one endpoint's name, and how their answers become one.

    `version` is a whole number that `number_graph` makes of the steps.
    """

    endpoint: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", description="The endpoint's name.")
    version: str = Field(pattern=r"^[1-9][0-9]{8}$", description="The number of these very steps.")
    combine: Combine = Field(description="chain: one after the other. mean: side by side, and their outputs averaged.")
    steps: tuple[Release, ...] = Field(min_length=STEPS_MIN, max_length=STEPS_MAX, description="The releases.")

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        check_steps_fit(self.combine, [(step.pin.uri, step.contract) for step in self.steps])
        return self

    @property
    def contract(self) -> Contract:
        """The inputs of the first step and the outputs of the last one."""
        return join_contracts(tuple(step.contract for step in self.steps))

    @property
    def batching(self) -> BatchingConfig:
        """The batching of the first step, at which requests arrive."""
        return self.steps[0].batching

    @property
    def scaling(self) -> Scaling:
        """How many replicas each step has."""
        return self.steps[0].scaling

    @property
    def rows_max(self) -> int:
        """Rows of one request, at most."""
        return min(step.rows_max for step in self.steps)

    def without_batching(self) -> Self:
        """Return the same graph with each request passed alone."""
        return self._change_steps({"batching": BatchingConfig()})

    def with_scaling(self, scaling: Scaling) -> Self:
        """Return the same graph with other numbers of replicas."""
        return self._change_steps({"scaling": scaling})

    def _change_steps(self, changes: Mapping[str, Any]) -> Self:
        return self.model_copy(update={"steps": tuple(step.model_copy(update=changes) for step in self.steps)})


AnyRelease = Release | Graph
_ANY_RELEASE: TypeAdapter[AnyRelease] = TypeAdapter(AnyRelease)


def read_release(folder: Path) -> AnyRelease:
    """Return the release or the graph whose release.json lies in a folder."""
    return _ANY_RELEASE.validate_json((folder / RELEASE_FILE).read_text())


def number_graph(combine: Combine, steps: Sequence[tuple[ModelPin, Mapping[str, Any]]]) -> str:
    """Return the version of a graph: nine digits out of the digest of its steps.

    Args:
        combine: How the answers of the steps become one.
        steps: The model of each step, and what else its answer or its speed depends on, as JSON.

    The same steps have the same number, and no registry has to count them. Two graphs of one endpoint have the same
    number once in 900 million.
    """
    described = [(pin.name, pin.version, pin.digest, given) for pin, given in steps]
    digest = hashlib.sha256(json.dumps([combine, described], sort_keys=True).encode()).hexdigest()
    return str(_VERSION_MIN + int(digest, 16) % _VERSION_COUNT)


def join_contracts(contracts: Sequence[Contract]) -> Contract:
    """Return what a graph takes and gives: the inputs of its first step, and the outputs of its last one."""
    return Contract(inputs=contracts[0].inputs, outputs=contracts[-1].outputs)


def share_batching(combine: Combine, batching: BatchingConfig, position: int) -> BatchingConfig:
    """Return the batching of one step, counted from 0, out of that of the whole graph.

    Only where requests arrive are they waited for. Later steps of a chain get them together already, and pass at once
    those that are there.
    """
    return batching if combine == "mean" or position == 0 else batching.model_copy(update={"wait_ms_max": 0.0})


def check_steps_fit(combine: Combine, steps: Sequence[tuple[str, Contract]]) -> None:
    """Check that the steps of a graph fit together; each is the address of its model and the model's contract.

    Raises SchemaMismatch where a step of a chain does not take exactly the tensors that the one before it gives, where
    the models of an ensemble do not take and give the same tensors, of floats, or where the name of an input is the
    name of an output too.
    """
    for (uri_before, before), (uri, contract) in itertools.pairwise(steps):
        if combine == "chain":
            must = f"{uri} must take what {uri_before}, the step before it, gives"
            _check_tensors(must, before.outputs, contract.inputs)
        else:
            _check_tensors(f"{uri} must take what {uri_before} takes", before.inputs, contract.inputs)
            _check_tensors(f"{uri} must give what {uri_before} gives", before.outputs, contract.outputs)
    joined = join_contracts([contract for _, contract in steps])
    if combine == "mean" and (words := [each.name for each in joined.outputs if np.dtype(each.dtype).kind != "f"]):
        message = (
            f"The outputs of an ensemble must be float numbers to be averaged, got others: {words}. Log the models "
            "with scores as float32 or float64, or make the endpoint of one of them."
        )
        raise SchemaMismatch(message)
    names = {each.name for each in joined.inputs} & {each.name for each in joined.outputs}
    if names:
        message = (
            f"The outputs of a graph must have other names than its inputs, got {sorted(names)} as both. Log the last "
            "step with other names in its signature."
        )
        raise SchemaMismatch(message)


def _check_tensors(must: str, given: Sequence[Input | Output], taken: Sequence[Input | Output]) -> None:
    """Raise SchemaMismatch where two sets of tensors differ in a name, a type or a shape."""
    expected, got = _describe_tensors(given), _describe_tensors(taken)
    if expected != got:
        message = (
            f"{must}, tensor by tensor: {', '.join(sorted(expected.values()))}; got "
            f"{', '.join(sorted(got.values()))}. Log one of the two with a signature whose names, types and shapes are "
            "those of the other."
        )
        raise SchemaMismatch(message)


def _describe_tensors(tensors: Sequence[Input | Output]) -> dict[str, str]:
    return {each.name: f"{each.name} {each.dtype} {list(describe_tensor(each).shape)}" for each in tensors}


def pass_on(outputs: Predictions, contract: Contract) -> Arrays:
    """Return the outputs of a step as the inputs of the next one, whose contract this is."""
    return {value.name: outputs[value.name].reshape(-1, *value.shape) for value in contract.inputs}


def average_outputs(answers: Sequence[Predictions], contract: Contract) -> Predictions:
    """Return the mean of the answers of several models, computed in float64 and given in the outputs' own types."""
    return {
        value.name: np.mean([each[value.name] for each in answers], axis=0, dtype=np.float64).astype(value.dtype)
        for value in contract.outputs
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphModel:
    """The loaded models of a graph, each with its contract, as one model of this process."""

    combine: Combine
    steps: tuple[tuple[Contract, Model], ...]

    @property
    def slots(self) -> int:
        """As many as the step with the fewest."""
        return min(model.slots for _, model in self.steps)

    def prepare(self, encoded: Encoded) -> Encoded:
        """Do nothing: what a step prepares depends on the answer of the one before it."""
        return encoded

    def predict(self, inputs: Arrays) -> Predictions:
        """Return the answer of the graph. Raises ModelFailed where a step gives a null, NaN or infinity."""
        if self.combine == "mean":
            answers = [_predict_step(model, inputs) for _, model in self.steps]
            return average_outputs(answers, self.steps[0][0])
        outputs = _predict_step(self.steps[0][1], inputs)
        for contract, model in self.steps[1:]:
            _check_complete(outputs)
            outputs = _predict_step(model, pass_on(outputs, contract))
        return outputs

    @contextmanager
    def slot(self) -> Generator[None]:
        """Enter a slot of every model."""
        with ExitStack() as stack:
            for _, model in self.steps:
                stack.enter_context(model.slot())
            yield


def _predict_step(model: Model, inputs: Arrays) -> Predictions:
    rows = len(next(iter(inputs.values())))
    return model.predict(model.prepare(Encoded(inputs=dict(inputs), flags=Flags.all_good(rows), rows=rows)).inputs)


def _check_complete(outputs: Predictions) -> None:
    for name, value in outputs.items():
        if find_missing(value).any():
            message = f"Every step of a graph must give finite numbers, got others in {name!r}. Repair the model."
            raise ModelFailed(message)
