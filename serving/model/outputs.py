"""What a model returns, under the names and in the shapes and dtypes of its signature.

Text is in arrays of objects with None for a null. Numbers are in arrays of their dtype: nulls among floats are NaN, and
integers and booleans among which there are nulls are objects too.

Shapes: N rows; every output is [N, *shape].
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from serving.errors import ModelFailed


class Output(Protocol):
    """An output as a contract has it."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def dtype(self) -> str:
        """The name of its type in numpy, or `str`."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a row."""
        ...

    @property
    def width(self) -> int:
        """The number of values of a row."""
        ...


_LABELS_SHOWN = 3
_LOG_AGAIN = "Log the model again with the signature of what it returns."


def name_outputs(
    raw: Any, outputs: Sequence[Output], rows: int, to_numpy: Callable[[Any], npt.NDArray[Any]]
) -> dict[str, npt.NDArray[Any]]:
    """Return what a model returned as outputs by name, each in its shape and dtype.

    A Series or DataFrame is put in the order of the input by its index, whose labels are the row numbers of the input.
    Values without an index, or with a new one (`reset_index`, `to_numpy`), are taken to be in the order of the input.

    Args:
        raw: What the model returned: an array or tensor, a DataFrame or Series, a mapping or list of them, or a list of
            rows, each a mapping or an object of pydantic.
        outputs: The outputs of the contract.
        rows: The number of rows that the model was given.
        to_numpy: Turns one value into an array.

    Raises:
        ModelFailed: It does not fit the signature, or its index is not that of the input.
        ValueError: An infinite number is in an output of integers.
    """
    values = _select_by_name(_restore_order(raw, rows), outputs)
    values = {name: _convert_column(_restore_order(value, rows)) for name, value in values.items()}
    return {output.name: _reshape(to_numpy(values[output.name]), output, rows) for output in outputs}


def find_missing(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return which values of an output are null or not finite, in its shape."""
    if values.dtype.kind == "O":
        return _find_none(values)
    return ~np.isfinite(values) if values.dtype.kind in "fc" else np.zeros(values.shape, dtype=np.bool_)


def _find_none(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    none = np.fromiter((item is None for item in values.flat), dtype=np.bool_, count=values.size)
    return none.reshape(values.shape)


def _convert_column(value: Any) -> Any:
    """Return integers with nulls, of pandas, Arrow or polars, as objects, and anything else unchanged.

    All three of them would make floats of such a column, which round large integers.
    """
    if hasattr(value, "isna"):
        is_integer = getattr(getattr(value, "dtype", None), "kind", None) in ("i", "u")
        return value.to_numpy(dtype=object, na_value=None) if is_integer and value.isna().any() else value
    if hasattr(value, "__arrow_c_stream__"):
        import pyarrow as pa  # noqa: PLC0415

        columns = pa.table(value).columns if hasattr(value, "columns") else [pa.chunked_array(value)]
        if any(column.null_count and pa.types.is_integer(column.type) for column in columns):
            return np.array([column.to_pylist() for column in columns], dtype=object).T
    return value


def _restore_order(value: Any, rows: int) -> Any:
    """Return a Series or DataFrame in the order of the input, anything else unchanged."""
    if not hasattr(value, "iloc") or len(value) != rows or rows == 1:
        return value
    labels = np.asarray(value.index)
    order = np.arange(rows)
    if np.array_equal(labels, order):
        return value
    if labels.dtype.kind in "iuf":
        places = np.argsort(labels, kind="stable")
        if np.array_equal(labels[places], order):
            return value.iloc[places]
    shown = labels[:_LABELS_SHOWN].tolist()
    message = (
        f"What the model returns must be in the order of its input, or have the index of its input: 0 to {rows - 1}, "
        f"each once, got {shown}{' and more' if rows > len(shown) else ''}. Return the rows in their order with "
        "reset_index(drop=True), and log the model again."
    )
    raise ModelFailed(message)


def _select_by_name(raw: Any, outputs: Sequence[Output]) -> dict[str, Any]:
    names = [output.name for output in outputs]
    raw = _join_rows(raw)
    if hasattr(raw, "columns") and (hasattr(raw, "iloc") or hasattr(raw, "__arrow_c_stream__")):
        return _select_by_column(raw, outputs)
    if isinstance(raw, Mapping):
        if len(names) == len(raw) == 1:
            # A signature of an array names no output, and the model may.
            return dict(zip(names, raw.values(), strict=True))
        if missing := [name for name in names if name not in raw]:
            message = f"The model must return {names}, got {sorted(map(str, raw))}: {missing} missing. {_LOG_AGAIN}"
            raise ModelFailed(message)
        return {name: raw[name] for name in names}
    if len(outputs) == 1:
        return {names[0]: raw[0] if isinstance(raw, list | tuple) and len(raw) == 1 else raw}
    if not isinstance(raw, list | tuple) or len(raw) != len(outputs):
        message = f"The model must return {len(outputs)} outputs {names}, got a {type(raw).__name__}. {_LOG_AGAIN}"
        raise ModelFailed(message)
    return dict(zip(names, raw, strict=True))


def _join_rows(raw: Any) -> Any:
    """Return rows, each a mapping or an object of pydantic, as columns by name; anything else unchanged.

    What a row lacks is a null.
    """
    first = raw[0] if isinstance(raw, list | tuple) and raw else None
    if not isinstance(first, Mapping) and not hasattr(first, "model_dump"):
        return raw
    rows = [row if isinstance(row, Mapping) else row.model_dump() for row in raw]
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(itertools.chain.from_iterable(rows))}


def _select_by_column(frame: Any, outputs: Sequence[Output]) -> dict[str, Any]:
    """Take the outputs from a table by name, else by position; no column may be left over."""
    names = [output.name for output in outputs]
    found, take = _open_columns(frame)
    counts = Counter(found)
    if all(counts[name] == 1 for name in names):
        return {name: take(found.index(name)) for name in names}
    if len(outputs) == 1 and 1 < outputs[0].width == len(found):
        return {names[0]: frame}
    if len(outputs) != len(found):
        message = f"The model must return the columns {names}, got {found}. {_LOG_AGAIN}"
        raise ModelFailed(message)
    return {name: take(at) for at, name in enumerate(names)}


def _open_columns(frame: Any) -> tuple[list[str], Callable[[int], Any]]:
    """Return the names of the columns of a table of pandas, polars or Arrow, and what takes one by its place."""
    if hasattr(frame, "iloc"):
        return [str(name) for name in frame.columns], lambda at: frame.iloc[:, at]
    import pyarrow as pa  # noqa: PLC0415

    table = pa.table(frame)
    return table.column_names, table.column


def _reshape(value: npt.NDArray[Any], output: Output, rows: int) -> npt.NDArray[Any]:
    if value.dtype.kind == "O" and value.shape == (rows,) and output.width > 1:
        value = _stack_rows(value, output)
    if not _is_valid_shape(value.shape, output, rows):
        message = (
            f"Output {output.name!r} must hold {output.width} values for each of {rows} rows, in the shape "
            f"{(rows, *output.shape)}, got {value.shape}. {_LOG_AGAIN}"
        )
        raise ModelFailed(message)
    value = value.reshape(rows, *output.shape)
    if value.dtype.kind == "O" or output.dtype == "str":
        value = _replace_nulls(value)
    if output.dtype != "str":
        return _cast_numbers(value, output)
    if invalid := [item for item in value.flat if item is not None and not isinstance(item, str)]:
        message = f"Output {output.name!r} must be text, as the signature says, got {invalid[0]!r}. {_LOG_AGAIN}"
        raise ModelFailed(message)
    return value


def _stack_rows(value_N: npt.NDArray[Any], output: Output) -> npt.NDArray[Any]:
    """Return a column of lists as one array; a row that is null has a null in every place."""
    null = np.full(output.shape, None, dtype=object)
    try:
        # Numpy's own text would lose zeros at its end.
        return np.array(
            [null if row is None else row for row in value_N], dtype=object if output.dtype == "str" else None
        )
    except ValueError:
        message = (
            f"Output {output.name!r} must hold {output.width} values in each row, got lists of different lengths. "
            f"{_LOG_AGAIN}"
        )
        raise ModelFailed(message) from None


def _is_valid_shape(shape: tuple[int, ...], output: Output, rows: int) -> bool:
    """Return whether a shape is [rows, *output.shape], dimensions of one aside, or flattened to [rows, width]."""
    if rows == 1:
        return math.prod(shape) == output.width
    inner = [size for size in shape[1:] if size != 1]
    expected = [size for size in output.shape if size != 1]
    return bool(shape) and shape[0] == rows and inner in (expected, [output.width])


def _replace_nulls(value: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return values as objects, with None for every kind of null."""
    import pandas as pd  # noqa: PLC0415

    objects = value.astype(object)
    objects[pd.isna(objects)] = None
    return objects


def _cast_numbers(value: npt.NDArray[Any], output: Output) -> npt.NDArray[Any]:
    """Cast to the output's dtype; floats are rounded, other values must stay the same, and nulls stay nulls."""
    dtype = np.dtype(output.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype.kind == "f" or np.can_cast(value.dtype, dtype, "safe"):
            return value.astype(dtype, copy=False)
    null = _find_none(value) if value.dtype.kind == "O" else np.isnan(value)
    if not null.any():
        return _cast_exactly(value, output)
    given = value[~null]
    if given.dtype.kind == "f" and (np.abs(given) >= 2 ** (np.finfo(given.dtype).nmant + 1)).any():
        message = (
            f"Output {output.name!r} must hold {dtype} beside nulls, got {given.dtype}, which rounds integers as large "
            f"as {np.abs(given).max():.0f}. Return pandas' Int64, or objects with None."
        )
        raise ModelFailed(message)
    objects = np.full(value.shape, None, dtype=object)
    objects[~null] = _cast_exactly(given, output)
    return objects


def _cast_exactly(value: npt.NDArray[Any], output: Output) -> npt.NDArray[Any]:
    """Cast numbers without nulls to integers or booleans, which must have the same values."""
    dtype = np.dtype(output.dtype)
    if not np.isfinite(value.astype(np.float64) if value.dtype.kind == "O" else value).all():
        message = f"output {output.name!r} must be finite to be {dtype}"
        raise ValueError(message)
    try:
        with np.errstate(invalid="ignore"):
            cast = value.astype(dtype)
        changed = value[cast != value]
    except OverflowError:
        # Of objects, whose numbers are of any size.
        changed = value[(value < np.iinfo(dtype).min) | (value > np.iinfo(dtype).max)]
    if len(changed):
        message = (
            f"Output {output.name!r} must be {dtype}, as the signature says, got {value.dtype} such as {changed[0]}. "
            f"{_LOG_AGAIN}"
        )
        raise ModelFailed(message)
    return cast
