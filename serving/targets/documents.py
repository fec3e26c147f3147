"""Requests and answers as parsed documents, for servers that read bodies themselves: KServe's and MLServer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from serving.errors import BadRequest
from serving.model.contract import Contract
from serving.model.interface import Predictions
from serving.model.release import Release
from serving.protocol.oip import InferRequest, decode_request, encode_request, encode_response
from serving.protocol.tensors import describe_tensors


def read_request(inputs: Sequence[Mapping[str, Any]], outputs: Sequence[str] | None, release: Release) -> InferRequest:
    """Return what a request asks, from its inputs (name, shape, datatype, data) and the names of the outputs it wants.

    Raises BadRequest as `decode_request` does, which it goes through, so that every server refuses the same requests.
    """
    document = {"inputs": list(inputs), "outputs": [{"name": name} for name in outputs or ()]}
    try:
        body = orjson.dumps(document, default=_decode_text)
    except TypeError as error:
        message = f"The body must be an inference request, got what JSON has not: {error.__cause__ or error}."
        raise BadRequest(message) from None
    return decode_request(body, release.contract, header_length=None, rows_max=release.rows_max)


def write_response(request: InferRequest, outputs: Predictions, release: Release) -> dict[str, Any]:
    """Return the answer to a request as a document. Raises ModelFailed where JSON can't hold an output."""
    model = {"model": release.endpoint, "version": release.version}
    answer: dict[str, Any] = orjson.loads(encode_response(request, outputs, release.contract, **model).content)
    return answer


def encode_inputs(request: InferRequest, release: Release) -> list[dict[str, Any]]:
    """Return the inputs of a request as documents that can be joined to others': in the contract's order, data flat."""
    inputs: list[dict[str, Any]] = orjson.loads(encode_request(release.contract, request.inputs).content)["inputs"]
    return inputs


def dump_tensors(contract: Contract) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the inputs and the outputs of a model as its metadata names them."""
    inputs, outputs = describe_tensors(contract)
    return [each.model_dump(mode="json") for each in inputs], [each.model_dump(mode="json") for each in outputs]


def _decode_text(item: object) -> str:
    # gRPC carries text as bytes.
    if not isinstance(item, bytes):
        raise TypeError(type(item).__name__)
    try:
        return item.decode()
    except UnicodeDecodeError as error:
        message = f"{error.reason} in bytes that should be UTF-8 text"
        raise TypeError(message) from None
