"""Columns to arrays: an Arrow table becomes the model's inputs, and rows that break the contract are flagged.

Shapes: N rows, n rows of one Arrow chunk, F features, W values of a list. Stacked inputs are filled as [F, N], one copy
a column, and returned as the transposed view [N, F]: a matrix product takes either, and no value is copied twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Literal

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from serving.model.contract import (
    OPAQUE_DTYPES,
    Column,
    Contract,
    Input,
    casts_safely,
    convert_fill_value,
    is_list,
    is_text,
)
from serving.model.number_casts import Array, Mask, cast_numbers, parse_numbers
from serving.model.shared_memory import Allocate
from serving.model.time_casts import cast_times, parse_times

Columns = dict[str, pa.ChunkedArray]
# The unit of batch sizes: tokens with padding, where rows have lengths.
BatchUnit = Literal["rows", "tokens"]

# A row stride of a power of two would map every feature to the same cache set.
_PAD = 16


@dataclass(slots=True)
class Flags:
    """Which rows are rejects, and why: code_N is 0 for a good row, else 1 + an index into reasons."""

    code_N: npt.NDArray[np.int32]
    reasons: list[tuple[str, str]] = field(default_factory=list)
    _codes: dict[tuple[str, str], int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._codes = {pair: code for code, pair in enumerate(self.reasons, start=1)}

    @classmethod
    def all_good(cls, rows: int) -> Flags:
        """Return flags for `rows` good rows."""
        return cls(np.zeros(rows, dtype=np.int32))

    def mark(self, mask_n: Mask, column: str, reason: str, start: int = 0) -> None:
        """Flag the rows of a mask that begins at row `start`; a row keeps its first reason."""
        if mask_n.any():
            code_n = self.code_N[start : start + len(mask_n)]
            new_n = mask_n & (code_n == 0)
            if new_n.any():
                code_n[new_n] = self._find_code(column, reason)

    def mark_row(self, row: int, column: str, reason: str) -> None:
        """Flag one row; a row keeps its first reason."""
        if self.code_N[row] == 0:
            self.code_N[row] = self._find_code(column, reason)

    @classmethod
    def concat(cls, several: list[Flags]) -> Flags:
        """Return the flags of consecutive rows as one."""
        whole = cls(np.concatenate([flags.code_N for flags in several]))
        start = 0
        for flags in several:
            stop = start + len(flags.code_N)
            if flags.reasons:
                codes = [0, *(whole._find_code(*pair) for pair in flags.reasons)]
                whole.code_N[start:stop] = np.array(codes, dtype=np.int32)[flags.code_N]
            start = stop
        return whole

    def _find_code(self, column: str, reason: str) -> int:
        pair = (column, reason)
        if pair not in self._codes:
            self.reasons.append(pair)
            self._codes[pair] = len(self.reasons)
        return self._codes[pair]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """The model's inputs for N rows, each [N, *shape], and the flags of rows that are rejects.

    `length_N` is the number of tokens of each row, None where all rows take the same share of a pass.
    """

    inputs: dict[str, Array]
    flags: Flags
    rows: int
    length_N: npt.NDArray[np.int64] | None = None

    def slice_rows(self, start: int, stop: int) -> Encoded:
        """Return rows [start, stop) as views of the same memory."""
        flags = Flags(self.flags.code_N[start:stop], self.flags.reasons)
        return Encoded(
            inputs={name: value[start:stop] for name, value in self.inputs.items()},
            flags=flags,
            rows=len(flags.code_N),
            length_N=None if self.length_N is None else self.length_N[start:stop],
        )

    def with_own_flags(self) -> Encoded:
        """Return the same rows with flags of their own: what a model adds to those is not seen elsewhere."""
        return replace(self, flags=Flags(self.flags.code_N.copy(), list(self.flags.reasons)))

    def repeat(self, times: int) -> Encoded:
        """Return copies of the rows, several times over, in the same memory layout."""
        return Encoded(
            inputs={name: _repeat_array(value, times) for name, value in self.inputs.items()},
            flags=Flags(np.tile(self.flags.code_N, times), list(self.flags.reasons)),
            rows=self.rows * times,
            length_N=None if self.length_N is None else np.tile(self.length_N, times),
        )


def encode(contract: Contract, table: pa.Table, allocate: Allocate = np.empty) -> Encoded:
    """Turn N rows of a table into the model's inputs.

    Rows that break the contract are flagged and keep their place, with any value in it; the caller overwrites
    such a row with a good one before a pass. An optional column that is missing is a column of nulls.

    Args:
        contract: What the model takes.
        table: The rows.
        allocate: Makes the arrays of columns of numbers, each of a column or of lists.
    """
    flags = Flags.all_good(table.num_rows)
    columns = dict(zip(table.column_names, table.columns, strict=True))
    inputs = {value.name: _encode_input(value, columns, flags, allocate) for value in contract.inputs}
    return Encoded(inputs=inputs, flags=flags, rows=table.num_rows)


def _encode_input(value: Input, columns: Columns, flags: Flags, allocate: Allocate) -> Array:
    rows = len(flags.code_N)
    if value.dtype in OPAQUE_DTYPES:
        arrays = [_encode_opaque(column, _find_chunks(column, columns, rows), flags) for column in value.columns]
        return np.stack(arrays, axis=1) if value.is_stacked else arrays[0]
    if value.is_stacked:
        buffer_FN = np.empty((len(value.columns), rows + _PAD), dtype=value.dtype)[:, :rows]
        for out_N, column in zip(buffer_FN, value.columns, strict=True):
            _fill_scalars(out_N, column, _find_chunks(column, columns, rows), flags)
        return buffer_FN.T
    (column,) = value.columns
    out = allocate((rows, *column.shape), value.dtype)
    chunks = _find_chunks(column, columns, rows)
    if column.shape:
        _fill_lists(out.reshape(rows, math.prod(column.shape)), column, chunks, flags)
    else:
        _fill_scalars(out, column, chunks, flags)
    return out


def _repeat_array(value: Array, times: int) -> Array:
    if value.ndim > 1 and not value.flags.c_contiguous:
        rows = len(value) * times
        buffer = np.empty((*value.shape[:0:-1], rows + _PAD), dtype=value.dtype)[..., :rows]
        buffer[:] = np.tile(value.T, times)
        return buffer.T
    return np.concatenate([value] * times)


def copy_array(value: Array) -> Array:
    """Return a copy of an array of rows, in the memory layout that inputs are made in."""
    if value.ndim > 1 and not value.flags.c_contiguous:
        buffer = np.empty((*value.shape[:0:-1], len(value) + _PAD), dtype=value.dtype)[..., : len(value)]
        buffer[:] = value.T
        return buffer.T
    return value.copy()


def _find_chunks(column: Column, columns: Columns, rows: int) -> list[pa.Array]:
    found = columns.get(column.name)
    return [pa.nulls(rows)] if found is None else found.chunks


def _fill_scalars(out_N: Array, column: Column, chunks: list[pa.Array], flags: Flags) -> None:
    start = 0
    for chunk in chunks:
        stop = start + len(chunk)
        _fill_chunk(out_N[start:stop], column, chunk, flags, start)
        start = stop


def _fill_chunk(out_n: Array, column: Column, chunk: pa.Array, flags: Flags, start: int) -> None:
    """Cast one Arrow chunk of n rows into its place."""
    if pa.types.is_dictionary(chunk.type):
        chunk = chunk.dictionary_decode()
    if pa.types.is_null(chunk.type):
        out_n[:] = 0
    elif is_text(chunk.type):
        text = _use_point(chunk) if column.policy.decimal == "," else chunk
        broken_n = parse_numbers(out_n, text, nearest=column.policy.cast == "round")
        flags.mark(broken_n, column.name, f"text that does not parse as {column.dtype}", start)
    elif pa.types.is_decimal(chunk.type):
        lost_n = _cast_decimals(out_n, chunk, column.policy.cast)
        flags.mark(lost_n, column.name, f"a {chunk.type} that does not fit {column.dtype}", start)
    else:
        _cast_chunk(out_n, column, chunk, flags, start)
    if chunk.null_count:
        _apply_null_policy(out_n, _make_null_mask(chunk), column, flags, start)


def _use_point(chunk: pa.Array) -> pa.Array:
    """Return texts of numbers with a point for each comma, and a comma, which no number has, for each point."""
    return pl.Series(chunk, dtype=pl.String).str.replace_many([",", "."], [".", ","]).to_arrow()


def _cast_decimals(out_n: Array, chunk: pa.Array, cast: str) -> Mask:
    """Cast n decimals into their place, each to the nearest value, and return which do not fit as the policy says."""
    # Digit by digit: Arrow's own cast of large decimals is off in the last bit.
    lost_n = parse_numbers(out_n, pc.cast(chunk, pa.string()), nearest=cast == "round")
    if cast == "exact" and out_n.dtype.kind == "f":
        pairs = zip(chunk.to_pylist(), out_n.tolist(), strict=True)
        lost_n |= np.array([given is not None and Decimal(held) != given for given, held in pairs], dtype=np.bool_)
    return lost_n


def _make_null_mask(chunk: pa.Array) -> Mask:
    if pa.types.is_null(chunk.type):
        return np.ones(len(chunk), dtype=np.bool_)
    # Arrow's is_null takes ten times as long to reach numpy.
    bits = np.frombuffer(chunk.buffers()[0], dtype=np.uint8)
    valid = np.unpackbits(bits, count=chunk.offset + len(chunk), bitorder="little")
    return np.asarray(valid[chunk.offset :] == 0)


def _apply_null_policy(out_n: Array, null_n: Mask, column: Column, flags: Flags, start: int) -> None:
    """Replace or flag nulls as the policy says; `out_n` may hold lists, of which every value is replaced."""
    null = column.policy.null
    if null in (None, "reject") or (null == "keep" and out_n.dtype.kind in "iub"):
        flags.mark(null_n, column.name, "null", start)
    elif null != "keep":
        out_n[null_n] = convert_fill_value(column)
    elif out_n.dtype.kind == "f":
        out_n[null_n] = np.nan


def _cast_chunk(out_n: Array, column: Column, chunk: pa.Array, flags: Flags, start: int) -> None:
    filled = chunk.fill_null(False if pa.types.is_boolean(chunk.type) else 0) if chunk.null_count else chunk
    given_n = filled.to_numpy(zero_copy_only=False)
    if casts_safely(chunk.type, column.dtype):
        out_n[:] = given_n
        return
    lost_n = cast_numbers(out_n, given_n, exact=column.policy.cast == "exact")
    flags.mark(lost_n, column.name, f"a {chunk.type} that does not fit {column.dtype}", start)


def _encode_opaque(column: Column, chunks: list[pa.Array], flags: Flags) -> Array:
    """Return text and bytes as objects, times as datetime64."""
    out_N = np.empty(len(flags.code_N), dtype=column.dtype if column.dtype == "datetime64[ns]" else object)
    start = 0
    for chunk in chunks:
        stop = start + len(chunk)
        _encode_opaque_chunk(out_N[start:stop], column, chunk, flags, start)
        start = stop
    return out_N


def _encode_opaque_chunk(out_n: Array, column: Column, chunk: pa.Array, flags: Flags, start: int) -> None:
    if pa.types.is_dictionary(chunk.type):
        chunk = chunk.dictionary_decode()
    if out_n.dtype.kind != "M":
        out_n[:] = chunk.to_numpy(zero_copy_only=False)
    elif is_text(chunk.type):
        out_n[:], broken_n = parse_times(chunk)
        flags.mark(broken_n, column.name, f"text that does not parse as {column.dtype}", start)
    else:
        out_n[:], lost_n = cast_times(chunk)
        flags.mark(lost_n, column.name, f"a {chunk.type} that does not fit {column.dtype}", start)
    if chunk.null_count:
        _apply_null_policy(out_n, _make_null_mask(chunk), column, flags, start)


def _fill_lists(out_NW: Array, column: Column, chunks: list[pa.Array], flags: Flags) -> None:
    """Fill [N, W] from a column of lists by one copy an Arrow chunk; lists of one value may be values."""
    start = 0
    for chunk in chunks:
        storage = chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk
        stop = start + len(storage)
        if out_NW.shape[1] == 1 and not is_list(storage.type):
            _fill_chunk(out_NW[start:stop, 0], column, storage, flags, start)
        else:
            _fill_lists_chunk(out_NW[start:stop], column, storage, flags, start)
        start = stop


def _fill_lists_chunk(out_nW: Array, column: Column, chunk: pa.Array, flags: Flags, start: int) -> None:
    rows, width = out_nW.shape
    lengths = pc.list_value_length(chunk).fill_null(-1).to_numpy(zero_copy_only=False)
    whole_n = lengths == width
    all_whole = bool(whole_n.all())
    values = (chunk if all_whole else chunk.filter(pa.array(whole_n))).flatten()
    flat = out_nW.reshape(rows * width) if all_whole else np.empty(len(values), dtype=out_nW.dtype)
    inner = Flags.all_good(len(values))
    _fill_chunk(flat, column, values, inner, 0)
    if not all_whole:
        out_nW[whole_n] = flat.reshape(-1, width)
        out_nW[~whole_n] = 0
        flags.mark((lengths != width) & (lengths >= 0), column.name, f"a list that has not {width} values", start)
        _apply_null_policy(out_nW, lengths < 0, column, flags, start)
    for code, (_, reason) in enumerate(inner.reasons, start=1):
        broken_n = np.zeros(rows, dtype=np.bool_)
        broken_n[whole_n] = (inner.code_N.reshape(-1, width) == code).any(axis=1)
        flags.mark(broken_n, column.name, f"in its list, {reason}", start)
