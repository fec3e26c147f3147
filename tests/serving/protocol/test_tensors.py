"""Values of tensors: from JSON and bytes and back, held against datatype and shape."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from serving.errors import BadRequest
from serving.model.contract import Column, Contract, Input, Output
from serving.protocol.tensors import (
    decode_bytes,
    decode_json,
    describe_tensors,
    encode_bytes,
    encode_json,
    get_datatype,
    get_row_shape,
)

NUMBERS = ("bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)), "float32", "float64")


def tensor(dtype: str, shape: tuple[int, ...] = ()) -> Input:
    return Input(name="x", dtype=dtype, shape=shape, columns=(Column(name="x", dtype=dtype, shape=shape),))


def wire_shape(value: Input, array: Any) -> list[int]:
    return [len(array), *get_row_shape(value)]


@st.composite
def arrays(draw: st.DrawFn) -> tuple[Input, Any]:
    dtype, shape = draw(st.sampled_from((*NUMBERS, "float16"))), draw(st.sampled_from(((), (3,), (2, 2))))
    finite = {"allow_nan": False, "allow_infinity": False} if dtype.startswith("float") else {}
    elements = nps.from_dtype(np.dtype(dtype), **finite)
    return tensor(dtype, shape), draw(nps.arrays(dtype, (draw(st.integers(1, 4)), *shape), elements=elements))


@given(arrays())
def test_numbers_pass_through_json_flat_and_nested_and_through_bytes(drawn: tuple[Input, Any]) -> None:
    value, array = drawn
    shape = wire_shape(value, array)
    flat = np.asarray(encode_json(value, array)).tolist()

    np.testing.assert_array_equal(array, decode_json(value, shape, flat))
    np.testing.assert_array_equal(array, decode_json(value, shape, np.reshape(np.array(flat, object), shape).tolist()))
    np.testing.assert_array_equal(array, decode_bytes(value, shape, memoryview(encode_bytes(array))))


@given(st.lists(st.text(st.characters(codec="utf-8")), min_size=1))
def test_texts_pass_through_json_and_bytes(texts: list[str]) -> None:
    value = tensor("str")
    array = np.empty(len(texts), dtype=object)
    array[:] = texts
    shape = wire_shape(value, array)

    assert texts == decode_json(value, shape, encode_json(value, array)).tolist()
    assert texts == decode_bytes(value, shape, memoryview(encode_bytes(array))).tolist()


@given(st.lists(st.binary(), min_size=1))
def test_bytes_pass_through_bytes(items: list[bytes]) -> None:
    array = np.empty(len(items), dtype=object)
    array[:] = items

    assert items == decode_bytes(tensor("binary"), [len(items), 1], memoryview(encode_bytes(array))).tolist()


def test_times_are_nanoseconds_since_1970() -> None:
    value, array = tensor("datetime64[ns]"), np.array(["2026-01-01T00:00:00.000000001"], "datetime64[ns]")

    assert "INT64" == get_datatype(value)
    assert [1767225600000000001] == encode_json(value, array).tolist()
    assert array == decode_json(value, [1, 1], [1767225600000000001])


def test_a_contract_is_described_in_tensors_with_a_scalar_as_a_row_of_one() -> None:
    contract = Contract(inputs=(tensor("float32", (3,)), tensor("str")), outputs=(Output(name="y", dtype="bool"),))
    inputs, outputs = describe_tensors(contract)

    assert [("FP32", (-1, 3)), ("BYTES", (-1, 1))] == [(each.datatype, each.shape) for each in inputs]
    assert [("BOOL", (-1, 1))] == [(each.datatype, each.shape) for each in outputs]


@pytest.mark.parametrize(
    ("dtype", "data", "said"),
    [
        ("float32", ["1"], "numbers (FP32), got '1' at place 0"),
        ("float32", [None], "got null"),
        ("float32", [True], "got True"),
        ("float32", [1e300], "must fit FP32"),
        ("float16", [70000], "must fit FP16"),
        ("int32", [1.5], "whole numbers (INT32), got 1.5"),
        ("int32", [1 << 31], "must fit INT32"),
        ("uint8", [-1], "must fit UINT8"),
        ("bool", [1], "true or false (BOOL), got 1"),
        ("str", [b"x"], "text (BYTES)"),
        ("str", [{"a": 1}], "text (BYTES)"),
        ("float32", [1.0, 2.0], "must be 1 values for the shape [1, 1]"),
        ("float32", [], "must be 1 values"),
        ("float32", [[1.0], [2.0]], "lists of other lengths"),
        ("float32", [[[1.0]]], "numbers (FP32)"),
        ("float32", [[]], "lists of other lengths"),
        ("float32", [[1.0], 2.0], "lists of other lengths"),
        ("float32", 1.0, "must be a list, got float"),
        ("float32", {"0": 1.0}, "must be a list, got dict"),
    ],
)
def test_json_that_the_datatype_or_shape_does_not_take_is_refused_by_name(dtype: str, data: Any, said: str) -> None:
    with pytest.raises(BadRequest, match=r"'x'") as refused:
        decode_json(tensor(dtype), [1, 1], data)

    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("dtype", "data", "said"),
    [
        ("float32", b"\0" * 5, "must have 4 bytes for the shape [1, 1] of FP32, got 5"),
        ("bool", b"\2", "0 or 1"),
        ("str", b"\1\0\0", "got 0 whole ones in 3 bytes"),
        ("str", b"\xff\0\0\0a", "got 0 whole ones"),
        ("str", b"\1\0\0\0a\0", "got 1 whole ones in 6 bytes"),
        ("str", b"\1\0\0\0\xff", "must be UTF-8"),
    ],
)
def test_bytes_that_the_datatype_or_shape_does_not_take_are_refused_by_name(dtype: str, data: bytes, said: str) -> None:
    with pytest.raises(BadRequest, match=r"'x'") as refused:
        decode_bytes(tensor(dtype), [1, 1], memoryview(data))

    assert said in str(refused.value)


def test_a_false_count_of_texts_is_refused_without_a_list_of_that_size() -> None:
    with pytest.raises(BadRequest, match="must be 1000000000000 items"):
        decode_bytes(tensor("str"), [10**12, 1], memoryview(b"\0\0\0\0"))


def test_what_json_can_not_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN or Infinity"):
        encode_json(tensor("float32"), np.array([np.nan], np.float32))
    with pytest.raises(ValueError, match="not UTF-8 text"):
        encode_json(tensor("binary"), np.array([b"\xff"], object))
