"""The features of a chunk's rows: looked up in tables that a worker keeps, or read from files for each chunk.

From files only row groups are read that can matter, as the least and greatest values of keys and time in their footers
say, and only the columns that the model reads.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from serving.errors import SourceFault
from tasks.batch.as_of_join import FeatureRows, LatestRows, SortedFeatures, SpineRows
from tasks.batch.chunk_layout import Chunk, Piece, block_rows, list_row_groups
from tasks.batch.chunk_reader import Reader, open_reader
from tasks.batch.column_types import unpack_types
from tasks.batch.dataset import SourceFile, map_parallel, name_corrupt_file, read_parquet_schema
from tasks.batch.feature_pins import FeaturePin, choose_joined_rows
from tasks.batch.join_types import DAY_SECONDS, count_ticks, normalize_keys
from tasks.batch.plan import Plan
from tasks.batch.struct_fields import list_fields
from tasks.storage import Storage, open_storage

_NANOSECONDS = 1_000_000_000
_UNIT_NANOSECONDS = {"milliseconds": 1_000_000, "microseconds": 1_000, "nanoseconds": 1}

# The least and the greatest value of a column.
Range = tuple[Any, Any]


class FeatureLookup:
    """Finds the features of rows for all slots of a process; its methods may be called from many threads at once.

    Each table is read under a lock of its own.
    """

    def __init__(
        self,
        features: Sequence[FeaturePin],
        make_lock: Callable[[], AbstractContextManager[object]] = threading.Lock,
    ) -> None:
        self._tables = [(_KeptTable if pin.is_kept else _FilesTable)(pin, make_lock()) for pin in features]

    def find(self, spine: pa.Table, time: str) -> pa.Table:
        """Return the features of the rows of a chunk, by the names that the model has for them, in its order.

        Args:
            spine: The keys and the time of the rows.
            time: The column of the time.

        Raises:
            SourceChanged: A file of a feature table is another than when the run was planned.
            SourceCorrupt: One can't be decoded.
        """
        columns: dict[str, pa.ChunkedArray] = {}
        for table in self._tables:
            found = table.find(SpineRows(spine, table.pin.table.join_keys, time), spine, time)
            columns |= dict(zip(table.pin.names, found.columns, strict=True))
        return pa.table(columns)


def _open_feature_reader(pin: FeaturePin) -> Reader:
    names = [*pin.table.join_keys, pin.table.time, *pin.columns]
    return Reader(pin.snapshot, names, pin.partitions, block_rows(1, pin.decoded_bytes / pin.rows), places=False)


def _prepare(table: pa.Table, pin: FeaturePin) -> FeatureRows:
    return FeatureRows(table, pin.table.join_keys, pin.table.time, pin.columns)


@dataclass(slots=True)
class _KeptTable:
    """A feature table that is read once, when the first chunk needs it, and kept sorted in memory."""

    pin: FeaturePin
    _lock: AbstractContextManager[object]
    _sorted: SortedFeatures | None = None

    def find(self, spine: SpineRows, _keys: pa.Table, _time: str) -> pa.Table:
        """Return the columns of the table for the rows of a chunk."""
        with self._lock:
            if self._sorted is None:
                reader = _open_feature_reader(self.pin)
                blocks = [table for piece in list_row_groups(self.pin.snapshot.files) for table in reader.read(piece)]
                self._sorted = SortedFeatures(_prepare(pa.concat_tables(blocks), self.pin))
        return self._sorted.find_latest(spine, self.pin.table.age_seconds_max)


@dataclass(slots=True)
class _FilesTable:
    """A feature table that is read from its files for each chunk, as far as footers say that rows may match."""

    pin: FeaturePin
    _lock: AbstractContextManager[object]
    _footers: _Footers | None = None

    def find(self, spine: SpineRows, keys: pa.Table, time: str) -> pa.Table:
        """Return the columns of the table for the rows of a chunk."""
        with self._lock:
            footers = self._footers = self._footers or _read_footers(self.pin)
        latest = LatestRows(spine, self.pin.table.age_seconds_max, footers.schema)
        if not len(spine):
            return latest.finish()
        reader = _open_feature_reader(self.pin)
        wanted = find_wanted(keys, self.pin.table.join_keys, time, self.pin.table.age_seconds_max)
        for piece, ranges in footers.groups:
            if may_match(ranges, wanted):
                for table in reader.read(piece):
                    latest.add(_prepare(table, self.pin))
        return latest.finish()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Footers:
    """What the footers of a feature table tell: its row groups, with ranges of keys and time, and types of columns."""

    groups: list[tuple[Piece, GroupRanges]]
    schema: pa.Schema


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRanges:
    """The least and the greatest values of keys and time in a row group, where its footer tells, in nanoseconds."""

    keys: Mapping[str, Range]
    time: Range | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedRows:
    """What rows of a feature table can matter to a chunk: ranges of keys, and of the time in nanoseconds.

    `oldest` is None where rows may be of any age.
    """

    keys: Mapping[str, Range]
    oldest: int | None
    latest: int


def find_wanted(spine: pa.Table, keys: Sequence[str], time: str, age_seconds_max: int | None) -> WantedRows:
    """Return what rows of a feature table can matter to the rows of a chunk, of which some have all keys and a time."""
    column = spine.column(time)
    nanoseconds = _count_nanoseconds(column.type)
    least, greatest = (int(value.value) * nanoseconds for value in pc.min_max(column).values())
    ranges: dict[str, Range] = {}
    for key in keys:
        found = normalize_keys(spine.select([key])).column(key)
        if pa.types.is_integer(found.type) or pa.types.is_large_string(found.type):
            low, high = pc.min_max(found).values()
            ranges[key] = (low.as_py(), high.as_py())
    oldest = None if age_seconds_max is None else least - age_seconds_max * _NANOSECONDS
    return WantedRows(keys=ranges, oldest=oldest, latest=greatest)


def may_match(group: GroupRanges, wanted: WantedRows) -> bool:
    """Return whether a row group may hold a row that matters; one whose footer does not tell may hold any."""
    if group.time is not None:
        least, greatest = group.time
        if least > wanted.latest or (wanted.oldest is not None and greatest < wanted.oldest):
            return False
    return all(
        group.keys[key][0] <= greatest and least <= group.keys[key][1]
        for key, (least, greatest) in wanted.keys.items()
        if key in group.keys
    )


def _read_footers(pin: FeaturePin) -> _Footers:
    storage = open_storage(pin.snapshot.root)
    found = map_parallel(storage, lambda file: _read_ranges(storage, file, pin), pin.snapshot.files)
    schema = next(schema for ranges, schema in found if ranges)
    types = unpack_types(pin.snapshot.types)
    kinds = [(name, pin.partitions.get(name) or types.get(name) or schema.field(name).type) for name in pin.columns]
    groups = [(piece, found[piece.file][0][piece.row_group]) for piece in list_row_groups(pin.snapshot.files)]
    return _Footers(groups=groups, schema=pa.schema(kinds))


def _read_ranges(storage: Storage, file: SourceFile, pin: FeaturePin) -> tuple[list[GroupRanges], pa.Schema]:
    """Return the ranges in each row group of a file, and its schema."""
    with storage.open_pinned(file.entry) as stream, name_corrupt_file(storage, file.entry):
        metadata = pq.read_metadata(stream)
        schema = list_fields(read_parquet_schema(stream, metadata))
    storage.check_unchanged(file.entry)
    paths = [metadata.schema.column(at).path for at in range(metadata.num_columns)]
    # Of a column and a field of one name nothing is known by the path.
    counts = Counter(paths)
    places = {path: at for at, path in enumerate(paths) if counts[path] == 1}
    groups = []
    for group in range(metadata.num_row_groups):
        columns = metadata.row_group(group)
        keys: dict[str, Range] = {}
        for key in pin.table.join_keys:
            if key in places:
                found = _find_key_range(columns.column(places[key]).statistics)
            else:
                value = _read_partition(file, pin, key)
                found = None if value is None else _make_key_range(value.as_py(), value.as_py())
            keys |= {} if found is None else {key: found}
        # A file of a Delta table that is older than the column has no times.
        timed, day = places.get(pin.table.time), _read_partition(file, pin, pin.table.time)
        if timed is not None:
            time = _find_time_range(columns.column(timed).statistics)
        else:
            time = None if day is None else (day.value * _count_nanoseconds(day.type),) * 2
        groups.append(GroupRanges(keys=keys, time=time))
    return groups, schema


def _read_partition(file: SourceFile, pin: FeaturePin, name: str) -> pa.Scalar | None:
    """Return the value of a partition in its type; None where it is null, or no partition."""
    value = file.partition_values.get(name)
    return None if value is None or name not in pin.partitions else pa.scalar(value).cast(pin.partitions[name])


def _count_nanoseconds(kind: pa.DataType) -> int:
    """Return how many nanoseconds a tick of a type of time has."""
    return (DAY_SECONDS if pa.types.is_date32(kind) else 1) * (_NANOSECONDS // count_ticks(kind))


def _find_key_range(statistics: pq.Statistics | None) -> Range | None:
    if statistics is None or not statistics.has_min_max:
        return None
    return _make_key_range(statistics.min, statistics.max)


def _make_key_range(least: Any, greatest: Any) -> Range | None:
    return (least, greatest) if all(type(end) in (int, str) for end in (least, greatest)) else None


def _find_time_range(statistics: pq.Statistics | None) -> Range | None:
    """Return the least and the greatest time of a row group in nanoseconds, None where its footer does not tell."""
    if statistics is None or not statistics.has_min_max or statistics.physical_type not in ("INT32", "INT64"):
        return None
    kind = statistics.logical_type.type
    if kind == "DATE":
        factor = DAY_SECONDS * _NANOSECONDS
    elif kind == "TIMESTAMP":
        factor = _UNIT_NANOSECONDS[json.loads(statistics.logical_type.to_json())["timeUnit"]]
    else:
        return None
    return statistics.min_raw * factor, statistics.max_raw * factor


class JoinedReader:
    """Reads chunks of a dataset with the features of their rows, one at a time, for one thread.

    Keys and times of a whole chunk are read first, and with them the features of all of its rows. Where tables are read
    from files, so are those of the next chunks of the shard, as far as memory allows: for as many the tables are read
    once.
    """

    def __init__(self, plan: Plan, lookup: FeatureLookup) -> None:
        self._plan, self._lookup = plan, lookup
        self._reader = open_reader(plan)
        rows = block_rows(plan.step, plan.row_bytes)
        self._spine = Reader(plan.snapshot, plan.options.join_columns, plan.partitions, rows, places=False)
        self._rows_at_once = choose_joined_rows(plan.features, max(chunk.rows for chunk in plan.chunks.values()))
        self._places = {chunk: at for at, chunk in plan.chunks.items()}
        self._found: dict[Chunk, pa.Table] = {}

    def blocks(self, chunk: Chunk, rows: int | None = None) -> Generator[pa.Table]:
        """Yield the rows of a chunk in order, as a Reader does, with the columns of its features beside them.

        Raises SourceChanged and SourceCorrupt by file name, of the source or of a feature table.
        """
        if chunk not in self._found:
            self._found = {}
            self._found = self._join_with_next(chunk)
        features = self._found.pop(chunk)
        at = 0
        for block in self._reader.blocks(chunk, rows):
            beside = features.slice(at, block.num_rows)
            at += block.num_rows
            columns = dict(zip(block.column_names, block.columns, strict=True))
            yield pa.table(columns | dict(zip(beside.column_names, beside.columns, strict=True)))

    def _join_with_next(self, chunk: Chunk) -> dict[Chunk, pa.Table]:
        """Return the features of a chunk and of the next ones; of it alone where one of those can't be read."""
        following = self._list_next(chunk)
        if following:
            try:
                return self._join([chunk, *following])
            except SourceFault:
                # What ails the file of another chunk is no fault of this one's.
                self._rows_at_once = 0
        return self._join([chunk])

    def _list_next(self, chunk: Chunk) -> list[Chunk]:
        """Return the chunks behind one in its shard that are joined at once with it."""
        if chunk not in self._places:
            return []
        shard, place = self._places[chunk]
        found, rows = [], chunk.rows
        for each in self._plan.shards[shard][place + 1 :]:
            rows += each.rows
            if rows > self._rows_at_once:
                break
            found.append(each)
        return found

    def _join(self, chunks: Sequence[Chunk]) -> dict[Chunk, pa.Table]:
        spine = pa.concat_tables(table for chunk in chunks for table in self._spine.blocks(chunk))
        features = self._lookup.find(spine, self._plan.options.spine_time or "")
        ends = itertools.accumulate(chunk.rows for chunk in chunks)
        return {chunk: features.slice(end - chunk.rows, chunk.rows) for chunk, end in zip(chunks, ends, strict=True)}


def open_joined_reader(plan: Plan, lookup: FeatureLookup) -> Reader | JoinedReader:
    """Return a reader over the dataset of a plan and its features, for one thread."""
    return JoinedReader(plan, lookup) if plan.features else open_reader(plan)
