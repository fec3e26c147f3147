"""Numbers and text into the dtype that a model takes, and which rows that loses.

What a CPU makes of a number that does not fit is its own affair: whether one fits is told by its
value, so that every machine rejects the same rows. Shapes: n rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

_BOOLEANS = {"true": True, "false": False, "1": True, "0": False}


def cast_numbers(out_n: Array, given_n: Array, *, exact: bool) -> Mask:
    """Cast n numbers into their place and return which do not survive it.

    exact: the value must be the same afterwards. Otherwise the nearest value will do, but no infinity
    in a finite number's place. Booleans fit everywhere, and are none of the numbers given.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if out_n.dtype.kind == "f":
            return _cast_to_float(out_n, given_n, exact=exact)
        return _cast_to_whole(out_n, given_n, exact=exact)


def _cast_to_float(out_n: Array, given_n: Array, *, exact: bool) -> Mask:
    out_n[:] = given_n
    whole = given_n.dtype.kind != "f"
    if not exact:
        infinite_n = np.isinf(out_n)
        return infinite_n if whole or not infinite_n.any() else infinite_n & ~np.isinf(given_n)
    if not whole:
        return np.asarray((out_n != given_n) & ~np.isnan(given_n))
    # The largest integers round up to a float that is none of them.
    held_n = np.isfinite(out_n) & (out_n.astype(np.float64) < float(_limits(given_n.dtype)[1] + 1))
    return np.asarray(~held_n | (np.where(held_n, out_n, 0).astype(given_n.dtype) != given_n))


def _cast_to_whole(out_n: Array, given_n: Array, *, exact: bool) -> Mask:
    low, high = _limits(out_n.dtype)
    if given_n.dtype.kind != "f":
        out_n[:] = given_n
        return np.asarray((given_n < low) | (given_n > high))
    given_n = given_n.astype(np.float64) if exact else np.rint(given_n.astype(np.float64))
    held_n = (given_n >= low) & (given_n < float(high + 1))
    out_n[:] = np.where(held_n, given_n, 0)
    return np.asarray(~held_n | (out_n != given_n))


def _limits(dtype: np.dtype[Any]) -> tuple[int, int]:
    if dtype.kind == "b":
        return 0, 1
    return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)


def parse_numbers(out_n: Array, chunk: pa.Array) -> Mask:
    """Parse n texts into their place and return which are no such number; a null is zero."""
    text = pl.Series(chunk, dtype=pl.String)
    numbers = _parsed(text, out_n.dtype)
    if numbers.null_count() > text.null_count():
        # Stripping takes longer than parsing, and numbers seldom stand between blanks.
        numbers = _parsed(text.str.strip_chars(), out_n.dtype)
    out_n[:] = numbers.fill_null(False if out_n.dtype.kind == "b" else 0).to_numpy()
    broken_n = np.zeros(len(out_n), dtype=np.bool_)
    if numbers.null_count() > text.null_count():
        broken_n |= (numbers.is_null() & text.is_not_null()).to_numpy()
    if out_n.dtype.kind == "f" and (infinite_n := np.isinf(out_n)).any():
        # The parser makes an infinity of a number that is too large.
        broken_n |= infinite_n & ~text.str.contains("(?i)inf").fill_null(value=False).to_numpy()
    return broken_n


def _parsed(text: pl.Series, dtype: np.dtype[Any]) -> pl.Series:
    if dtype.kind == "b":
        return text.str.to_lowercase().replace_strict(_BOOLEANS, default=None)
    return text.cast(pl.Series(np.empty(0, dtype=dtype)).dtype, strict=False)
