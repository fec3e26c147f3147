"""Bodies of the Open Inference Protocol: JSON, and binary data of tensors behind it.

With the header Inference-Header-Content-Length a body is that many bytes of JSON, followed by the values of the tensors
that have a `binary_data_size`, in order. Shapes are those of serving.protocol.tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serving.errors import BadRequest
from serving.model.contract import Input, Output
from serving.protocol.tensors import (
    Array,
    decode_bytes,
    decode_json,
    encode_bytes,
    encode_json,
    get_datatype,
    get_row_shape,
    shorten,
)

HEADER_LENGTH = "Inference-Header-Content-Length"
JSON_BYTES_MAX = 8 << 20
_TOO_LARGE = 413
_PROBLEMS_SHOWN, _SHOWN, _DIGITS_MAX, _STRANGE_MAX = 5, 100, 18, 32
# Parsing and checking smaller JSON takes a few milliseconds at most.
_COUNTED_FROM_BYTES, _CHECKED_FROM_BYTES = 1 << 16, 1 << 10
# What takes memory and time when JSON is parsed, by a character that occurs once in each. At 8 MiB a value may take 16
# bytes on average, as a number of full precision does.
_COUNTS_MAX = {b",": ("values", 1 << 19), b"[": ("lists", 1 << 17), b"{": ("objects", 1 << 14), b":": ("keys", 1 << 16)}

_KIND_WORDS = {bool: "true or false", int: "a whole number"}

Parameters = dict[str, bool | int | float | str]


class Strict(BaseModel):
    """The base of the parts of a request: frozen, without unknown keys or values of another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class RequestTensor(Strict):
    """An input in the JSON of a request: its values are `data`, or `binary_data_size` bytes behind the JSON."""

    name: str = Field(description="The input's name.")
    shape: list[int] = Field(description="[N, ...], the number of rows first.")
    datatype: str = Field(description="As the model's metadata names it.")
    parameters: Parameters = Field(
        default_factory=dict, description="binary_data_size: the number of its bytes behind the JSON."
    )
    data: Any = Field(default=None, description="Its values, flat in row-major order or nested.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """The body of an HTTP message, and how many bytes of it are JSON where binary data follows."""

    content: bytes
    header_length: int | None = None

    @property
    def headers(self) -> dict[str, str]:
        """The HTTP headers of the body."""
        if self.header_length is None:
            return {"Content-Type": "application/json"}
        return {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(self.header_length)}


def write_body(head: Mapping[str, Any], key: str, values: Sequence[tuple[Input | Output, Array, bool]]) -> Body:
    """Return a body with these tensors, each in JSON or as binary data.

    Args:
        head: Other keys of the JSON.
        key: The key of the tensors, "inputs" or "outputs".
        values: The tensors: input or output, its values, and whether they are binary data.

    Raises:
        ValueError: JSON can't hold a value.
    """
    described, parts = [], []
    for value, array, binary in values:
        each: dict[str, Any] = {
            "name": value.name,
            "shape": [len(array), *get_row_shape(value)],
            "datatype": get_datatype(value),
        }
        if binary:
            parts.append(encode_bytes(array))
            each["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            each["data"] = encode_json(value, array)
        described.append(each)
    content = orjson.dumps({**head, key: described}, option=orjson.OPT_SERIALIZE_NUMPY)
    if not parts:
        return Body(content=content)
    return Body(content=b"".join([content, *parts]), header_length=len(content))


def read_header_length(stated: str | None) -> int | None:
    """Return how many bytes of a body are JSON by its header; None without a header, when all are.

    Raises BadRequest where the header is not a number of bytes.
    """
    if stated is None:
        return None
    if not (stated.isascii() and stated.isdigit() and len(stated) <= _DIGITS_MAX):
        message = f"{HEADER_LENGTH} must be a number of bytes, got {stated[:_SHOWN]!r}."
        raise BadRequest(message)
    return int(stated)


def read_document(body: bytes, header_length: int | None) -> tuple[Any, memoryview]:
    """Return the parsed JSON of a body, and the bytes behind it. Raises BadRequest where it is not JSON."""
    view = memoryview(body)
    if header_length is None:
        header_length = len(view)
    elif not 0 < header_length <= len(view):
        message = f"{HEADER_LENGTH} must be from 1 to the {len(view)} bytes of the body, got {header_length}."
        raise BadRequest(message)
    try:
        return orjson.loads(view[:header_length]), view[header_length:]
    except orjson.JSONDecodeError as error:
        message = f"The body must be JSON, got {_describe_json_error(error)}."
        raise BadRequest(message) from None


def check_size_of_json(body: bytes, header_length: int | None) -> None:
    """Check that the JSON of a request is small enough to be parsed.

    Takes no longer than parsing. Raises BadRequest, with status 413, where it has too many bytes or values.
    """
    json = body if header_length is None else body[:header_length]
    if len(json) < _COUNTED_FROM_BYTES:
        return
    if len(json) > JSON_BYTES_MAX:
        message = (
            f"The JSON of a request must have at most {JSON_BYTES_MAX} bytes, got {len(json)}. "
            "Send fewer rows at once, or their values as binary data."
        )
        raise BadRequest(message, status=_TOO_LARGE)
    if all(json.count(mark) <= most for mark, (_, most) in _COUNTS_MAX.items()):
        return
    # Such characters in texts do not count.
    found = _blank_out_texts(json)
    for mark, (what, most) in _COUNTS_MAX.items():
        if (count := int(np.count_nonzero(found == mark[0]))) > most:
            message = (
                f"The JSON of a request must have at most {most} {what}, got {count}. "
                "Send fewer rows at once, or their values as binary data."
            )
            raise BadRequest(message, status=_TOO_LARGE)


def _blank_out_texts(json: bytes) -> Array:
    """Return the characters of JSON, with zeros for those inside texts."""
    if b"\\" in json:
        # An escaped quote does not end a text.
        json = json.replace(b"\\\\", b"  ").replace(b'\\"', b"  ")
    characters = np.frombuffer(json, np.uint8)
    in_text = np.logical_xor.accumulate(characters == ord('"'))
    return np.where(in_text, 0, characters)


def check_counts(document: Any, size: int, tensors: Mapping[str, int]) -> None:
    """Check how many of everything a parsed request has, before each of them is checked.

    Args:
        document: The parsed JSON of a request.
        size: The bytes of its body.
        tensors: How many tensors the contract has, by the key of the request that lists them.

    Raises:
        BadRequest: There are too many of something.
    """
    if size < _CHECKED_FROM_BYTES or not isinstance(document, dict):
        return
    _check_count("keys of a request", document, dict)
    _check_count("parameters of a request", document.get("parameters"), dict)
    for key, count in tensors.items():
        given = document.get(key)
        _check_count(key, given, list, count)
        for each in given if isinstance(given, list) else ():
            if isinstance(each, dict):
                _check_count(f"keys of each of the {key}", each, dict)
                _check_count(f"parameters of each of the {key}", each.get("parameters"), dict)
                _check_count(f"dimensions of each of the {key}", each.get("shape"), list)


def _check_count(what: str, given: Any, kind: type[Sized], count: int = 0) -> None:
    # Some more than are right, so that the message of a later check can name what is wrong.
    if isinstance(given, kind) and len(given) > (most := count + _STRANGE_MAX):
        message = f"There may be at most {most} {what}, got {len(given)}."
        raise BadRequest(message)


def describe_problems(error: ValidationError) -> str:
    """Return in one line what is wrong with a document."""
    found = error.errors(include_url=False, include_context=False, include_input=False)[:_PROBLEMS_SHOWN]
    return "; ".join(
        f"{'.'.join(str(at)[:_SHOWN] for at in each['loc']) or 'the body'}: {each['msg']}" for each in found
    )


def check_names(what: str, given: Sequence[str], known: Mapping[str, Any]) -> None:
    """Check names against those of a contract. Raises BadRequest where one is unknown, or occurs twice."""
    if unknown := [name for name in given if name not in known]:
        message = f"The {what} must be {list(known)}, got {unknown[0][:_SHOWN]!r}."
        raise BadRequest(message)
    if len({*given}) < len(given):
        message = f"Each of the {what} may occur once in a request, got {list(given)}."
        raise BadRequest(message)


def check_parameters(where: str, given: Mapping[str, Any], taken: str, kind: type) -> None:
    """Check that the only parameter is the one that is allowed there.

    Others would reach the model server, where they may read shared memory or change the order of requests.

    Raises:
        BadRequest: There is another parameter, or that one has a value of another type.
    """
    if len(given) == 1 and type(given.get(taken)) is kind:
        return
    if unknown := [name for name in given if name != taken]:
        message = (
            f"The only parameter of {where} that is taken is {taken!r}, got {unknown[0][:_SHOWN]!r}; leave it out."
        )
        raise BadRequest(message)
    message = f"The {taken} of {where} must be {_KIND_WORDS[kind]}, got {shorten(given[taken])}."
    raise BadRequest(message)


def read_tensors(
    what: str,
    given: Sequence[RequestTensor],
    known: Mapping[str, Input] | Mapping[str, Output],
    binary: memoryview,
    *,
    rows_max: int | None = None,
) -> dict[str, Array]:
    """Return the values of tensors. Datatype and shape of each are checked before its values are read.

    Raises BadRequest, with status 413 where there are more rows than `rows_max`.
    """
    check_names(what, [each.name for each in given], known)
    values = {}
    for each in given:
        value = known[each.name]
        _check_tensor(value, each, rows_max)
        data, binary = _take_binary_data(each, binary)
        values[each.name] = (
            decode_json(value, each.shape, each.data) if data is None else decode_bytes(value, each.shape, data)
        )
    if len(binary):
        message = f"Behind the JSON there must be the bytes that binary_data_size counts, got {len(binary)} more."
        raise BadRequest(message)
    if len({len(array) for array in values.values()}) > 1:
        message = (
            f"All of the {what} must have one number of rows, got { ({name: len(values[name]) for name in values}) }."
        )
        raise BadRequest(message)
    return values


def _describe_json_error(error: orjson.JSONDecodeError) -> str:
    found = error.doc[error.pos : error.pos + len("-Infinity")].lstrip("-")
    for word in ("NaN", "Infinity"):
        if found.startswith(word):
            return f"{word}, which JSON does not have: send such numbers as binary data"
    return str(error)


def _check_tensor(value: Input | Output, given: RequestTensor, rows_max: int | None) -> None:
    if given.datatype != get_datatype(value):
        message = f"The datatype of {value.name!r} must be {get_datatype(value)}, got {given.datatype[:_SHOWN]!r}."
        raise BadRequest(message)
    if not given.shape or tuple(given.shape[1:]) != get_row_shape(value) or given.shape[0] < 1:
        expected = ", ".join(["N", *map(str, get_row_shape(value))])
        message = f"The shape of {value.name!r} must be [{expected}] with at least one row, got {given.shape[:20]}."
        raise BadRequest(message)
    if rows_max is not None and given.shape[0] > rows_max:
        message = f"A request must have at most {rows_max} rows, got {given.shape[0]} in {value.name!r}; send several."
        raise BadRequest(message, status=_TOO_LARGE)


def _take_binary_data(given: RequestTensor, binary: memoryview) -> tuple[memoryview | None, memoryview]:
    """Return the bytes of one tensor, None where its values are in the JSON, and the bytes behind them."""
    size = given.parameters.get("binary_data_size")
    if size is None:
        return None, binary
    if given.data is not None:
        message = f"{given.name!r} must have either data or binary_data_size, got both."
        raise BadRequest(message)
    if type(size) is not int or not 0 <= size <= len(binary):
        message = (
            f"The binary_data_size of {given.name!r} must be among the bytes behind the JSON, of which {len(binary)} "
            f"are left, got {shorten(size)}; {HEADER_LENGTH} says how many bytes are JSON."
        )
        raise BadRequest(message)
    return binary[:size], binary[size:]
