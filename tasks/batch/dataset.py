"""The dataset: files pinned as a snapshot, and the row groups and schema that they hold."""

from __future__ import annotations

import errno
import itertools
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from serving.errors import (
    BadInput,
    OvernightError,
    SchemaMismatch,
    SourceChanged,
    SourceCorrupt,
    SourceEmpty,
    SourceFormat,
    SourceNotFound,
    StorageFault,
    suggest_name,
)
from serving.model.contract import Frozen
from serving.option_words import give_option, name_option
from tasks.batch.column_types import FileColumns, choose_types, find_others, pack_types, unpack_schema, unpack_types
from tasks.batch.footer import FooterReader, GroupBytes, add_columns, read_tail
from tasks.batch.formats import find_format, list_suffixes
from tasks.batch.hive_partitions import PartitionType, choose_partition_fields, parse_hive_values, set_partition_types
from tasks.batch.options import CsvOptions
from tasks.batch.struct_fields import list_fields
from tasks.storage import Entry, LocalStorage, Selection, Storage, open_storage

SOURCE_FILE, SOURCE_ROW = "source_file", "source_row"

_UNDECODED = re.compile("[\ud800-\udfff]")
# Of files that differ, the schemas that are compared with each.
_SCHEMAS_KEPT = 8
# Where pyarrow keeps the number that Parquet gives a column, which Iceberg knows it by.
_FIELD_ID = b"PARQUET:field_id"

T = TypeVar("T")
R = TypeVar("R")


class SourceFile(Frozen):
    """One pinned file: path below the root, size in bytes, ETag or local times, and rows and bytes of each row group.

    A file that is a staged copy says of which file (`origin`) and of which of its rows it is the first, and has the
    digest of its bytes (`content`). One of a table has the partitions that the table's log gives it, in place of those
    in its path. `read_as` are the columns that are read in another type than the file has, or as nulls where it lacks
    them, with the types in words.
    """

    path: str
    size: int
    tag: str
    row_groups: tuple[int, ...] = ()
    group_bytes: tuple[GroupBytes, ...] = ()
    origin: str | None = None
    origin_row: int = 0
    content: str | None = Field(default=None, exclude_if=lambda value: value is None)
    partitions: dict[str, str | None] | None = None
    read_as: dict[str, str] = Field(default_factory=dict, exclude_if=operator.not_)

    @property
    def partition_values(self) -> dict[str, str | None]:
        """Name and value of each partition that the file lies in."""
        return parse_hive_values(_user_path(self)) if self.partitions is None else self.partitions

    @property
    def sized_groups(self) -> list[tuple[GroupBytes, int]]:
        """The bytes and rows of each row group, where its footer was read."""
        return list(zip(self.group_bytes, self.row_groups, strict=bool(self.group_bytes)))

    def rows_within(self, bytes_max: int, group: int) -> int:
        """Return how many rows of a row group stay within so many bytes, on average: at least one, at most all."""
        rows = self.row_groups[group]
        size = self.group_bytes[group].decoded if self.group_bytes else 0
        return rows if size <= bytes_max else max(1, rows * bytes_max // size)

    @property
    def mark(self) -> str:
        """What changes where the bytes do: the digest of them, or the size with the ETag or the local times."""
        return self.content or f"{self.size}/{self.tag}"

    @property
    def entry(self) -> Entry:
        """The file as storage knows it."""
        return Entry(path=self.path, size=self.size, tag=self.tag)


class IcebergPin(Frozen):
    """What ties a snapshot to one of an Iceberg table: the metadata file that lists it, its id, and its schema's.

    `field_ids` are those of the columns that are used. `named` says that files without field ids hold these columns
    under their names.
    """

    metadata: str
    snapshot_id: int
    schema_id: int
    field_ids: dict[str, int]
    named: bool


class Snapshot(Frozen):
    """The files that a run is tied to, in order; `root` is the address that their paths lie below.

    `version` is that of a Delta table, the snapshot of an Iceberg table, and the run of an Overnight destination; None
    for loose files. `columns_missing` are columns of staged copies that nothing in the source has: they are null
    throughout. `empty_schema` is what a source without files and rows says of its columns, packed, and empty for any
    other. `iceberg` is given for files of an Iceberg table alone, and left out of what is written otherwise.
    `types` are those of columns that the schema of a Delta table states, or that are read in another type than a file
    has, as `pack_types` writes them. `partition_types` are those that the schema of a Delta table states of its
    partitions, in Arrow's words.
    """

    root: str
    format: str
    files: tuple[SourceFile, ...]
    version: str | None = None
    columns_missing: tuple[str, ...] = ()
    empty_schema: str = Field(default="", exclude_if=operator.not_)
    iceberg: IcebergPin | None = Field(default=None, exclude_if=lambda value: value is None)
    types: str = Field(default="", exclude_if=operator.not_)
    partition_types: dict[str, str] = Field(default_factory=dict, exclude_if=operator.not_)

    @property
    def title(self) -> str:
        """What messages and reports call it: its root and, of a table, the version."""
        return self.root if self.version is None else f"{self.root} (version {self.version})"

    def identify(self, file: SourceFile) -> tuple[str, ...]:
        """Return what tells the bytes of a file from those of all others.

        Of a staged copy the digest of its bytes, and in S3 the ETag, which a copy of the object keeps. Elsewhere the
        file's place too: on a local disk and in other clouds only the same file has the same mark for certain.
        """
        is_content = file.content is not None or self.root.startswith("s3://")
        return (file.mark,) if is_content else (file.mark, self.root, file.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A snapshot of Parquet files with their footers read: row counts, and one schema, with the fields of structs."""

    snapshot: Snapshot
    schema: pa.Schema
    hive: tuple[str, ...]

    @property
    def rows(self) -> int:
        """The rows of all files."""
        return sum(sum(file.row_groups) for file in self.snapshot.files)

    @property
    def partitions(self) -> dict[str, str]:
        """The types, in Arrow's words, of the columns that are not in the files but in their paths or a table's log."""
        return {name: str(self.schema.field(name).type) for name in self.hive}


def pin_files(selected: Selection, source: str, *, csv: bool = False) -> Snapshot:
    """Return the snapshot of the loose files that a source selects. Raises SourceNotFound, SourceFormat, BadInput.

    With `csv` files whose names do not say their format are CSV.
    """
    if not selected.entries:
        message = (
            f"The source must name at least one file, got none at {source}{_suggest_path(selected, source)} Check the "
            "path; names that begin with _ or . are passed over, and * stays within a folder where ** does not."
        )
        raise SourceNotFound(message)
    if undecoded := [entry.path for entry in selected.entries if _UNDECODED.search(entry.path)]:
        message = f"The name of every file must be UTF-8, got {undecoded[0]!r} below {source}. Rename it."
        raise BadInput(message)
    files = tuple(
        SourceFile(path=entry.path, size=entry.size, tag=entry.tag)
        for entry in pin_entries(selected.storage, selected.entries)
    )
    return Snapshot(root=selected.storage.url, format=_detect_format(selected.entries, source, csv=csv), files=files)


def _suggest_path(selected: Selection, source: str) -> str:
    """Return the local path that may have been meant by one that is not there: another name in the folder above it."""
    given = Path(source)
    if not isinstance(selected.storage, LocalStorage) or not given.parent.is_dir() or given.exists():
        return "."
    return suggest_name(given.name, (path.name for path in given.parent.iterdir())) or "."


def pin_entries(storage: Storage, entries: Sequence[Entry]) -> list[Entry]:
    """Return entries of a source as they are pinned: by ETag, and on a local disk by time of change and inode too."""
    return storage.pin(entries) if isinstance(storage, LocalStorage) else list(entries)


def pin_listed_files(storage: Storage, sizes: dict[str, int], listed_by: str, *, listed: bool = True) -> list[Entry]:
    """Return the pinned entries of the files that a log lists, sorted by path.

    `listed` says that the storage holds little else, so that one listing finds them; else each is looked for by its
    name. Raises SourceChanged where one is gone or of another size.
    """
    if listed:
        there = {entry.path: entry for entry in storage.entries()}
    else:
        found = map_parallel(storage, storage.find, list(sizes))
        there = {entry.path: entry for entry in found if entry is not None}
    wrong = [path for path, size in sizes.items() if path not in there or there[path].size != size]
    if wrong:
        message = (
            f"Every file that {listed_by} at {storage.url} lists must be there as it was written, but {len(wrong)} are "
            f"gone or of another size, the first {wrong[0]}. Call again: a newer version may have taken its place; if "
            "this stays, restore the files."
        )
        raise SourceChanged(message)
    return pin_entries(storage, [there[path] for path in sorted(sizes)])


def check_outside_source(selected: Selection, destination: str, source: str) -> None:
    """Raise BadInput where the parts of a destination would be taken for the files of a source."""
    target = open_storage(destination)
    if selected.would_select(target, "run=0/part-00000-0000.parquet"):
        message = (
            f"The destination must lie outside the source, or the next run would read this one's parts; got "
            f"{target.url} inside {source}. Choose another destination, or name the source's files by a glob."
        )
        raise BadInput(message)


def _detect_format(entries: list[Entry], source: str, *, csv: bool) -> str:
    by_format: dict[str | None, list[str]] = {}
    for entry in entries:
        found = find_format(entry.path) or ("csv" if csv else None)
        by_format.setdefault(found, []).append(entry.path)
    if csv and "csv" not in by_format:
        message = (
            f"{name_option('csv')} must go with CSV files, which it describes, but {source} has none, got such as "
            f"{entries[0].path}. Leave it out, or name CSV files."
        )
        raise BadInput(message)
    if len(by_format) == 1 and None not in by_format:
        return str(next(iter(by_format)))
    listed = "; ".join(f"{name or 'unknown'}: {len(paths)}, e.g. {paths[0]}" for name, paths in by_format.items())
    by_another_name = f"Where it is CSV by another name, give {give_option('csv', CsvOptions())}."
    advice = "Narrow it by a glob." if len(by_format) > 1 else by_another_name
    message = f"All files of {source} must be of one format out of {list_suffixes()}, got {listed}. {advice}"
    raise SourceFormat(message)


def open_dataset(
    snapshot: Snapshot,
    columns: Sequence[str],
    keys: Sequence[str],
    nullable: Collection[str] | None = None,
    partition_types: Mapping[str, PartitionType] = MappingProxyType({}),
    *,
    may_be_empty: bool = False,
) -> Dataset:
    """Read the footer of every Parquet file, and choose one type for each column that is used.

    Args:
        snapshot: The files.
        columns: The columns that are used.
        keys: Those that name a row.
        nullable: Columns that are null in a file that lacks them; those of a Delta table all are. None: no column is,
            and the caller has no option that says otherwise.
        partition_types: The types that are asked for of partitions. Others have the one that the snapshot states, or
            are text.
        may_be_empty: Whether the source may be without rows.

    Raises:
        SourceCorrupt: A file can't be read.
        SchemaMismatch: Files lack a column, or hold it in types of which none holds the values of all; or a value of a
            partition is none of the type that is asked for.
        SourceEmpty: There are no rows, and there must be.
    """
    if not snapshot.files and snapshot.empty_schema and may_be_empty:
        empty = set_partition_types(list_fields(unpack_schema(snapshot.empty_schema)), partition_types)
        return Dataset(snapshot=snapshot, schema=empty, hive=())
    if not snapshot.files:
        message = f"The source must hold at least one row, got a table without files at {snapshot.title}."
        raise SourceEmpty(message)
    storage = open_storage(snapshot.root)
    used = dict.fromkeys([*columns, *keys])
    read = _Footers(storage, used.keys(), set(keys), snapshot.iceberg).read
    footers = [read(snapshot.files[0]), *map_parallel(storage, read, snapshot.files[1:])]
    with_rows = [(file, schema) for file, schema in footers if sum(file.row_groups)]
    if not with_rows and may_be_empty:
        with_rows = footers
    if not with_rows:
        message = f"The source must hold at least one row, got none in {len(footers)} files below {snapshot.title}."
        raise SourceEmpty(message)
    declared = unpack_types(snapshot.types)
    held = [FileColumns(path=_user_path(file), schema=schema) for file, schema in with_rows]
    types = choose_types(held, used, declared, nullable)
    fields = join_fields(held[0].schema, types)
    schema = pa.schema([field for field in fields if field.name not in snapshot.columns_missing])
    parted = [(_user_path(file), file.partition_values) for file, _ in with_rows]
    hive = choose_partition_fields(parted, schema.names, used, partition_types, snapshot.partition_types)
    others = dict(zip((file.path for file, _ in with_rows), find_others(held, types), strict=True))
    files = tuple(_pin_types(file, schema, others.get(file.path, {}), types, keys) for file, schema in footers)
    differing = {name: types[name] for file in files for name in file.read_as}
    pinned = snapshot.model_copy(update={"files": files, "types": pack_types(declared | differing)})
    return Dataset(snapshot=pinned, schema=pa.schema([*schema, *hive]), hive=tuple(field.name for field in hive))


def join_fields(first: pa.Schema, types: Mapping[str, pa.DataType]) -> list[pa.Field]:
    """Return the columns of the first file in the types of all files, then those that it lacks."""
    fields = [field.with_type(types.get(field.name, field.type)) for field in first]
    return fields + [pa.field(name, kind) for name, kind in types.items() if name not in first.names]


def _pin_types(
    file: SourceFile,
    schema: pa.Schema,
    others: dict[str, str],
    types: Mapping[str, pa.DataType],
    keys: Collection[str],
) -> SourceFile:
    """Return a file that says which of its columns are read in another type than it has, and what these take.

    Raises SchemaMismatch where the file lacks one that its path has.
    """
    if others == file.read_as == {}:
        return file
    if parted := [name for name in others if name not in schema.names and name in file.partition_values]:
        message = (
            f"A column must be in every file or in the path of every file, got {parted[0]!r} in the path of "
            f"{_user_path(file)} and in other files themselves. Rewrite those files, or narrow the source by a glob."
        )
        raise SchemaMismatch(message)
    kinds = [types[name] for name in others]
    of_keys = [types[name] for name in others if name in keys]
    sizes = tuple(add_columns(size, rows, kinds, of_keys) for size, rows in file.sized_groups)
    return file.model_copy(update={"read_as": others, "group_bytes": sizes})


def map_parallel(storage: Storage, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Map over items in order, several at once: remote footers mostly wait, local ones keep a core busy each.

    Each worker takes a run of items: handing over one by one costs as much as a footer.
    """
    readers = min(storage.reads_at_once, len(items))
    if readers <= 1:
        return [work(item) for item in items]
    edges = [len(items) * at // (readers * 4) for at in range(readers * 4 + 1)]
    runs = [items[start:stop] for start, stop in itertools.pairwise(edges)]
    with ThreadPoolExecutor(readers, thread_name_prefix="footers") as pool:
        return [found for run in pool.map(lambda run: [work(item) for item in run], runs) for found in run]


def list_entries_at(storage: Storage, paths: Iterable[str]) -> dict[str, Entry]:
    """Return the objects that stand at some paths, by their paths; one listing of each folder, several at once."""
    wanted = set(paths)
    folders = sorted({path.rpartition("/")[0] for path in wanted})
    listed = map_parallel(storage, lambda folder: storage.entries(folder, depth=1), folders)
    return {entry.path: entry for entries in listed for entry in entries if entry.path in wanted}


# Arrow takes INT96 for nanoseconds, which end in 2262 and go on in 1677: 9999-12-31 would become 1816-03-30.
INT96 = {"coerce_int96_timestamp_unit": "us"}


class _Footers:
    """Reads footers, and keeps schemas that many files have, and what they tell of sizes, once: the first few."""

    def __init__(
        self, storage: Storage, used: Collection[str], keys: Collection[str], iceberg: IcebergPin | None
    ) -> None:
        self._storage, self._used, self._keys, self._iceberg = storage, used, keys, iceberg
        self._known: list[tuple[pa.Schema, FooterReader]] = []

    def read(self, file: SourceFile) -> tuple[SourceFile, pa.Schema]:
        """Return a file with its row groups, and the schema of its columns and their fields."""
        with self._storage.open_pinned(file.entry) as stream, name_corrupt_file(self._storage, file.entry):
            tail = read_tail(stream)
            metadata = pq.read_metadata(pa.BufferReader(tail))
            groups = tuple(metadata.row_group(at).num_rows for at in range(metadata.num_row_groups))
            schema = list_fields(read_parquet_schema(stream, metadata), file.partition_values)
            if self._iceberg is not None:
                _check_field_ids(schema, self._iceberg, self._storage.address(file.path))
            known = next((each for each in self._known if schema.equals(each[0])), None)
            if known is None:
                known = (schema, FooterReader(metadata, schema, self._used, self._keys))
                self._known += [known] if len(self._known) < _SCHEMAS_KEPT else []
            size = file.entry.size
            sizes = known[1].read(metadata, tail, size, lambda **options: pq.ParquetFile(stream, **options))
        return file.model_copy(update={"row_groups": groups, "group_bytes": sizes}), known[0]


def read_parquet_schema(stream: pa.NativeFile, metadata: pq.FileMetaData) -> pa.Schema:
    """Return the schema of a Parquet file as its rows are read: times in INT96 count microseconds."""
    schema = metadata.schema.to_arrow_schema()
    # Most files have no such times, and are not looked through column by column.
    if pa.timestamp("ns") in list_fields(schema).types and list_int96_columns(metadata):
        return pq.ParquetFile(stream, metadata=metadata, **INT96).schema_arrow
    return schema


def list_int96_columns(metadata: pq.FileMetaData) -> list[str]:
    """Return the columns whose times are INT96, as Spark, Hive and Impala write them by default."""
    columns = (metadata.schema.column(at) for at in range(metadata.num_columns))
    return [column.path for column in columns if column.physical_type == "INT96"]


def _check_field_ids(schema: pa.Schema, pin: IcebergPin, where: str) -> None:
    """Raise SourceFormat where a data file of an Iceberg table holds another field under the name of a column."""
    found = {field.name: (field.metadata or {}).get(_FIELD_ID) for field in schema}
    numbered = any(value is not None for value in found.values())
    others = [
        name
        for name, number in pin.field_ids.items()
        if (numbered and found.get(name) != str(number).encode()) or not (numbered or pin.named)
    ]
    if others:
        message = (
            f"Every data file of an Iceberg table must hold the columns that are used under their present names and "
            f"field ids, but {where} does not hold {', '.join(others[:3])} so, though no schema of the table says why. "
            "Rewrite the table's data files (Spark: CALL system.rewrite_data_files), then call again."
        )
        raise SourceFormat(message)


class name_corrupt_file:  # noqa: N801 - a context manager reads as a verb
    """Turn Arrow's errors about a file's bytes into SourceCorrupt with the file's name.

    Bytes that make no sense since the file was changed under the reader are SourceChanged.
    """

    def __init__(self, storage: Storage, entry: Entry) -> None:
        self._storage, self._entry = storage, entry

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # Arrow's errors are ValueErrors and OSErrors, the latter without an errno where the bytes are to blame.
        if not isinstance(error, OSError | ValueError | pa.ArrowException) or isinstance(error, OvernightError):
            return
        self._storage.check_unchanged(self._entry)
        where = self._storage.address(self._entry.path)
        got = (str(error).splitlines() or [repr(error)])[0][:300]
        if isinstance(error, OSError) and error.errno not in (None, errno.EIO):
            message = f"{where} must be readable, got: {got}. Call again once it is: the run resumes."
            raise StorageFault(message) from error
        message = f"{where} must be readable, got: {got}. Repair or remove the file, then call again."
        raise SourceCorrupt(message) from error


def _user_path(file: SourceFile) -> str:
    """Return the path that the user knows a file by."""
    return file.origin or file.path
