"""Upsert by key: which rows of a table's files a run replaces, and the files that stand in their place.

A file with rows that are replaced is written again without them; the others stay. The parts of the run are then added
as they are. Whatever the kind of the table, its log makes one commit of that.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from serving.errors import PublishRefused, SourceChanged, StorageFault, shorten_error
from serving.extras import import_extra
from serving.machine import count_cores
from tasks.batch.dataset import list_entries_at, name_corrupt_file
from tasks.batch.key_check import find_entries, map_ahead
from tasks.batch.part_footer import PartFooter
from tasks.batch.parts import REJECT_REASON
from tasks.batch.plan import Plan
from tasks.batch.staging import write_copies
from tasks.storage import Entry, Storage, local_errors

REWRITTEN = "rewritten"
NOT_IN_SOURCE = "not in source"
# What DuckDB may take before it writes to disk; Arrow's buffers for it come on top.
_MEMORY_BYTES = 256 << 20
_BATCH_ROWS = 1 << 17
_WRITERS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RewrittenFile:
    """A file with the rows that are left of a file of a table."""

    path: str
    bytes: int
    rows: int


# What stands in the place of a file of a table: None where it stays itself, nothing where no row of it is left.
Rewrites = dict[str, tuple[RewrittenFile, ...] | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileChanges:
    """Which files a commit takes out of a table, by their paths, and which it adds."""

    removed: tuple[str, ...]
    added: tuple[PartFooter | RewrittenFile, ...]


def find_changes(
    storage: Storage, plan: Plan, parts: Sequence[PartFooter], held: Collection[str], rewrites: Rewrites
) -> FileChanges:
    """Return what a run that replaces all rows of a table, or those of its keys, changes of the files of one version.

    Parts that the table holds already stay. Those of earlier runs that it has given up since the run was planned are
    added under names of their own: a vacuum may be about to delete the files that it has given up. `rewrites` is what
    was found of earlier versions, and gets what is found now. Raises as rewrite_files does.
    """
    ours, reused = {part.path for part in parts}, {part.path for part in plan.reused}
    theirs = [path for path in held if path not in ours]
    new = [part for part in parts if part.path not in held]
    added = [_copy_part(storage, plan, part) if part.path in reused else part for part in new]
    if not plan.options.upserts:
        return FileChanges(removed=tuple(theirs), added=tuple(added))
    rewrites |= rewrite_files(storage, plan, parts, [path for path in theirs if path not in rewrites])
    left = {path: files for path in theirs if (files := rewrites[path]) is not None}
    return FileChanges(removed=tuple(left), added=(*(file for files in left.values() for file in files), *added))


def _copy_part(storage: Storage, plan: Plan, part: PartFooter) -> RewrittenFile:
    data = storage.read(part.path)
    if data is None or len(data) != part.bytes:
        message = (
            f"{storage.address(part.path)} must be there with its {part.bytes:,} bytes, since the run has it from an "
            "earlier one. Nothing was published; call again to score it."
        )
        raise SourceChanged(message)
    return _put_rewritten(storage, plan, part.path, 0, part.rows, memoryview(data))


def rewrite_files(storage: Storage, plan: Plan, parts: Sequence[PartFooter], paths: Sequence[str]) -> Rewrites:
    """Write again the files of a table that hold rows with keys of a run, without those rows.

    Files are immutable, so that what is found for one holds in every later version of the table. A file that is written
    is named after its source and its content: called again, or by two workers at once, it is written once. Until a
    commit names it no reader opens it; where none ever does, a vacuum of the table takes it away.

    Memory is bounded: keys are joined by DuckDB, which spills to the temporary folder beyond 256 MiB, and two files
    at a time are written in pieces of some 64 MiB. A byte for each row of them comes on top.

    Args:
        storage: The destination, below which the table's files lie.
        plan: The plan of the run, whose options say what becomes of rows whose keys the run does not have.
        parts: All parts of the run. Their keys must be unique and hold no nulls.
        paths: The files of the table that are none of the parts.

    Raises:
        SourceChanged: A file of the table is gone: another commit took it away.
        StorageFault: A file that was written is not there as it was written.
        PublishRefused: DuckDB has no more memory or disk.
    """
    if plan.options.missing_keys == "delete":
        return dict.fromkeys(paths, ())
    if not paths:
        return {}
    theirs = _find_held_files(storage, paths)
    ours = find_entries(storage, [part.path for part in parts])
    with _match_keys(storage, plan, ours, theirs) as list_rows:
        # DuckDB is asked by this thread alone.
        matched = ((entry, list_rows(at)) for at, entry in enumerate(theirs))
        written = map_ahead(lambda each: _rewrite_file(storage, plan, *each), matched, _WRITERS)
        return dict(zip(paths, written, strict=True))


def _find_held_files(storage: Storage, paths: Sequence[str]) -> list[Entry]:
    entries = list_entries_at(storage, paths)
    if missing := [path for path in paths if path not in entries]:
        message = (
            f"The files of a table must be there for as long as its log names them, but {len(missing)} are gone, the "
            f"first {storage.address(missing[0])}. Call again; if this stays, repair the table."
        )
        raise SourceChanged(message)
    return [entries[path] for path in paths]


@contextmanager
def _match_keys(
    storage: Storage, plan: Plan, ours: Sequence[Entry], theirs: Sequence[Entry]
) -> Generator[Callable[[int], np.ndarray]]:
    """Join the keys of a run with those of files; give a function that lists the rows of a file that have a match.

    Nulls match nothing.
    """
    duckdb = import_extra("duckdb", plan.options.output)
    keys, folder = plan.options.key_columns, Path(tempfile.gettempdir())
    with local_errors(folder), tempfile.TemporaryDirectory(prefix="overnight-upsert-", dir=folder) as scratch:
        settings = {
            "memory_limit": f"{_MEMORY_BYTES}B",
            "temp_directory": scratch,
            "threads": count_cores(),
            "preserve_insertion_order": False,
        }
        with closing(duckdb.connect(config=settings)) as connection:
            types = _read_key_types(storage, ours[0], keys)
            names = ", ".join(types.names)
            try:
                _load(connection, "ours", types, _read_run_keys(storage, keys, ours, types))
                places = pa.schema([*types, ("file", pa.int32()), ("row", pa.int64())])
                _load(connection, "theirs", places, _read_held_keys(storage, keys, theirs, places))
                connection.execute(
                    f"CREATE TEMP TABLE found AS FROM theirs SEMI JOIN ours USING ({names}) SELECT file, row"
                )
                connection.execute("DROP TABLE ours")
                connection.execute("DROP TABLE theirs")
                yield lambda at: connection.execute("SELECT row FROM found WHERE file = ?", [at]).fetchnumpy()["row"]
            except duckdb.Error as error:
                message = (
                    f"Keys of a run must be compared with those of a table in {_MEMORY_BYTES >> 20} MiB of memory and "
                    f"what {scratch} has free, got: {shorten_error(error)} Nothing was published; call again with "
                    "space there, or set TMPDIR to a folder that has some."
                )
                raise PublishRefused(message) from error


def _load(connection: Any, table: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Put batches into a table of DuckDB; an error of theirs is raised as it is, not as DuckDB tells it."""
    failed: list[Exception] = []

    def watch() -> Generator[pa.RecordBatch]:
        try:
            yield from batches
        except Exception as error:
            failed.append(error)
            raise

    connection.register("given", pa.RecordBatchReader.from_batches(schema, watch()))
    try:
        connection.execute(f"CREATE TEMP TABLE {table} AS SELECT * FROM given")  # noqa: S608 - the names are ours
    except Exception:
        if failed:
            raise failed[0] from None
        raise
    finally:
        connection.unregister("given")


def _read_key_types(storage: Storage, entry: Entry, keys: Sequence[str]) -> pa.Schema:
    """Return the types of keys in a part, under names that need no quotes."""
    with storage.open_pinned(entry) as stream:
        schema = pq.read_schema(stream)
    return pa.schema([(f"key_{at}", schema.field(key).type) for at, key in enumerate(keys)])


def _read_run_keys(
    storage: Storage, keys: Sequence[str], entries: Sequence[Entry], types: pa.Schema
) -> Generator[pa.RecordBatch]:
    for entry in entries:
        for batch in _read_batches(storage, entry, keys):
            yield _cast(batch, types)


def _read_held_keys(
    storage: Storage, keys: Sequence[str], entries: Sequence[Entry], places: pa.Schema
) -> Generator[pa.RecordBatch]:
    types = pa.schema(list(places)[: len(keys)])
    for at, entry in enumerate(entries):
        row = 0
        for batch in _read_batches(storage, entry, keys):
            rows = batch.num_rows
            file, place = np.full(rows, at, np.int32), np.arange(row, row + rows, dtype=np.int64)
            yield pa.record_batch([*_cast(batch, types).columns, pa.array(file), pa.array(place)], schema=places)
            row += rows


def _cast(batch: pa.RecordBatch, types: pa.Schema) -> pa.RecordBatch:
    return pa.record_batch(
        [column.cast(given) for column, given in zip(batch.columns, types.types, strict=True)], schema=types
    )


def _read_batches(storage: Storage, entry: Entry, columns: Sequence[str] | None) -> Generator[pa.RecordBatch]:
    """Yield columns of a Parquet file, some rows at a time. A file that lacks one was written before it was added."""
    with storage.open_pinned(entry) as stream, name_corrupt_file(storage, entry):
        file = pq.ParquetFile(stream)
        names = file.schema_arrow.names if columns is None else list(columns)
        if not set(names) <= set(file.schema_arrow.names):
            return
        for batch in file.iter_batches(_BATCH_ROWS, columns=names):
            yield batch.select(names)


def _rewrite_file(storage: Storage, plan: Plan, entry: Entry, matched: np.ndarray) -> tuple[RewrittenFile, ...] | None:
    """Write what is left of a file; None where it is left as it is."""
    marks = plan.options.missing_keys == "mark"
    if not marks and not len(matched):
        return None
    if marks and not len(matched) and _is_marked(storage, entry):
        return None
    with storage.open_pinned(entry) as stream, name_corrupt_file(storage, entry):
        is_left = np.ones(pq.read_metadata(stream).num_rows, np.bool_)
    is_left[matched] = False
    if not is_left.any():
        return ()
    keys = plan.options.key_columns

    def tables() -> Generator[pa.Table]:
        row = 0
        for batch in _read_batches(storage, entry, None):
            left = pa.table(batch).filter(pa.array(is_left[row : row + batch.num_rows]))
            row += batch.num_rows
            if left.num_rows:
                yield _mark_rows(left, keys) if marks else left

    written = enumerate(write_copies(tables()))
    return tuple(_put_rewritten(storage, plan, entry.path, number, rows, data) for number, (rows, data) in written)


def _put_rewritten(
    storage: Storage, plan: Plan, source: str, number: int, rows: int, data: memoryview
) -> RewrittenFile:
    """Write a file of a table, or a piece of it, again, under a name that tells its source and its content."""
    content = hashlib.sha256(data).hexdigest()[:16]
    path = f"{name_rewritten(plan.run, source, number)}-{content}.parquet"
    _put_whole(storage, path, data)
    return RewrittenFile(path=path, bytes=len(data), rows=rows)


def name_rewritten(run: str, source: str, number: int = 0) -> str:
    """Return how the path begins of a file that a run has written in the place of another, up to its content."""
    return f"{REWRITTEN}/{run}/{hashlib.sha256(source.encode()).hexdigest()[:12]}-{number:04d}"


def _put_whole(storage: Storage, path: str, data: memoryview) -> None:
    """Create a file, unless it is there, and look whether it is: parts are read before they count, these are not.

    Raises StorageFault where it is not there, or of another size, which is set aside.
    """
    storage.put_new(path, data)
    entry = storage.find(path)
    if entry is None or entry.size != len(data):
        if entry is not None:
            storage.set_aside(entry)
        message = (
            f"{storage.address(path)} must be as it was written before a commit names it, with {len(data):,} bytes, "
            f"but {'is not there' if entry is None else f'has {entry.size:,}'}. Nothing was published; call again."
        )
        raise StorageFault(message)


def _is_marked(storage: Storage, entry: Entry) -> bool:
    """Return whether every row of a file is marked as no longer in the source."""
    return all(
        pc.all(pc.is_in(batch.column(0), pa.array([NOT_IN_SOURCE], batch.column(0).type))).as_py()
        for batch in _read_batches(storage, entry, [REJECT_REASON])
    )


def _mark_rows(table: pa.Table, keys: Sequence[str]) -> pa.Table:
    """Return rows with their keys alone, and the reason that their source is gone."""
    columns = {name: pa.nulls(table.num_rows, table.schema.field(name).type) for name in table.column_names}
    columns |= {key: table.column(key) for key in keys}
    reason = table.schema.field(REJECT_REASON).type
    columns[REJECT_REASON] = pa.array([NOT_IN_SOURCE] * table.num_rows, pa.string()).cast(reason)
    return pa.table(columns, schema=table.schema)
