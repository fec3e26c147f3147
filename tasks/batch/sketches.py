"""Sums, quantiles and distinct values that add up: in any order of adding to the same result, bit for bit.

No sum of floats does: (a + b) + c is not a + (b + c). So sums here are integers times a power of two; a quantile sketch
is a set of numbers with integer weights; an estimate of distinct values is a maximum of small integers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

# A sketch of a chunk has a number for each of so many equal shares of its rows: ranks are off by 1 / 256 at most.
STRATA = 256
# A sketch of a run has at most so many numbers.
POINTS_MAX = 2048
# 2^9 registers: a standard error of 1.04 / sqrt(512) = 4.6 %.
_REGISTER_BITS = 9
_REGISTERS = 1 << _REGISTER_BITS
# The places that a one may have in the bits of a hash that do not name the register, as far as a float64 tells them.
_RANK_MAX = 54
# A register is one character of text: compressed, it takes some four bits.
_REGISTER_ZERO = ord("0")

_U64 = np.uint64
_NOT_SIGN = (1 << 63) - 1
_FACTORS = (_U64(0xBF58476D1CE4E5B9), _U64(0x94D049BB133111EB))


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactSum:
    """A sum without rounding: an integer times a power of two. The same number is always the same value."""

    mantissa: int = 0
    exponent: int = 0

    @classmethod
    def normalize(cls, mantissa: int, exponent: int) -> ExactSum:
        """Return mantissa * 2^exponent in its one form: an odd mantissa, or zero twice."""
        if mantissa == 0:
            return cls()
        zeros = (mantissa & -mantissa).bit_length() - 1
        return cls(mantissa=mantissa >> zeros, exponent=exponent + zeros)

    def __add__(self, other: ExactSum) -> ExactSum:
        low = min(self.exponent, other.exponent)
        mantissa = (self.mantissa << self.exponent - low) + (other.mantissa << other.exponent - low)
        return ExactSum.normalize(mantissa, low)

    def as_fraction(self) -> Fraction:
        """Return the number itself."""
        if self.exponent >= 0:
            return Fraction(self.mantissa << self.exponent)
        return Fraction(self.mantissa, 1 << -self.exponent)

    def as_text(self) -> str:
        """Return it as text that `parse` reads, such as 1a2fp-40."""
        return f"{self.mantissa:x}p{self.exponent}"

    @classmethod
    def parse(cls, text: str) -> ExactSum:
        """Read what `as_text` has written. Raises ValueError."""
        mantissa, _, exponent = text.partition("p")
        return cls.normalize(int(mantissa, 16), int(exponent))


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantileSketch:
    """Numbers in ascending order, each with the rows that it stands for.

    Sketches of chunks have 256 numbers at most, one for each equal share of the rows, so that every rank is off by less
    than 1 / 256 of the rows that were sampled; fewer where fewer values are different, and then nothing is off. They
    are added by adding weights. Above 2,048 numbers the lowest bits of all are cut off, as in UDDSketch (Epicoco et
    al. 2020): `level` says how many. How many must go depends on all numbers together and never on the order in which
    they came: a part of them never needs more cut off than all do.
    """

    points: tuple[float, ...] = ()
    weights: tuple[int, ...] = ()
    level: int = 0

    def points_as_text(self) -> str:
        """Return the numbers as text that `parse_points` reads: the bits that they have in common are left out."""
        if not self.points:
            return ""
        keys = _to_keys(np.asarray(self.points, np.float64))
        shared = int(np.bitwise_or.reduce(keys))
        zeros = (shared & -shared).bit_length() - 1 if shared else 0
        keys >>= zeros
        # Without signs, since two numbers may be further apart than a signed integer holds.
        unsigned = keys.view(_U64)
        return f"{zeros} {keys[0]} {write_integers(unsigned[1:] - unsigned[:-1])}"

    def share_up_to(self, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return for each value the share of rows that are not above it, from 0 to 1."""
        below = np.concatenate([[0], np.cumsum(self.weights, dtype=np.float64)])
        return np.asarray(below[np.searchsorted(self.points, values, side="right")] / max(below[-1], 1.0))

    def quantile(self, share: float) -> float:
        """Return the number that this share of the rows does not exceed, such as 0.5; NaN where there is none."""
        if not self.points:
            return math.nan
        summed = np.cumsum(self.weights)
        return self.points[int(np.searchsorted(summed, share * summed[-1], side="left"))]


def parse_points(text: str) -> tuple[float, ...]:
    """Return the numbers of `points_as_text`. Raises ValueError where they are not finite and in ascending order."""
    if not text:
        return ()
    zeros, first, steps = text.split(" ")
    if not (0 <= int(zeros) < 64 and abs(int(first)) < 1 << 63):  # noqa: PLR2004 - bits
        message = "the numbers of a sketch must have 64 bits"
        raise ValueError(message)
    # What goes round beyond 2^64 is no sketch: it does not ascend.
    start = np.array([int(first)], np.int64).view(_U64)
    keys = np.cumsum(np.append(start, read_integers(steps)), dtype=_U64) << _U64(int(zeros))
    points = _to_values(keys.view(np.int64))
    if not np.isfinite(points).all() or (points[1:] <= points[:-1]).any():
        message = "the numbers of a sketch must be finite, and ascend"
        raise ValueError(message)
    return tuple(points.tolist())


def write_integers(values: npt.NDArray[np.int64] | npt.NDArray[np.uint64]) -> str:
    """Return integers of 0 or more as hexadecimal digits, as many for each as the largest needs."""
    width = max(1, -(-int(values.max(initial=0)).bit_length() // 8))
    digits = values.astype(">u8").view(np.uint8).reshape(-1, 8)[:, 8 - width :].tobytes().hex()
    return f"{width}:{digits}"


def read_integers(text: str) -> npt.NDArray[np.uint64]:
    """Read what `write_integers` has written. Raises ValueError."""
    given, _, digits = text.partition(":")
    width = int(given)
    data = np.frombuffer(bytes.fromhex(digits), np.uint8)
    if not 1 <= width <= 8 or len(data) % width:  # noqa: PLR2004 - bytes of an integer
        message = f"integers must have 1 to 8 bytes each, got {len(data)} bytes by {width}"
        raise ValueError(message)
    padded = np.zeros((len(data) // width, 8), np.uint8)
    padded[:, 8 - width :] = data.reshape(-1, width)
    return padded.reshape(-1).view(">u8").astype(np.uint64)


def sketch_sorted(values: npt.NDArray[Any], weight: int = 1) -> QuantileSketch:
    """Return the sketch of finite values in ascending order, each of which stands for `weight` rows.

    Of each share of the rows it takes the number with the fewest bits that is above the first value and not above the
    last, so that sketches of equal distributions have many numbers in common, and are short as text.
    """
    if not len(values):
        return QuantileSketch()
    steps = values[1:] != values[:-1]
    if np.count_nonzero(steps) < STRATA:
        lasts = np.append(np.flatnonzero(steps), len(values) - 1)
        points = values[lasts].astype(np.float64) + 0.0
    else:
        starts, lasts = _cut_strata(len(values))
        points = _find_simplest(values[starts].astype(np.float64), values[lasts].astype(np.float64))
    # Of equal points the last stays: integers above 2^53 may be equal as floats.
    kept = np.append(points[1:] != points[:-1], True)
    stops = lasts[kept] + 1
    counts = stops - np.append(0, stops[:-1])
    return QuantileSketch(points=tuple(points[kept].tolist()), weights=tuple((counts * weight).tolist()))


@functools.lru_cache(maxsize=64)
def _cut_strata(rows: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the first and the last row of each equal share of rows."""
    starts = np.arange(STRATA) * rows // STRATA
    return starts, np.append(starts[1:], rows) - 1


def add_sketches(sketches: Sequence[QuantileSketch]) -> QuantileSketch:
    """Return the sketch of all their rows: the same for every order, and for sums of sums."""
    if not sketches:
        return QuantileSketch()
    points = np.concatenate([np.asarray(sketch.points, np.float64) for sketch in sketches])
    weights = np.concatenate([np.asarray(sketch.weights, np.int64) for sketch in sketches])
    return _add_up(_to_keys(points), weights, max(sketch.level for sketch in sketches))


def _add_up(keys: npt.NDArray[np.int64], weights: npt.NDArray[np.int64], level: int) -> QuantileSketch:
    """Add weights of equal keys, with as many of the lowest bits cut off as at least `level` and POINTS_MAX ask for."""
    unique, places = np.unique(keys, return_inverse=True)
    if len(unique) > POINTS_MAX:
        # Two neighbours stay apart as long as the highest bit in which they differ is not cut off.
        highest = np.sort(_find_highest_bit(unique[1:] ^ unique[:-1]))
        level = max(level, int(highest[-POINTS_MAX]) + 1)
    if level:
        # The middle of the range of 2^level keys that each lies in.
        middles = (unique >> level << level) | (1 << level >> 1)
        unique, folded = np.unique(middles, return_inverse=True)
        places = folded[places]
    summed = np.zeros(len(unique), np.int64)
    np.add.at(summed, places, weights)
    return QuantileSketch(points=tuple(_to_values(unique).tolist()), weights=tuple(summed.tolist()), level=level)


def _turn_bits(bits: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the bits of float64 values as integers in the same order, and such integers as bits again."""
    return np.asarray(bits ^ ((bits >> 63) & _NOT_SIGN))


def _to_keys(values: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return float64 values as integers in the same order, whose leading bits say where a value lies."""
    # Adding zero turns -0.0 into 0.0.
    return _turn_bits((values + 0.0).view(np.int64))


def _to_values(keys: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    return _turn_bits(keys).view(np.float64)


def _find_highest_bit(bits: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the place of the highest one of each integer, as a float64 of it has it for an exponent."""
    unsigned = bits.view(_U64)
    # Without a second one behind the first, it is not rounded up to the next power of two.
    rounded = (unsigned & ~(unsigned >> _U64(1))).astype(np.float64)
    return (rounded.view(np.int64) >> 52) - 1023


def _find_simplest(first: npt.NDArray[np.float64], last: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the numbers of the fewest bits above `first` and not above `last`, or both where they are equal."""
    low, high = _to_keys(first), _to_keys(last)
    # Of equal ones the lowest bit stays.
    highest = np.maximum(_find_highest_bit(low ^ high), 0)
    return _to_values(high >> highest << highest)


def mix_bits(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return hashes of 64 bits by SplitMix64's finalizer (Steele, Lea, Flood 2014), the same on every machine."""
    mixed = keys ^ (keys >> _U64(30))
    mixed *= _FACTORS[0]
    mixed ^= mixed >> _U64(27)
    mixed *= _FACTORS[1]
    mixed ^= mixed >> _U64(31)
    return mixed


class DistinctSketch:
    """HyperLogLog (Flajolet et al. 2007): registers that take the maximum, and an estimate with 4.6 % standard error.

    The estimate is the one of Ertl 2017 (arXiv:1702.01284, algorithm 6), which needs no tables of corrections.
    """

    __slots__ = ("registers",)

    def __init__(self, registers: npt.NDArray[np.uint8] | None = None) -> None:
        self.registers = np.zeros(_REGISTERS, np.uint8) if registers is None else registers

    @classmethod
    def of_hashes(cls, hashes: npt.NDArray[np.uint64]) -> DistinctSketch:
        """Return the sketch of values by their hashes."""
        sketch = cls()
        places = (hashes >> _U64(64 - _REGISTER_BITS)).astype(np.int64)
        # The place of the first one among the bits that are left. Of zero the exponent is -1023, which is one too many.
        rest = ((hashes << _U64(_REGISTER_BITS)) >> _U64(11)).view(np.int64)
        ranks = 1076 - (rest.astype(np.float64).view(np.int64) >> 52)
        np.minimum(ranks, _RANK_MAX, out=ranks)
        np.maximum.at(sketch.registers, places, ranks.astype(np.uint8))
        return sketch

    def __or__(self, other: DistinctSketch) -> DistinctSketch:
        return DistinctSketch(np.maximum(self.registers, other.registers))

    def estimate(self) -> float:
        """Return how many different values there are, by estimate."""
        counts = np.bincount(self.registers, minlength=_RANK_MAX + 1)
        top = _RANK_MAX - 1
        z = _REGISTERS * _tau(1 - counts[top + 1] / _REGISTERS)
        for rank in range(top, 0, -1):
            z = 0.5 * (z + counts[rank])
        z += _REGISTERS * _sigma(counts[0] / _REGISTERS)
        return float(_REGISTERS**2 / (2 * math.log(2) * z)) if math.isfinite(z) else 0.0

    def as_text(self) -> str:
        """Return the registers as text, without those at the end that are zero."""
        return (self.registers + np.uint8(_REGISTER_ZERO)).tobytes().decode("ascii").rstrip("0")

    @classmethod
    def parse(cls, text: str) -> DistinctSketch:
        """Read what `as_text` has written. Raises ValueError."""
        registers = np.frombuffer(text.ljust(_REGISTERS, "0").encode("ascii"), np.uint8) - np.uint8(_REGISTER_ZERO)
        if len(registers) != _REGISTERS or registers.max(initial=0) > _RANK_MAX:
            message = f"a sketch of distinct values must have {_REGISTERS} registers up to {_RANK_MAX}"
            raise ValueError(message)
        return cls(registers)


def _sigma(x: float) -> float:
    if x == 1:
        return math.inf
    y, z, before = 1.0, x, -1.0
    while z != before:
        x, before = x * x, z
        z, y = z + x * y, y + y
    return z


def _tau(x: float) -> float:
    if x in (0, 1):
        return 0.0
    y, z, before = 1.0, 1 - x, -1.0
    while z != before:
        x, before, y = math.sqrt(x), z, y / 2
        z -= (1 - x) ** 2 * y
    return z / 3
