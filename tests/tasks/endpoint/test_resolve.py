from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serving.model.contract import Contract, Input, Output
from serving.model.encoding import Encoded
from serving.model.registry import resolve_model
from tasks.endpoint.resolve import draw_random_rows, keep_answered_rows, read_example_rows
from tests.serving.toys import alone, column, matrix
from tests.support import register_torch
from tests.tasks.endpoint.values import sample

DTYPES = ("float32", "float64", "int8", "int64", "uint8", "bool", "str", "binary", "datetime64[ns]")


@given(dtype=st.sampled_from(DTYPES), shape=st.sampled_from([(), (3,), (2, 2)]), rows=st.integers(1, 9))
def test_random_rows_are_of_the_contracts_types_and_the_same_each_time(
    dtype: str, shape: tuple[int, ...], rows: int
) -> None:
    contract = Contract(
        inputs=(Input(name="x", dtype=dtype, shape=shape, columns=(column(dtype, "x"),)),),
        outputs=(Output(name="score", dtype="float32"),),
    )
    first, again = draw_random_rows(contract, rows), draw_random_rows(contract, rows)

    assert (rows, *shape) == first["x"].shape
    assert np.dtype(object if dtype in ("str", "binary") else dtype) == first["x"].dtype
    assert np.array_equal(first["x"], again["x"])


class Function:
    """A model that is one function of x."""

    slots = 1

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def prepare(self, encoded: Encoded) -> Encoded:
        return encoded

    def predict(self, inputs: Any) -> dict[str, Any]:
        return {"score": self.function(inputs["x"])}

    def slot(self) -> Any:
        return nullcontext()


def picky(x_NF: Any) -> Any:
    if (x_NF[:, 0] > 1).any():
        message = "no row may begin above 1"
        raise ValueError(message)
    return x_NF[:, 0]


X = np.array([[0, 1], [2, 1], [1, 1]], dtype=np.float32)


@pytest.mark.parametrize(
    ("function", "kept"),
    [
        (lambda x_NF: x_NF[:, 0], [0, 1, 2]),
        (picky, [0, 2]),
        (lambda x_NF: np.where(x_NF[:, 0] == 2, np.nan, x_NF[:, 0]), [0, 2]),
    ],
)
def test_only_rows_that_the_model_answers_are_kept(function: Callable[[Any], Any], kept: list[int]) -> None:
    found = keep_answered_rows(Function(function), {"x": X})

    assert found is not None
    assert X[kept].tolist() == found.inputs["x"].tolist()
    assert X[kept, 0].tolist() == found.outputs["score"].tolist()
    assert len(kept) == found.rows


def test_a_model_that_answers_no_row_gives_no_sample() -> None:
    assert (
        keep_answered_rows(Function(lambda x_NF: x_NF[:, 0] / 0 if len(x_NF) == 9 else picky(x_NF + 9)), {"x": X})
        is None
    )
    assert keep_answered_rows(Function(picky), {"x": X[:0]}) is None
    assert keep_answered_rows(Function(picky), None) is None


def test_pieces_are_the_rows_in_order() -> None:
    pieces = list(sample().split(3))

    assert [3, 3, 2] == [piece.rows for piece in pieces]
    assert np.array_equal(sample().inputs["x"], np.concatenate([piece.inputs["x"] for piece in pieces]))


X_KEPT = np.arange(6, dtype=np.float32).reshape(2, 3)


class Logged:
    """What MLflow keeps of a model, as far as its example goes."""

    folder = "nowhere"

    def __init__(self, example: object) -> None:
        self.mlmodel = self
        self.example = example

    def load_input_example(self, _folder: str) -> object:
        return self.example


AB = alone(column("float32", "a"), column("int64", "b"))


@pytest.mark.parametrize(
    ("contract", "example", "rows"),
    [
        (matrix(2), X, X.tolist()),
        (matrix(2), {"x": X.tolist()}, X.tolist()),
        (matrix(2), X[0], [X[0].tolist()]),
        (matrix(2), np.zeros((2, 3)), None),
        (matrix(2), {"y": X}, None),
        (matrix(2), None, None),
        (matrix(2), pd.DataFrame({"c0": [1.0, 2.0], "c1": [3.0, 4.0]}).astype("float32"), [[1, 3], [2, 4]]),
        (matrix(2), pd.DataFrame({"c0": ["1", "?"], "c1": ["3", "4"]}), [[1, 3]]),
        (matrix(2), pd.DataFrame({"c0": [1.0]}), None),
    ],
)
def test_the_models_own_example_becomes_rows_where_the_contract_takes_it(
    contract: Contract, example: object, rows: list[list[float]] | None
) -> None:
    found = read_example_rows(Logged(example), contract)  # type: ignore[arg-type]

    assert rows == (None if found is None else found["x"].tolist())


def test_an_example_of_columns_becomes_one_input_each() -> None:
    frame = pd.DataFrame({"a": [1.5], "b": [2]})
    found = read_example_rows(Logged(frame.astype({"a": "float32"})), AB)  # type: ignore[arg-type]

    assert found is not None
    assert {"a": [1.5], "b": [2]} == {name: value.tolist() for name, value in found.items()}
    # As float64 a may not fit, and no policy says what to do then.
    assert read_example_rows(Logged(frame), AB) is None  # type: ignore[arg-type]


def test_an_example_that_mlflow_keeps_is_found_and_one_that_it_does_not_keep_is_none(
    linear: str, registry: Path
) -> None:
    kept = register_torch("exemplary", torch.nn.Linear(3, 1), ("a", "b", "c"), X_KEPT)
    resolved, without = resolve_model(kept), resolve_model(linear)
    found = read_example_rows(resolved, resolved.contract({}, {}))

    assert found is not None
    assert X_KEPT.tolist() == found["x"].tolist()
    assert read_example_rows(without, without.contract({}, {})) is None
