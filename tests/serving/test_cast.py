from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serving.cast import cast_numbers, parse_numbers
from tests.serving.reference import LOST, cast_one, limits, parse_one

WHOLE = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
FLOATS = ("float16", "float32", "float64")
NUMBERS = ("bool", *WHOLE, *FLOATS)


def same(expected: float, actual: float) -> bool:
    return expected == actual or (math.isnan(expected) and math.isnan(actual))


def numbers_of(dtype: str) -> st.SearchStrategy[Any]:
    """Numbers of a dtype, the edges of every other among them."""
    kind = np.dtype(dtype)
    edges = [
        sign * (2**bits + more)
        for bits in (7, 8, 11, 15, 16, 24, 31, 32, 53, 63, 64)
        for sign in (1, -1)
        for more in (-1, 0, 1)
    ]
    if kind.kind != "f":
        low, high = limits(kind)
        return st.sampled_from([edge for edge in [*edges, 0, low, high] if low <= edge <= high]) | st.integers(
            low, high
        )
    with np.errstate(all="ignore"):
        held = np.array([float(edge) for edge in edges] + [0.5, 1.5, 2.5, -0.5, 0.1]).astype(kind).astype(np.float64)
    return st.sampled_from(held.tolist()) | st.floats(width=kind.itemsize * 8)


casts = st.tuples(
    st.sampled_from((*WHOLE, *FLOATS)), st.sampled_from(NUMBERS), st.sampled_from(["exact", "round"])
).flatmap(lambda pick: st.tuples(*map(st.just, pick), st.lists(numbers_of(pick[0]), min_size=1, max_size=8)))


@settings(deadline=None, max_examples=400)
@given(casts)
@example(("int64", "float64", "exact", [2**53, 2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63)]))
@example(("uint64", "float64", "exact", [2**63, 2**64 - 1, 2**64 - 2**11]))
@example(("int32", "float16", "exact", [-(2**31), 2**31 - 1, 65504, 65505]))
@example(("float64", "int64", "round", [2.0**63, -(2.0**63), math.nan, math.inf, 0.5, 1.5, -0.5]))
@example(("float32", "uint64", "exact", [2.0**64, -1.0, -0.0, 2.0**63]))
@example(("float64", "bool", "exact", [0.0, 1.0, 0.5, 2.0, -1.0, math.nan]))
@example(("int64", "uint8", "round", [-1, 255, 256, -256]))
@example(("uint64", "int64", "exact", [2**63 - 1, 2**63, 2**64 - 1]))
@example(("float64", "float32", "round", [1e300, -1e300, math.inf, math.nan, 1e-300]))
def test_a_cast_keeps_the_values_and_loses_the_rows_that_plain_python_does(
    case: tuple[str, str, str, list[Any]],
) -> None:
    given_type, dtype, cast, values = case
    out_n = np.empty(len(values), dtype=dtype)
    lost_n = cast_numbers(out_n, np.array(values, dtype=given_type), exact=cast == "exact")
    expected = [cast_one(value, dtype, cast) for value in values]

    assert [one is LOST for one in expected] == lost_n.tolist()
    assert all(one is LOST or same(one, got) for one, got in zip(expected, out_n.tolist(), strict=True))


texts = st.one_of(
    st.integers(-(2**65), 2**65).map(str),
    st.integers(-300, 300).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.sampled_from(
        ["true", "False", "TRUE", "inf", "-inf", "nan", "1e400", "-1e60", "", "abc", "1,5", "0x10", "1 2", "+7", ".5"]
    ),
).flatmap(lambda text: st.sampled_from([text, f" {text}", f"{text}\t"]))


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(("bool", *WHOLE, "float32", "float64")),
    st.lists(st.none() | texts, max_size=8),
    st.sampled_from([pa.string(), pa.large_string(), pa.string_view()]),
)
def test_text_is_parsed_as_plain_python_does(dtype: str, values: list[str | None], kind: pa.DataType) -> None:
    out_n = np.empty(len(values), dtype=dtype)
    broken_n = parse_numbers(out_n, pa.array(values, kind))
    expected = [0 if text is None else parse_one(text, dtype) for text in values]

    assert [one is LOST for one in expected] == broken_n.tolist()
    assert all(one is LOST or same(one, got) for one, got in zip(expected, out_n.tolist(), strict=True))


@pytest.mark.parametrize("text", ["1e39", "-1e39", "1e400"])
def test_a_number_too_large_for_a_float_does_not_become_infinity(text: str) -> None:
    out_n = np.empty(2, dtype=np.float32)

    assert [True, False] == parse_numbers(out_n, pa.array([text, "-Infinity"])).tolist()
    assert -math.inf == out_n[1]


def test_half_precision_is_parsed_too() -> None:
    out_n = np.empty(3, dtype=np.float16)

    assert [False, False, True] == parse_numbers(out_n, pa.array(["0.5", None, "70000"])).tolist()
    assert [0.5, 0.0] == out_n[:2].tolist()
