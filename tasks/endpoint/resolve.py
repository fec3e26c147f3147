"""The model of an endpoint, resolved once and loaded here, and rows that it answers: its example and random ones.

Shapes: N rows; every input is [N, *shape] of the contract.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from serving.errors import ModelFailed, SchemaMismatch
from serving.model.contract import Contract, Input
from serving.model.encoding import Encoded, Flags, encode
from serving.model.interface import Model, Tunable
from serving.model.loading import load_model
from serving.model.registry import Resolved, resolve_model
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
class LoadedModel:
    """A pinned model version, its contract, the model itself, and rows to compare its endpoint with."""

    resolved: Resolved
    contract: Contract
    model: Tunable
    example: Sample | None
    random: Sample | None

    @property
    def version(self) -> str:
        """The model version, a whole number from 1."""
        return self.resolved.pin.version

    @property
    def sample(self) -> Sample:
        """The rows to measure with: random ones, which differ, where the model answers any."""
        sample = self.random or self.example
        assert sample is not None, "load_endpoint_model makes none without"  # noqa: S101 - our own mistake, not a caller's
        return sample


def load_endpoint_model(spec: EndpointSpec) -> LoadedModel:
    """Resolve and load a spec's model, and have it answer its own example and random rows.

    Raises ModelNotFound, ModelUnfit, and ModelFailed where it answers none of them.
    """
    resolved = resolve_model(spec.model)
    contract = resolved.contract(spec.input_columns, spec.policies, spec.params)
    model = load_model(resolved, contract, allow_pickle=spec.allow_pickle)
    with model.slot():
        example = keep_answered_rows(model, read_example_rows(resolved, contract))
        random = keep_answered_rows(model, draw_random_rows(contract, _RANDOM_ROWS))
    if example is None and random is None:
        message = (
            f"{resolved.pin.uri} must answer its own input example, or random rows, in finite numbers, to be "
            "compared with its endpoint; it answers none. Log it with an input_example that it answers."
        )
        raise ModelFailed(message)
    return LoadedModel(resolved=resolved, contract=contract, model=model, example=example, random=random)


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
    """Return those of the rows that the model answers in finite numbers, with its answers; None where it answers none.

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
    finite_N = np.ones(len(next(iter(outputs.values()))), dtype=np.bool_)
    for value in outputs.values():
        if value.dtype.kind == "f":
            finite_N &= np.isfinite(value).reshape(len(value), -1).all(axis=1)
    if not finite_N.any():
        return None
    kept_inputs, kept_outputs = ({name: value[finite_N] for name, value in each.items()} for each in (inputs, outputs))
    return Sample(inputs=kept_inputs, outputs=kept_outputs, rows=int(finite_N.sum()))


def predict_rows(model: Model, inputs: Arrays) -> Arrays:
    """Return the model's answers, as a batch run computes them."""
    rows = len(next(iter(inputs.values())))
    return model.predict(model.prepare(Encoded(inputs=dict(inputs), flags=Flags.all_good(rows), rows=rows)).inputs)


def read_example_rows(resolved: Resolved, contract: Contract) -> Arrays | None:
    """Return the rows of the model's input example, None where it has none that the contract takes."""
    example = resolved.mlmodel.load_input_example(str(resolved.folder))
    if example is None:
        return None
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
