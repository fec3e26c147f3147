"""The Open Inference Protocol, version 2, as functions of values: requests and answers, in JSON and in its binary form.

A body is JSON. With the header Inference-Header-Content-Length it is that many bytes of JSON, and behind them the raw
values of the tensors that name a `binary_data_size`, in their order. Shapes are those of serving.tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from serving.contract import Contract, Frozen, Input, Output
from serving.errors import BadRequest, ModelFailed
from serving.tensors import (
    Array,
    TensorMetadata,
    datatype,
    from_bytes,
    from_json,
    row_shape,
    tensors,
    to_bytes,
    to_json,
)

HEADER_LENGTH = "Inference-Header-Content-Length"
EXTENSIONS = ("binary_tensor_data",)
_TOO_LARGE = 413

Parameters = dict[str, bool | int | float | str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """An output that a request asks for, in JSON or as binary data."""

    name: str
    binary: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class InferRequest:
    """What a request asks: every input of the contract for N rows, each [N, *shape] of the contract."""

    id: str | None
    inputs: dict[str, Array]
    outputs: tuple[Wanted, ...]
    parameters: Mapping[str, bool | int | float | str] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """How many rows are to be predicted."""
        return len(next(iter(self.inputs.values())))


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """A body as HTTP carries it, and how many bytes of it are JSON where binary data follows."""

    content: bytes
    header_length: int | None = None

    @property
    def headers(self) -> dict[str, str]:
        """The HTTP headers that go with it."""
        if self.header_length is None:
            return {"Content-Type": "application/json"}
        return {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(self.header_length)}


class ServerMetadata(Frozen):
    """What GET /v2 answers."""

    name: str = Field(description="The server's name.")
    version: str = Field(description="The server's version.")
    extensions: tuple[str, ...] = Field(default=EXTENSIONS, description="The extensions that it speaks.")


class ModelMetadata(Frozen):
    """What GET /v2/models/MODEL answers."""

    name: str = Field(description="The model's name.")
    versions: tuple[str, ...] = Field(description="The versions that can be asked.")
    platform: str = Field(description="What runs it.")
    inputs: tuple[TensorMetadata, ...] = Field(description="What it takes.")
    outputs: tuple[TensorMetadata, ...] = Field(description="What it gives.")


def model_metadata(name: str, contract: Contract, *, versions: Sequence[str], platform: str) -> ModelMetadata:
    """Return the metadata of a model with this contract."""
    inputs, outputs = tensors(contract)
    return ModelMetadata(name=name, versions=tuple(versions), platform=platform, inputs=inputs, outputs=outputs)


def error_body(message: str) -> bytes:
    """Return the body of every answer that is none."""
    return orjson.dumps({"error": message})


class RequestTensor(BaseModel):
    """An input of a request: its values are `data`, or the bytes that `binary_data_size` counts."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(description="The input's name.")
    shape: list[int] = Field(description="[N, ...], the number of rows first.")
    datatype: str = Field(description="As the model's metadata names it.")
    parameters: Parameters = Field(default={}, description="binary_data_size: the bytes of it behind the JSON.")
    data: Any = Field(default=None, description="Its values, flat in row-major order or nested.")


class RequestOutput(BaseModel):
    """An output that a request asks for."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(description="The output's name.")
    parameters: Parameters = Field(default={}, description="binary_data: whether its values come behind the JSON.")


class RequestDocument(BaseModel):
    """The JSON of a request."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    id: str | None = Field(default=None, max_length=256, description="Comes back with the answer.")
    parameters: Parameters = Field(default={}, description="binary_data_output: all outputs as binary data.")
    inputs: list[RequestTensor] = Field(description="Every input of the model, once.")
    outputs: list[RequestOutput] = Field(default=[], description="The outputs wanted; all, where there are none.")


_REQUEST = TypeAdapter(RequestDocument)


def decode_request(body: bytes, contract: Contract, *, header_length: int | None, rows_max: int) -> InferRequest:
    """Return what a request asks of a model with this contract.

    Promises: the arrays are the caller's own, of the contract's dtypes, text and bytes as objects. Raises BadRequest
    where the body is no JSON, or no request that the contract takes: the message names the tensor and what it must be.
    """
    document, binary = _document(body, header_length)
    request = _validated(document)
    known = {value.name: value for value in contract.inputs}
    _check_names("inputs", [given.name for given in request.inputs], known)
    if missing := [name for name in known if name not in {given.name for given in request.inputs}]:
        message = f"The inputs must be {list(known)}, got none of the name {missing[0]!r}."
        raise BadRequest(message)
    inputs = {}
    for given in request.inputs:
        _check_tensor(known[given.name], given, rows_max)
        size = given.parameters.get("binary_data_size")
        data, binary = _cut(given.name, binary, size)
        inputs[given.name] = _values(known[given.name], given, data)
    if len(binary):
        message = f"Behind the JSON there must be the bytes that binary_data_size counts, got {len(binary)} more."
        raise BadRequest(message)
    _check_rows({name: len(values) for name, values in inputs.items()})
    return InferRequest(id=request.id, inputs=inputs, outputs=_wanted(request, contract), parameters=request.parameters)


def encode_response(
    request: InferRequest, outputs: Mapping[str, Array], contract: Contract, *, model: str, version: str | None
) -> Body:
    """Return the answer to a request: the outputs it wants, in the form it wants them.

    Raises ModelFailed where JSON can't hold an output: a number that is not finite, bytes that are no text.
    """
    known = {value.name: value for value in contract.outputs}
    wanted = [(known[each.name], outputs[each.name], each.binary) for each in request.outputs]
    head: dict[str, Any] = {"model_name": model}
    if version is not None:
        head["model_version"] = version
    if request.id is not None:
        head["id"] = request.id
    try:
        return _packed(head, "outputs", wanted)
    except ValueError as error:
        message = f"Output {error}"
        raise ModelFailed(message) from None


def encode_request(
    contract: Contract,
    inputs: Mapping[str, Array],
    *,
    identity: str | None = None,
    binary: bool = False,
    outputs: Sequence[Wanted] = (),
) -> Body:
    """Return a request for the predictions of N rows, as a client writes it.

    Raises ValueError where JSON can't hold a value, which binary data can.
    """
    head: dict[str, Any] = {} if identity is None else {"id": identity}
    if outputs:
        head["outputs"] = [{"name": each.name, "parameters": {"binary_data": each.binary}} for each in outputs]
    elif binary:
        head["parameters"] = {"binary_data_output": True}
    return _packed(head, "inputs", [(value, inputs[value.name], binary) for value in contract.inputs])


def decode_response(body: bytes, contract: Contract, *, header_length: int | None) -> dict[str, Array]:
    """Return the outputs of an answer, each [N, *shape] of the contract.

    Raises BadRequest, with status 502, where it is no answer of a model with this contract.
    """
    try:
        document, binary = _document(body, header_length)
        answer = _ANSWER.validate_python(document)
        known = {value.name: value for value in contract.outputs}
        _check_names("outputs", [given.name for given in answer.outputs], known)
        outputs = {}
        for given in answer.outputs:
            _check_tensor(known[given.name], given, None)
            data, binary = _cut(given.name, binary, given.parameters.get("binary_data_size"))
            outputs[given.name] = _values(known[given.name], given, data)
    except ValidationError as error:
        message = f"A server must answer as the protocol says, got {_told(error)}."
        raise BadRequest(message, status=502) from None
    except BadRequest as error:
        message = f"A server must answer as the protocol says. {error}"
        raise BadRequest(message, status=502) from None
    return outputs


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    outputs: list[RequestTensor]


_ANSWER = TypeAdapter(_Answer)


def _document(body: bytes, header_length: int | None) -> tuple[Any, memoryview]:
    view = memoryview(body)
    if header_length is not None:
        if not 0 < header_length <= len(view):
            message = f"{HEADER_LENGTH} must be from 1 to the {len(view)} bytes of the body, got {header_length}."
            raise BadRequest(message)
        view, binary = view[:header_length], view[header_length:]
    else:
        binary = view[len(view) :]
    try:
        return orjson.loads(view), binary
    except orjson.JSONDecodeError as error:
        message = f"The body must be JSON, got {_why(error)}."
        raise BadRequest(message) from None


def _why(error: orjson.JSONDecodeError) -> str:
    found = error.doc[error.pos : error.pos + 9].lstrip("-")
    if found.startswith(("NaN", "Infinity")):
        return f"{found.split(',')[0].rstrip(']')}, which JSON has not: send such numbers as binary data"
    return str(error)


def _validated(document: Any) -> RequestDocument:
    try:
        return _REQUEST.validate_python(document)
    except ValidationError as error:
        message = f"The body must be an inference request, got {_told(error)}."
        raise BadRequest(message) from None


_PROBLEMS_SHOWN = 5


def _told(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    told = [f"{'.'.join(map(str, each['loc'])) or 'the body'}: {each['msg']}" for each in problems[:_PROBLEMS_SHOWN]]
    return "; ".join(told)


def _check_names(what: str, given: Sequence[str], known: Mapping[str, Input] | Mapping[str, Output]) -> None:
    if strange := [name for name in given if name not in known]:
        message = f"The {what} must be {list(known)}, got {strange[0][:100]!r}."
        raise BadRequest(message)
    if len({*given}) < len(given):
        message = f"Each of the {what} may stand once in a request, got {list(given)}."
        raise BadRequest(message)


def _check_tensor(value: Input | Output, given: RequestTensor, rows_max: int | None) -> None:
    """Hold what a tensor says of itself against what it must be, before a value of it is looked at."""
    if given.datatype != datatype(value):
        message = f"The datatype of {value.name!r} must be {datatype(value)}, got {given.datatype[:100]!r}."
        raise BadRequest(message)
    if not given.shape or tuple(given.shape[1:]) != row_shape(value) or given.shape[0] < 1:
        wanted = ", ".join(["N", *map(str, row_shape(value))])
        message = f"The shape of {value.name!r} must be [{wanted}] with at least one row, got {given.shape[:20]}."
        raise BadRequest(message)
    if rows_max is not None and given.shape[0] > rows_max:
        message = f"A request must have at most {rows_max} rows, got {given.shape[0]} in {value.name!r}; send several."
        raise BadRequest(message, status=_TOO_LARGE)


def _cut(name: str, binary: memoryview, size: Any) -> tuple[memoryview | None, memoryview]:
    if size is None:
        return None, binary
    if type(size) is not int or not 0 <= size <= len(binary):
        message = (
            f"The binary_data_size of {name!r} must be among the bytes behind the JSON, of which {len(binary)} are "
            f"left, got {size!r:.40}; {HEADER_LENGTH} says how many bytes are JSON."
        )
        raise BadRequest(message)
    return binary[:size], binary[size:]


def _values(value: Input | Output, given: RequestTensor, data: memoryview | None) -> Array:
    if data is None:
        return from_json(value, given.shape, given.data)
    if given.data is not None:
        message = f"{value.name!r} must have either data or binary_data_size, got both."
        raise BadRequest(message)
    return from_bytes(value, given.shape, data)


def _check_rows(rows: Mapping[str, int]) -> None:
    if len({*rows.values()}) > 1:
        message = f"Every input must have the same number of rows, got {dict(rows)}."
        raise BadRequest(message)


def _wanted(request: RequestDocument, contract: Contract) -> tuple[Wanted, ...]:
    known = {value.name: value for value in contract.outputs}
    binary = request.parameters.get("binary_data_output") is True
    if not request.outputs:
        return tuple(Wanted(name=name, binary=binary) for name in known)
    _check_names("outputs", [given.name for given in request.outputs], known)
    if classified := [given.name for given in request.outputs if "classification" in given.parameters]:
        message = f"An output can't be asked for as a classification here, got that for {classified[0]!r}."
        raise BadRequest(message)
    return tuple(
        Wanted(name=given.name, binary=given.parameters.get("binary_data", binary) is True) for given in request.outputs
    )


def _packed(head: dict[str, Any], key: str, values: Sequence[tuple[Input | Output, Array, bool]]) -> Body:
    """Return a body of these tensors, each in JSON or behind it."""
    described, parts = [], []
    for value, array, binary in values:
        each: dict[str, Any] = {
            "name": value.name,
            "shape": [len(array), *row_shape(value)],
            "datatype": datatype(value),
        }
        if binary:
            parts.append(to_bytes(array))
            each["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            each["data"] = to_json(value, array)
        described.append(each)
    content = orjson.dumps({**head, key: described}, option=orjson.OPT_SERIALIZE_NUMPY)
    if not parts:
        return Body(content=content)
    return Body(content=b"".join([content, *parts]), header_length=len(content))
