"""CSV, JSON lines and Arrow IPC become Parquet once, file by file, under the run's own folder.

These formats have no row groups to read at random, and a run that resumes needs them. So do the files of an Iceberg
table from which rows were deleted, or which hold columns otherwise than the table does now. The copy is
create-only and pinned like any source; it is deleted once the run is published. Values of text
formats stay text: the contract parses them, and a value that does not parse rejects its row.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Container, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from serving.errors import (
    BadInput,
    OvernightError,
    SchemaMismatch,
    SourceChanged,
    SourceEmpty,
    SourceFault,
    StorageFault,
    suggest_name,
)
from serving.extras import import_extra
from serving.model.contract import Contract, Frozen
from serving.option_words import name_option
from tasks.batch.chunk_layout import Chunk
from tasks.batch.column_types import pack_schema
from tasks.batch.dataset import Snapshot, SourceFile, name_corrupt_file
from tasks.batch.feature_pins import remove_features
from tasks.batch.formats import RequestedColumns, read_tables
from tasks.batch.options import BatchOptions, CsvOptions, MissingColumns
from tasks.batch.parts import ChunkId
from tasks.batch.plan import Plan
from tasks.batch.struct_fields import list_fields
from tasks.storage import LocalStorage, Storage, check_create_only, copy_pinned, local_errors, open_storage

_ROWS_PER_GROUP = 1 << 16
_COPY_BYTES = 64 << 20
_NAMES_SHOWN = 20


def choose_copied(
    contract: Contract, feature_names: Sequence[str], options: BatchOptions
) -> tuple[Contract, tuple[str, ...]]:
    """Return the inputs of all models, and the other columns, that copies of text files hold.

    Args:
        contract: What the models take, of the source or of feature tables.
        feature_names: Which columns feature tables give.
        options: Names the columns that are read as they are, and those that models are compared by.
    """
    others = dict.fromkeys([*options.copied_columns, *options.columns_kept])
    return remove_features(contract, feature_names), tuple(name for name in others if name not in feature_names)


def list_copied(plan: Plan) -> tuple[Contract, tuple[str, ...]]:
    """Return the inputs, and the other columns, that copies of text files hold for a plan."""
    merged = plan.contract.with_inputs_of(each.contract for each in plan.challengers)
    return choose_copied(merged, plan.feature_names, plan.options)


def stage(
    snapshot: Snapshot,
    destination: Storage,
    folder: str,
    contract: Contract,
    keys: tuple[str, ...],
    csv: CsvOptions | None = None,
    missing_columns: MissingColumns = "refuse",
    *,
    may_be_empty: bool = False,
) -> Snapshot:
    """Return a snapshot of Parquet copies of every file, each made unless it is there already.

    A file becomes copies of about 64 MiB and then a list of them, the commit of its staging, so
    memory is bounded whatever the size of the file. Raises SourceCorrupt by file name, SourceEmpty
    where there are no rows unless that may be: there are no copies then, and the snapshot says what columns there are.
    """
    found = _copy_files(snapshot, destination, folder, contract, keys, csv, missing_columns)
    copies = [copy for each in found for copy in each.copies]
    if not copies and may_be_empty:
        schema = _find_empty_schema(snapshot, contract, keys, csv)
        return Snapshot(root=destination.url, format="parquet", files=(), empty_schema=pack_schema(schema))
    if not copies:
        message = (
            f"The source must hold at least one row, got none in {len(snapshot.files)} files below {snapshot.root}."
        )
        raise SourceEmpty(message)
    missing = _find_missing(snapshot, found, _requested_columns(contract, keys)) if snapshot.format == "jsonl" else ()
    files = _pin_copies(copies, destination, folder)
    return Snapshot(root=destination.url, format="parquet", files=files, columns_missing=missing)


def _find_empty_schema(
    snapshot: Snapshot, contract: Contract, keys: tuple[str, ...], csv: CsvOptions | None
) -> pa.Schema:
    """Return the columns of files without rows: as the first that names any has them, else those wanted, as text."""
    source, wanted = open_storage(snapshot.root), _requested_columns(contract, keys)
    work = _Staging(snapshot, contract, keys, csv or CsvOptions(), "null", source, source, "")
    types = {name: pa.list_(pa.string()) if name in wanted.lists else pa.string() for name in wanted.names}
    schema = pa.schema(types.items())
    if work.iceberg_rows is not None:
        return work.iceberg_rows.schema
    for file in snapshot.files:
        with name_corrupt_file(source, file.entry), work.open_tables(file, wanted) as tables:
            if (first := next(iter(tables), None)) is not None:
                schema = first.schema
                break
    values = [name for name in snapshot.files[0].partition_values if name not in schema.names]
    return pa.schema([*schema, *(pa.field(name, pa.string()) for name in values)])


def stage_again(
    plan: Plan, chunks: Sequence[ChunkId], destination: Storage
) -> tuple[Plan, dict[ChunkId, OvernightError]]:
    """Return a plan over copies of its source that are made again, and the chunks that they lack, with the errors.

    The copies of a run are deleted once it is published. Only files that the chunks are of are copied. A plan over
    Parquet files is returned as it is.

    Args:
        plan: The plan of the run.
        chunks: The chunks that are to be read.
        destination: Where the copies go.
    """
    if plan.source.format == "parquet":
        return plan, {}
    files = plan.snapshot.files
    origins = {files[piece.file].origin for at in chunks for piece in plan.chunk(at).pieces}
    tags: dict[str, str] = {}
    problems: dict[str | None, OvernightError] = {}
    for file in plan.source.files:
        if file.path not in origins:
            continue
        one = plan.source.model_copy(update={"files": (file,)})
        try:
            told = *list_copied(plan), plan.options.csv, plan.options.missing_columns
            (made,) = _copy_files(one, destination, plan.folder, *told)
        except (SourceFault, StorageFault, BadInput) as error:
            problems[file.path] = error
        else:
            # A copy is named by its content: one of the same name holds the same bytes, whenever it was made.
            tags |= {copy.path: copy.tag for copy in _pin_copies(made.copies, destination, plan.folder)}
    again = tuple(file.model_copy(update={"tag": tags.get(file.path, file.tag)}) for file in files)
    snapshot = plan.snapshot.model_copy(update={"root": destination.url, "files": again})
    lost = {at: why for at in chunks if (why := _find_problem(plan, plan.chunk(at), tags, problems)) is not None}
    return plan.model_copy(update={"snapshot": snapshot}), lost


def _find_problem(
    plan: Plan, chunk: Chunk, copied: Container[str], problems: Mapping[str | None, OvernightError]
) -> OvernightError | None:
    for piece in chunk.pieces:
        file = plan.snapshot.files[piece.file]
        if file.path not in copied:
            message = (
                f"The copy of {file.origin} that run {plan.run} was scored from must come out the same again, got "
                "another. Call again with the versions that made the run."
            )
            return problems.get(file.origin) or SourceChanged(message)
    return None


def _copy_files(
    snapshot: Snapshot,
    destination: Storage,
    folder: str,
    contract: Contract,
    keys: tuple[str, ...],
    csv: CsvOptions | None,
    missing_columns: MissingColumns,
) -> list[_Listing]:
    """Copy every file of a snapshot, unless it is copied already, and return the lists of their copies."""
    source = open_storage(snapshot.root)
    listed = {entry.path for entry in destination.entries(f"{folder}/staged")}
    # A list of copies is tied to these: a call under the same name over other files has lists of its own.
    told = f"{snapshot.model_dump_json()}\n{contract.model_dump_json()}\n{keys}"
    told += "" if csv is None else f"\n{csv.model_dump_json()}"
    made_for = hashlib.blake2b(told.encode(), digest_size=8).hexdigest()
    work = _Staging(snapshot, contract, keys, csv or CsvOptions(), missing_columns, source, destination, folder)
    listings = {f"{folder}/staged/{file.path}/listing-{made_for}.json": file for file in snapshot.files}
    for path, file in listings.items():
        if path not in listed:
            destination.put_new(path, work.convert(file).model_dump_json().encode())
    return [_read_listing(destination, folder, path) for path in listings]


class _Copy(Frozen):
    path: str
    origin: str
    origin_row: int


class _Listing(Frozen):
    """The copies of a file, and which of the columns that the run reads its lines have, where it is JSON lines."""

    copies: tuple[_Copy, ...]
    columns: tuple[str, ...]


def _find_missing(snapshot: Snapshot, listings: Sequence[_Listing], wanted: RequestedColumns) -> tuple[str, ...]:
    """Return the columns that no line of any file has; a field that a whole file lacks is null there."""
    found = {name for listing in listings for name in listing.columns}
    if wanted.names and not found:
        message = (
            f"The JSON lines of {snapshot.root} must hold a column that the run reads, got none of "
            f"{list(wanted.names)} in {len(snapshot.files)} files. Check their names, or the source."
        )
        raise SchemaMismatch(message)
    return tuple(name for name in wanted.names if name not in found)


def _read_listing(destination: Storage, folder: str, path: str) -> _Listing:
    data = destination.read(path)
    if data is None:
        raise _missing_copy_error(destination, folder, path)
    try:
        return _Listing.model_validate_json(data)
    except ValidationError as error:
        message = (
            f"{destination.address(path)} must list the copies of a source file, got: {error.errors()[0]['msg']}. To "
            f"make them again, delete {destination.address(f'{folder}/staged')} and call again."
        )
        raise StorageFault(message) from error


def _pin_copies(copies: Sequence[_Copy], destination: Storage, folder: str) -> tuple[SourceFile, ...]:
    found = {entry.path: entry for entry in destination.entries(f"{folder}/staged")}
    files = []
    for copy in copies:
        entry = found.get(copy.path)
        if entry is None:
            raise _missing_copy_error(destination, folder, copy.path)
        content = Path(copy.path).stem.rpartition("-")[2]
        files.append(
            SourceFile(
                path=copy.path,
                size=entry.size,
                tag=entry.tag,
                origin=copy.origin,
                origin_row=copy.origin_row,
                content=content,
            )
        )
    return tuple(files)


def _missing_copy_error(destination: Storage, folder: str, path: str) -> StorageFault:
    return StorageFault(
        f"{destination.address(path)} must stay until its run is published, but is gone: another worker may have "
        f"published the run. Call again; if this stays, delete {destination.address(f'{folder}/staged')}."
    )


def _requested_columns(contract: Contract, keys: tuple[str, ...]) -> RequestedColumns:
    """Return the columns that the run reads."""
    names = tuple(dict.fromkeys([*(column.name for column in contract.columns), *keys]))
    return RequestedColumns(names=names, lists=frozenset(column.name for column in contract.columns if column.shape))


@dataclass(slots=True)
class _Staging:
    """What the files of a snapshot are copied by, and where to."""

    snapshot: Snapshot
    contract: Contract
    keys: tuple[str, ...]
    csv: CsvOptions
    missing_columns: MissingColumns
    source: Storage
    destination: Storage
    folder: str
    iceberg_rows: Any = None
    is_tried: bool = False

    def __post_init__(self) -> None:
        if self.snapshot.format == "iceberg":
            self.iceberg_rows = import_extra("tasks.batch.iceberg_source", "iceberg").SnapshotRows(self.snapshot)
            where = f"The table at {self.snapshot.title}"
            advice = "Rename them in the table, or name an earlier snapshot of it"
            _require_columns(self.iceberg_rows.names, self._list_required(), where, advice)

    def convert(self, file: SourceFile) -> _Listing:
        """Copy a file, and return the list of its copies."""
        wanted = _requested_columns(self.contract, self.keys)
        copies = tuple(self._copy(file, wanted))
        return _Listing(copies=copies, columns=tuple(name for name in wanted.names if name in wanted.found))

    def _copy(self, file: SourceFile, wanted: RequestedColumns) -> Generator[_Copy]:
        row = 0
        with name_corrupt_file(self.source, file.entry), self.open_tables(file, wanted) as tables:
            for rows, data in write_copies(tables):
                if not self.is_tried:
                    # Nothing is written before the first file has been found fit.
                    check_create_only(self.destination)
                    self.is_tried = True
                # Named by its content: copies that an attempt before this one cut elsewhere are never mixed with these.
                digest = hashlib.blake2b(data, digest_size=16).hexdigest()
                path = f"{self.folder}/staged/{file.path}/{row:012d}-{digest}.parquet"
                self.destination.put_new(path, data)
                yield _Copy(path=path, origin=file.path, origin_row=row)
                row += rows

    @contextlib.contextmanager
    def open_tables(self, file: SourceFile, wanted: RequestedColumns) -> Generator[Iterable[pa.Table]]:
        """Yield the rows of a file, which must be the same one before and after they are read."""
        if self.iceberg_rows is not None:
            self.source.check_unchanged(file.entry)
            yield self.iceberg_rows.read(file)
            self.source.check_unchanged(file.entry)
            return
        where = self.source.address(file.path)
        with _local_copy(self.source, file) as raw:
            tables = read_tables(raw, self.snapshot.format, wanted, where, self.csv)
            yield _check_columns(tables, self._find_required(file), where)

    def _find_required(self, file: SourceFile) -> frozenset[str]:
        """Return the columns that a file must have itself."""
        return self._list_required() - file.partition_values.keys()

    def _list_required(self) -> frozenset[str]:
        """Return the columns that must be there; JSON lines may leave out any."""
        if self.snapshot.format == "jsonl" or self.missing_columns == "null":
            return frozenset()
        return frozenset(column.name for column in self.contract.columns) - self.contract.nullable | set(self.keys)


def _check_columns(tables: Iterable[pa.Table], required: frozenset[str], where: str) -> Generator[pa.Table]:
    """Yield tables, and raise SchemaMismatch before the first one where columns are missing."""
    for at, table in enumerate(tables):
        if at == 0 and table.num_rows:
            advice = f"Rename them, or say how the file is written by {name_option('csv')}"
            _require_columns(list_fields(table.schema).names, required, where, advice)
        yield table


def _require_columns(names: Sequence[str], required: Iterable[str], where: str, advice: str) -> None:
    if missing := sorted(set(required).difference(names)):
        found = ", ".join(names[:_NAMES_SHOWN])
        message = (
            f"{where} must have every column that the run reads, but {missing} are missing"
            f"{suggest_name(missing[0], names) or '.'} Columns found: {found}. {advice}."
        )
        raise SchemaMismatch(message)


@contextlib.contextmanager
def _local_copy(source: Storage, file: SourceFile) -> Generator[Path]:
    """Give a local file as it stands, held against its pin before and after, and a remote one as a copy."""
    if isinstance(source, LocalStorage):
        source.check_unchanged(file.entry)
        try:
            yield source.locate(file.path)
        except Exception:
            # What does not parse since it was changed is SourceChanged.
            source.check_unchanged(file.entry)
            raise
        source.check_unchanged(file.entry)
        return
    with tempfile.TemporaryDirectory(prefix="overnight-") as scratch:
        raw = Path(scratch) / "raw"
        with local_errors(raw), raw.open("wb") as sink:
            copy_pinned(source, file.entry, sink)
        yield raw


def write_copies(tables: Iterable[pa.Table]) -> Generator[tuple[int, memoryview]]:
    """Yield Parquet files of at most about 64 MiB, and the rows of each; none where there are no rows."""
    sink, writer, rows = pa.BufferOutputStream(), None, 0
    for table in group_tables(tables):
        writer = writer or pq.ParquetWriter(sink, table.schema, compression="zstd")
        writer.write_table(table, row_group_size=_ROWS_PER_GROUP)
        rows += table.num_rows
        if sink.tell() >= _COPY_BYTES:
            writer.close()
            yield rows, memoryview(sink.getvalue())
            sink, writer, rows = pa.BufferOutputStream(), None, 0
    if writer is not None:
        writer.close()
        yield rows, memoryview(sink.getvalue())


def group_tables(tables: Iterable[pa.Table]) -> Generator[pa.Table]:
    """Join tables until they are a row group, by rows or by bytes, and cut those that are larger."""
    held: list[pa.Table] = []
    rows = size = 0
    for table in (part for whole in tables for part in _split_table(whole)):
        held.append(table)
        rows, size = rows + table.num_rows, size + table.nbytes
        if rows >= _ROWS_PER_GROUP or size >= _COPY_BYTES:
            yield pa.concat_tables(held)
            held, rows, size = [], 0, 0
    if rows:
        yield pa.concat_tables(held)


def _split_table(table: pa.Table) -> Generator[pa.Table]:
    """Yield the halves of a table until each is within the bytes of a copy, or one row."""
    if table.num_rows > 1 and table.nbytes > _COPY_BYTES:
        middle = table.num_rows // 2
        yield from _split_table(table.slice(0, middle))
        yield from _split_table(table.slice(middle))
    else:
        yield table
