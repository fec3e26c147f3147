"""Columns to arrays: an Arrow table becomes the model's inputs, and rows that can't are flagged.

Shapes: N rows, F features. Stacked inputs are filled as [F, N], each column one copy, and handed on
as the transposed view [N, F]: a matrix product takes either, and no value is moved twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from serving.contract import OPAQUE_DTYPES, Column, Contract, Input, fits, is_text

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

# A row stride of a power of two maps every feature to the same cache set; this keeps them apart.
_PAD = 16


@dataclass(slots=True)
class Flags:
    """Which rows are rejects, and why: code_N is 0 for a good row, else 1 + an index into reasons."""

    code_N: npt.NDArray[np.int32]
    reasons: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def none(cls, rows: int) -> Flags:
        """Return flags for `rows` good rows."""
        return cls(np.zeros(rows, dtype=np.int32))

    def mark(self, mask_N: Mask, column: str, reason: str) -> None:
        """Flag the rows of the mask; the first reason of a row stands."""
        fresh_N = mask_N & (self.code_N == 0)
        if fresh_N.any():
            self.code_N[fresh_N] = self._code(column, reason)

    def mark_row(self, row: int, column: str, reason: str) -> None:
        """Flag one row; the first reason of a row stands."""
        if self.code_N[row] == 0:
            self.code_N[row] = self._code(column, reason)

    @classmethod
    def joined(cls, several: list[Flags]) -> Flags:
        """Return the flags of consecutive rows as one."""
        whole = cls(np.concatenate([flags.code_N for flags in several]))
        start = 0
        for flags in several:
            stop = start + len(flags.code_N)
            if flags.reasons:
                codes = [0, *(whole._code(*pair) for pair in flags.reasons)]
                whole.code_N[start:stop] = np.array(codes, dtype=np.int32)[flags.code_N]
            start = stop
        return whole

    def _code(self, column: str, reason: str) -> int:
        pair = (column, reason)
        if pair not in self.reasons:
            self.reasons.append(pair)
        return self.reasons.index(pair) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """The model's inputs for N rows, each [N, *shape], and the flags of rows that are rejects."""

    inputs: dict[str, Array]
    flags: Flags
    rows: int


def encode(contract: Contract, table: pa.Table) -> Encoded:
    """Turn N rows of a table into the model's inputs.

    Rows that break the contract are flagged and keep their place, with a zero or an empty value in
    it: the caller fills such a row with a good one before it passes it on.
    """
    flags = Flags.none(table.num_rows)
    inputs = {value.name: _encode_input(value, table, flags) for value in contract.inputs}
    return Encoded(inputs=inputs, flags=flags, rows=table.num_rows)


def _encode_input(value: Input, table: pa.Table, flags: Flags) -> Array:
    rows = table.num_rows
    if value.stacked:
        buffer_FN = np.empty((len(value.columns), rows + _PAD), dtype=value.dtype)[:, :rows]
        for index, column in enumerate(value.columns):
            _fill(buffer_FN[index], column, table, flags)
        return buffer_FN.T
    (column,) = value.columns
    if column.dtype in OPAQUE_DTYPES:
        return _opaque(column, table, flags)
    if column.shape:
        return _tensor(column, table, flags)
    out_N = np.empty(rows, dtype=value.dtype)
    _fill(out_N, column, table, flags)
    return out_N


def _fill(out_N: Array, column: Column, table: pa.Table, flags: Flags) -> None:
    if column.name not in table.column_names:
        out_N[:] = np.nan if out_N.dtype.kind == "f" else 0
        return
    start = 0
    for chunk in table.column(column.name).chunks:
        stop = start + len(chunk)
        _fill_chunk(out_N[start:stop], column, chunk, flags, start)
        start = stop


def _fill_chunk(out_n: Array, column: Column, chunk: pa.Array, flags: Flags, start: int) -> None:
    """Cast one Arrow chunk of n rows into its place."""
    if pa.types.is_dictionary(chunk.type):
        chunk = chunk.dictionary_decode()
    nulls = _null_mask(chunk)
    if pa.types.is_null(chunk.type):
        out_n[:] = 0
    elif is_text(chunk.type):
        _parse(out_n, column, chunk, flags, start)
    else:
        _cast(out_n, column, chunk, flags, start)
    if nulls is not None:
        _settle_nulls(out_n, nulls, column, flags, start)


def _null_mask(chunk: pa.Array) -> Mask | None:
    if not chunk.null_count:
        return None
    return np.asarray(chunk.is_null().to_numpy(zero_copy_only=False), dtype=np.bool_)


def _settle_nulls(out_n: Array, nulls: Mask, column: Column, flags: Flags, start: int) -> None:
    null = column.policy.null
    if null == "reject" or (null == "keep" and out_n.dtype.kind != "f"):
        _mark(flags, start, nulls, column.name, "null")
    else:
        out_n[nulls] = np.nan if null == "keep" else out_n.dtype.type(null)


def _mark(flags: Flags, start: int, mask: Mask, column: str, reason: str) -> None:
    if mask.any():
        whole_N = np.zeros(len(flags.code_N), dtype=np.bool_)
        whole_N[start : start + len(mask)] = mask
        flags.mark(whole_N, column, reason)


def _parse(out_n: Array, column: Column, chunk: pa.Array, flags: Flags, start: int) -> None:
    text = pl.Series(chunk, dtype=pl.String).str.strip_chars()
    if out_n.dtype.kind == "b":
        numbers = text.str.to_lowercase().replace_strict(
            {"true": True, "false": False, "1": True, "0": False}, default=None
        )
    else:
        numbers = text.cast(_polars_type(out_n.dtype), strict=False)
    broken = (numbers.is_null() & text.is_not_null()).to_numpy()
    out_n[:] = numbers.fill_null(False if out_n.dtype.kind == "b" else 0).to_numpy()
    _mark(flags, start, broken, column.name, f"text that does not parse as {column.dtype}")


def _polars_type(dtype: np.dtype[Any]) -> pl.DataType:
    return pl.Series(np.empty(0, dtype=dtype)).dtype


def _cast(out_n: Array, column: Column, chunk: pa.Array, flags: Flags, start: int) -> None:
    filled = chunk.fill_null(False if pa.types.is_boolean(chunk.type) else 0) if chunk.null_count else chunk
    given_n = filled.to_numpy(zero_copy_only=False)
    if fits(chunk.type, column.dtype):
        out_n[:] = given_n
        return
    lost_n = _cast_lossy(out_n, given_n, exact=column.policy.cast == "exact")
    _mark(flags, start, lost_n, column.name, f"a {chunk.type} that does not fit {column.dtype}")


def _cast_lossy(out_n: Array, given_n: Array, *, exact: bool) -> Mask:
    """Cast to the nearest value and return which rows it loses."""
    if out_n.dtype.kind in "iub" and given_n.dtype.kind == "f":
        given_n = given_n if exact else np.rint(given_n)
    with np.errstate(over="ignore", invalid="ignore"):
        out_n[:] = given_n
        if out_n.dtype.kind == "f" and not exact:
            return np.asarray(np.isinf(out_n) & ~np.isinf(given_n.astype(np.float64)))
        same_n = out_n.astype(given_n.dtype) == given_n
    if out_n.dtype.kind == "f" and given_n.dtype.kind == "f":
        same_n |= np.isnan(given_n)
    if out_n.dtype.kind == "u" and given_n.dtype.kind == "i":
        same_n &= given_n >= 0
    if out_n.dtype.kind == "i" and given_n.dtype.kind == "u":
        same_n &= out_n >= 0
    if given_n.dtype.kind in "iu" and out_n.dtype.kind == "f":
        # 2**63 - 1 becomes 2**63 as a float and wraps on its way back, so the edge counts as lost.
        same_n &= np.abs(out_n.astype(np.float64)) < 2.0**63
    return np.asarray(~same_n)


def _opaque(column: Column, table: pa.Table, flags: Flags) -> Array:
    """Return text, bytes or times as numpy holds them: objects, or datetime64."""
    wanted = "datetime64[ns]" if column.dtype == "datetime64[ns]" else object
    if column.name not in table.column_names:
        return np.full(table.num_rows, None if wanted is object else np.datetime64("NaT"), dtype=wanted)
    values = table.column(column.name)
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if wanted is not object:
        values = pc.cast(values, pa.timestamp("ns"))
    out_N = np.array(values.to_numpy(), dtype=wanted)
    if values.null_count:
        nulls = np.asarray(values.is_null().to_numpy(), dtype=np.bool_)
        if column.policy.null == "reject":
            _mark(flags, 0, nulls, column.name, "null")
        elif column.policy.null != "keep":
            out_N[nulls] = column.policy.null
    return out_N


def _tensor(column: Column, table: pa.Table, flags: Flags) -> Array:
    """Return a column of lists as [N, *shape]: one block copy an Arrow chunk, none a row."""
    width = int(np.prod(column.shape))
    out_NW = np.empty((table.num_rows, width), dtype=column.dtype)
    start = 0
    for chunk in table.column(column.name).chunks:
        storage = chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk
        stop = start + len(storage)
        _tensor_chunk(out_NW[start:stop], column, storage, flags, start)
        start = stop
    return out_NW.reshape(table.num_rows, *column.shape)


def _tensor_chunk(out_nW: Array, column: Column, chunk: pa.Array, flags: Flags, start: int) -> None:
    rows, width = out_nW.shape
    nulls = _null_mask(chunk)
    if nulls is not None:
        _mark(flags, start, nulls, column.name, "null")
    lengths = pc.list_value_length(chunk).fill_null(-1).to_numpy(zero_copy_only=False)
    whole = lengths == width
    ragged = ~whole if nulls is None else ~whole & ~nulls
    _mark(flags, start, ragged, column.name, f"a list that has not {width} values")
    if not whole.all():
        out_nW[~whole] = 0
        chunk = chunk.filter(pa.array(whole))
    values = chunk.flatten()
    inner = Flags.none(len(values))
    flat = np.empty(len(values), dtype=out_nW.dtype) if not whole.all() else out_nW.reshape(rows * width)
    value = Column(name=column.name, dtype=column.dtype, policy=column.policy)
    _fill_chunk(flat, value, values, inner, 0)
    if not whole.all():
        out_nW[whole] = flat.reshape(-1, width)
    for code, (_, reason) in enumerate(inner.reasons, start=1):
        broken = np.zeros(rows, dtype=np.bool_)
        broken[whole] = (inner.code_N.reshape(-1, width) == code).any(axis=1)
        _mark(flags, start, broken, column.name, f"in its list, {reason}")
