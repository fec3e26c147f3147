"""Statistics of the columns of a table: values that add up over chunks, and their form as text.

Counts and range are of every row, and so are the sums of outputs. All else is of a sample of each chunk
(tasks/batch/chunk_statistics.py), which is all of it up to 8,192 rows.
"""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from serving.errors import BadInput, FormatTooNew
from tasks.batch.sketches import (
    DistinctSketch,
    ExactSum,
    QuantileSketch,
    add_sketches,
    parse_points,
    read_integers,
    write_integers,
)

FORMAT_VERSION = 1
Kind = Literal["number", "time", "text", "other"]
Number = int | float

KINDS = ("number", "time", "text", "other")
_RANGE = ("minimum", "maximum")
# In place of the registers of floats that are more than a sketch of a chunk has numbers: nobody counts those.
MANY = "many"
# What is unpacked is never more than this, whatever a part says.
_BYTES_MAX = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnStatistics:
    """What is known of one column.

    Of a text, range, sums and quantiles are those of its length in characters; of a time they are microseconds since
    1970; of a boolean 0 and 1. `other` stands for lists, bytes and the like, of which only nulls are counted. Neither
    range nor sums have values that are not finite: `nans` and `infinite` count those. `summed` says how many values are
    in the sums, and `sampled` how many in quantiles, frequent texts and distinct values. A text that is not among the
    frequent ones has at most `unnamed_max` rows.
    """

    kind: Kind
    rows: int = 0
    nulls: int = 0
    nans: int = 0
    infinite: int = 0
    sampled: int = 0
    summed: int = 0
    minimum: Number | None = None
    maximum: Number | None = None
    sum: ExactSum = field(default_factory=ExactSum)
    squares: ExactSum = field(default_factory=ExactSum)
    quantiles: QuantileSketch = field(default_factory=QuantileSketch)
    distinct: str = ""
    frequent: tuple[tuple[str, int], ...] = ()
    unnamed_max: int = 0

    @property
    def finite(self) -> int:
        """How many rows have a value that is finite: the range is theirs."""
        return self.rows - self.nulls - self.nans - self.infinite

    @property
    def null_rate(self) -> float:
        """The share of rows that are null or NaN."""
        return (self.nulls + self.nans) / self.rows if self.rows else 0.0

    @property
    def mean(self) -> float:
        """The mean; NaN where there is no value."""
        return float(self.sum.as_fraction() / self.summed) if self.summed else math.nan

    @property
    def deviation(self) -> float:
        """The standard deviation, of the population; NaN where there is no value."""
        if not self.summed:
            return math.nan
        mean = self.sum.as_fraction() / self.summed
        return _root(self.squares.as_fraction() / self.summed - mean * mean)

    @property
    def distinct_sampled(self) -> int | None:
        """How many different values the sampled rows have, by estimate; None for floats that are too many to count."""
        if self.distinct == MANY:
            return None
        return min(self.sampled, round(DistinctSketch.parse(self.distinct).estimate()))


def _root(variance: Fraction) -> float:
    """Return the square root of what may be too large, or too small, for a float."""
    if variance <= 0:
        return 0.0
    half = (variance.numerator.bit_length() - variance.denominator.bit_length()) // 2
    return math.ldexp(math.sqrt(float(variance / Fraction(4) ** half)), half)


@dataclass(frozen=True, slots=True, kw_only=True)
class TableStatistics:
    """Statistics of rows that were scored: inputs as they were read, outputs as they are in the parts."""

    rows: int = 0
    rejects: int = 0
    inputs: Mapping[str, ColumnStatistics] = field(default_factory=dict)
    outputs: Mapping[str, ColumnStatistics] = field(default_factory=dict)

    @property
    def reject_rate(self) -> float:
        """The share of rows without a prediction."""
        return self.rejects / self.rows if self.rows else 0.0


def add_columns(columns: Sequence[ColumnStatistics]) -> ColumnStatistics:
    """Return the statistics of all their rows: bit for bit the same in any order, and of sums of sums.

    Raises:
        BadInput: They are of different kinds.
    """
    kinds = {column.kind for column in columns}
    if len(kinds) != 1:
        message = f"Statistics of one column must be of one kind, got {', '.join(sorted(kinds)) or 'none'}."
        raise BadInput(message)
    lows = [column.minimum for column in columns if column.minimum is not None]
    highs = [column.maximum for column in columns if column.maximum is not None]
    frequent: Counter[str] = Counter()
    for column in columns:
        frequent.update(dict(column.frequent))
    return ColumnStatistics(
        kind=columns[0].kind,
        rows=sum(column.rows for column in columns),
        nulls=sum(column.nulls for column in columns),
        nans=sum(column.nans for column in columns),
        infinite=sum(column.infinite for column in columns),
        sampled=sum(column.sampled for column in columns),
        summed=sum(column.summed for column in columns),
        minimum=min(lows, default=None, key=_order_number),
        maximum=max(highs, default=None, key=_order_number),
        sum=sum((column.sum for column in columns), ExactSum()),
        squares=sum((column.squares for column in columns), ExactSum()),
        quantiles=add_sketches([column.quantiles for column in columns]),
        distinct=_add_distinct([column.distinct for column in columns]),
        frequent=order_frequent(frequent),
        unnamed_max=sum(column.unnamed_max for column in columns),
    )


def _order_number(value: Number) -> tuple[Number, bool]:
    """Return what orders numbers so that of 1 and 1.0 it is always the same that comes first."""
    return value, isinstance(value, float)


def _add_distinct(texts: Sequence[str]) -> str:
    if MANY in texts:
        return MANY
    registers = [DistinctSketch.parse(text).registers for text in texts if text]
    return DistinctSketch(np.maximum.reduce(registers)).as_text() if registers else ""


def order_frequent(counts: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """Return texts with their rows, the most frequent first, and those of equal rows in the order of the alphabet."""
    return tuple(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def add_tables(tables: Iterable[TableStatistics]) -> TableStatistics:
    """Return the statistics of all their rows: bit for bit the same in any order, and of sums of sums.

    Raises:
        BadInput: A column is of different kinds.
    """
    parts = list(tables)
    return TableStatistics(
        rows=sum(part.rows for part in parts),
        rejects=sum(part.rejects for part in parts),
        inputs=_add_named([part.inputs for part in parts]),
        outputs=_add_named([part.outputs for part in parts]),
    )


def _add_named(parts: Sequence[Mapping[str, ColumnStatistics]]) -> dict[str, ColumnStatistics]:
    names = sorted({name for part in parts for name in part})
    return {name: add_columns([part[name] for part in parts if name in part]) for name in names}


def write_statistics(statistics: TableStatistics) -> bytes:
    """Return statistics as JSON: the same bytes for the same statistics."""
    document = {
        "format_version": FORMAT_VERSION,
        "rows": statistics.rows,
        "rejects": statistics.rejects,
        "inputs": {name: _write_column(column) for name, column in sorted(statistics.inputs.items())},
        "outputs": {name: _write_column(column) for name, column in sorted(statistics.outputs.items())},
    }
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def read_statistics(data: bytes, address: str) -> TableStatistics:
    """Read what `write_statistics` has written.

    Args:
        data: The JSON.
        address: Where it is from, for messages.

    Raises:
        FormatTooNew: A newer Overnight has written it.
        BadInput: It is something else.
    """
    try:
        document = json.loads(data)
        version = document["format_version"]
        if version > FORMAT_VERSION:
            message = (
                f"{address} must be of format {FORMAT_VERSION} or older, got {version}: a newer Overnight has written "
                "it. Update Overnight."
            )
            raise FormatTooNew(message)
        return TableStatistics(
            rows=int(document["rows"]),
            rejects=int(document["rejects"]),
            inputs={name: _read_column(column) for name, column in document["inputs"].items()},
            outputs={name: _read_column(column) for name, column in document["outputs"].items()},
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        message = (
            f"{address} must hold statistics that Overnight has written, got something else "
            f"({type(error).__name__}). Name another file, or write it again."
        )
        raise BadInput(message) from None


def pack_statistics(statistics: TableStatistics) -> str:
    """Return statistics as short text, as the metadata of a part holds them."""
    data = write_statistics(statistics)
    packed = pa.compress(data, codec="zstd", asbytes=True)
    return f"{len(data)}:{base64.b64encode(packed).decode('ascii')}"


def unpack_statistics(text: str, address: str) -> TableStatistics:
    """Read what `pack_statistics` has written. Raises FormatTooNew and BadInput, as `read_statistics` does."""
    size, _, packed = text.partition(":")
    try:
        length = min(int(size), _BYTES_MAX)
        data = pa.decompress(base64.b64decode(packed, validate=True), length, codec="zstd", asbytes=True)
    except (ValueError, OSError, pa.ArrowException):
        data = b""
    return read_statistics(data, address)


def _write_column(column: ColumnStatistics) -> dict[str, Any]:
    """Return a column as JSON holds it, without what is empty."""
    weights = column.quantiles.weights
    document = {
        "kind": column.kind,
        "rows": column.rows,
        "nulls": column.nulls,
        "nans": column.nans,
        "infinite": column.infinite,
        "sampled": column.sampled,
        "summed": column.summed,
        "minimum": column.minimum,
        "maximum": column.maximum,
        "sum": column.sum.as_text() if column.sum.mantissa else None,
        "squares": column.squares.as_text() if column.squares.mantissa else None,
        "points": column.quantiles.points_as_text(),
        "weights": write_integers(np.asarray(weights, np.int64)) if weights else "",
        "level": column.quantiles.level,
        "distinct": column.distinct,
        "frequent": [list(pair) for pair in column.frequent],
        "unnamed_max": column.unnamed_max,
    }
    return {
        name: value for name, value in document.items() if value not in ("", None, []) and (value or name in _RANGE)
    }


def _read_column(document: dict[str, Any]) -> ColumnStatistics:
    points = parse_points(document.get("points", ""))
    weights = tuple(read_integers(document["weights"]).tolist()) if points else ()
    if len(weights) != len(points) or document["kind"] not in KINDS:
        message = "each number of a sketch must have a weight"
        raise ValueError(message)
    # Held against what a sketch must be, before anything is judged by it.
    if (distinct := document.get("distinct", "")) != MANY:
        DistinctSketch.parse(distinct)
    return ColumnStatistics(
        kind=document["kind"],
        **{name: int(document.get(name, 0)) for name in ("rows", "nulls", "nans", "infinite", "sampled", "summed")},
        minimum=_read_number(document.get("minimum")),
        maximum=_read_number(document.get("maximum")),
        sum=ExactSum.parse(document.get("sum", "0p0")),
        squares=ExactSum.parse(document.get("squares", "0p0")),
        quantiles=QuantileSketch(points=points, weights=weights, level=int(document.get("level", 0))),
        distinct=distinct,
        frequent=tuple((str(text), int(rows)) for text, rows in document.get("frequent", ())),
        unnamed_max=int(document.get("unnamed_max", 0)),
    )


def _read_number(value: Any) -> Number | None:
    if value is None or (isinstance(value, int | float) and math.isfinite(value)):
        return value
    message = f"a bound of a column must be a number, got {value!r}"
    raise ValueError(message)
