"""Whether the keys of a run are unique, found in memory that does not grow with the rows."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, TypeVar

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from serving.errors import KeysUnfit, RunDamaged
from serving.machine import count_cores
from serving.option_words import name_option
from tasks.batch.column_types import read_column
from tasks.batch.dataset import INT96, list_entries_at, name_corrupt_file
from tasks.batch.part_footer import PartFooter
from tasks.batch.plan import Plan
from tasks.batch.struct_fields import list_fields, read_field
from tasks.storage import Entry, LocalStorage, Storage, local_errors

MEMORY_BYTES = 128 << 20
_BATCH_ROWS = 1 << 17
_HASH = np.dtype(np.uint64)
# Sorted hashes are found again by their highest bits: so many ranges of equal size have an index.
_RANGE_BITS = 12
# Keys that are compared in full, at most: those beyond are counted by their hashes.
_SUSPECTS_MAX = 100_000
_EXAMPLES = 10
_SHOWN_CHARACTERS = 60
_REMOTE_READERS = 16

_NO_TYPES: Mapping[str, pa.DataType] = MappingProxyType({})

R = TypeVar("R")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class DoubledKey:
    """A key that more than one row has, with the number of those rows."""

    values: tuple[object, ...]
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyCheck:
    """What a check of keys found.

    `rows` were compared; `rows_key_null` were not, since a null equals nothing, as in SQL. `doubled` keys occur more
    than once. Of those `examples` has up to ten, the most frequent first.
    """

    columns: tuple[str, ...]
    rows: int
    rows_key_null: int
    doubled: int
    examples: tuple[DoubledKey, ...] = ()


def check_run_keys(storage: Storage, plan: Plan, parts: Sequence[PartFooter]) -> KeyCheck:
    """Check the keys of a run whose parts are all there, and whose options name key columns.

    Raises KeysUnfit where rows are to be put into a table by their keys, and keys hold nulls or are not unique. Rows
    that are only added, or that replace all others, may have any.
    """
    check = check_keys(storage, [part.path for part in parts], plan.options.key_columns)
    if plan.options.upserts:
        require_unique(check, plan.run)
    return check


def check_keys(
    storage: Storage,
    paths: Sequence[str],
    keys: Sequence[str],
    memory_bytes: int = MEMORY_BYTES,
    types: Mapping[str, pa.DataType] = _NO_TYPES,
) -> KeyCheck:
    """Find the keys that occur more than once in Parquet files, by reading their key columns alone.

    Equal keys have equal hashes of 64 bits. Those are sorted in runs, which go to a temporary file where they exceed
    the memory given, and come back range by range. Only where hashes are equal are files read once more, and the keys
    themselves compared. Numbers are compared by value: 0.0 and -0.0 are equal, and so are two NaN.

    Args:
        storage: Where the files lie.
        paths: Their paths in it.
        keys: The key columns.
        memory_bytes: What the hashes may take. What a reader has decoded, some MiB for each core, is not counted.
        types: The types of keys that files hold in several, or lack.

    Returns:
        How many keys occur more than once, and examples. The number is exact up to 100,000 suspects; beyond those it is
        that of equal hashes.

    Raises:
        RunDamaged: A file is gone.
        StorageFull: The temporary file finds no space.
    """
    entries = find_entries(storage, paths)
    rows = nulls = 0
    folder = Path(tempfile.gettempdir())
    with local_errors(folder), tempfile.TemporaryFile(prefix="overnight-keys-", dir=folder) as spill:
        runs = _SortedRuns(spill, memory_bytes)
        for hashes, skipped in _hash_files(storage, entries, keys, types):
            runs.add(hashes)
            rows, nulls = rows + len(hashes), nulls + skipped
        suspects = _Suspects()
        for sorted_hashes in runs.ranges():
            suspects.add(sorted_hashes)
    if not suspects.count:
        return KeyCheck(columns=tuple(keys), rows=rows, rows_key_null=nulls, doubled=0)
    found = _count_suspects(storage, entries, keys, types, suspects.kept)
    return KeyCheck(
        columns=tuple(keys),
        rows=rows,
        rows_key_null=nulls,
        doubled=suspects.count if suspects.count > _SUSPECTS_MAX else found.height,
        examples=tuple(DoubledKey(values=row[:-1], rows=row[-1]) for row in found.head(_EXAMPLES).iter_rows()),
    )


def require_unique(check: KeyCheck, run: str) -> None:
    """Raise KeysUnfit where keys are doubled or hold nulls: such rows can't replace those of a table by their keys."""
    named = ", ".join(check.columns)
    if check.rows_key_null:
        message = (
            f"Every row must have a key where rows are put into a table by their keys, but {check.rows_key_null:,} "
            f"rows of run {run} have a null in {named}. Nothing was published; the parts stay. Give those rows keys or "
            f"take them out of the source, or choose other {name_option('key_columns')}."
        )
        raise KeysUnfit(message)
    if check.doubled:
        message = (
            f"Keys must be unique where rows are put into a table by their keys, but {describe_doubled(check)} Nothing "
            f"was published of run {run}; the parts stay. Take the other rows out of the source, or choose "
            f"{name_option('key_columns')} that name a row."
        )
        raise KeysUnfit(message)


def describe_doubled(check: KeyCheck) -> str:
    """Return in words which keys occur more than once."""
    many = "1 key occurs" if check.doubled == 1 else f"{check.doubled:,} keys occur"
    words = f"{many} more than once in {', '.join(check.columns)}"
    if not check.examples:
        return f"{words}."
    listed = [f"{_show_key(each)} ({each.rows:,} rows)" for each in check.examples]
    more = check.doubled - len(check.examples)
    listed += [f"and {more:,} more"] if more else []
    return f"{words}: {', '.join(listed)}."


def _show_key(key: DoubledKey) -> str:
    texts = [repr(value) if isinstance(value, str | bytes) else str(value) for value in key.values]
    texts = [text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..." for text in texts]
    return texts[0] if len(texts) == 1 else f"({', '.join(texts)})"


def find_entries(storage: Storage, paths: Sequence[str]) -> list[Entry]:
    """Return the objects at some paths, in their order, by one listing of each folder. Raises RunDamaged."""
    entries = list_entries_at(storage, paths)
    if missing := [path for path in paths if path not in entries]:
        message = (
            f"{storage.address(missing[0])} must be there until its rows are published, but is gone, as are "
            f"{len(missing) - 1} others. Call again: what is missing is scored once more."
        )
        raise RunDamaged(message)
    return [entries[path] for path in paths]


def read_key_batches(
    storage: Storage, entry: Entry, keys: Sequence[str], types: Mapping[str, pa.DataType] = _NO_TYPES
) -> Generator[pa.RecordBatch]:
    """Yield the key columns of a Parquet file, some rows at a time, in the order and in the types given."""
    with storage.open_pinned(entry) as stream, name_corrupt_file(storage, entry):
        file = pq.ParquetFile(stream, page_checksum_verification=True, **INT96)
        if missing := [key for key in keys if key not in (*list_fields(file.schema_arrow).names, *types)]:
            message = f"it must have the key columns {list(keys)}, got none called {missing[0]!r}"
            raise ValueError(message)
        for batch in file.iter_batches(_BATCH_ROWS, columns=list(keys), use_threads=False):
            # Without metadata: over one that is no UTF-8, as a wrong bit makes it, polars ends in a panic.
            columns = [read_column(batch, key, types[key]) if key in types else read_field(batch, key) for key in keys]
            yield pa.RecordBatch.from_arrays(columns, names=list(keys))


def _hash_files(
    storage: Storage, entries: Sequence[Entry], keys: Sequence[str], types: Mapping[str, pa.DataType]
) -> Generator[tuple[np.ndarray, int]]:
    """Yield the sorted hashes of each file's keys, and how many of its rows were left out for a null in their key."""

    def hash_file(entry: Entry) -> tuple[np.ndarray, int]:
        hashes, rows = [np.empty(0, _HASH)], 0
        for batch in read_key_batches(storage, entry, keys, types):
            rows += batch.num_rows
            hashes.append(_hash_rows(_drop_nulls(batch)))
        together = np.concatenate(hashes)
        together.sort()
        return together, rows - len(together)

    yield from _map_files(storage, hash_file, entries)


def _map_files(storage: Storage, work: Callable[[Entry], R], entries: Sequence[Entry]) -> Generator[R]:
    return map_ahead(work, entries, count_cores() if isinstance(storage, LocalStorage) else _REMOTE_READERS)


def map_ahead(work: Callable[[T], R], items: Iterable[T], threads: int) -> Generator[R]:
    """Yield what work makes of items, in order, by threads; of a slow taker no more than twice as many wait."""
    with ThreadPoolExecutor(threads, thread_name_prefix="keys") as pool:
        begun: deque[Future[R]] = deque()
        for item in items:
            begun.append(pool.submit(work, item))
            if len(begun) == 2 * threads:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()


def _drop_nulls(batch: pa.RecordBatch) -> pl.DataFrame:
    frame = pl.from_arrow(batch, rechunk=False)
    if not isinstance(frame, pl.DataFrame):
        message = f"Key columns must make a table, got {type(frame)}."
        raise TypeError(message)
    return frame.drop_nulls() if any(column.null_count for column in batch.columns) else frame


def _hash_rows(frame: pl.DataFrame) -> np.ndarray:
    return frame.hash_rows(seed=0).to_numpy()


class _SortedRuns:
    """Hashes in sorted runs: one in memory and, where there are more than fit, others in a temporary file.

    One buffer serves for all, so that memory does not grow by what an allocator keeps. What is put into it is sorted
    already, and the stable sort merges that in a quarter of the time of others; it takes half of the buffer once more.
    """

    def __init__(self, spill: IO[bytes], memory_bytes: int) -> None:
        self._spill = spill
        self._buffer = np.empty(max(1, memory_bytes * 2 // 3 // _HASH.itemsize), _HASH)
        self._rows = 0
        # Of each run in the file, where each range of hashes begins.
        self._edges: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> None:
        """Keep the sorted hashes of a file."""
        while len(hashes):
            if self._rows == len(self._buffer):
                self._write_run()
            taken = min(len(hashes), len(self._buffer) - self._rows)
            self._buffer[self._rows : self._rows + taken] = hashes[:taken]
            self._rows += taken
            hashes = hashes[taken:]

    def _sort(self) -> np.ndarray:
        run = self._buffer[: self._rows]
        run.sort(kind="stable")
        return run

    def _write_run(self) -> None:
        run = self._sort()
        # Two of a kind are enough to know, and a key that all rows have must not fill a range.
        is_third = run[2:] == run[:-2]
        run = run[np.concatenate([[True] * min(2, len(run)), ~is_third])] if is_third.any() else run
        starts = np.arange(1, 1 << _RANGE_BITS, dtype=_HASH) << np.uint64(64 - _RANGE_BITS)
        edges = np.concatenate([[0], np.searchsorted(run, starts), [len(run)]])
        self._edges.append(edges + (self._edges[-1][-1] if self._edges else 0))
        self._spill.write(run.data)
        self._rows = 0

    def ranges(self) -> Generator[np.ndarray]:
        """Yield all hashes, sorted, in pieces that stand until the next; equal ones are in one piece."""
        if not self._edges:
            yield self._sort()
            return
        self._write_run()
        sizes = np.sum([np.diff(edges) for edges in self._edges], axis=0)
        # Only of a buffer that holds a few hashes a range may be more.
        self._buffer = self._buffer if sizes.max() <= len(self._buffer) else np.empty(sizes.max(), _HASH)
        start = 0
        for stop in _group_ranges(sizes, len(self._buffer)):
            self._rows = 0
            for edges in self._edges:
                first, last = int(edges[start]), int(edges[stop])
                piece = self._buffer[self._rows : self._rows + last - first]
                self._spill.seek(first * _HASH.itemsize)
                self._spill.readinto(piece.data)  # type: ignore[attr-defined]
                self._rows += last - first
            yield self._sort()
            start = stop


def _group_ranges(sizes: np.ndarray, rows_max: int) -> Generator[int]:
    """Yield where groups of neighbouring ranges end, each of at most so many rows, or of one range."""
    rows = 0
    for at, size in enumerate(sizes):
        if rows and rows + size > rows_max:
            yield at
            rows = 0
        rows += size
    yield len(sizes)


class _Suspects:
    """Hashes that occur more than once: how many, and the first of them."""

    def __init__(self) -> None:
        self.count = 0
        self.kept = np.empty(0, _HASH)

    def add(self, hashes: np.ndarray) -> None:
        """Take in sorted hashes, all of each value."""
        again = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        self.count += len(again)
        self.kept = np.concatenate([self.kept, again[: _SUSPECTS_MAX - len(self.kept)]])


def _count_suspects(
    storage: Storage,
    entries: Sequence[Entry],
    keys: Sequence[str],
    types: Mapping[str, pa.DataType],
    suspects: np.ndarray,
) -> pl.DataFrame:
    """Return the keys of these hashes that occur more than once, and how often, the most frequent first."""
    counted = next(name for name in ("rows", "_rows", "__rows") if name not in keys)

    def add_up(frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
        return pl.concat(frames).group_by(keys, maintain_order=True).agg(pl.col(counted).sum())

    def count_file(entry: Entry) -> pl.DataFrame:
        frames = [_drop_nulls(batch) for batch in read_key_batches(storage, entry, keys, types)]
        frames = [frame.filter(np.isin(_hash_rows(frame), suspects)) for frame in frames]
        return add_up([frame.with_columns(pl.lit(1, pl.Int64).alias(counted)) for frame in frames])

    total: pl.DataFrame | None = None
    for found in _map_files(storage, count_file, entries):
        total = found if total is None else add_up([total, found])
    return pl.DataFrame() if total is None else total.filter(pl.col(counted) > 1).sort(counted, descending=True)
