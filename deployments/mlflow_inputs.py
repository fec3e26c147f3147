"""What callers of `mlflow deployments predict` give, as the arrays of an endpoint's request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from mlflow import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from serving.model.contract import TEXT_DTYPES, Column, Contract


def round_floats(contract: Contract) -> Contract:
    """Return the contract with floats rounded to the column's type, and other numbers taken where the type has them.

    JSON and pandas do not tell the types of numbers. Nulls are what the endpoint makes of them.
    """

    def choose(column: Column) -> Column:
        cast = "round" if column.dtype.startswith("float") or column.policy.cast == "round" else "exact"
        return column.model_copy(update={"policy": column.policy.model_copy(update={"cast": cast})})

    inputs = [
        value.model_copy(update={"columns": tuple(choose(column) for column in value.columns)})
        for value in contract.inputs
    ]
    return contract.model_copy(update={"inputs": tuple(inputs)})


def encode_inputs(contract: Contract, inputs: Any) -> dict[str, Any]:
    """Return the model's inputs out of a table, or out of arrays by input. Raises MlflowException, BadInput."""
    import pandas as pd  # noqa: PLC0415 - for predictions alone

    names = {value.name for value in contract.inputs}
    if isinstance(inputs, list) and inputs and isinstance(inputs[0], Mapping):
        inputs = pd.DataFrame(inputs)
    if not isinstance(inputs, Mapping | pd.DataFrame) and len(contract.inputs) == 1:
        inputs = {contract.inputs[0].name: inputs}
    if isinstance(inputs, Mapping) and set(inputs) == names:
        arrays = {value.name: _shape_array(value, inputs[value.name]) for value in contract.inputs}
    else:
        arrays = _encode_table(contract, pd.DataFrame(inputs))
    for value in contract.inputs:
        if value.dtype in TEXT_DTYPES and (places := np.argwhere(pd.isna(arrays[value.name]))).size:
            column = value.columns[places[0][1] if value.is_stacked else 0].name
            raise _make_unfit(places[0][0], column, "null, which requests do not have of text")
    return arrays


def _encode_table(contract: Contract, frame: Any) -> dict[str, Any]:
    import pyarrow as pa  # noqa: PLC0415 - for predictions alone

    from serving.model.encoding import encode  # noqa: PLC0415 - the same

    given = pa.Table.from_pandas(frame, preserve_index=False)
    if not (rows := given.num_rows):
        message = "The inputs must have a row, got none."
        raise MlflowException(message, INVALID_PARAMETER_VALUE)
    # pandas has a column of nulls alone as one of floats.
    columns = [pa.nulls(rows) if column.null_count == rows else column for column in given.columns]
    table = pa.table(columns, given.column_names)
    contract.check(table.schema, "The table of inputs")
    encoded = encode(contract, table)
    if (bad_n := np.flatnonzero(encoded.flags.code_N)).size:
        raise _make_unfit(bad_n[0], *encoded.flags.reasons[encoded.flags.code_N[bad_n[0]] - 1])
    return encoded.inputs


def _make_unfit(row: int, column: str, reason: str) -> MlflowException:
    message = f"Every row must fit the model, got row {row} with {column}: {reason}. Correct it."
    return MlflowException(message, INVALID_PARAMETER_VALUE)


def _shape_array(value: Any, given: Any) -> Any:
    dtype = object if value.dtype in ("str", "binary") else value.dtype
    try:
        return np.asarray(given, dtype=dtype).reshape(-1, *value.shape)
    except (ValueError, TypeError) as error:
        message = f"Input {value.name!r} must be {value.dtype} of the shape {('N', *value.shape)}, got: {error}."
        raise MlflowException(message, INVALID_PARAMETER_VALUE) from None
