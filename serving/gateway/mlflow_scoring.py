"""An upstream that does not speak V2: MLflow's own scoring server, whose door is POST /invocations.

Where the model was logged with a signature of tensors it is sent {"inputs": ...}, else the columns of a table. Its
answer holds the outputs of the contract by name, or the values of the only one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson

from serving.errors import BadRequest, ModelFailed, Unanswered
from serving.gateway.http import Http
from serving.gateway.route import Served
from serving.gateway.upstream import Call, Reply
from serving.gateway.v2 import refusal
from serving.model.contract import Contract, Input, Output
from serving.protocol.oip import InferRequest, encode_response, run_aside
from serving.protocol.tensors import Array, from_json, row_shape, to_json

_OK, _BAD_GATEWAY = 200, 502
_JSON = {"Content-Type": "application/json"}


class MlflowUpstream:
    """One model on a scoring server of MLflow."""

    def __init__(self, http: Http, served: Served, contract: Contract) -> None:
        self._http = http
        self._served = served
        self._contract = contract
        self._body = _as_tensors if served.speaks == "mlflow-tensors" else _as_columns

    async def infer(self, call: Call) -> Reply:
        """Ask for the predictions of the rows, and answer as V2 has it."""
        url = f"{self._served.url.rstrip('/')}/invocations"
        try:
            content = await run_aside(lambda: self._content(call.request), len(call.body.content))
        except ValueError as error:
            message = f"Input {error} The model server behind this endpoint takes JSON alone."
            raise BadRequest(message) from None
        answered = await self._http.send("POST", url, content, _JSON)
        if answered.status != _OK:
            return refusal(answered, url)
        outputs = _outputs(answered.content, self._contract, call.request.rows)
        try:
            body = encode_response(
                call.request, outputs, self._contract, model=self._served.upstream_model, version=self._served.version
            )
        except ModelFailed as error:
            raise Unanswered(str(error), status=_BAD_GATEWAY) from None
        return Reply(status=_OK, content=body.content, headers=body.headers)

    def _content(self, request: InferRequest) -> bytes:
        return orjson.dumps(self._body(request.inputs, self._contract))

    async def ready(self) -> bool:
        """Ask the server whether it is healthy."""
        return await self._http.healthy(f"{self._served.url.rstrip('/')}/health")


def _as_tensors(inputs: Mapping[str, Array], contract: Contract) -> dict[str, Any]:
    return {"inputs": {value.name: _nested(value, inputs[value.name]) for value in contract.inputs}}


def _as_columns(inputs: Mapping[str, Array], contract: Contract) -> dict[str, Any]:
    columns: dict[str, list[Any]] = {}
    for value in contract.inputs:
        values = inputs[value.name]
        sides = values.T if value.stacked else [values]
        for column, side in zip(value.columns, sides, strict=True):
            columns[column.name] = _nested(value, side)
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    return {"dataframe_split": {"columns": list(columns), "data": rows}}


def _nested(value: Input, values: Array) -> list[Any]:
    flat = to_json(value, values)
    # numpy's own text takes the width of the longest for each, and loses zeros at its end.
    listed: list[Any] = (
        np.asarray(flat, dtype=object if values.dtype.kind == "O" else None).reshape(values.shape).tolist()
    )
    return listed


def _outputs(content: bytes, contract: Contract, rows: int) -> dict[str, Array]:
    """Return the outputs in an answer. Raises Unanswered, with 502, where it holds others."""
    try:
        predictions = orjson.loads(content)["predictions"]
        return {
            value.name: _values(value, predictions, rows, alone=len(contract.outputs) == 1)
            for value in contract.outputs
        }
    except (ValueError, KeyError, TypeError, BadRequest) as error:
        message = f"The scoring server must answer with the outputs of the contract for {rows} rows, got: {error}."
        raise Unanswered(message, status=_BAD_GATEWAY) from None


def _values(value: Output, predictions: Any, rows: int, *, alone: bool) -> Array:
    if isinstance(predictions, dict):
        found = predictions[value.name]
    elif predictions and isinstance(predictions[0], dict):
        found = [row[value.name] for row in predictions]
    elif alone:
        found = predictions
    else:
        message = f"no output named {value.name}"
        raise KeyError(message)
    if value.dtype.startswith("float"):
        return from_json(value, [rows, *row_shape(value)], np.asarray(found, dtype=np.float64).reshape(-1).tolist())
    dtype = object if value.dtype in ("str", "binary") else None
    return from_json(value, [rows, *row_shape(value)], np.asarray(found, dtype=dtype).reshape(-1).tolist())
