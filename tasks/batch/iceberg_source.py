"""An Iceberg table as a source: the files of one snapshot, pinned, and those with deletes or older schemas as rows.

pyiceberg is imported here, so this module is only imported where a source is an Iceberg table.
"""

from __future__ import annotations

import datetime as dt
import posixpath
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence

import pyarrow as pa
from pyiceberg.expressions import AlwaysTrue
from pyiceberg.io.pyarrow import ArrowScan, schema_to_pyarrow
from pyiceberg.manifest import DataFile, FileFormat
from pyiceberg.schema import Schema, sanitize_column_names
from pyiceberg.table import FileScanTask, Table
from pyiceberg.table.name_mapping import MappedField
from pyiceberg.table.snapshots import Snapshot as TableSnapshot
from pyiceberg.transforms import IdentityTransform
from pyiceberg.types import NestedField, StructType

from serving.errors import BadInput, OvernightError, SourceChanged, SourceFormat, SourceNotFound, shorten_error
from tasks.batch.column_types import pack_schema
from tasks.batch.dataset import IcebergPin, Snapshot, SourceFile, pin_listed_files
from tasks.batch.iceberg_catalog import (
    describe_tables,
    find_table,
    open_catalog,
    open_metadata,
    parse_table_name,
)
from tasks.storage import join_location, open_storage, split_location

# Where a table without a catalog says which of its metadata files is the current one.
_HINT = "metadata/version-hint.text"


def open_named_table(name: str) -> Table:
    """Open CATALOG.NAMESPACE.TABLE. Raises SourceNotFound, BadInput, StorageFault."""
    named = parse_table_name(name)
    with open_catalog(named) as catalog:
        table = find_table(catalog, named)
        if table is None:
            message = (
                f"The catalog {named.catalog!r} must have the table {'.'.join(named.identifier)}, but has none of that "
                f"name.{describe_tables(catalog, named)} Correct the name."
            )
            raise SourceNotFound(message)
    return table


def open_located_table(location: str) -> Table:
    """Open a table by one of its metadata files, or by its folder where a version hint names the current one.

    Raises SourceFormat where nothing in the folder says which of its metadata files is the current one.
    """
    if not location.endswith(".metadata.json"):
        storage = open_storage(location)
        if not storage.exists(_HINT):
            message = (
                f"Which metadata file of an Iceberg table is the current one must come from its catalog, and the "
                f"folder {location} does not say it (it has no {_HINT}). Name the table as "
                f"iceberg:CATALOG.NAMESPACE.TABLE, or the very file: {location}/metadata/*.metadata.json."
            )
            raise SourceFormat(message)
        location = storage.url
    return open_metadata(location)


def pin_iceberg(
    table: Table,
    columns: Sequence[str] | None = None,
    *,
    version: int | None = None,
    timestamp: dt.datetime | None = None,
) -> Snapshot:
    """Pin the data files of one snapshot of a table: the current one, one by its id, or that of a time.

    The current snapshot is read by the table's current schema, an earlier one by the schema that it was written with.
    Files are read in place where each has the columns that are used as the schema has them, by field ids; where rows
    were deleted from a file, or a column was renamed, added or widened since, or has a name that files can't have, the
    snapshot is one of rows that are to be staged (its format is "iceberg").

    Args:
        table: The table.
        columns: The columns that are used; those that the table lacks are passed over. None: all of them.
        version: The id of a snapshot.
        timestamp: The snapshot that was current then.

    Raises:
        BadInput: There is no such snapshot.
        SourceFormat: The table holds files or deletes that can't be read.
        SourceChanged: A file of the snapshot is gone.
    """
    where = table.location()
    chosen = _choose_snapshot(table, version, timestamp)
    if chosen is None:
        root = open_storage(join_location(*split_location(where))).url
        return Snapshot(root=root, format="parquet", files=(), version="0", empty_schema=_pack_columns(table.schema()))
    schema_id = table.schema().schema_id
    if (version is not None or timestamp is not None) and chosen.schema_id is not None:
        schema_id = chosen.schema_id
    schema = table.schemas()[schema_id]
    names = [field.name for field in schema.fields] if columns is None else columns
    used = {name: field for name, field in _list_fields(schema).items() if name in names}
    tasks = plan_tasks(table, chosen.snapshot_id)
    title = str(chosen.snapshot_id) + ("" if schema_id == chosen.schema_id else f", schema {schema_id}")
    pin = IcebergPin(
        metadata=table.metadata_location,
        snapshot_id=chosen.snapshot_id,
        schema_id=schema_id,
        field_ids={name: field.field_id for name, field in used.items()},
        named=_is_mapped(table, used),
    )
    root, files = _pin_files(tasks, where, title)
    return Snapshot(
        root=root,
        format="parquet" if _are_plain(table, tasks, schema, used, set(names)) else "iceberg",
        files=files,
        version=title,
        empty_schema="" if files else _pack_columns(schema),
        iceberg=pin,
    )


def _list_fields(within: Schema | StructType) -> dict[str, NestedField]:
    """Return the columns of a schema and the fields of its structs, by their paths."""
    found = {field.name: field for field in within.fields}
    for field in within.fields:
        if isinstance(field.field_type, StructType):
            below = _list_fields(field.field_type)
            found = {f"{field.name}.{path}": each for path, each in below.items()} | found
    return found


def _pack_columns(schema: Schema) -> str:
    return pack_schema(schema_to_pyarrow(schema, include_field_ids=False))


def _choose_snapshot(table: Table, version: int | None, timestamp: dt.datetime | None) -> TableSnapshot | None:
    if version is None and timestamp is None:
        return table.current_snapshot()
    if version is not None:
        wanted, found = f"snapshot {version}", table.snapshot_by_id(version)
    else:
        assert timestamp is not None  # noqa: S101 - for mypy; one of the two is given
        wanted = f"a snapshot of {timestamp.isoformat()} or before"
        found = table.snapshot_as_of_timestamp(int(timestamp.timestamp() * 1000))
    if found is None:
        kept = sorted(table.snapshots(), key=lambda each: each.timestamp_ms)
        listed = ", ".join(f"{each.snapshot_id} of {_time(each.timestamp_ms)}" for each in kept[-5:]) or "none at all"
        message = (
            f"The Iceberg table at {table.location()} must still have {wanted}, but has {listed}. Name one of those: "
            "what was expired can't be read any more."
        )
        raise BadInput(message)
    return found


def _time(milliseconds: int) -> str:
    return dt.datetime.fromtimestamp(milliseconds / 1000, dt.UTC).isoformat(timespec="seconds")


def plan_tasks(table: Table, snapshot_id: int) -> list[FileScanTask]:
    """Return the data files of a snapshot and the delete files of each. Raises SourceFormat for what can't be read."""
    try:
        tasks = list(table.scan(snapshot_id=snapshot_id).plan_files())
    except OvernightError:
        raise
    except FileNotFoundError as error:
        raise _lost_metadata(table, snapshot_id, error) from error
    except Exception as error:
        unread = "deletes by equality" if "equality delete" in str(error).lower() else shorten_error(error)
        message = (
            f"Every file of an Iceberg table must be one that can be read here, but snapshot {snapshot_id} of "
            f"{table.location()} has {unread}, which can't be read yet. Rewrite its data files (Spark: CALL "
            "system.rewrite_data_files), or write what it holds to a folder of Parquet and name that."
        )
        raise SourceFormat(message) from error
    paths = Counter(task.file.file_path for task in tasks)
    if twice := [path for path, count in paths.items() if count > 1]:
        message = (
            f"Every data file of an Iceberg table must be listed once, but snapshot {snapshot_id} of "
            f"{table.location()} lists {len(twice)} more often, the first {twice[0]}: readers give its rows each time. "
            "Delete those rows and append them once, or write what it holds to a folder of Parquet and name that."
        )
        raise SourceFormat(message)
    for task in tasks:
        if task.file.file_format != FileFormat.PARQUET or task.file.key_metadata:
            kind = "an encrypted one" if task.file.key_metadata else f"one in {task.file.file_format.value}"
            message = (
                f"Every data file of an Iceberg table must be Parquet that is not encrypted, got {kind} in snapshot "
                f"{snapshot_id} of {table.location()}: {task.file.file_path}. Rewrite the table's data files as such."
            )
            raise SourceFormat(message)
    return tasks


def _lost_metadata(table: Table, snapshot_id: int, error: Exception) -> SourceChanged:
    return SourceChanged(
        f"Every manifest of snapshot {snapshot_id} of the Iceberg table at {table.location()} must be there, got: "
        f"{shorten_error(error)}. Call again: a newer snapshot may have taken its place; if this stays, restore the "
        "files."
    )


def _are_plain(
    table: Table, tasks: Sequence[FileScanTask], schema: Schema, used: Mapping[str, NestedField], names: set[str]
) -> bool:
    """Whether every data file holds the columns that are used as the table has them now, and no row was deleted.

    Of the `names` that are asked for, files may hold some that the table has no more: columns that were dropped or
    renamed.

    No file is opened: what the table's schemas have been says how its files were written. Readers hold each file
    against the field ids once more, see dataset.py.
    """
    if any(names.difference(used).intersection(_list_fields(each)) for each in table.schemas().values()):
        return False
    if not used:
        return True
    if any(task.delete_files for task in tasks):
        return False
    if any(_differs(each, used) for each in table.schemas().values()):
        return False
    # Writers of Iceberg give such columns other names in the files, which their field ids alone lead to.
    read = schema.select(*used)
    if sanitize_column_names(read).column_names != read.column_names:
        return False
    # Files that were not written by Iceberg may leave out what their partition says already.
    ids = {field.field_id for field in used.values()}
    identities = (
        each.source_id
        for spec in table.specs().values()
        for each in spec.fields
        if isinstance(each.transform, IdentityTransform)
    )
    return table.name_mapping() is None or not ids.intersection(identities)


def _differs(schema: Schema, used: Mapping[str, NestedField]) -> bool:
    """Whether files that were written with a schema hold a column otherwise than it is now, or not at all."""
    held = _list_fields(schema)
    return any(
        name not in held or (held[name].field_id, held[name].field_type) != (field.field_id, field.field_type)
        for name, field in used.items()
    )


def _is_mapped(table: Table, used: Mapping[str, NestedField]) -> bool:
    """Whether files without field ids hold the columns under their present names, by the table's name mapping."""
    mapping = table.name_mapping()
    if mapping is None:
        return False
    ids = _list_mapped(mapping)
    return all(ids.get(name) == field.field_id for name, field in used.items())


def _list_mapped(fields: Iterable[MappedField]) -> dict[str, int | None]:
    """Return the ids that a name mapping gives columns and the fields of structs, by their paths."""
    found: dict[str, int | None] = {}
    for field in fields:
        for name in field.names:
            below = {f"{name}.{path}": each for path, each in _list_mapped(field.fields).items()}
            found = below | found | {name: field.field_id}
    return found


def _pin_files(tasks: Sequence[FileScanTask], where: str, title: str) -> tuple[str, tuple[SourceFile, ...]]:
    """Return the folder that the files of a snapshot lie below, and the files as they are pinned."""
    places = {split_location(task.file.file_path): task.file for task in tasks}
    home = split_location(where)
    roots = {root for root, _ in places} or {home[0]}
    if len(roots) > 1:
        message = (
            f"The files of an Iceberg table must lie in one bucket, got some in each of {sorted(roots)} for {where}. "
            "Rewrite its data files into one, or write what it holds to a folder of Parquet and name that."
        )
        raise SourceFormat(message)
    (root,) = roots
    below_home = root == home[0] and all(path.startswith(f"{home[1]}/") for _, path in places)
    folder = home[1] if below_home or not places else posixpath.commonpath([posixpath.dirname(p) for _, p in places])
    storage = open_storage(join_location(root, folder))
    cut = len(f"{folder}/") if folder else 0
    sizes = {path[cut:]: file.file_size_in_bytes for (_, path), file in places.items()}
    entries = pin_listed_files(storage, sizes, f"snapshot {title} of the Iceberg table", listed=below_home)
    # The folders of a path may have the form of partitions; what a column holds is in the files.
    return storage.url, tuple(SourceFile(path=e.path, size=e.size, tag=e.tag, partitions={}) for e in entries)


class SnapshotRows:
    """The rows of the data files of a pinned snapshot, but those that were deleted, in the columns of its schema."""

    def __init__(self, snapshot: Snapshot) -> None:
        if snapshot.iceberg is None:
            message = f"Only rows of a snapshot of an Iceberg table can be read so, got {snapshot.title}."
            raise SourceFormat(message)
        pin = snapshot.iceberg
        self._table = open_metadata(pin.metadata)
        schema = self._table.schemas()[pin.schema_id]
        self.names = list(_list_fields(schema))
        self._schema = schema.select(*pin.field_ids)
        self.schema = schema_to_pyarrow(self._schema, include_field_ids=False)
        tasks = plan_tasks(self._table, pin.snapshot_id)
        self._tasks = {split_location(task.file.file_path)[1]: task for task in tasks}
        self._root, self._snapshot_id = snapshot.root, pin.snapshot_id

    def read(self, file: SourceFile) -> Generator[pa.Table]:
        """Yield the rows of one data file in order; the columns of one file are in memory at once.

        Raises SourceChanged where a delete file is gone or of another size.
        """
        task = self._tasks[split_location(f"{self._root}/{file.path}")[1]]
        for deletes in task.delete_files:
            self._check_size(deletes)
        scan = ArrowScan(self._table.metadata, self._table.io, self._schema, AlwaysTrue())
        try:
            for batch in scan.to_record_batches([task]):
                yield pa.Table.from_batches([batch]).cast(self.schema)
        except FileNotFoundError as error:
            raise _lost_metadata(self._table, self._snapshot_id, error) from error

    def _check_size(self, deletes: DataFile) -> None:
        found = self._table.io.new_input(deletes.file_path)
        if not found.exists() or (
            deletes.file_format == FileFormat.PARQUET and len(found) != deletes.file_size_in_bytes
        ):
            message = (
                f"Every delete file of the Iceberg table at {self._table.location()} must be there as it was written, "
                f"but {deletes.file_path} is gone or of another size. Restore it, or name a newer snapshot."
            )
            raise SourceChanged(message)
