"""Iceberg as the output: the same parts, added to a table in one commit.

pyiceberg is imported here, so this module is only imported where rows go into an Iceberg table.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import (
    CommitFailedException,
    CommitStateUnknownException,
    ServiceUnavailableError,
    TableAlreadyExistsError,
)
from pyiceberg.io.pyarrow import parquet_files_to_data_files, schema_to_pyarrow
from pyiceberg.manifest import DataFile, ManifestContent
from pyiceberg.table import Table, Transaction
from sqlalchemy.exc import IntegrityError, OperationalError

from serving.errors import (
    DestinationUnusable,
    OvernightError,
    PublishRefused,
    SourceChanged,
    SourceFormat,
    shorten_error,
)
from tasks.batch.column_types import describe_differences
from tasks.batch.dataset import map_parallel
from tasks.batch.delta import TableFiles, TableState
from tasks.batch.iceberg_catalog import TableName, catalog_error, find_table, open_catalog, parse_table_name
from tasks.batch.iceberg_source import plan_tasks
from tasks.batch.options import BatchOptions
from tasks.batch.part_footer import PartFooter
from tasks.batch.plan import Plan
from tasks.batch.upsert import Rewrites, find_changes
from tasks.storage import LocalStorage, Storage, check_create_only, join_location, open_storage, split_location

_TRIES = 20
_PAUSE_SECONDS = 0.05
# Properties of a table: for each run that it holds, the plan that its rows are of; the highest number, in the order of
# runs, that it holds, and that of the run that last replaced its rows. They outlive the snapshots that set them.
_RUN, _ORDER, _REPLACED = "overnight.run.", "overnight.order", "overnight.replaced"
_FORMAT_MAX = 2  # what pyiceberg writes
_MAPPING = "schema.name-mapping.default"
_UTC = {"UTC", "Etc/UTC", "+00:00", "Z"}
# The outcome of a commit that ends so is unknown, or it lost against another: the table itself says which.
_UNDECIDED = (CommitFailedException, CommitStateUnknownException, ServiceUnavailableError, OperationalError)


def check_iceberg(storage: Storage, contract_schema: pa.Schema, run_key: str, options: BatchOptions) -> int:
    """Hold a run that is to be planned against Iceberg's types, and against the table that its rows go into.

    Args:
        storage: The destination.
        contract_schema: The schema that the parts will have.
        run_key: The key of the run.
        options: Those of the run, with the name of the table.

    Returns:
        The highest number, in the order of runs, of those that the table holds; 0 where there is no table.

    Raises:
        DestinationUnusable: The table can't hold the run, or holds it already.
        BadInput: The catalog is not configured.
        StorageFault: The catalog does not answer.
    """
    if "%" in storage.url:
        message = (
            f"The address of an Iceberg table must not hold %, which some readers take for an escape, got "
            f"{storage.url}. Choose another destination."
        )
        raise DestinationUnusable(message)
    _check_types(contract_schema)
    name = parse_table_name(options.iceberg_table or "")
    table = _look_up_table(name)
    if table is None:
        return 0
    _check_columns(table, contract_schema, name)
    if options.upserts:
        _check_upsertable(table, storage, name)
    if _RUN + run_key in table.properties:
        message = (
            f"The Iceberg table {name.title} must not hold the run that is to be planned, but holds run {run_key} "
            "already, whose plan below _overnight is gone. Its rows are in the table, once: there is nothing to do. To "
            "score them again all the same, choose another destination and table."
        )
        raise DestinationUnusable(message)
    return int(table.properties.get(_ORDER, 0))


def _look_up_table(name: TableName) -> Table | None:
    """Return a table as its catalog has it now, None where there is none. Raises BadInput, StorageFault."""
    with open_catalog(name) as catalog:
        return find_table(catalog, name)


def open_table_folder(storage: Storage, contract_schema: pa.Schema, options: BatchOptions) -> Storage:
    """Open where the table of a run that is to be planned lies; the table is created, empty, where there is none.

    The order of runs is that of the table, whichever destinations feed it, so its numbers lie with the table. Raises
    as check_iceberg does.
    """
    name = parse_table_name(options.iceberg_table or "")
    with open_catalog(name) as catalog:
        try:
            table = find_table(catalog, name) or _create_table(catalog, name, storage, contract_schema)
        except OvernightError:
            raise
        except Exception as error:
            raise catalog_error(name, error) from error
    folder = _open_folder(table)
    check_create_only(folder)
    return folder


def find_table_folder(options: BatchOptions) -> Storage | None:
    """Open where the table that options name lies, None where there is none. Raises as check_iceberg does."""
    name = parse_table_name(options.iceberg_table or "")
    table = _look_up_table(name)
    return None if table is None else _open_folder(table)


def _open_folder(table: Table) -> Storage:
    return open_storage(join_location(*split_location(table.location())))


def _check_types(schema: pa.Schema) -> None:
    unfit = [f"{field.name} ({field.type})" for field in schema if not _fits_iceberg(field.type)]
    if unfit:
        message = (
            f"An Iceberg table must have columns of types that Iceberg has, got {', '.join(unfit)}. Cast them in the "
            'source, choose other key columns, or output="parquet".'
        )
        raise DestinationUnusable(message)


def _fits_iceberg(given: pa.DataType) -> bool:
    """Whether a part's column of a type is read by every reader of Iceberg tables of format version 2."""
    if pa.types.is_struct(given):
        return all(_fits_iceberg(given.field(at).type) for at in range(given.num_fields))
    if pa.types.is_list(given) or pa.types.is_large_list(given):
        return _fits_iceberg(given.value_type)
    if pa.types.is_timestamp(given):
        return given.unit == "us" and (given.tz is None or given.tz in _UTC)
    simple = (pa.bool_(), pa.int32(), pa.int64(), pa.float32(), pa.float64(), pa.date32(), pa.time64("us"))
    texts = (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())
    return given in simple + texts or pa.types.is_decimal128(given) or pa.types.is_fixed_size_binary(given)


def _check_columns(table: Table, schema: pa.Schema, name: TableName) -> None:
    """Raise DestinationUnusable where a table has other columns than the parts, or partitions."""
    theirs = _describe_columns(schema_to_pyarrow(table.schema()))
    found = [describe_differences(_describe_columns(schema), theirs)]
    if table.format_version > _FORMAT_MAX:
        found.append(f"it has format version {table.format_version}")
    if not table.spec().is_unpartitioned():
        found.append(f"it is partitioned by {[each.name for each in table.spec().fields]}")
    if told := "; ".join(each for each in found if each):
        drop = "" if table.current_snapshot() else ", drop this one, which is empty"
        message = (
            f"The Iceberg table {name.title} must have the columns of the run, no partitions, and format version "
            f"{_FORMAT_MAX} at most, but {told}. Choose another table{drop}, or write the source with the types of the "
            "table: in CSV all values are text."
        )
        raise DestinationUnusable(message)
    _check_names_mapped(table, name)


def _check_names_mapped(table: Table, name: TableName) -> None:
    """Raise DestinationUnusable where readers would not find the columns of parts, which have no field ids."""
    mapping = table.name_mapping()
    ids = None if mapping is None else {each: field.field_id for field in mapping for each in field.names}
    lost = [] if ids is None else [f.name for f in table.schema().fields if ids.get(f.name) != f.field_id]
    if lost:
        message = (
            f"The property {_MAPPING} of the Iceberg table {name.title} must name every column, since parts have no "
            f"field ids, but does not have {', '.join(lost)} right. Add them, or remove the property."
        )
        raise DestinationUnusable(message)


def _describe_columns(schema: pa.Schema) -> dict[str, str]:
    return {field.name: f"{_plain_type(field.type)}{'' if field.nullable else ' not null'}" for field in schema}


def _plain_type(given: pa.DataType) -> str:
    """Return a type in words that are the same for what Iceberg takes for the same."""
    if pa.types.is_list(given) or pa.types.is_large_list(given):
        return f"list<{_plain_type(given.value_type)}>"
    if pa.types.is_struct(given):
        fields = [given.field(at) for at in range(given.num_fields)]
        return f"struct<{', '.join(f'{field.name}: {_plain_type(field.type)}' for field in fields)}>"
    if pa.types.is_timestamp(given) and given.tz in _UTC:
        return "timestamp[us, tz=UTC]"
    return str(given).removeprefix("large_")


def commit_iceberg(storage: Storage, plan: Plan, parts: Sequence[PartFooter]) -> None:
    """Add a run's parts to the Iceberg table in one commit, once: a second call finds the run in the table.

    Which runs a table holds is looked up on the very metadata that the commit is based on, so that of two workers one
    commits, and the other's commit fails and finds it done. pyiceberg itself tries no commit again: it would not look.

    Raises:
        DestinationUnusable: The table has other columns by now.
        PublishRefused: The table takes no commit, or holds a run that was planned after this one: nothing goes back to
            an older run.
        StorageFault: The catalog does not answer.
    """
    name = parse_table_name(plan.options.iceberg_table or "")
    schema = pq.read_schema(pa.BufferReader(storage.read(parts[0].path))).remove_metadata()
    with open_catalog(name) as catalog:
        failed = _try_to_commit(catalog, name, storage, plan, schema, parts)
    if failed is not None:
        message = (
            f"The Iceberg table {name.title} must take a commit, got: {shorten_error(failed)}. Call again: the parts "
            "are all there."
        )
        raise PublishRefused(message) from failed


def _try_to_commit(
    catalog: Catalog,
    name: TableName,
    storage: Storage,
    plan: Plan,
    schema: pa.Schema,
    parts: Sequence[PartFooter],
) -> Exception | None:
    """Commit a run unless the table holds it; return what the last of all tries failed by, None where it holds it."""
    failed: Exception | None = None
    rewrites: Rewrites = {}
    for attempt in range(_TRIES):
        time.sleep(random.uniform(0, _PAUSE_SECONDS) * attempt)  # noqa: S311 - keeps workers from trying in step
        try:
            table = find_table(catalog, name) or _create_table(catalog, name, storage, schema)
            if _holds_run(table, plan, name):
                return None
            # pyiceberg takes files that lack columns too.
            _check_columns(table, schema, name)
            _commit(table, name, storage, plan, parts, rewrites)
        except (*_UNDECIDED, SourceChanged) as error:
            failed = error
        except OvernightError:
            raise
        except Exception as error:
            raise _name_error(name, error) from error
        else:
            return None
    return failed


def _name_error(name: TableName, error: Exception) -> OvernightError:
    if "already referenced" in str(error):
        return PublishRefused(
            f"The Iceberg table {name.title} must not get the parts of a run twice, but has some of them, though its "
            "properties do not name the run: they were changed. Nothing was added."
        )
    return catalog_error(name, error)


def _create_table(catalog: Catalog, name: TableName, storage: Storage, schema: pa.Schema) -> Table:
    """Create an empty table at the destination, or return the one that another worker has just created."""
    try:
        # pyiceberg passes this error of a database on where another worker has just created the namespace.
        with suppress(IntegrityError):
            catalog.create_namespace_if_not_exists(name.identifier[:-1])
        return catalog.create_table(name.identifier, schema, location=_locate(storage, ""))
    except TableAlreadyExistsError:
        return catalog.load_table(name.identifier)


def _locate(storage: Storage, path: str) -> str:
    """Return the location of an object as the metadata of a table has it."""
    address = storage.address(path)
    return f"file://{address}" if isinstance(storage, LocalStorage) else address


def _holds_run(table: Table, plan: Plan, name: TableName) -> bool:
    """Return whether a table holds the parts of a plan; raises PublishRefused where it may not take them."""
    held_plan = table.properties.get(_RUN + plan.key)
    if held_plan == plan.digest:
        return True
    if held_plan is not None:
        message = (
            f"The Iceberg table {name.title} must hold run {plan.run} by the parts of this plan, but holds those of "
            "another plan of the run, whose records below _overnight were deleted. Its rows are in the table, once, "
            "and nothing was added: there is nothing left to do."
        )
        raise PublishRefused(message)
    held = int(table.properties.get(_REPLACED if plan.options.iceberg_mode == "append" else _ORDER, 0))
    # Two runs have one number where records were deleted between their plans: nobody knows then which is the older one.
    if held >= max(plan.order, 1):
        message = (
            f"An Iceberg table must not go back to an older run, but {name.title} holds run number {held}, and run "
            f"{plan.run} is number {plan.order}: it was planned before. Nothing was published. To publish it as the "
            f"newest, delete {plan.folder} below the destination and call again; its parts stay and are not scored "
            "again where the plan comes out the same."
        )
        raise PublishRefused(message)
    return False


def check_takes_run(plan: Plan) -> None:
    """Raise PublishRefused where the Iceberg table will take no parts of a plan, as `commit_iceberg`."""
    name = parse_table_name(plan.options.iceberg_table or "")
    table = _look_up_table(name)
    if table is not None:
        _holds_run(table, plan, name)


def _commit(
    table: Table, name: TableName, storage: Storage, plan: Plan, parts: Sequence[PartFooter], rewrites: Rewrites
) -> None:
    """Add parts to a table as it was loaded, and say of which run they are; fails where it is another by now.

    `rewrites` is what earlier tries of an upsert found, and gets more.
    """
    # This copy alone says so, and the catalog's own does not: see commit_iceberg.
    properties = {**table.metadata.properties, "commit.retry.num-retries": "0"}
    table.metadata = table.metadata.model_copy(update={"properties": properties})
    told = {"overnight.run": plan.run, "overnight.model": plan.model.uri}
    if plan.options.iceberg_mode == "append":
        with table.transaction() as transaction:
            transaction.set_properties(_record_run(table, plan))
            transaction.add_files([_locate(storage, part.path) for part in parts], snapshot_properties=told)
        return
    if plan.options.upserts:
        _check_upsertable(table, storage, name)
    held = _list_files(table, storage)
    changes = find_changes(storage, plan, parts, held, rewrites)
    removed, added = [held[path] for path in changes.removed], [_locate(storage, file.path) for file in changes.added]
    with table.transaction() as transaction:
        transaction.set_properties(_record_run(table, plan))
        _swap_files(table, transaction, storage, removed, added, told)


def _check_upsertable(table: Table, storage: Storage, name: TableName) -> None:
    """Raise DestinationUnusable where rows of a table can't be replaced by writing its files again."""
    outside = [path for path, file in _list_files(table, storage).items() if path == file.file_path]
    current = table.current_snapshot()
    manifests = [] if current is None else current.manifests(table.io)
    has_deletes = any(manifest.content == ManifestContent.DELETES for manifest in manifests)
    if outside or has_deletes:
        got = f"data files elsewhere, the first {outside[0]}" if outside else "row-level deletes beside its data files"
        message = (
            f"The Iceberg table {name.title} must have all its files below {storage.url}, and no deletes beside them, "
            f"where rows are put into it by their keys, got {got}. Rewrite its data files there, or choose another "
            "table."
        )
        raise DestinationUnusable(message)


def _record_run(table: Table, plan: Plan) -> dict[str, str]:
    """Return what a commit says of itself in the properties of a table: the run, its plan, and the run's number."""
    record = {_RUN + plan.key: plan.digest}
    if table.name_mapping() is None:
        # Parts have names and no field ids.
        record[_MAPPING] = table.schema().name_mapping.model_dump_json()
    for number in [_ORDER] if plan.options.iceberg_mode == "append" else [_ORDER, _REPLACED]:
        record[number] = str(max(plan.order, int(table.properties.get(number, 0))))
    return record


def _swap_files(
    table: Table,
    transaction: Transaction,
    storage: Storage,
    removed: Sequence[DataFile],
    files: Sequence[str],
    told: dict[str, str],
) -> None:
    """Put files in the place of data files of a table, in one snapshot."""
    metadata = transaction.table_metadata

    def describe(file: str) -> DataFile:
        return next(parquet_files_to_data_files(table.io, metadata, iter([file])))

    added = map_parallel(storage, describe, files)
    with transaction.update_snapshot(snapshot_properties=told).overwrite() as overwrite:
        for held in removed:
            overwrite.delete_data_file(held)
        for file in added:
            overwrite.append_data_file(file)


def read_table(storage: Storage, plan: Plan) -> TableState | None:
    """Return the current snapshot of the table that a run went into, with its files at the destination.

    None where the catalog has no such table. Raises BadInput, StorageFault.
    """
    name = parse_table_name(plan.options.iceberg_table or "")
    table = _look_up_table(name)
    if table is None:
        return None
    files = {path: file for path, file in _list_files(table, storage).items() if path != file.file_path}
    current, held_plan = table.current_snapshot(), table.properties.get(_RUN + plan.key)
    return TableState(
        version=0 if current is None else current.snapshot_id,
        files={path: (file.file_size_in_bytes, file.record_count) for path, file in files.items()},
        holds_run=held_plan is not None,
        holds_plan=held_plan == plan.digest,
    )


def list_table_files(storage: Storage, table: str) -> TableFiles:
    """Return the files of an Iceberg table that lie at a destination, none where the catalog has no such table.

    A file counts as whole where no deletes belong to it, and none where some are by equality. Raises BadInput,
    StorageFault.
    """
    name = parse_table_name(table)
    found = _look_up_table(name)
    current = None if found is None else found.current_snapshot()
    if found is None or current is None:
        return TableFiles(named={}, whole={}, is_there=found is not None)
    files = {path: file for path, file in _list_files(found, storage).items() if path != file.file_path}
    whole = set[str]()
    with suppress(SourceFormat):
        whole = {task.file.file_path for task in plan_tasks(found, current.snapshot_id) if not task.delete_files}
    named = {path: file.file_size_in_bytes for path, file in files.items()}
    return TableFiles(named=named, whole={path: named[path] for path in files if files[path].file_path in whole})


def _list_files(table: Table, storage: Storage) -> dict[str, DataFile]:
    """Return the data files of a table by their paths below the destination; those elsewhere by their locations."""
    below = f"{_locate(storage, '').rstrip('/')}/"
    return {file.file_path.removeprefix(below): file for file in _list_data_files(table)}


def _list_data_files(table: Table) -> Iterable[DataFile]:
    current = table.current_snapshot()
    for manifest in [] if current is None else current.manifests(table.io):
        if manifest.content == ManifestContent.DATA:
            yield from (entry.data_file for entry in manifest.fetch_manifest_entry(table.io, discard_deleted=True))
