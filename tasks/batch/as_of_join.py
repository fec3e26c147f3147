"""The as-of join: the latest row of a feature table that is not later than each row of a spine, of the same keys.

Of several rows of the same keys and time the last one counts, in the order in which they are added. Rows with a null
among keys and time are passed over, and a row of the spine with one has no match.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from tasks.batch.join_types import Ticks, TimeScale, count_ticks, find_valid, normalize_keys, read_ticks

# Rows of features are held up to so many bytes before those that match no row are dropped.
HELD_BYTES = 32 << 20
# Of a row that is held, beside its columns: its code and time, and what the join makes of them.
HELD_ROW_BYTES = 80
_CODE, _ROW, _TIME, _AT = "__code", "__row", "__time", "__at"

Places = npt.NDArray[np.int64]


class FeatureRows:
    """Rows of a feature table that have keys and time, ready to be joined."""

    def __init__(self, table: pa.Table, keys: Sequence[str], time: str, columns: Sequence[str]) -> None:
        named = [*keys, time]
        valid = find_valid(table.select(named))
        if len(valid) < table.num_rows:
            table = table.take(valid)
        self.keys: pl.DataFrame = _read_keys(table, keys)
        self.times = read_ticks(table.column(time))
        self.per_second = count_ticks(table.schema.field(time).type)
        self.columns = table.select(list(columns))

    def __len__(self) -> int:
        return len(self.times)


class SpineRows:
    """Keys and times of the rows of a chunk, each key with a code of its own."""

    def __init__(self, spine: pa.Table, keys: Sequence[str], time: str) -> None:
        self.rows = spine.num_rows
        self.places: Places = find_valid(spine.select([*keys, time])).to_numpy()
        valid = spine if len(self.places) == self.rows else spine.take(pa.array(self.places))
        names = _read_keys(valid, keys)
        self.keys = names.unique(maintain_order=True).with_row_index(_CODE)
        self.codes = names.join(self.keys, on=names.columns, how="left", maintain_order="left")[_CODE]
        self.times = read_ticks(valid.column(time))
        self.per_second = count_ticks(spine.schema.field(time).type)

    def __len__(self) -> int:
        return len(self.places)


def make_scale(spine: SpineRows, features_per_second: int, age_seconds_max: int | None) -> TimeScale:
    """Return how the times of a chunk are compared with those of a feature table."""
    return TimeScale(
        spine_per_second=spine.per_second, feature_per_second=features_per_second, age_seconds_max=age_seconds_max
    )


class LatestRows:
    """The latest rows of a feature table for the rows of one chunk, while the table is read in any number of batches.

    Held are the rows that match so far, and at most HELD_BYTES more: memory is bounded by the chunk and a batch.
    """

    def __init__(self, spine: SpineRows, age_seconds_max: int | None, schema: pa.Schema) -> None:
        self._spine, self._age, self._schema = spine, age_seconds_max, schema
        self._codes: list[npt.NDArray[np.uint32]] = []
        self._times: list[Ticks] = []
        self._columns: list[pa.Table] = []
        self._scale: TimeScale | None = None
        self._held_max = HELD_BYTES

    def add(self, features: FeatureRows) -> None:
        """Add the next rows of the table, in its order."""
        if not len(features) or not len(self._spine):
            return
        scale = self._scale = make_scale(self._spine, features.per_second, self._age)
        known = scale.place_features(features.times) <= scale.place_spine(self._spine.times).max()
        if self._age is not None:
            known &= scale.place_oldest(features.times) >= scale.find_oldest(self._spine.times).min()
        found = (
            features.keys.with_row_index(_ROW)
            .filter(pl.Series(known))
            .join(self._spine.keys, on=features.keys.columns, how="inner", maintain_order="left")
        )
        rows = found[_ROW].to_numpy()
        if not len(rows):
            return
        self._codes.append(found[_CODE].to_numpy())
        self._times.append(features.times[rows])
        self._columns.append(features.columns.take(pa.array(rows)))
        if self._count_held_bytes() > self._held_max:
            self._drop_unmatched()

    def _count_held_bytes(self) -> int:
        return sum(each.nbytes + HELD_ROW_BYTES * each.num_rows for each in self._columns)

    def finish(self) -> pa.Table:
        """Return the columns of the latest row for each row of the chunk, nulls where none matches."""
        matched = np.full(self._spine.rows, -1)
        if not self._columns or self._scale is None:
            return take_rows(self._schema.empty_table(), matched)
        codes, times, columns = self._join_held()
        found = _match(self._spine, codes, times, self._scale)
        matched[self._spine.places] = drop_old(found, times, self._spine.times, self._scale)
        return take_rows(columns, matched)

    def _join_held(self) -> tuple[npt.NDArray[np.uint32], Ticks, pa.Table]:
        return np.concatenate(self._codes), np.concatenate(self._times), pa.concat_tables(self._columns)

    def _drop_unmatched(self) -> None:
        """Keep of the rows held those that are the latest of a row so far: of others none will be."""
        assert self._scale is not None  # noqa: S101 - for mypy; rows are held only once there is one
        codes, times, columns = self._join_held()
        found = _match(self._spine, codes, times, self._scale)
        is_kept = np.zeros(len(times), bool)
        is_kept[found[found >= 0]] = True
        kept = np.flatnonzero(is_kept)
        self._codes, self._times = [codes[kept]], [times[kept]]
        self._columns = [columns.take(pa.array(kept)).combine_chunks()]
        self._held_max = self._count_held_bytes() + HELD_BYTES


def _match(spine: SpineRows, codes: npt.NDArray[np.uint32], times: Ticks, scale: TimeScale) -> Places:
    """Return, for each row of a spine, the place of its latest row among those held, -1 where there is none."""
    left = pl.DataFrame({_CODE: spine.codes, _TIME: scale.place_spine(spine.times)}).with_row_index(_ROW)
    right = pl.DataFrame({_CODE: codes, _TIME: scale.place_features(times), _AT: np.arange(len(times))})
    # Rounding up keeps the order of times, but not which of two within a unit is the later one.
    order = np.argsort(times, kind="stable")
    joined = left.sort(_TIME).join_asof(right[order], on=_TIME, by=_CODE, strategy="backward", check_sortedness=False)
    found: Places = joined.sort(_ROW)[_AT].fill_null(-1).to_numpy()
    return found


def drop_old(found: Places, times: Ticks, spine: Ticks, scale: TimeScale) -> Places:
    """Return matches without those that are older than the scale allows, for which -1 stands."""
    if scale.age_seconds_max is None or not len(times):
        return found
    placed = scale.place_oldest(times[found])
    return np.where((found >= 0) & (placed >= scale.find_oldest(spine)), found, -1)


def take_rows(columns: pa.Table, places: Places) -> pa.Table:
    """Return rows of a table by their places, nulls where a place is -1."""
    return columns.take(pa.array(places, mask=places < 0)).combine_chunks()


class SortedFeatures:
    """A whole feature table in memory, sorted by keys and time, for any number of chunks and threads."""

    def __init__(self, features: FeatureRows) -> None:
        self._per_second = features.per_second
        keyed = features.keys.with_columns(pl.Series(_TIME, features.times)).with_row_index(_ROW)
        keyed = keyed.sort([*features.keys.columns, _TIME, _ROW])
        order = keyed[_ROW].to_numpy()
        self._times = features.times[order]
        self._columns = features.columns.take(pa.array(order)).combine_chunks()
        # Where the rows of each key begin and end.
        self._groups = (
            keyed.select(features.keys.columns)
            .with_row_index(_AT)
            .group_by(features.keys.columns)
            .agg(pl.col(_AT).min().alias("__start"), (pl.col(_AT).max() + 1).alias("__stop"))
        )

    def find_latest(self, spine: SpineRows, age_seconds_max: int | None) -> pa.Table:
        """Return the columns of the latest row for each row of a chunk, nulls where none matches."""
        scale = make_scale(spine, self._per_second, age_seconds_max)
        keys = [name for name in spine.keys.columns if name != _CODE]
        found = spine.keys.join(self._groups, on=keys, how="inner")
        starts, stops = np.zeros(len(spine.keys), np.int64), np.zeros(len(spine.keys), np.int64)
        codes = found[_CODE].to_numpy()
        starts[codes], stops[codes] = found["__start"].to_numpy(), found["__stop"].to_numpy()
        of_row = spine.codes.to_numpy()
        latest = _search_segments(self._times, starts[of_row], stops[of_row], scale.place_spine(spine.times), scale)
        matched = np.full(spine.rows, -1)
        matched[spine.places] = drop_old(latest, self._times, spine.times, scale)
        return take_rows(self._columns, matched)


def _search_segments(times: Ticks, starts: Places, stops: Places, wanted: Ticks, scale: TimeScale) -> Places:
    """Return the last place within each segment of times whose time is not later than the one wanted, else -1."""
    low, high = starts.copy(), stops.copy()
    while (left := low < high).any():
        middle = (low + high) // 2
        is_known = np.zeros(len(low), bool)
        is_known[left] = scale.place_features(times[middle[left]]) <= wanted[left]
        low = np.where(left & is_known, middle + 1, low)
        high = np.where(left & ~is_known, middle, high)
    return np.where(low > starts, low - 1, -1)


def _read_keys(table: pa.Table, keys: Sequence[str]) -> pl.DataFrame:
    """Return key columns for polars, numbered: a key may have any name, also one that is used here."""
    found = pl.from_arrow(normalize_keys(table.select(list(keys))).rename_columns([str(at) for at in range(len(keys))]))
    assert isinstance(found, pl.DataFrame)  # noqa: S101 - for mypy; a table of Arrow gives no series
    return found
