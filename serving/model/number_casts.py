"""Numbers of another type, and numbers in texts: each goes into its place, or is told as one that does not fit.

Whether a number fits another type is decided by its value, not by what the CPU makes of it, so that every machine
rejects the same rows. Shapes: n rows of one Arrow chunk.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

_DECIMAL = r"^(?P<sign>[+-]?)(?P<whole>[0-9]*)\.?(?P<part>[0-9]*)(?:[eE](?P<exponent>[+-]?[0-9]+))?$"
# One digit more than the largest integer has; longer numbers do not fit either.
_DIGITS_MAX = 21
_SIZE_MAX = np.uint64(2**64 - 1)
_BOOLEANS = {"true": True, "false": False, "1": True, "0": False}


def cast_numbers(out_n: Array, given_n: Array, *, exact: bool) -> Mask:
    """Cast n numbers into their place and return which of them do not fit.

    With `exact` a value must stay the same. Otherwise the nearest value will do, but not infinity for a finite number.
    The numbers given are not booleans, which fit every type.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if out_n.dtype.kind == "f":
            return _cast_to_float(out_n, given_n, exact=exact)
        return _cast_to_integer(out_n, given_n, exact=exact)


def _cast_to_float(out_n: Array, given_n: Array, *, exact: bool) -> Mask:
    out_n[:] = given_n
    whole = given_n.dtype.kind != "f"
    if not exact:
        infinite_n = np.isinf(out_n)
        return infinite_n if whole or not infinite_n.any() else infinite_n & ~np.isinf(given_n)
    if not whole:
        return np.asarray((out_n != given_n) & ~np.isnan(given_n))
    # The largest integers round up to a float that no integer of the type equals.
    held_n = np.isfinite(out_n) & (out_n.astype(np.float64) < float(_find_limits(given_n.dtype)[1] + 1))
    return np.asarray(~held_n | (np.where(held_n, out_n, 0).astype(given_n.dtype) != given_n))


def _cast_to_integer(out_n: Array, given_n: Array, *, exact: bool) -> Mask:
    low, high = _find_limits(out_n.dtype)
    if given_n.dtype.kind != "f":
        out_n[:] = given_n
        return np.asarray((given_n < low) | (given_n > high))
    given_n = given_n.astype(np.float64) if exact else np.rint(given_n.astype(np.float64))
    held_n = (given_n >= low) & (given_n < float(high + 1))
    out_n[:] = np.where(held_n, given_n, 0)
    return np.asarray(~held_n | (out_n != given_n))


def _find_limits(dtype: np.dtype[Any]) -> tuple[int, int]:
    if dtype.kind == "b":
        return 0, 1
    return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)


def parse_numbers(out_n: Array, chunk: pa.Array, *, nearest: bool) -> Mask:
    """Parse n texts into their place and return which of them do not parse; a null becomes zero.

    Integers may be written as floats, "20.0" or "2e1", and lose no digit. With `nearest`, "20.5" becomes the nearest
    integer.
    """
    text = pl.Series(chunk, dtype=pl.String)
    numbers = _parse_text(text, out_n.dtype)
    if numbers.null_count() > text.null_count():
        # Stripping takes longer than parsing, and numbers seldom have blanks around them.
        text = text.str.strip_chars()
        # pandas writes integers in a column with nulls as "20.0"; other texts that do not parse still do not.
        numbers = _parse_text(text.str.strip_suffix(".0") if out_n.dtype.kind in "iu" else text, out_n.dtype)
    # Polars runs fill_null as a query, which takes ten times as long for a small column.
    filled = numbers.to_arrow().fill_null(False if out_n.dtype.kind == "b" else 0)
    out_n[:] = filled.to_numpy(zero_copy_only=False)
    broken_n = np.zeros(len(out_n), dtype=np.bool_)
    if numbers.null_count() > text.null_count():
        broken_n |= (numbers.is_null() & text.is_not_null()).to_numpy()
        if out_n.dtype.kind in "iu":
            out_n[broken_n], broken_n[broken_n] = _parse_decimals(text.filter(broken_n), out_n.dtype, nearest=nearest)
    if out_n.dtype.kind == "f" and (infinite_n := np.isinf(out_n)).any():
        # The parser turns a number that is too large into infinity.
        broken_n |= infinite_n & ~text.str.contains("(?i)inf").fill_null(value=False).to_numpy()
    return broken_n


def _parse_text(text: pl.Series, dtype: np.dtype[Any]) -> pl.Series:
    if dtype.kind == "b":
        return text.str.to_lowercase().replace_strict(_BOOLEANS, default=None)
    return text.cast(_polars_type(dtype), strict=False)


@cache
def _polars_type(dtype: np.dtype[Any]) -> pl.DataType:
    return pl.Series(np.empty(0, dtype=dtype)).dtype


def _parse_decimals(text: pl.Series, dtype: np.dtype[Any], *, nearest: bool) -> tuple[Array, Mask]:
    """Return n decimal numbers as integers, and which are invalid. Works on digits, since a float keeps only 15."""
    parts = text.str.extract_groups(_DECIMAL).struct.unnest()
    negative_n = (parts["sign"] == "-").fill_null(value=False).to_numpy()
    whole, rest = _split_at_point(parts)
    sizes = whole.cast(pl.UInt64, strict=False)
    broken_n, size_n = sizes.is_null().to_numpy(), sizes.fill_null(0).to_numpy()
    if nearest:
        # Digits after the point sort as text as they do as numbers, and "5" is one half.
        up_n = (rest > "5").to_numpy() | ((rest == "5").to_numpy() & (size_n % 2 == 1))
        broken_n = broken_n | (up_n & (size_n == _SIZE_MAX))
        size_n = size_n + up_n
    else:
        broken_n = broken_n | (rest != "").to_numpy()
    low, high = _find_limits(dtype)
    broken_n = broken_n | (size_n > np.where(negative_n, np.uint64(-low), np.uint64(high)))
    return np.where(negative_n, np.negative(size_n), size_n).astype(dtype), broken_n


def _split_at_point(parts: pl.DataFrame) -> tuple[pl.Series, pl.Series]:
    """Return the digits before and after the point, with the exponent applied; null where the text is not a number.

    The former has at most 22 digits; the latter has no trailing zeros.
    """
    digits = pl.col("whole") + pl.col("part")
    # Without leading zeros, so that 21 digits are always too many.
    led = digits.str.strip_chars_start("0")
    exponent = pl.col("exponent").cast(pl.Float64).clip(-1e9, 1e9).fill_null(0).cast(pl.Int64)
    zeros = digits.str.len_bytes().cast(pl.Int64) - led.str.len_bytes().cast(pl.Int64)
    found = parts.select(
        led=pl.when(digits != "").then(led), point=pl.col("whole").str.len_bytes().cast(pl.Int64) + exponent - zeros
    ).select(
        whole=pl.lit("0") + (pl.col("led") + "0" * _DIGITS_MAX).str.slice(0, pl.col("point").clip(0, _DIGITS_MAX)),
        rest=pl.when(pl.col("point") < 0).then(pl.lit("0")).otherwise(pl.lit(""))
        + pl.col("led").str.slice(pl.col("point").clip(0)),
    )
    return found["whole"], found["rest"].str.strip_chars_end("0").fill_null("")
