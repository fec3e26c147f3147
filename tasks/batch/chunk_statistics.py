"""Statistics of a chunk's columns, counted block by block while it is read."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from serving.errors import BadInput, suggest_name
from serving.model.contract import is_text
from tasks.batch.column_statistics import (
    MANY,
    ColumnStatistics,
    Kind,
    Number,
    TableStatistics,
    add_tables,
    order_frequent,
)
from tasks.batch.sketches import STRATA, DistinctSketch, ExactSum, mix_bits, sketch_sorted

# A chunk of more rows is sampled: one of every k, so that 2,731 to 4,096 are.
ALL_MAX, SAMPLE_MAX = 8192, 4096
# Texts that fewer rows of a sample have are not named: they may be of a person, and say nothing of the column.
NAMED_ROWS_MIN = 10
FREQUENT_MAX, TEXT_CHARACTERS_MAX = 32, 64

# The rows of a chunk of a table that is described as a whole.
_CHUNK_ROWS = 250_000
# Rows that are summed at a time: their float64 values stay in a core's cache.
_PIECE, _LANE = 32_768, 8_192
# Values are rounded to 2^-19 of their range, so that the squares of 2^15 rows add up to less than 2^53.
_ROUND_BITS, _MANTISSA_BITS = 19, 50
_EXPONENT_MAX = 400


def choose_step(rows: int) -> int:
    """Return how many rows of a chunk a row of its sample stands for."""
    return 1 if rows <= ALL_MAX else -(-rows // SAMPLE_MAX)


def sample_rows(rows: int) -> npt.NDArray[np.int64]:
    """Return the rows of a chunk that are sampled, in order: all, or one of every k at a place that varies.

    The place within each k rows is that of a hash, so that rows that repeat every k are no trap. It is the same on
    every machine, and does not depend on the blocks in which a chunk is read.
    """
    step = choose_step(rows)
    if step == 1:
        return np.arange(rows)
    at = np.arange(rows // step, dtype=np.uint64)
    places = (mix_bits(at) >> np.uint64(32)) % np.uint64(step)
    return (at * np.uint64(step) + places).astype(np.int64)


class StatisticsCollector:
    """Counts the columns of one chunk, for one thread: rows go in as they are read, statistics come out at the end."""

    def __init__(self, rows: int, *, sums_all: bool = False) -> None:
        """Begin a chunk of so many rows: the sample is chosen by that.

        `sums_all` asks for sums of every row, not of the sample. They cost more than all else together.
        """
        self._sampled = sample_rows(rows)
        self._weight, self._sums_all = choose_step(rows), sums_all
        self._at = 0
        self._columns: dict[str, _Column] = {}
        self._buffer = np.empty((_PIECE // _LANE, _LANE))

    def add(self, table: pa.Table) -> None:
        """Count the next rows of the chunk, all columns of the table."""
        start, stop = np.searchsorted(self._sampled, (self._at, self._at + table.num_rows))
        places = self._sampled[start:stop] - self._at
        self._at += table.num_rows
        for name in table.column_names:
            if name not in self._columns:
                kind = find_kind(table.schema.field(name).type)
                self._columns[name] = _Column(kind, self._weight, self._buffer, sums_all=self._sums_all)
            self._columns[name].add(_combine(table.column(name)), places)

    def finish(self) -> dict[str, ColumnStatistics]:
        """Return the statistics of each column."""
        return {name: column.finish() for name, column in self._columns.items()}


def collect_statistics(table: pa.Table, *, sums_all: bool = True) -> dict[str, ColumnStatistics]:
    """Return the statistics of the columns of a whole chunk."""
    collector = StatisticsCollector(table.num_rows, sums_all=sums_all)
    collector.add(table)
    return collector.finish()


def describe_table(table: pa.Table, outputs: str | Sequence[str] = ()) -> TableStatistics:
    """Return the statistics of a whole table, such as a training set, to hold runs against.

    Args:
        table: Its columns are the model's inputs, but for the outputs.
        outputs: The columns that are predictions, or labels, under the names that predictions have.

    Raises:
        BadInput: An output is not in the table.
    """
    wanted = [outputs] if isinstance(outputs, str) else list(outputs)
    for name in wanted:
        if name not in table.column_names:
            message = (
                f"The table must have the outputs named, got no column {name!r}"
                f"{suggest_name(name, table.column_names)}. Correct the name."
            )
            raise BadInput(message)
    names = [name for name in table.column_names if name not in wanted]
    chunks = [table.slice(start, _CHUNK_ROWS) for start in range(0, table.num_rows, _CHUNK_ROWS)] or [table]
    return add_tables(
        TableStatistics(
            rows=chunk.num_rows,
            inputs=collect_statistics(chunk.select(names)),
            outputs=collect_statistics(chunk.select(wanted)),
        )
        for chunk in chunks
    )


def find_kind(kind: pa.DataType) -> Kind:
    """Return how a column of this type is counted."""
    if isinstance(kind, pa.BaseExtensionType):
        return find_kind(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return find_kind(kind.value_type)
    if is_text(kind):
        return "text"
    if any(is_kind(kind) for is_kind in _NUMBERS):
        return "number"
    return "time" if pa.types.is_temporal(kind) and not pa.types.is_interval(kind) else "other"


_NUMBERS = (pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)


def _combine(column: pa.ChunkedArray) -> pa.Array:
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if isinstance(array.type, pa.BaseExtensionType):
        array = array.storage
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    # Few functions of pyarrow take views.
    return array.cast(pa.large_string()) if pa.types.is_string_view(array.type) else array


class _Column:
    """What a column has come to so far."""

    def __init__(self, kind: Kind, weight: int, buffer: npt.NDArray[np.float64], *, sums_all: bool) -> None:
        self._kind: Kind = kind
        self._sums_all, self._summed = sums_all, 0
        self._weight, self._buffer = weight, buffer
        self._rows = self._nulls = self._nans = self._infinite = 0
        self._minimum: Any = None
        self._maximum: Any = None
        self._sums: dict[int, tuple[int, int]] = {}
        self._numbers: list[npt.NDArray[Any]] = []
        self._texts: list[pa.Array] = []

    def add(self, array: pa.Array, places: npt.NDArray[np.int64]) -> None:
        """Count the next rows; those at `places` are sampled."""
        self._rows += len(array)
        self._nulls += array.null_count
        if self._kind == "other" or array.null_count == len(array):
            return
        valid = None
        if array.null_count:
            valid = array.is_valid().to_numpy(zero_copy_only=False)
            places = places[valid[places]]
            # A value that is there, in place of each null, leaves the range as it is. To leave nulls out takes longer.
            array = array.fill_null(array[int(valid.argmax())])
        numbers = _to_numbers(array)
        self._numbers.append(numbers.take(places))
        if self._kind == "text":
            self._texts.append(array.take(pa.array(places)))
        if valid is not None and (self._sums_all or not math.isfinite(numbers[valid.argmax()])):
            numbers = numbers[valid]
        if self._sums_all:
            for start in range(0, len(numbers), _PIECE):
                self._add_sums(*self._bound(numbers[start : start + _PIECE]))
        else:
            self._bound(numbers)

    def _bound(self, numbers: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], Number, Number]:
        """Add values to the range; return those that are finite, the least and the greatest of them."""
        low, high = numbers.min(), numbers.max()
        if numbers.dtype.kind == "f" and not (math.isfinite(low) and math.isfinite(high)):
            nans = int(np.count_nonzero(np.isnan(numbers)))
            finite = numbers[np.isfinite(numbers)]
            self._nans += nans
            self._infinite += len(numbers) - len(finite) - nans
            if not len(finite):
                return finite, 0, 0
            numbers, low, high = finite, finite.min(), finite.max()
        # Adding zero turns -0.0 into 0.0: which of the two is the lesser would depend on their order.
        low, high = low.item() + 0, high.item() + 0
        self._minimum = low if self._minimum is None else min(self._minimum, low)
        self._maximum = high if self._maximum is None else max(self._maximum, high)
        return numbers, low, high

    def _add_sums(self, numbers: npt.NDArray[Any], low: Number, high: Number) -> None:
        """Add finite values to the sums."""
        exponent, total, squares = _sum_up(numbers, low, high, self._buffer)
        before = self._sums.get(exponent, (0, 0))
        self._sums[exponent] = before[0] + total, before[1] + squares
        self._summed += len(numbers)

    def finish(self) -> ColumnStatistics:
        """Return what the column has come to."""
        numbers = np.concatenate(self._numbers) if self._numbers else np.empty(0)
        if numbers.dtype.kind == "f" and self._nans + self._infinite:
            numbers = numbers[np.isfinite(numbers)]
        numbers.sort()
        if not self._sums_all and len(numbers):
            for start in range(0, len(numbers), _PIECE):
                piece = numbers[start : start + _PIECE]
                self._add_sums(piece, piece[0].item(), piece[-1].item())
        quantiles = sketch_sorted(numbers, self._weight)
        texts = _Texts(self._texts, self._weight) if self._kind == "text" and len(numbers) else None
        sums = [ExactSum.normalize(total, exponent) for exponent, (total, _) in self._sums.items()]
        squares = [ExactSum.normalize(square, 2 * exponent) for exponent, (_, square) in self._sums.items()]
        return ColumnStatistics(
            kind=self._kind,
            rows=self._rows,
            nulls=self._nulls,
            nans=self._nans,
            infinite=self._infinite,
            sampled=len(numbers),
            summed=self._summed,
            minimum=self._minimum,
            maximum=self._maximum,
            sum=sum(sums, ExactSum()),
            squares=sum(squares, ExactSum()),
            quantiles=quantiles,
            distinct=_count_distinct(numbers) if texts is None else DistinctSketch.of_hashes(texts.hashes).as_text(),
            frequent=texts.frequent if texts is not None else (),
            unnamed_max=texts.unnamed_max if texts is not None else 0,
        )


class _Texts:
    """The sampled texts of a column: the frequent ones, and a hash of each that is different."""

    def __init__(self, sampled: list[pa.Array], weight: int) -> None:
        counted = pc.value_counts(pa.chunked_array(sampled).combine_chunks())
        import pandas as pd  # noqa: PLC0415 - a second that most runs do not need

        values = counted.field("values").to_numpy(zero_copy_only=False).astype(object)
        counts = counted.field("counts").to_numpy()
        # SipHash with pandas' fixed key: the same on every machine.
        self.hashes = pd.util.hash_array(values, categorize=False)
        named = np.flatnonzero(counts >= NAMED_ROWS_MIN)
        rows: Counter[str] = Counter()
        for place in named:
            rows[values[place][:TEXT_CHARACTERS_MAX]] += int(counts[place]) * weight
        ordered = order_frequent(rows)
        self.frequent = ordered[:FREQUENT_MAX]
        rare = (NAMED_ROWS_MIN - 1) * weight if len(named) < len(counts) else 0
        self.unnamed_max = ordered[FREQUENT_MAX][1] if len(ordered) > FREQUENT_MAX else rare


def _count_distinct(numbers: npt.NDArray[Any]) -> str:
    """Return the registers of values in ascending order; of floats only where a sketch holds all that are different."""
    if not len(numbers):
        return ""
    if numbers.dtype.kind == "f":
        starts = np.flatnonzero(numbers[1:] != numbers[:-1])
        if len(starts) >= STRATA:
            return MANY
        # Adding zero turns -0.0 into 0.0.
        keys = (numbers[np.append(starts, len(numbers) - 1)].astype(np.float64) + 0.0).view(np.uint64)
    else:
        keys = numbers.astype(np.int64, casting="unsafe").view(np.uint64)
    return DistinctSketch.of_hashes(mix_bits(keys)).as_text()


def _sum_up(
    numbers: npt.NDArray[Any], low: float, high: float, buffer: npt.NDArray[np.float64]
) -> tuple[int, int, int]:
    """Return an exponent, and the sum of the values and of their squares in units of 2^exponent and of its square.

    Each value is rounded once, to a multiple of 2^exponent that is at most 2^-18 of the range of these values, and the
    sums are exact: they do not depend on order or on the machine. Integers that span less than 2^19 are not rounded.
    """
    count = len(numbers)
    if not count:
        return 0, 0, 0
    if low == high:
        numerator, denominator = low.as_integer_ratio()
        exponent = 1 - denominator.bit_length()
        return exponent, count * numerator, count * numerator * numerator
    span, size = high - low, max(abs(low), abs(high))
    exponent = max(_find_exponent(span) - _ROUND_BITS, _find_exponent(size) - _MANTISSA_BITS)
    if numbers.dtype.kind != "f":
        exponent = max(exponent, 0)
    lanes = -(-count // _LANE)
    padded = buffer[:lanes].reshape(-1)
    used = padded[:count]
    np.copyto(used, numbers)
    padded[count:] = 0.0
    unit = math.ldexp(1.0, exponent)
    if abs(exponent) > _EXPONENT_MAX:
        # Squares would be too small, or too large, for float64.
        np.ldexp(used, -exponent, out=used)
        unit = 1.0
    # Adding 1.5 * 2^52 units leaves no bits below a unit. The middle goes too, so that the squares are small.
    middle = round(math.ldexp(low / 2 + high / 2, -exponent))
    shift = 1.5 * 2.0**52 * unit
    used += shift
    used -= shift + middle * unit
    total = int(buffer[:lanes].sum() / unit)
    # Rows of 8,192, since BLAS makes threads for more.
    squares = int(float(np.vecdot(buffer[:lanes], buffer[:lanes]).sum()) / unit / unit)
    return exponent, total + count * middle, squares + 2 * middle * total + count * middle * middle


def _find_exponent(size: float) -> int:
    """Return the exponent of the power of two that is above a positive number."""
    # The span of float64 values may be twice the largest of them.
    return math.frexp(size)[1] if math.isfinite(size) else sys.float_info.max_exp + 1


_MICROSECONDS = {"s": 1_000_000, "ms": 1_000, "us": 1}


def _to_numbers(array: pa.Array) -> npt.NDArray[Any]:
    """Return values without nulls as numbers: lengths of texts, microseconds of times."""
    kind = array.type
    if is_text(kind):
        return _without_copy(pc.utf8_length(array))
    if pa.types.is_boolean(kind):
        return _without_copy(array.cast(pa.uint8()))
    if pa.types.is_decimal(kind):
        return _without_copy(array.cast(pa.float64()))
    if pa.types.is_temporal(kind):
        return _to_microseconds(array)
    numbers = _without_copy(array)
    return numbers.astype(np.float32) if numbers.dtype == np.float16 else numbers


def _to_microseconds(array: pa.Array) -> npt.NDArray[np.int64]:
    kind = array.type
    if pa.types.is_date32(kind):
        factor = 86_400 * 1_000_000
    else:
        factor = _MICROSECONDS.get("ms" if pa.types.is_date64(kind) else kind.unit, 0)
    stored = pa.int32() if kind.bit_width == 32 else pa.int64()  # noqa: PLR2004 - bits
    numbers = _without_copy(array.view(stored)).astype(np.int64)
    if not factor:
        return numbers // 1_000
    # Years that no one means stay where they are: far away.
    most = np.iinfo(np.int64).max // factor
    return np.clip(numbers, -most, most) * factor


def _without_copy(array: pa.Array) -> npt.NDArray[Any]:
    numbers: npt.NDArray[Any] = array.to_numpy(zero_copy_only=True)
    return numbers
