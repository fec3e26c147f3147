"""The model or the graph of an endpoint, resolved once and loaded here, and rows that it answers.

Shapes: N rows; every input is [N, *shape] of the contract.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from serving.errors import BadInput, ModelFailed, SchemaMismatch
from serving.model.contract import Contract, Input
from serving.model.encoding import Encoded, Flags, encode
from serving.model.environment_choice import OwnEnvironment
from serving.model.graph import Combine, GraphModel, check_steps_fit, join_contracts, number_graph
from serving.model.interface import Model, Tunable
from serving.model.loading import load_model
from serving.model.outputs import find_missing
from serving.model.processes import ProcessOptions
from serving.model.registry import Resolved, resolve_model
from tasks.endpoint.environment import choose_endpoint_environment
from tasks.endpoint.spec import EndpointSpec

Arrays = dict[str, npt.NDArray[Any]]

_RANDOM_ROWS = 32
_EXAMPLE_ROWS_MAX = 64
_SEED = 2013
_SECONDS = 1_000_000_000
_YEAR_2020 = 1_577_836_800
_DAYS = 86_400
_WORDS = np.array(["a", "the", "night", "model", "rows", "answers", "quick", "late", "flight", "customer", "score"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded(ABC):
    """What an endpoint answers by, loaded: its contract, the model itself, and rows to compare its endpoint with."""

    contract: Contract
    model: Model
    example: Sample | None
    random: Sample | None

    @property
    @abstractmethod
    def version(self) -> str:
        """The version of the endpoint, a whole number from 1."""

    @property
    @abstractmethod
    def sources(self) -> tuple[Resolved, ...]:
        """The pinned model, or those of the steps of a graph."""

    @property
    @abstractmethod
    def description(self) -> str:
        """The pinned models, in words."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """SHA-256 over the files of the models."""

    @abstractmethod
    def settings_name(self, endpoint: str) -> str:
        """Return the name under which the last of the models keeps, as a tag, how an endpoint serves this version."""

    @property
    def sample(self) -> Sample:
        """The rows to measure with: random ones, which differ, where the model answers any."""
        sample = self.random or self.example
        assert sample is not None, "load_endpoint makes none without"  # noqa: S101 - our own mistake, not a caller's
        return sample


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel(Loaded):
    """A pinned model version, and the environment of its own that it runs in, if any."""

    resolved: Resolved
    model: Tunable
    environment: OwnEnvironment | None = None

    @property
    def version(self) -> str:
        """The model version, a whole number from 1."""
        return self.resolved.pin.version

    @property
    def sources(self) -> tuple[Resolved, ...]:
        """The model version alone."""
        return (self.resolved,)

    @property
    def description(self) -> str:
        """Its address."""
        return self.resolved.pin.uri

    @property
    def digest(self) -> str:
        """SHA-256 over its files."""
        return self.resolved.pin.digest

    def settings_name(self, endpoint: str) -> str:
        """Return the endpoint's name: the tag is the version's own."""
        return endpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedGraph(Loaded):
    """The pinned model versions of a graph, their contracts and environments, in the order of its steps."""

    combine: Combine
    steps: tuple[Resolved, ...]
    contracts: tuple[Contract, ...]
    environments: tuple[OwnEnvironment | None, ...]
    number: str

    @property
    def version(self) -> str:
        """The number that is made of the steps."""
        return self.number

    @property
    def sources(self) -> tuple[Resolved, ...]:
        """The model versions of the steps."""
        return self.steps

    @property
    def description(self) -> str:
        """The addresses of the steps."""
        uris = [step.pin.uri for step in self.steps]
        return ", then ".join(uris) if self.combine == "chain" else f"the mean of {', '.join(uris[:-1])} and {uris[-1]}"

    @property
    def digest(self) -> str:
        """SHA-256 over the digests of the steps."""
        return hashlib.sha256("".join(step.pin.digest for step in self.steps).encode()).hexdigest()

    def settings_name(self, endpoint: str) -> str:
        """Return the endpoint's name with the number of the graph: the last step may be one of several graphs."""
        return f"{endpoint}.{self.number}"


def load_endpoint(spec: EndpointSpec) -> LoadedModel | LoadedGraph:
    """Resolve and load a spec's model, or the steps of its graph, and have it answer its own example and random rows.

    Raises ModelNotFound, ModelUnfit, SchemaMismatch where the steps of a graph do not fit together, and ModelFailed
    where none of the rows is answered.
    """
    return load_endpoint_graph(spec) if spec.graph_steps else load_endpoint_model(spec)


def load_endpoint_model(spec: EndpointSpec) -> LoadedModel:
    """Resolve and load the one model of a spec, as `load_endpoint` does. Raises BadInput for a graph too."""
    if spec.model is None:
        message = f"The endpoint {spec.name} must answer by one model here, got a graph. Name one model as `model`."
        raise BadInput(message)
    resolved = resolve_model(spec.model)
    # An answer of the protocol holds no null: a request with such a row is refused.
    contract = resolved.contract(spec.input_columns, spec.policies, spec.params).require_outputs()
    model, environment = _load_step(spec, resolved, contract)
    example, random = _answer_samples(model, contract, resolved)
    return LoadedModel(
        resolved=resolved, contract=contract, model=model, example=example, random=random, environment=environment
    )


def _load_step(spec: EndpointSpec, resolved: Resolved, contract: Contract) -> tuple[Tunable, OwnEnvironment | None]:
    """Load a model as its server does: in a process of its own environment, which is returned too, or in this one."""
    made = choose_endpoint_environment(spec, resolved)
    processes = None if made is None else ProcessOptions(python=made.interpreter)
    model = load_model(resolved, contract, allow_pickle=spec.allow_pickle, processes=processes)
    return model, None if made is None else made.own


def load_endpoint_graph(spec: EndpointSpec) -> LoadedGraph:
    """Resolve and load the steps of a spec, as `load_endpoint` does.

    The spec's input_columns and policies are for what a caller sends: for the first step, or for each of an ensemble.
    """
    combine: Combine = "chain" if spec.steps else "mean"
    steps = tuple(resolve_model(step.model) for step in spec.graph_steps)
    contracts = tuple(_read_step_contract(spec, combine, position, step) for position, step in enumerate(steps))
    check_steps_fit(combine, [(step.pin.uri, contract) for step, contract in zip(steps, contracts, strict=True)])
    loaded = [_load_step(spec, step, contract) for step, contract in zip(steps, contracts, strict=True)]
    model = GraphModel(
        combine=combine, steps=tuple((contract, model) for contract, (model, _) in zip(contracts, loaded, strict=True))
    )
    contract = join_contracts(contracts)
    example, random = _answer_samples(model, contract, steps[0])
    terms = [step.model_dump(mode="json", include={"params", "batching"}) for step in spec.graph_steps]
    return LoadedGraph(
        contract=contract,
        model=model,
        example=example,
        random=random,
        combine=combine,
        steps=steps,
        contracts=contracts,
        environments=tuple(environment for _, environment in loaded),
        number=number_graph(combine, [(step.pin, given) for step, given in zip(steps, terms, strict=True)]),
    )


def _read_step_contract(spec: EndpointSpec, combine: Combine, position: int, step: Resolved) -> Contract:
    is_first = combine == "mean" or position == 0
    columns, policies = (spec.input_columns, spec.policies) if is_first else ({}, {})
    return step.contract(columns, policies, spec.graph_steps[position].params).require_outputs()


def _answer_samples(model: Model, contract: Contract, first: Resolved) -> tuple[Sample | None, Sample | None]:
    """Return those rows that a model answers of its input example, and of random ones. Raises ModelFailed for none."""
    with model.slot():
        example = keep_answered_rows(model, read_example_rows(first, contract))
        random = keep_answered_rows(model, draw_random_rows(contract, _RANDOM_ROWS))
    if example is None and random is None:
        message = (
            f"{first.pin.uri} must answer its own input example, or random rows, in finite numbers, to be "
            "compared with its endpoint; it answers none. Log it with an input_example that it answers."
        )
        raise ModelFailed(message)
    return example, random


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Rows, and what the model itself answers to them."""

    inputs: Arrays
    outputs: Arrays
    rows: int

    def split(self, size: int) -> Iterator[Sample]:
        """Yield the rows in samples of `size` rows; the last one may have fewer."""
        for at in range(0, self.rows, size):
            inputs, outputs = _slice_rows(self.inputs, at, at + size), _slice_rows(self.outputs, at, at + size)
            yield Sample(inputs=inputs, outputs=outputs, rows=min(size, self.rows - at))


def keep_answered_rows(model: Model, inputs: Arrays | None) -> Sample | None:
    """Return the rows that the model answers, without nulls and in finite numbers, with its answers; None for no row.

    Must be called inside the model's slot.
    """
    rows = len(next(iter(inputs.values()))) if inputs else 0
    if inputs is None or not rows:
        return None
    try:
        outputs = predict_rows(model, inputs)
    except Exception:  # noqa: BLE001 - a model may raise anything on rows that it was not made for
        kept = [at for at in range(rows) if _is_answered(model, _slice_rows(inputs, at, at + 1))]
        if not kept:
            return None
        inputs = {name: value[kept] for name, value in inputs.items()}
        outputs = predict_rows(model, inputs)
    answered_N = np.ones(len(next(iter(outputs.values()))), dtype=np.bool_)
    for value in outputs.values():
        answered_N &= ~find_missing(value).reshape(len(value), -1).any(axis=1)
    if not answered_N.any():
        return None
    kept_inputs, kept_outputs = (
        {name: value[answered_N] for name, value in each.items()} for each in (inputs, outputs)
    )
    return Sample(inputs=kept_inputs, outputs=kept_outputs, rows=int(answered_N.sum()))


def predict_rows(model: Model, inputs: Arrays) -> Arrays:
    """Return the model's answers, as a batch run computes them."""
    rows = len(next(iter(inputs.values())))
    return model.predict(model.prepare(Encoded(inputs=dict(inputs), flags=Flags.all_good(rows), rows=rows)).inputs)


def read_example_rows(resolved: Resolved, contract: Contract) -> Arrays | None:
    """Return the rows of the model's input example, None where it has none that the contract takes."""
    example: Any = resolved.mlmodel.load_input_example(str(resolved.folder))
    if example is None:
        return None
    if isinstance(example, list) and all(isinstance(row, Mapping) for row in example):
        example = pd.DataFrame(example)
    if isinstance(example, pd.DataFrame):
        return _encode_example_table(
            pa.Table.from_pandas(example.head(_EXAMPLE_ROWS_MAX), preserve_index=False), contract
        )
    inputs = example if isinstance(example, Mapping) else {contract.inputs[0].name: example}
    try:
        return {value.name: _read_example_array(value, inputs[value.name]) for value in contract.inputs}
    except (KeyError, ValueError, TypeError):
        return None


def _encode_example_table(table: pa.Table, contract: Contract) -> Arrays | None:
    try:
        contract.check(table.schema, "The input example")
    except SchemaMismatch:
        return None
    encoded = encode(contract, table)
    good_N = encoded.flags.code_N == 0
    return {name: np.ascontiguousarray(value[good_N]) for name, value in encoded.inputs.items()}


def _read_example_array(value: Input, given: Any) -> npt.NDArray[Any]:
    """Return one input of an example as [N, *shape]; a single row may lack N. Raises ValueError for another shape."""
    array = np.asarray(given, dtype=object if value.dtype in ("str", "binary") else value.dtype)
    if array.shape not in (value.shape, (len(array), *value.shape), (len(array), *(value.shape or (1,)))):
        message = f"An example of {value.name!r} must have the shape {value.shape} a row, got {array.shape} in all."
        raise ValueError(message)
    return array.reshape(-1, *value.shape)[:_EXAMPLE_ROWS_MAX]


def draw_random_rows(contract: Contract, rows: int, seed: int = _SEED) -> Arrays:
    """Return seeded rows of every input's type: standard normal floats, small whole numbers, words, bytes, times."""
    random = np.random.default_rng(seed)
    return {value.name: _draw_values(value, rows, random) for value in contract.inputs}


def _draw_values(value: Input, rows: int, random: np.random.Generator) -> npt.NDArray[Any]:
    shape = (rows, *value.shape)
    if value.dtype == "str":
        return _draw_objects(shape, lambda: " ".join(random.choice(_WORDS, size=random.integers(1, 12))))
    if value.dtype == "binary":
        return _draw_objects(shape, lambda: random.bytes(int(random.integers(1, 32))))
    if value.dtype == "datetime64[ns]":
        seconds = _YEAR_2020 + random.integers(0, 3650 * _DAYS, shape)
        return (seconds * _SECONDS).view("datetime64[ns]")
    kind = np.dtype(value.dtype).kind
    if kind == "f":
        return random.standard_normal(shape).astype(value.dtype)
    return random.integers(0, 2 if kind == "b" else 10, shape).astype(value.dtype)


def _draw_objects(shape: tuple[int, ...], make: Callable[[], Any]) -> npt.NDArray[Any]:
    array = np.empty(shape, dtype=object)
    for at in np.ndindex(shape):
        array[at] = make()
    return array


def _is_answered(model: Model, inputs: Arrays) -> bool:
    try:
        predict_rows(model, inputs)
    except Exception:  # noqa: BLE001 - the same
        return False
    return True


def _slice_rows(arrays: Arrays, start: int, stop: int) -> Arrays:
    return {name: value[start:stop] for name, value in arrays.items()}
