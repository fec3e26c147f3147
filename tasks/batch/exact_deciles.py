"""Deciles of numbers that are read again and again rather than kept: exact, whatever the number of rows.

A floating-point number is 32 or 64 bits whose order, with the sign turned, is that of an unsigned integer. Each pass
over the numbers counts 16 of these bits, from the highest, for those numbers alone that may still be a decile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_BITS = 16
_VALUES = 1 << _BITS
_NINE = 9
_U64 = np.uint64


# Reads some columns, some rows at a time.
Reading = Callable[[], Iterable[Sequence[npt.NDArray[Any]]]]


def find_deciles(read: Reading, columns: int) -> list[npt.NDArray[np.float64]]:
    """Return the nine deciles of each of several columns of finite numbers.

    The k-th is the least value that at least k tenths of the rows do not exceed.

    Args:
        read: Reads the columns, some rows at a time; called two times for float32, four times for float64.
        columns: How many there are.

    Returns:
        Nine numbers in ascending order for each column, none where there are no rows.
    """
    found = [_Search() for _ in range(columns)]
    while not all(each.is_done for each in found):
        for arrays in read():
            for search, values in zip(found, arrays, strict=True):
                search.count(values)
        for search in found:
            search.narrow()
    return [search.list_values() for search in found]


def place_in_deciles(values: npt.NDArray[Any], deciles: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return for each value how many deciles are below it, from 0 to 9."""
    return np.searchsorted(deciles, values.astype(np.float64), side="left")


class _Search:
    """The search for the deciles of one column: how their highest bits begin, and the rank of each among those."""

    def __init__(self) -> None:
        self._bits: int | None = None
        self._known = 0
        self._prefixes: list[int] = [0]
        self._counts: dict[int, npt.NDArray[np.int64]] = {}
        self._ranks: list[int] = []
        self._found: list[int] = []
        self.is_done = False

    def count(self, values: npt.NDArray[Any]) -> None:
        if self.is_done:
            return
        keys, bits = _to_keys(values)
        self._bits = max(bits, self._bits or 0)
        left = bits - self._known
        below = _U64(left - _BITS)
        for prefix in self._prefixes:
            some = keys if not self._known else keys[(keys >> _U64(left)) == _U64(prefix)]
            places = ((some >> below) & _U64(_VALUES - 1)).astype(np.int64)
            counted = np.bincount(places, minlength=_VALUES)
            self._counts[prefix] = self._counts[prefix] + counted if prefix in self._counts else counted

    def narrow(self) -> None:
        """Go from the counts of a pass to the bits that the deciles begin with."""
        if self.is_done:
            return
        rows = int(sum(each.sum() for each in self._counts.values())) if not self._known else 1
        if self._bits is None or not rows:
            self.is_done = True
            return
        if not self._known:
            self._found, self._ranks = [0] * _NINE, [-(-rows * at // 10) for at in range(1, _NINE + 1)]
        for at, (prefix, rank) in enumerate(zip(self._found, self._ranks, strict=True)):
            summed = np.cumsum(self._counts[prefix])
            place = int(np.searchsorted(summed, rank, side="left"))
            self._ranks[at] = rank - (int(summed[place - 1]) if place else 0)
            self._found[at] = prefix << _BITS | place
        self._known += _BITS
        self._prefixes, self._counts = sorted(set(self._found)), {}
        self.is_done = self._known == self._bits

    def list_values(self) -> npt.NDArray[np.float64]:
        if not self._found:
            return np.empty(0, np.float64)
        wide = self._bits == 64  # noqa: PLR2004 - bits of a float64
        keys = np.array(self._found, np.uint64)
        sign = _U64(1 << (self._bits or 0) - 1)
        mask = _U64((1 << (self._bits or 0)) - 1)
        bits = np.where(keys & sign, keys & ~sign, ~keys & mask)
        return bits.view(np.float64) if wide else bits.astype(np.uint32).view(np.float32).astype(np.float64)


def _to_keys(values: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint64], int]:
    """Return numbers as unsigned integers in the same order, and how many bits these have."""
    # Adding zero turns -0.0 into 0.0.
    if values.dtype.itemsize > 4:  # noqa: PLR2004 - bytes of a float32
        bits, sign, mask, width = (values + 0.0).view(np.uint64), _U64(1 << 63), _U64(2**64 - 1), 64
    else:
        small = (values.astype(np.float32) + np.float32(0.0)).view(np.uint32)
        bits, sign, mask, width = small.astype(np.uint64), _U64(1 << 31), _U64(2**32 - 1), 32
    return np.where(bits & sign, ~bits & mask, bits | sign), width
