"""Numbers that are cast and parsed, held against plain Python's own, which knows no type of a fixed size."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serving.model.number_casts import cast_numbers, parse_numbers
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


@settings(max_examples=400)
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
    st.sampled_from(
        ["20.0", "2e1", "-2.0E+1", "20.", "20.5", "-21.5", "-0.0", "-0.4", ".", "e1", "1e", "1.2.3", "--1"]
    ),
    st.tuples(st.integers(-(2**65), 2**65), st.sampled_from(["", "0", "00", "5", "50", "500001", "49"])).map(
        lambda pair: f"{pair[0]}.{pair[1]}"
    ),
    st.tuples(st.integers(-(10**25), 10**25), st.integers(0, 30)).map(lambda pair: f"{pair[0]}e-{pair[1]}"),
    st.tuples(st.integers(-300, 300), st.integers(-3, 25), st.sampled_from("eE")).map(
        lambda three: f"{three[0]}.25{three[2]}{three[1]}"
    ),
).flatmap(lambda text: st.sampled_from([text, f" {text}", f"{text}\t"]))


@settings(max_examples=400)
@given(
    st.sampled_from(("bool", *WHOLE, "float32", "float64")),
    st.lists(st.none() | texts, max_size=8),
    st.sampled_from([pa.string(), pa.large_string(), pa.string_view()]),
    st.sampled_from(["safe", "exact", "round"]),
)
@example("int64", ["9223372036854775807.0", "-9223372036854775808.0", "9223372036854775808.0"], pa.string(), "safe")
@example("int64", ["9223372036854775807.5", "-9223372036854775808.5", "9.223372036854775807e18"], pa.string(), "round")
@example("uint64", ["18446744073709551615.0", "18446744073709551615.5", "-0.5", "-0.6"], pa.string(), "round")
@example("int64", ["9007199254740993.0", "9007199254740993e0", "9007199254740993.00000000001"], pa.string(), "exact")
@example("int8", ["0e99999999", "1e-99999999", "1e99999999", "0.0e-5"], pa.string(), "round")
@example("int8", ["0" * 40 + "7.0", "0." + "0" * 40 + "7e41", "-.5", "1.5", "2.5"], pa.string(), "round")
def test_text_is_parsed_as_plain_python_does(
    dtype: str, values: list[str | None], kind: pa.DataType, cast: str
) -> None:
    out_n = np.empty(len(values), dtype=dtype)
    broken_n = parse_numbers(out_n, pa.array(values, kind), nearest=cast == "round")
    expected = [0 if text is None else parse_one(text, dtype, cast) for text in values]

    assert [one is LOST for one in expected] == broken_n.tolist()
    assert all(one is LOST or same(one, got) for one, got in zip(expected, out_n.tolist(), strict=True))


@pytest.mark.parametrize("text", ["1e39", "-1e39", "1e400"])
def test_a_number_too_large_for_a_float_does_not_become_infinity(text: str) -> None:
    out_n = np.empty(2, dtype=np.float32)

    assert [True, False] == parse_numbers(out_n, pa.array([text, "-Infinity"]), nearest=False).tolist()
    assert -math.inf == out_n[1]


@pytest.mark.parametrize("dtype", WHOLE)
def test_whole_numbers_with_a_point_as_pandas_writes_them_beside_nulls_are_parsed(dtype: str) -> None:
    texts = ["20.0", None, " 7.0", "3", "2e1", "20.5", "inf", "nan"]
    kept_n, rounded_n = np.empty(8, dtype=dtype), np.empty(8, dtype=dtype)

    assert [*[False] * 5, True, True, True] == parse_numbers(kept_n, pa.array(texts), nearest=False).tolist()
    assert [*[False] * 6, True, True] == parse_numbers(rounded_n, pa.array(texts), nearest=True).tolist()
    assert [20, 0, 7, 3, 20] == kept_n[:5].tolist()
    assert [20, 0, 7, 3, 20, 20] == rounded_n[:6].tolist()


def test_half_precision_is_parsed_too() -> None:
    out_n = np.empty(3, dtype=np.float16)

    assert [False, False, True] == parse_numbers(out_n, pa.array(["0.5", None, "70000"]), nearest=False).tolist()
    assert [0.5, 0.0] == out_n[:2].tolist()
