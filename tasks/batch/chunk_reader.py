"""Rows of a chunk, read in blocks: a block is a whole number of batches, and memory is bounded by it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from serving.errors import SchemaMismatch, SourceFormat, shorten_error
from tasks.batch.chunk_layout import BLOCK_BYTES, Chunk, Piece, block_rows
from tasks.batch.column_types import read_column, unpack_types
from tasks.batch.dataset import (
    INT96,
    SOURCE_FILE,
    SOURCE_ROW,
    Snapshot,
    SourceFile,
    list_int96_columns,
    name_corrupt_file,
)
from tasks.batch.plan import Plan
from tasks.batch.struct_fields import list_fields, read_field
from tasks.storage import LocalStorage, Storage, open_storage

T = TypeVar("T")

_INT96_ROWS = 65_536


class Reader:
    """Reads chunks of a dataset, one at a time, for one thread.

    A chunk that lies where the last one stopped, or further on in the same row group, goes on reading
    there: a large row group cut into many chunks is read and decoded once, also where a resume leaves some out.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        columns: Sequence[str],
        partitions: Mapping[str, str],
        rows: int,
        *,
        places: bool = True,
    ) -> None:
        self._storage: Storage = open_storage(snapshot.root)
        self._snapshot = snapshot
        self._columns = columns
        self._types = unpack_types(snapshot.types)
        self._partitions = {name: kind for name, kind in partitions.items() if name in columns}
        self._rows = rows
        self._places = places
        self._open: tuple[int, pq.ParquetFile] | None = None
        self._cursor: _Cursor | None = None

    def blocks(self, chunk: Chunk, rows: int | None = None) -> Generator[pa.Table]:
        """Yield the rows of a chunk in order, as tables of `rows` rows (else the reader's own), the last one shorter.

        Each has the columns asked for and, where `places` is set, source_file and source_row. Raises SourceChanged and
        SourceCorrupt by file name.
        """
        rows = rows or self._rows
        held: list[pa.Table] = []
        count = 0
        for table in (table for piece in chunk.pieces for table in self.read(piece, rows)):
            held.append(table)
            count += table.num_rows
            # The last block waits until its file has been held against the snapshot after its last row was read.
            while count > rows:
                whole = pa.concat_tables(held)
                held, count = [whole.slice(rows)], count - rows
                block = whole.slice(0, rows)
                # What is yielded belongs to the caller alone, who may be done with it before the next is read.
                del whole
                yield block
                del block
        if count:
            yield pa.concat_tables(held)

    def read(self, piece: Piece, rows: int | None = None) -> Generator[pa.Table]:
        """Yield the rows of one piece as they are decoded: at most a block at a time, and of large rows some 8 MiB."""
        file = self._snapshot.files[piece.file]
        at = sum(file.row_groups[: piece.row_group]) + piece.row_start
        with name_corrupt_file(self._storage, file.entry):
            for batch in self._read(piece, file, rows or self._rows):
                yield self._table(batch, file, at)
                at += batch.num_rows
        self._storage.check_unchanged(file.entry)

    def _read(self, piece: Piece, file: SourceFile, rows: int) -> Generator[pa.RecordBatch]:
        cursor = self._cursor
        if cursor is None or not cursor.is_at_or_before(piece):
            # What is decoded at once grows as it is, each time into twice the memory: of large rows only a few are.
            rows = min(rows, file.rows_within(BLOCK_BYTES, piece.row_group))
            parquet = self._parquet(piece.file, file)
            if pa.timestamp("us") in list_fields(parquet.schema_arrow).types:
                self._check_int96(file, piece.row_group, parquet)
            cursor = self._cursor = _Cursor(parquet, piece, self._physical(), rows)
        cursor.skip_to(piece.row_start)
        yield from cursor.take(piece.rows)

    def _parquet(self, at: int, file: SourceFile) -> pq.ParquetFile:
        if self._open is None or self._open[0] != at:
            local = isinstance(self._storage, LocalStorage)
            stream = self._storage.open_pinned(file.entry)
            # Without pre-buffering a remote column is read page by page; with it a local one is copied twice.
            self._open = (at, pq.ParquetFile(stream, pre_buffer=not local, page_checksum_verification=True, **INT96))
        return self._open[1]

    def _check_int96(self, file: SourceFile, row_group: int, parquet: pq.ParquetFile) -> None:
        """Raise SourceFormat where times in INT96, which are read in microseconds, are finer than that.

        Their nanoseconds wrap around by 2^64, as a thousand times their microseconds do: both differ where digits are
        lost, whatever the year.
        """
        names = [name for name in list_int96_columns(parquet.metadata) if name in self._columns]
        if not names:
            return
        with self._storage.open_pinned(file.entry) as stream:
            units = (
                pq.ParquetFile(stream, coerce_int96_timestamp_unit=unit).iter_batches(
                    _INT96_ROWS, [row_group], names, use_threads=False
                )
                for unit in ("us", "ns")
            )
            for coarse, fine in zip(*units, strict=True):
                for name in names:
                    read, exact = (pc.cast(read_field(batch, name), pa.int64()) for batch in (coarse, fine))
                    if pc.any(pc.not_equal(pc.multiply(read, 1000), exact)).as_py():
                        message = (
                            f"{self._storage.address(file.path)} must hold whole microseconds in column {name!r}, as "
                            "times in INT96 are read, got a finer time. Write the column as TIMESTAMP(NANOS)."
                        )
                        raise SourceFormat(message)

    def _physical(self) -> list[str]:
        return [name for name in self._columns if name not in self._partitions]

    def _table(self, batch: pa.RecordBatch, file: SourceFile, at: int) -> pa.Table:
        """Return rows as a table that has the same columns, in the same order, whatever file they are from."""
        rows = batch.num_rows
        origin = file.origin or file.path
        columns = {}
        if self._places:
            first = file.origin_row + at
            columns[SOURCE_FILE] = pa.repeat(pa.scalar(origin), rows)
            columns[SOURCE_ROW] = pa.array(np.arange(first, first + rows))
        if self._partitions:
            values = file.partition_values
            for name, kind in self._partitions.items():
                columns[name] = pa.repeat(pa.scalar(values[name], pa.string()).cast(kind), rows)
        if file.read_as:
            columns |= {name: self._read_column(batch, file, name) for name in self._physical()}
        else:
            columns |= {name: read_field(batch, name) for name in self._physical()}
        return pa.table(columns)

    def _read_column(self, batch: pa.RecordBatch, file: SourceFile, name: str) -> pa.Array:
        """Return a column in the type that it has in all files. Raises SchemaMismatch for a value that does not fit."""
        if name not in file.read_as:
            return read_field(batch, name)
        try:
            return read_column(batch, name, self._types[name])
        except pa.ArrowInvalid as error:
            message = (
                f"{self._storage.address(file.path)} must hold values in column {name!r} that fit {self._types[name]}, "
                f"as other files have it, got: {shorten_error(error)}. Rewrite the column in one type."
            )
            raise SchemaMismatch(message) from error


class _Cursor:
    """A place inside one row group that only moves forward."""

    def __init__(self, parquet: pq.ParquetFile, piece: Piece, columns: list[str], rows: int) -> None:
        self._group = (piece.file, piece.row_group)
        self._batches: Iterator[pa.RecordBatch] = parquet.iter_batches(
            batch_size=rows, row_groups=[piece.row_group], columns=columns, use_threads=False
        )
        self._left: pa.RecordBatch | None = None
        self._at = 0

    def is_at_or_before(self, piece: Piece) -> bool:
        return self._group == (piece.file, piece.row_group) and self._at <= piece.row_start

    def skip_to(self, row: int) -> None:
        """Pass over the rows before this one."""
        for _ in self.take(row - self._at):
            pass

    def take(self, rows: int) -> Generator[pa.RecordBatch]:
        """Yield the next `rows` rows; raises ValueError where the row group ends before."""
        while rows:
            batch = self._left if self._left is not None else next(self._batches, None)
            self._left = None
            if batch is None:
                message = f"row group {self._group[1]} must hold {rows} more rows"
                raise ValueError(message)
            if batch.num_rows > rows:
                self._left = batch.slice(rows)
                batch = batch.slice(0, rows)
            self._at += batch.num_rows
            rows -= batch.num_rows
            if batch.num_rows:
                yield batch


def open_reader(plan: Plan) -> Reader:
    """Return a reader over the dataset of a plan, for one thread, with the columns of its challengers too."""
    rows = block_rows(plan.step, plan.row_bytes)
    columns = (*plan.columns, *plan.columns_beside)
    # A key of the caller's own needs no places.
    return Reader(plan.snapshot, columns, plan.partitions, rows, places=not plan.options.key_columns)


_END = object()


def read_ahead(items: Iterable[T], depth: int) -> Generator[T]:
    """Yield items that a thread of its own makes up to `depth` ahead; its errors come through here.

    With a depth of 0 there is no such thread: each item is made when it is asked for.
    """
    if not depth:
        yield from items
        return
    ready: queue.Queue[object] = queue.Queue(depth)
    stop = threading.Event()

    def fill() -> None:
        try:
            for item in items:
                if not _put_unless_stopped(ready, item, stop):
                    return
                del item
            _put_unless_stopped(ready, _END, stop)
        except BaseException as error:  # noqa: BLE001 - carried over to the thread that consumes
            _put_unless_stopped(ready, error, stop)

    thread = threading.Thread(target=fill, name="read-ahead", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            yield item  # type: ignore[misc]  # the queue holds what `items` gave
    finally:
        stop.set()
        thread.join()


def _put_unless_stopped(ready: queue.Queue[object], item: object, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False
