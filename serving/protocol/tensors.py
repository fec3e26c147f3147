"""Tensors of the Open Inference Protocol: datatypes for the contract's dtypes, and values from JSON or bytes and back.

Shapes: N rows; a tensor is [N, *shape] of the contract, [N, 1] where that is one scalar a row.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from serving.errors import BadRequest
from serving.model.contract import Contract, Frozen, Input, Output

Array = npt.NDArray[Any]
Datatype = Literal[
    "BOOL",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "FP16",
    "FP32",
    "FP64",
    "BYTES",
]

_DATATYPES: dict[str, Datatype] = {
    "bool": "BOOL",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
    "str": "BYTES",
    "binary": "BYTES",
    # Nanoseconds since 1970, in UTC.
    "datetime64[ns]": "INT64",
}
_LENGTH = struct.Struct("<I")
_SHOWN = 60


class TensorMetadata(Frozen):
    """An input or output in the metadata of a model."""

    name: str = Field(description="The tensor's name.")
    datatype: Datatype = Field(description="The type of its values.")
    shape: tuple[int, ...] = Field(description="Its shape; -1 stands for the number of rows.")


def describe_tensors(contract: Contract) -> tuple[tuple[TensorMetadata, ...], tuple[TensorMetadata, ...]]:
    """Return the metadata of the inputs and of the outputs of a contract."""
    return tuple(map(describe_tensor, contract.inputs)), tuple(map(describe_tensor, contract.outputs))


def describe_tensor(value: Input | Output) -> TensorMetadata:
    """Return the metadata of one input or output."""
    return TensorMetadata(name=value.name, datatype=get_datatype(value), shape=(-1, *get_row_shape(value)))


def get_datatype(value: Input | Output) -> Datatype:
    """Return the protocol's datatype of an input or output."""
    return _DATATYPES[value.dtype]


def get_row_shape(value: Input | Output) -> tuple[int, ...]:
    """Return the shape of one row of a tensor; (1,) for a scalar, since servers that batch have no empty shape."""
    return value.shape or (1,)


def decode_json(value: Input | Output, shape: Sequence[int], data: Any) -> Array:
    """Decode the JSON values of a tensor of this shape, nested or flat in row-major order.

    Raises BadRequest where their number does not fit the shape, or a value does not fit the datatype.
    """
    flat = _flatten(value, shape, data)
    name = get_datatype(value)
    kinds, words = _JSON_TYPES[name]
    if invalid := {*map(type, flat)} - kinds:
        at = next(at for at, item in enumerate(flat) if type(item) in invalid)
        message = f"The data of {value.name!r} must be {words} ({name}), got {shorten(flat[at])} at place {at}."
        raise BadRequest(message)
    if name == "BYTES":
        items = flat if value.dtype == "str" else [item.encode() for item in flat]
        return _reshape_rows(value, _make_object_array(items))
    dtype = _NUMPY[name]
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            numbers = np.array(flat, dtype=dtype)
        if not np.isfinite(numbers).all():
            raise _number_too_large(value)
        return _reshape_rows(value, numbers)
    try:
        return _reshape_rows(value, np.array(flat, dtype=dtype))
    except OverflowError:
        raise _number_too_large(value) from None


def decode_bytes(value: Input | Output, shape: Sequence[int], data: memoryview) -> Array:
    """Decode the little-endian bytes of a tensor of this shape into memory of its own.

    Raises BadRequest where their number does not fit the shape, or they are not values of the datatype.
    """
    name, count = get_datatype(value), math.prod(shape)
    if name == "BYTES":
        return _reshape_rows(value, _make_object_array(_split_items(value, count, data)))
    dtype = _NUMPY[name]
    if len(data) != count * dtype.itemsize:
        message = (
            f"The binary data of {value.name!r} must have {count * dtype.itemsize} bytes for the shape {list(shape)} "
            f"of {name}, got {len(data)}."
        )
        raise BadRequest(message)
    if name == "BOOL" and (np.frombuffer(data, np.uint8) > 1).any():
        message = f"The binary data of {value.name!r} must hold 0 or 1 for each BOOL, got another byte."
        raise BadRequest(message)
    return _reshape_rows(value, np.frombuffer(data, dtype).copy())


def encode_json(value: Input | Output, values: Array) -> Array | list[str]:
    """Return the values of a tensor flat, in a form that orjson writes.

    Raises ValueError where a number is not finite, which JSON can't express.
    """
    flat = values.reshape(-1)
    if values.dtype.kind == "O":
        return [_text_for_json(value, item) for item in flat]
    if values.dtype.kind == "f" and not np.isfinite(flat).all():
        message = f"{value.name!r} holds NaN or Infinity, which JSON can't express; ask for binary_data."
        raise ValueError(message)
    flat = flat.view(np.int64) if values.dtype.kind == "M" else flat
    return np.ascontiguousarray(flat)


def encode_bytes(values: Array) -> bytes:
    """Return the values of a tensor as little-endian bytes in row-major order; text and bytes with their lengths."""
    if values.dtype.kind != "O":
        return np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).tobytes()
    items = [item.encode() if isinstance(item, str) else bytes(item) for item in values.reshape(-1)]
    return b"".join(part for item in items for part in (_LENGTH.pack(len(item)), item))


def shorten(item: Any) -> str:
    """Return a JSON value for a message, shortened where it is large."""
    if item is None:
        return "null"
    if isinstance(item, list | dict):
        return f"a {type(item).__name__}"
    return repr(item[:_SHOWN] if isinstance(item, str) else item)[:_SHOWN]


def _find_json_types(name: str) -> tuple[frozenset[type], str]:
    """Return the Python types of JSON values that a datatype takes, and their name."""
    if name == "BOOL":
        return frozenset({bool}), "true or false"
    if name == "BYTES":
        return frozenset({str}), "text"
    return (frozenset({int, float}), "numbers") if name.startswith("FP") else (frozenset({int}), "whole numbers")


_JSON_TYPES = {name: _find_json_types(name) for name in _DATATYPES.values()}
_NUMPY: dict[str, np.dtype[Any]] = {
    name: np.dtype(dtype).newbyteorder("<")
    for dtype, name in _DATATYPES.items()
    if name != "BYTES" and not dtype.startswith("datetime")
}


def _flatten(value: Input | Output, shape: Sequence[int], data: Any) -> list[Any]:
    if not isinstance(data, list):
        message = f"The data of {value.name!r} must be a list, got {type(data).__name__}."
        raise BadRequest(message)
    if data and isinstance(data[0], list):
        return _flatten_nested(value, shape, data)
    if len(data) != math.prod(shape):
        raise _wrong_count(value, shape, f"got {len(data)}")
    return data


def _flatten_nested(value: Input | Output, shape: Sequence[int], data: list[Any]) -> list[Any]:
    level = [data]
    for size in shape:
        if any(not isinstance(item, list) or len(item) != size for item in level):
            raise _wrong_count(value, shape, "got lists of other lengths")
        level = list(chain.from_iterable(level))
    return level


def _wrong_count(value: Input | Output, shape: Sequence[int], found: str) -> BadRequest:
    return BadRequest(
        f"The data of {value.name!r} must be {math.prod(shape)} values for the shape {list(shape)}, flat or nested as "
        f"the shape says, {found}."
    )


def _number_too_large(value: Input | Output) -> BadRequest:
    return BadRequest(f"The data of {value.name!r} must fit {get_datatype(value)}, got a number that does not.")


def _split_items(value: Input | Output, count: int, data: memoryview) -> list[Any]:
    """Return texts or bytes, each of which is preceded by its length in four bytes."""
    # The loop ends with the data, so a false count in the shape does not allocate a list of that size.
    items: list[Any] = []
    at = 0
    while at + _LENGTH.size <= len(data) and len(items) < count:
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if at + length > len(data):
            break
        items.append(bytes(data[at : at + length]))
        at += length
    if len(items) != count or at != len(data):
        message = (
            f"The binary data of {value.name!r} must be {count} items, each preceded by its length in four bytes, got "
            f"{len(items)} whole ones in {len(data)} bytes."
        )
        raise BadRequest(message)
    return items if value.dtype == "binary" else [_decode_text(value, item) for item in items]


def _decode_text(value: Input | Output, item: bytes) -> str:
    try:
        return item.decode()
    except UnicodeDecodeError:
        message = f"The data of {value.name!r} must be UTF-8 text, got the bytes {item[:_SHOWN]!r}."
        raise BadRequest(message) from None


def _text_for_json(value: Input | Output, item: Any) -> str:
    try:
        return item.decode() if isinstance(item, bytes) else str(item)
    except UnicodeDecodeError:
        message = f"{value.name!r} holds bytes that are not UTF-8 text, which JSON can't express; ask for binary_data."
        raise ValueError(message) from None


def _make_object_array(items: list[Any]) -> Array:
    # numpy's text types have a fixed width, and lose zeros at the end.
    values = np.empty(len(items), dtype=object)
    values[:] = items
    return values


def _reshape_rows(value: Input | Output, flat: Array) -> Array:
    values = flat.reshape(-1, *value.shape)
    return values.view(value.dtype) if value.dtype.startswith("datetime") else values
