"""Which keys and times of two tables can be compared, and the form in which they are.

Times are compared as whole numbers of the coarser of the two units, so that none leaves the range of 64 bits: the
finer one is rounded towards where the comparison stays the same. Nothing is rounded in what is put out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from serving.model.contract import is_text

Ticks = npt.NDArray[np.int64]

_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
DAY_SECONDS = 86_400
_LEAST = np.iinfo(np.int64).min


def find_key_kind(kind: pa.DataType) -> str | None:
    """Return what the values of a key are, None where they can't be a key: keys of one kind can be compared."""
    if pa.types.is_dictionary(kind):
        return find_key_kind(kind.value_type)
    if pa.types.is_uint64(kind):
        return "whole numbers of 64 bits without sign"
    kinds = {
        "whole numbers": pa.types.is_integer(kind),
        "text": is_text(kind),
        "truth values": pa.types.is_boolean(kind),
        "dates": pa.types.is_date(kind),
        "bytes": _is_bytes(kind),
    }
    return next((name for name, fits in kinds.items() if fits), None)


def _is_bytes(kind: pa.DataType) -> bool:
    varying = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    return bool(varying or pa.types.is_fixed_size_binary(kind))


def is_time(kind: pa.DataType) -> bool:
    """Return whether values are dates or timestamps."""
    return bool(pa.types.is_date(kind) or pa.types.is_timestamp(kind))


def has_zone(kind: pa.DataType) -> bool:
    """Return whether values are timestamps with a time zone, which are moments; dates and others are as clocks show."""
    return bool(pa.types.is_timestamp(kind) and kind.tz is not None)


def normalize_keys(table: pa.Table) -> pa.Table:
    """Return key columns in one layout for each kind: other widths and encodings of the same values are equal then."""
    columns = {}
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        columns[name] = column.cast(_normal_type(column.type))
    return pa.table(columns)


def _normal_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_uint64(kind):
        return kind
    if pa.types.is_integer(kind):
        return pa.int64()
    if is_text(kind):
        return pa.large_string()
    if pa.types.is_date(kind):
        return pa.date32()
    return pa.large_binary() if _is_bytes(kind) else kind


def count_ticks(kind: pa.DataType) -> int:
    """Return the units of a type of time that a second has; a date counts in seconds."""
    if pa.types.is_date(kind):
        return 1_000 if pa.types.is_date64(kind) else 1
    return _PER_SECOND[kind.unit]


def read_ticks(column: pa.ChunkedArray) -> Ticks:
    """Return times without nulls as whole numbers of their own unit since 1970."""
    array = column.combine_chunks()
    is_days = pa.types.is_date32(array.type)
    ticks: Ticks = array.view(pa.int32() if is_days else pa.int64()).to_numpy(zero_copy_only=False)
    return ticks.astype(np.int64) * DAY_SECONDS if is_days else ticks


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeScale:
    """How times of a spine are compared with those of a feature table: how many ticks of each a second has.

    `age_seconds_max` is how much earlier a feature may be; None for any.
    """

    spine_per_second: int
    feature_per_second: int
    age_seconds_max: int | None = None

    @property
    def _coarse(self) -> int:
        return min(self.spine_per_second, self.feature_per_second)

    def place_spine(self, spine: Ticks) -> Ticks:
        """Return times of a spine in the coarser unit, rounded down: no feature between counts."""
        return spine // (self.spine_per_second // self._coarse)

    def place_features(self, features: Ticks) -> Ticks:
        """Return times of features in the coarser unit, rounded up: at most a spine's where they are not later."""
        return _divide_up(features, self.feature_per_second // self._coarse)

    def find_oldest(self, spine: Ticks) -> Ticks:
        """Return, for times of a spine, what `place_oldest` of a feature must be at least to be young enough."""
        if self.age_seconds_max is None:
            return np.full(len(spine), _LEAST)
        age = self.age_seconds_max * self.spine_per_second
        least = np.where(spine < _LEAST + age, _LEAST, spine - age)
        return _divide_up(least, self.spine_per_second // self._coarse)

    def place_oldest(self, features: Ticks) -> Ticks:
        """Return times of features in the coarser unit, rounded down, to be held against `find_oldest`."""
        return features // (self.feature_per_second // self._coarse)


def _divide_up(ticks: Ticks, by: int) -> Ticks:
    whole = ticks // by
    return whole if by == 1 else whole + (whole * by != ticks)


def find_valid(table: pa.Table) -> pa.Array:
    """Return the places of the rows of a table that hold no null."""
    mask = None
    for column in table.columns:
        if column.null_count:
            valid = column.is_valid()
            mask = valid if mask is None else pc.and_(mask, valid)
    if mask is None:
        return pa.array(np.arange(table.num_rows))
    return pc.indices_nonzero(mask).cast(pa.int64())
