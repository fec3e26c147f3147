"""The Open Inference Protocol, version 2, as functions of values: metadata, requests and responses.

Shapes: N rows. Arrays are [N, *shape] of the contract; tensors are the same, but [N, 1] for one scalar a row.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from serving.errors import BadRequest, ModelFailed
from serving.model.contract import Contract, Frozen
from serving.protocol.oip_body import (
    HEADER_LENGTH,
    Body,
    Parameters,
    RequestTensor,
    Strict,
    check_counts,
    check_names,
    check_parameters,
    check_size_of_json,
    describe_problems,
    read_document,
    read_header_length,
    read_tensors,
    write_body,
)
from serving.protocol.tensors import Array, TensorMetadata, describe_tensors

__all__ = (
    "EXTENSIONS",
    "HEADER_LENGTH",
    "Body",
    "InferRequest",
    "ModelMetadata",
    "OutputChoice",
    "Parameters",
    "RequestDocument",
    "RequestOutput",
    "RequestTensor",
    "ServerMetadata",
    "decode_request",
    "decode_request_to_forward",
    "decode_response",
    "decode_without_blocking",
    "encode_error",
    "encode_request",
    "encode_response",
    "make_model_metadata",
    "read_header_length",
)

EXTENSIONS = ("binary_tensor_data",)
_BAD_GATEWAY = 502
_SHOWN = 100
# Handing a body to a thread takes some 50 us, decoding a larger body takes milliseconds.
_THREAD_FROM_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputChoice:
    """An output that a request wants, in JSON or as binary data."""

    name: str
    binary: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class InferRequest:
    """A decoded request: every input of the contract for N rows, each [N, *shape], and the outputs that it wants."""

    id: str | None
    inputs: dict[str, Array]
    outputs: tuple[OutputChoice, ...]

    @property
    def rows(self) -> int:
        """The number of rows to predict."""
        return len(next(iter(self.inputs.values())))


class ServerMetadata(Frozen):
    """The response to GET /v2."""

    name: str = Field(description="The server's name.")
    version: str = Field(description="The server's version.")
    extensions: tuple[str, ...] = Field(default=EXTENSIONS, description="The protocol extensions that it supports.")


class ModelMetadata(Frozen):
    """The response to GET /v2/models/MODEL."""

    name: str = Field(description="The model's name.")
    versions: tuple[str, ...] = Field(description="The versions that it serves.")
    platform: str = Field(description="The library that runs it.")
    inputs: tuple[TensorMetadata, ...] = Field(description="The input tensors.")
    outputs: tuple[TensorMetadata, ...] = Field(description="The output tensors.")


def make_model_metadata(name: str, contract: Contract, *, versions: Sequence[str], platform: str) -> ModelMetadata:
    """Return the metadata of a model with this contract."""
    inputs, outputs = describe_tensors(contract)
    return ModelMetadata(name=name, versions=tuple(versions), platform=platform, inputs=inputs, outputs=outputs)


def encode_error(message: str) -> bytes:
    """Return the body of an error response."""
    return orjson.dumps({"error": message})


class RequestOutput(Strict):
    """An output in the JSON of a request."""

    name: str = Field(description="The output's name.")
    parameters: Parameters = Field(default_factory=dict, description="binary_data: whether its values follow the JSON.")


class RequestDocument(Strict):
    """The JSON of a request."""

    id: str | None = Field(default=None, max_length=256, description="Returned with the response.")
    parameters: Parameters = Field(default_factory=dict, description="binary_data_output: all outputs as binary data.")
    inputs: list[RequestTensor] = Field(description="Every input of the model, once.")
    outputs: list[RequestOutput] = Field(default_factory=list, description="The outputs to return; without any, all.")


_REQUEST = TypeAdapter(RequestDocument)
Result = TypeVar("Result")


def decode_request(body: bytes, contract: Contract, *, header_length: int | None, rows_max: int) -> InferRequest:
    """Decode a request to a model with this contract.

    The arrays are the caller's own, of the contract's dtypes, with text and bytes as objects.

    Raises:
        BadRequest: The body is not JSON, or not a request that the contract takes; the message names the tensor.
    """
    return _decode(Body(content=body, header_length=header_length), contract, rows_max)[0]


def decode_request_to_forward(body: Body, contract: Contract, *, rows_max: int) -> tuple[InferRequest, Body]:
    """Decode a request, and return with it a body that every parser reads as that request.

    It is the body itself, unless a key may occur twice in it, of which parsers take either. Raises BadRequest as
    `decode_request` does.
    """
    request, document, binary = _decode(body, contract, rows_max)
    marks = body.content.count(b":", 0, body.header_length)
    # Each key has a colon, so no key occurs twice where there are no more colons than keys.
    if marks == _count_keys(document):
        return request, body
    json = orjson.dumps(document)
    length = None if body.header_length is None else len(json)
    return request, Body(content=json + bytes(binary), header_length=length)


async def decode_without_blocking(decode: Callable[[], Result], size: int) -> Result:
    """Decode a body of this many bytes, in a thread where it is so large that other requests would wait for it."""
    return decode() if size < _THREAD_FROM_BYTES else await asyncio.to_thread(decode)


def _decode(body: Body, contract: Contract, rows_max: int) -> tuple[InferRequest, dict[str, Any], memoryview]:
    check_size_of_json(body.content, body.header_length)
    document, binary = read_document(body.content, body.header_length)
    check_counts(*(document, len(body.content)), {"inputs": len(contract.inputs), "outputs": len(contract.outputs)})
    try:
        request = _REQUEST.validate_python(document)
    except ValidationError as error:
        message = f"The body must be an inference request, got {describe_problems(error)}."
        raise BadRequest(message) from None
    _check_parameters(request)
    known = {value.name: value for value in contract.inputs}
    inputs = read_tensors("inputs", request.inputs, known, binary, rows_max=rows_max)
    if missing := [name for name in known if name not in inputs]:
        message = f"The inputs must be {list(known)}, got none of the name {missing[0]!r}."
        raise BadRequest(message)
    outputs = _choose_outputs(request, contract)
    return InferRequest(id=request.id, inputs=inputs, outputs=outputs), document, binary


def _check_parameters(request: RequestDocument) -> None:
    if request.parameters:
        check_parameters("a request", request.parameters, "binary_data_output", bool)
    for given in request.inputs:
        if given.parameters:
            check_parameters(repr(given.name[:_SHOWN]), given.parameters, "binary_data_size", int)
    for output in request.outputs:
        if output.parameters:
            check_parameters(repr(output.name[:_SHOWN]), output.parameters, "binary_data", bool)


def _count_keys(document: Mapping[str, Any]) -> int:
    """Return the number of keys in all objects of a validated request."""
    count = len(document) + len(document.get("parameters", ()))
    for each in document["inputs"]:
        count += len(each) + len(each.get("parameters", ()))
    for each in document.get("outputs", ()):
        count += len(each) + len(each.get("parameters", ()))
    return count


def encode_response(
    request: InferRequest, outputs: Mapping[str, Array], contract: Contract, *, model: str, version: str | None
) -> Body:
    """Return the response to a request: the outputs that it wants, each in JSON or as binary data.

    Raises ModelFailed where JSON can't hold an output: a number that is not finite, bytes that are not text.
    """
    known = {value.name: value for value in contract.outputs}
    chosen = [(known[each.name], outputs[each.name], each.binary) for each in request.outputs]
    head: dict[str, Any] = {"model_name": model}
    if version is not None:
        head["model_version"] = version
    if request.id is not None:
        head["id"] = request.id
    try:
        return write_body(head, "outputs", chosen)
    except ValueError as error:
        message = f"Output {error}"
        raise ModelFailed(message) from None


def encode_request(
    contract: Contract,
    inputs: Mapping[str, Array],
    *,
    identity: str | None = None,
    binary: bool = False,
    outputs: Sequence[OutputChoice] = (),
) -> Body:
    """Return a client's request for the predictions of N rows.

    Raises ValueError where JSON can't hold a value; binary data can hold every value.
    """
    head: dict[str, Any] = {} if identity is None else {"id": identity}
    if outputs:
        head["outputs"] = [{"name": each.name, "parameters": {"binary_data": each.binary}} for each in outputs]
    elif binary:
        head["parameters"] = {"binary_data_output": True}
    return write_body(head, "inputs", [(value, inputs[value.name], binary) for value in contract.inputs])


def decode_response(body: bytes, contract: Contract, *, header_length: int | None) -> dict[str, Array]:
    """Return the outputs of a response, each [N, *shape] of the contract.

    Raises BadRequest, with status 502, where it is not a response of a model with this contract.
    """
    try:
        document, binary = read_document(body, header_length)
        response = _RESPONSE.validate_python(document)
        return read_tensors("outputs", response.outputs, {value.name: value for value in contract.outputs}, binary)
    except (ValidationError, BadRequest) as error:
        problem = f"got {describe_problems(error)}." if isinstance(error, ValidationError) else str(error)
        message = f"A server must answer as the protocol says: {problem}"
        raise BadRequest(message, status=_BAD_GATEWAY) from None


class _Response(BaseModel):
    # Servers add keys of their own.
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    outputs: list[RequestTensor]


_RESPONSE = TypeAdapter(_Response)


def _choose_outputs(request: RequestDocument, contract: Contract) -> tuple[OutputChoice, ...]:
    known = {value.name: value for value in contract.outputs}
    binary = request.parameters.get("binary_data_output") is True
    if not request.outputs:
        return tuple(OutputChoice(name=name, binary=binary) for name in known)
    check_names("outputs", [given.name for given in request.outputs], known)
    return tuple(
        OutputChoice(name=given.name, binary=given.parameters.get("binary_data", binary) is True)
        for given in request.outputs
    )
