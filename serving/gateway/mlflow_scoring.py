"""The adapter for MLflow's own scoring server, which does not speak V2: requests go to POST /invocations.

Where the model was logged with a signature of tensors, it gets {"inputs": ...}, else the columns of a table. Its
answer holds the contract's outputs by name, or the values of the only output.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import numpy as np
import orjson

from serving.errors import BadRequest, ModelFailed, Unanswered
from serving.gateway.route import ServedVersion
from serving.gateway.upstreams import CheckedRequest, HttpClient, Reply, convert_error
from serving.model.contract import Contract, Input, Output
from serving.protocol.oip import decode_without_blocking, encode_response
from serving.protocol.tensors import Array, decode_json, encode_json, get_row_shape

_JSON = {"Content-Type": "application/json"}


class MlflowUpstream:
    """One model on a scoring server of MLflow."""

    def __init__(self, http: HttpClient, served: ServedVersion, contract: Contract) -> None:
        self._http = http
        self._served = served
        self._contract = contract
        self._build_body = _build_tensors if served.speaks == "mlflow-tensors" else _build_table

    async def infer(self, request: CheckedRequest) -> Reply:
        """Send the rows, and return the predictions as a V2 answer."""
        url = f"{self._served.url.rstrip('/')}/invocations"
        try:
            content = await decode_without_blocking(
                lambda: orjson.dumps(self._build_body(request.request.inputs, self._contract)),
                len(request.body.content),
            )
        except ValueError as error:
            message = f"Input {error} The model server behind this endpoint takes only JSON."
            raise BadRequest(message) from None
        response = await self._http.send("POST", url, content, _JSON)
        if response.status != HTTPStatus.OK:
            return convert_error(response, url)
        outputs = _read_outputs(response.content, self._contract, request.request.rows)
        try:
            body = encode_response(
                request.request,
                outputs,
                self._contract,
                model=self._served.upstream_model,
                version=self._served.version,
            )
        except ModelFailed as error:
            raise Unanswered(str(error), status=HTTPStatus.BAD_GATEWAY) from None
        return Reply(status=response.status, content=body.content, headers=body.headers)

    async def is_ready(self) -> bool:
        """Return whether the server is healthy."""
        return await self._http.is_healthy(f"{self._served.url.rstrip('/')}/health")


def _build_tensors(inputs: Mapping[str, Array], contract: Contract) -> dict[str, Any]:
    return {"inputs": {value.name: _to_lists(value, inputs[value.name]) for value in contract.inputs}}


def _build_table(inputs: Mapping[str, Array], contract: Contract) -> dict[str, Any]:
    columns: dict[str, list[Any]] = {}
    for value in contract.inputs:
        values = inputs[value.name]
        arrays = values.T if value.is_stacked else [values]
        for column, array in zip(value.columns, arrays, strict=True):
            columns[column.name] = _to_lists(value, array)
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    return {"dataframe_split": {"columns": list(columns), "data": rows}}


def _to_lists(value: Input, values: Array) -> list[Any]:
    flat = encode_json(value, values)
    # Text stays in an object array: numpy's own text type takes the longest width for each, and loses trailing zeros.
    dtype = object if values.dtype.kind == "O" else None
    nested: list[Any] = np.asarray(flat, dtype=dtype).reshape(values.shape).tolist()
    return nested


def _read_outputs(content: bytes, contract: Contract, rows: int) -> dict[str, Array]:
    """Return the outputs in an answer. Raises Unanswered, with 502, where they are not those of the contract."""
    try:
        predictions = orjson.loads(content)["predictions"]
        return {
            value.name: _read_output(value, predictions, rows, is_only=len(contract.outputs) == 1)
            for value in contract.outputs
        }
    except (ValueError, KeyError, TypeError, BadRequest) as error:
        message = f"The scoring server must answer with the outputs of the contract for {rows} rows, got: {error}."
        raise Unanswered(message, status=HTTPStatus.BAD_GATEWAY) from None


def _read_output(value: Output, predictions: Any, rows: int, *, is_only: bool) -> Array:
    if isinstance(predictions, dict):
        found = predictions[value.name]
    elif predictions and isinstance(predictions[0], dict):
        found = [row[value.name] for row in predictions]
    elif is_only:
        found = predictions
    else:
        message = f"no output named {value.name}"
        raise KeyError(message)
    dtype: Any = None
    if value.dtype.startswith("float"):
        dtype = np.float64
    elif value.dtype in ("str", "binary"):
        dtype = object
    return decode_json(value, [rows, *get_row_shape(value)], np.asarray(found, dtype=dtype).reshape(-1).tolist())
