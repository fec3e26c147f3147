from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from serving.errors import ModelFailed
from serving.model.contract import Output
from serving.model.outputs import name_outputs
from serving.model.process_protocol import pack_opaque, unpack_opaque

SCORE = Output(name="score", dtype="float32")
LABEL = Output(name="label", dtype="str")
WIDE = Output(name="wide", dtype="float32", shape=(2, 3))
COUNT = Output(name="count", dtype="int64")


class Scored(BaseModel):
    label: str
    score: float


def named(raw: Any, *outputs: Output, rows: int = 3) -> dict[str, Any]:
    return {name: value.tolist() for name, value in name_outputs(raw, outputs, rows, np.asarray).items()}


def refusal(raw: Any, *outputs: Output, rows: int = 3) -> str:
    with pytest.raises(ModelFailed) as caught:
        name_outputs(raw, outputs, rows, np.asarray)
    return str(caught.value)


@pytest.mark.parametrize(
    "raw",
    [
        np.array([1.0, 2.0, 3.0]),
        np.array([[1.0], [2.0], [3.0]]),
        [1.0, 2.0, 3.0],
        (np.array([[1.0], [2.0], [3.0]]),),
        [np.array([1.0, 2.0, 3.0])],
        {"score": [1, 2, 3], "more": "of it"},
        {"anything": [1.0, 2.0, 3.0]},
        pd.Series([1.0, 2.0, 3.0]),
        pl.Series([1.0, 2.0, 3.0]),
        pl.DataFrame({"anything": [1.0, 2.0, 3.0]}),
        pa.table({"anything": [1.0, 2.0, 3.0]}),
        pd.DataFrame({"anything": [1.0, 2.0, 3.0]}),
        pd.DataFrame({"more": ["a", "b", "c"], "score": [1.0, 2.0, 3.0]}),
        pl.DataFrame({"more": ["a", "b", "c"], "score": [1.0, 2.0, 3.0]}),
        [{"score": 1.0}, {"score": 2.0}, {"more": "of it", "score": 3.0}],
        [{"anything": 1.0}, {"anything": 2.0}, {"anything": 3.0}],
    ],
)
def test_one_output_is_found_in_whatever_holds_it(raw: Any) -> None:
    assert {"score": [1.0, 2.0, 3.0]} == named(raw, SCORE)


@pytest.mark.parametrize(
    "raw",
    [
        (np.array([1.0, 2.0, 3.0]), ["a", "b", "c"]),
        [np.array([[1.0], [2.0], [3.0]]), ["a", "b", "c"]],
        {"label": ["a", "b", "c"], "score": [1.0, 2.0, 3.0]},
        pd.DataFrame({"label": ["a", "b", "c"], "score": [1.0, 2.0, 3.0]}),
        pd.DataFrame({0: [1.0, 2.0, 3.0], 1: ["a", "b", "c"]}),
        pl.DataFrame({"label": ["a", "b", "c"], "score": [1.0, 2.0, 3.0]}),
        pl.DataFrame({"x": [1.0, 2.0, 3.0], "y": ["a", "b", "c"]}),
        pa.table({"label": ["a", "b", "c"], "score": [1.0, 2.0, 3.0]}),
        [{"label": "a", "score": 1.0}, {"score": 2.0, "label": "b"}, {"label": "c", "score": 3.0, "more": 0}],
        [Scored(label="a", score=1.0), Scored(label="b", score=2.0), Scored(label="c", score=3.0)],
    ],
)
def test_several_outputs_are_found_by_name_else_in_their_order(raw: Any) -> None:
    assert {"score": [1.0, 2.0, 3.0], "label": ["a", "b", "c"]} == named(raw, SCORE, LABEL)


@pytest.mark.parametrize("raw", [1.5, [1.5], np.array(1.5), np.array([[1.5]]), pd.DataFrame({"x": [1.5]})])
def test_one_row_may_come_without_a_dimension_of_rows(raw: Any) -> None:
    assert {"score": [1.5]} == named(raw, SCORE, rows=1)


def test_a_wide_output_may_be_flat_or_a_frame() -> None:
    x = np.arange(18.0).reshape(3, 2, 3)

    assert (
        {"wide": x.tolist()}
        == named(x, WIDE)
        == named(x.reshape(3, 6), WIDE)
        == named(pd.DataFrame(x.reshape(3, 6)), WIDE)
        == named(pl.DataFrame(x.reshape(3, 6)), WIDE)
    )


def test_a_name_that_two_columns_have_is_refused() -> None:
    frame = pd.concat([pd.DataFrame({"score": [9.0, 9.0, 9.0]}), pd.DataFrame({"score": [1.0, 2.0, 3.0]})], axis=1)

    assert "must return the columns ['score'], got ['score', 'score']" in refusal(frame, SCORE)


def test_a_row_that_lacks_an_output_has_a_null_there() -> None:
    found = named([{"label": "a"}, {"score": 2.0, "label": None}, {"score": 3.0, "label": "c"}], SCORE, LABEL)

    assert ["a", None, "c"] == found["label"]
    assert math.isnan(found["score"][0])
    assert [2.0, 3.0] == found["score"][1:]


@pytest.mark.parametrize("hold", [list, np.array])
def test_a_wide_output_may_be_a_column_of_lists(hold: Callable[[list[float]], Any]) -> None:
    rows = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    pair = Output(name="pair", dtype="float32", shape=(2,))
    values = [hold(row) for row in rows]

    assert {"pair": rows} == named(pd.Series(values), pair)
    assert {"pair": rows} == named(pd.DataFrame({"more": [0, 0, 0], "pair": values}), pair)
    assert {"pair": rows} == named([{"pair": value} for value in values], pair)
    assert {"pair": rows} == named(pl.Series(rows), pair)
    assert {"pair": rows} == named(pa.table({"pair": rows}), pair)


def test_a_null_in_a_column_of_lists_is_a_null_in_every_place() -> None:
    words = Output(name="words", dtype="str", shape=(2,))

    assert {"words": [["a\0", "b"], [None, None], ["c", None]]} == named(
        pd.Series([["a\0", "b"], None, ["c", None]]), words
    )


@pytest.mark.parametrize(
    ("raw", "outputs", "got"),
    [
        (np.zeros((3, 2)), (SCORE,), "must hold 1 values for each of 3 rows, in the shape (3,), got (3, 2)"),
        (np.zeros(2), (SCORE,), "got (2,)"),
        (np.zeros((1, 3)), (SCORE,), "got (1, 3)"),
        (np.zeros((3, 3, 2)), (WIDE,), "got (3, 3, 2)"),
        (np.zeros((6, 3)), (WIDE,), "got (6, 3)"),
        (0.5, (SCORE,), "got ()"),
        (np.zeros(3), (SCORE, LABEL), "must return 2 outputs ['score', 'label'], got a ndarray"),
        ((np.zeros(3),), (SCORE, LABEL), "got a tuple"),
        ({"score": np.zeros(3)}, (SCORE, LABEL), "got ['score']: ['label'] missing"),
        (pd.DataFrame({"a": [1.0] * 3, "b": [1.0] * 3}), (SCORE,), "return the columns ['score'], got ['a', 'b']"),
        (pd.DataFrame({"score": [1.0] * 3}), (SCORE, LABEL), "return the columns ['score', 'label'], got ['score']"),
        ([{"label": "a"}] * 3, (SCORE, LABEL), "got ['label']: ['score'] missing"),
        ([{"score": 1.0}] * 2, (SCORE,), "got (2,)"),
        (pd.Series([[1.0] * 6, [1.0] * 6, [1.0] * 5]), (WIDE,), "got lists of different lengths"),
        (pd.Series([[1.0] * 5] * 3), (WIDE,), "got (3, 5)"),
        (np.array([1, 2, 3]), (LABEL,), "must be text, as the signature says, got 1"),
        (np.array([b"a", b"b", b"c"]), (LABEL,), "must be text, as the signature says, got b'a'"),
        (np.array([0.5, 1.0, 2.0]), (COUNT,), "must be int64, as the signature says, got float64 such as 0.5"),
        ([0.5, None, 2], (COUNT,), "must be int64, as the signature says, got object such as 0.5"),
        ([2**63, None, 2], (COUNT,), "must be int64, as the signature says, got object such as 9223372036854775808"),
    ],
)
def test_a_result_that_does_not_fit_the_signature_fails_the_model_by_name(
    raw: Any, outputs: tuple[Output, ...], got: str
) -> None:
    message = refusal(raw, *outputs)

    assert got in message
    assert message.endswith("Log the model again with the signature of what it returns.")


def test_a_transposed_answer_is_not_taken_for_a_flat_one() -> None:
    assert "got (6, 3)" in refusal(np.arange(18.0).reshape(3, 6).T, WIDE)


def test_floats_are_rounded_to_the_outputs_own_and_overflow_to_infinity() -> None:
    (found,) = named([0.1, 1e300, None], SCORE).values()

    assert [float(np.float32(0.1)), math.inf] == found[:2]
    assert math.isnan(found[2])


@pytest.mark.parametrize(
    "raw", [np.array([1, 2, 3], dtype=np.int8), np.array([1.0, 2.0, 3.0]), np.array([1, 2, 3], dtype=object)]
)
def test_integers_are_integers_whatever_holds_them(raw: Any) -> None:
    assert {"count": [1, 2, 3]} == named(raw, COUNT)


@pytest.mark.parametrize("raw", [[1.0, math.inf, 2.0], [1, None, math.inf]])
def test_an_infinite_number_among_integers_is_an_error_of_its_row(raw: Any) -> None:
    with pytest.raises(ValueError, match="output 'count' must be finite to be int64"):
        name_outputs(raw, (COUNT,), 3, np.asarray)


@pytest.mark.parametrize(
    ("dtype", "raw"), [("int8", [127, 128, 0]), ("uint8", [0, -1, 1]), ("bool", [0, 1, 2]), ("uint64", [0, 1, -1])]
)
def test_integers_that_do_not_fit_fail_the_model(dtype: str, raw: list[int]) -> None:
    assert f"must be {dtype}" in refusal(np.array(raw), Output(name="y", dtype=dtype))


@pytest.mark.parametrize("null", [None, math.nan, pd.NA, pd.NaT])
def test_every_null_among_texts_is_none(null: object) -> None:
    assert {"label": ["a", None, "c"]} == named(np.array(["a", null, "c"], dtype=object), LABEL)
    assert {"label": ["a", None, "c"]} == named(pd.Series(["a", None, "c"]), LABEL)


BIG = 2**63 - 1
FLAG = Output(name="flag", dtype="bool")


@pytest.mark.parametrize(
    ("raw", "output", "expected"),
    [
        (pd.Series([1, None, BIG], dtype="Int64"), COUNT, [1, None, BIG]),
        (pd.Series([1, None, BIG], dtype=pd.ArrowDtype(pa.int64())), COUNT, [1, None, BIG]),
        (pd.Series([1, None, BIG], dtype=object), COUNT, [1, None, BIG]),
        (pd.Series([1, None, 3]), COUNT, [1, None, 3]),
        (pd.array([1, None, BIG], dtype="Int64"), COUNT, [1, None, BIG]),
        (pl.Series([1, None, BIG]), COUNT, [1, None, BIG]),
        (pa.table({"any": [1, None, BIG]}), COUNT, [1, None, BIG]),
        ([1, None, BIG], COUNT, [1, None, BIG]),
        (np.array([1, 2**53 + 1, BIG], dtype=object), COUNT, [1, 2**53 + 1, BIG]),
        (np.array([1.0, math.nan, 3.0]), COUNT, [1, None, 3]),
        (pd.Series([1, None, 3], dtype="Int64"), Output(name="small", dtype="int8"), [1, None, 3]),
        (pd.Series([None] * 3, dtype="Int64"), COUNT, [None] * 3),
        (pd.Series([True, None, False], dtype="boolean"), FLAG, [True, None, False]),
        (pd.Series([True, None, False], dtype=pd.ArrowDtype(pa.bool_())), FLAG, [True, None, False]),
        (pd.Series([True, None, False]), FLAG, [True, None, False]),
        (pl.Series([True, None, False]), FLAG, [True, None, False]),
        (pd.Series(["a", None, "c"], dtype="string"), LABEL, ["a", None, "c"]),
        (pd.Series(["a", None, "c"], dtype=pd.ArrowDtype(pa.string())), LABEL, ["a", None, "c"]),
    ],
)
def test_nulls_of_every_library_are_none_and_integers_beside_them_exact(
    raw: Any, output: Output, expected: list[Any]
) -> None:
    frame = pd.DataFrame({output.name: pd.Series(raw), "more": 0}) if isinstance(raw, pd.Series) else raw

    assert {output.name: expected} == named(raw, output) == named(frame, output)
    assert {output.name: expected} == named({output.name: raw}, output)


@pytest.mark.parametrize("null", [None, math.nan, pd.NA])
def test_a_null_among_floats_is_nan(null: object) -> None:
    for raw in (np.array([0.5, null, 2.0], dtype=object), pd.Series([0.5, null, 2.0]).astype("Float64")):
        np.testing.assert_array_equal([0.5, math.nan, 2.0], name_outputs(raw, (SCORE,), 3, np.asarray)["score"])


@given(st.lists(st.one_of(st.none(), st.integers(-(2**63), BIG)), min_size=1, max_size=20))
def test_any_integers_beside_nulls_reach_the_parent_of_the_models_process_as_they_are(rows: list[int | None]) -> None:
    column = pd.Series(rows, dtype="Int64")
    found = name_outputs(column, (COUNT,), len(rows), np.asarray)
    crossed = found if found["count"].dtype.kind != "O" else unpack_opaque(*pack_opaque(found))

    assert rows == crossed["count"].tolist()


def test_floats_that_may_have_rounded_integers_beside_nulls_are_refused() -> None:
    message = "must hold int64 beside nulls, got float64, which rounds integers as large as 9007199254740992"
    with pytest.raises(ModelFailed, match=message):
        name_outputs(np.array([2.0**53, math.nan]), (COUNT,), 2, np.asarray)


def test_texts_may_be_numpys_own_or_categories() -> None:
    assert {"label": ["a", "b", "a"]} == named(np.array(["a", "b", "a"]), LABEL)
    assert {"label": ["a", "b", "a"]} == named(pd.Series(["a", "b", "a"], dtype="category"), LABEL)


def test_the_models_own_array_is_not_written_to() -> None:
    labels = np.array(["a", math.nan, "c"], dtype=object)
    named(labels, LABEL)

    assert labels[1] is not None


def relabelled(values: list[float], labels: list[int]) -> pd.Series:
    return pd.Series(values, index=labels, dtype="float32")


@given(st.permutations(range(20)))
def test_rows_in_another_order_are_restored_by_their_index(order: list[int]) -> None:
    series = pd.Series(np.arange(20.0)).iloc[order]
    frame = pd.DataFrame({"more": "x", "score": series, "label": series.astype(str)})
    numbers, words = np.arange(20.0).tolist(), [str(at) for at in np.arange(20.0)]

    assert {"score": numbers} == named(series, SCORE, rows=20)
    assert {"score": numbers} == named([series], SCORE, rows=20)
    assert {"score": numbers} == named({"score": series, "other": 1}, SCORE, rows=20)
    assert {"score": numbers} == named(frame, SCORE, rows=20)
    assert {"score": numbers, "label": words} == named(frame[["score", "label"]], SCORE, LABEL, rows=20)
    assert {"score": numbers, "label": words} == named((series, series[::-1].astype(str)), SCORE, LABEL, rows=20)


def test_each_column_of_a_dict_is_restored_by_its_own_index() -> None:
    score, label = relabelled([3, 1, 2], [2, 0, 1]), pd.Series(["a", "c", "b"], index=[0, 2, 1])

    assert {"score": [1, 2, 3], "label": ["a", "b", "c"]} == named({"score": score, "label": label}, SCORE, LABEL)


def test_a_wide_output_is_restored_by_the_index_of_its_frame() -> None:
    x = np.arange(18.0).reshape(3, 6)
    frame = pd.DataFrame(x[[2, 0, 1]], index=[2, 0, 1])

    assert {"wide": x.reshape(3, 2, 3).tolist()} == named(frame, WIDE) == named({"wide": frame}, WIDE)


@pytest.mark.parametrize(
    "index",
    [
        [7, 8, 9],
        [0, 1, 1],
        [1, 2, 3],
        ["a", "b", "c"],
        ["0", "1", "2"],
        [0.0, 0.5, 1.0],
        [-3, -2, -1],
        [0, 1, None],
        pd.MultiIndex.from_tuples([(0, 0), (0, 1), (0, 2)]),
        pd.date_range("2024-01-01", periods=3),
        pd.RangeIndex(0, 6, 2),
        pd.RangeIndex(1, 4),
    ],
    ids=str,
)
def test_an_answer_whose_index_is_not_that_of_its_input_is_refused(index: Any) -> None:
    series = pd.Series([1.0, 2.0, 3.0], index=index)
    messages = {refusal(raw, SCORE) for raw in (series, series.to_frame("score"), {"score": series}, [series])}

    assert 1 == len(messages)
    assert "must be in the order of its input, or have the index of its input: 0 to 2, each once, got" in messages.pop()


def test_one_row_can_be_in_no_other_order_whatever_its_label() -> None:
    assert {"score": [1.5]} == named(pd.Series([1.5], index=["score"]), SCORE, rows=1)


def test_an_answer_of_fewer_rows_is_refused_by_their_number() -> None:
    assert "got (2,)" in refusal(pd.Series([1.0, 2.0], index=[0, 2]), SCORE)
