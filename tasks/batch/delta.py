"""Delta Lake as the output: the same parts, added to a table in one commit."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from serving.errors import (
    DestinationUnusable,
    PublishRefused,
    SourceChanged,
    StorageDenied,
    StorageFault,
    shorten_error,
)
from serving.extras import import_extra
from serving.option_words import give_option
from tasks.batch.column_types import describe_differences
from tasks.batch.options import TableMode
from tasks.batch.part_footer import PartFooter
from tasks.batch.plan import Plan
from tasks.batch.upsert import Rewrites, RewrittenFile, find_changes
from tasks.storage import S3Storage, Storage, reader_options

if TYPE_CHECKING:
    from deltalake import DeltaTable
    from deltalake import Schema as DeltaSchema
    from deltalake.transaction import AddAction, RemoveAction, Transaction

_TRIES = 20
_PAUSE_SECONDS = 0.05
# The highest number, in the order of runs, that the table holds, and that of the run that last replaced its rows.
_ORDER_APP, _REPLACED_APP = "overnight-order", "overnight-replaced"
# With these a table's Parquet files alone say what it holds, as long as no file has a deletion vector and no column a
# name of its own in the files; both are looked at.
_FEATURES_READ = {"timestampNtz", "vacuumProtocolCheck", "v2Checkpoint", "deletionVectors", "columnMapping"}
# A table whose readers follow its changes row by row, and one that takes no removals.
_CHANGE_FEED, _APPEND_ONLY = "delta.enableChangeDataFeed", "delta.appendOnly"
# What a table asks of each row that is written to it: a property of the table, or of one of its columns.
_CONSTRAINT = "delta.constraints."
_COLUMN_RULES = ("delta.invariants", "delta.generationExpression", "delta.identity.")
# Delta's readers don't have them, though its schema does.
_UNREADABLE = ("timestamp_nanos", "timestamp_nanos_ntz", "void")
_DENIED = re.compile("AccessDenied|lacked the necessary privileges|[Pp]ermission denied|Read-only file system")


def import_deltalake() -> Any:
    """Import deltalake. Raises BadInput where it is not installed."""
    return import_extra("deltalake", "delta")


def check_delta(
    storage: Storage,
    contract_schema: pa.Schema,
    run_key: str,
    earlier_keys: Sequence[str] = (),
    mode: TableMode = "append",
) -> int:
    """Hold a run that is to be planned against Delta's types, and against the table that stands at the destination.

    `earlier_keys` are those that earlier releases gave to the same call; the table must not hold a run of one either.
    Returns the highest number, in the order of runs, of those that the table holds; 0 where there is none.
    Raises DestinationUnusable before anything is scored, also where the table holds this very run already.
    """
    import_deltalake()
    if "%" in storage.url:
        message = (
            f"The address of a Delta table must not hold %, which its readers take for an escape, got {storage.url}. "
            "Choose another destination."
        )
        raise DestinationUnusable(message)
    schema = _delta_schema(contract_schema)
    table = _delta_table(storage)
    if table is None:
        return 0
    _check_columns(table, schema, storage)
    if mode == "upsert":
        _check_upsertable(table, storage)
    elif mode == "replace":
        _check_replaceable(table, storage)
    if table.transaction_version(_run_app(run_key)) is not None:
        message = (
            f"The Delta table at {storage.url} must not hold the run that is to be planned, but holds run {run_key} "
            "already, whose plan below _overnight is gone. Its rows are in the table, once: there is nothing to do. To "
            "score them again all the same, choose another destination."
        )
        raise DestinationUnusable(message)
    if held := [key for key in earlier_keys if table.transaction_version(_run_app(key)) is not None]:
        message = (
            f"The Delta table at {storage.url} must not get the rows of a call twice, but holds run {held[0]}, which "
            "an earlier release made of the same model, files and options. Its rows are in the table, once: there is "
            "nothing to do. To score them again all the same, choose another destination, or give "
            f"{give_option('delta_mode', 'replace')}."
        )
        raise DestinationUnusable(message)
    return table.transaction_version(_ORDER_APP) or 0


def _delta_schema(schema: pa.Schema) -> DeltaSchema:
    from deltalake import Schema  # noqa: PLC0415 - only for Delta output

    unfit = [f"{field.name} ({field.type})" for field in schema if not _fits_delta(field)]
    if unfit:
        message = (
            f"A Delta table must have columns of types that Delta and its readers have, got {', '.join(unfit)}. "
            'Cast them in the source, choose other key columns, or output="parquet".'
        )
        raise DestinationUnusable(message)
    return Schema.from_arrow(schema)


def _fits_delta(field: pa.Field) -> bool:
    from deltalake import Schema  # noqa: PLC0415

    if field.type == pa.uint64():
        return False
    try:
        (found,) = Schema.from_arrow(pa.schema([field])).fields
    except Exception:  # noqa: BLE001 - deltalake raises a bare Exception for a type that it does not know
        return False
    return not any(f'"{name}"' in str(found.type) for name in _UNREADABLE)


def _check_columns(table: DeltaTable, schema: DeltaSchema, storage: Storage) -> None:
    differing = describe_differences(_columns(schema), _columns(table.schema()))
    found = [differing] if differing else []
    if partitions := table.metadata().partition_columns:
        found.append(f"it is partitioned by {partitions}")
    if rules := _list_row_rules(table):
        found.append(f"it has {', '.join(rules)}, which parts are not held against")
    if found:
        cast = ", or write the source with the types of the table: in CSV all values are text" if differing else ""
        message = (
            f"The Delta table at {storage.url} must have the columns of the run, no partitions and no rules for rows, "
            f"but {'; '.join(found)}. Choose another destination{cast}."
        )
        raise DestinationUnusable(message)


def _list_row_rules(table: DeltaTable) -> list[str]:
    """Return by name what a table asks of each row that is written: constraints, generated and identity columns."""
    rules = [name for name in table.metadata().configuration if name.startswith(_CONSTRAINT)]
    return rules + [
        f"{rule} of {field.name!r}"
        for field in table.schema().fields
        for rule in field.metadata
        if rule.startswith(_COLUMN_RULES)
    ]


def _list_properties(table: DeltaTable, *names: str) -> list[str]:
    """Return which of some properties are true of a table."""
    properties = table.metadata().configuration
    return [f"{name}=true" for name in names if str(properties.get(name)).lower() == "true"]


def _check_replaceable(table: DeltaTable, storage: Storage) -> None:
    """Raise DestinationUnusable where the files of a table can't be taken out of it."""
    if unfit := _list_properties(table, _APPEND_ONLY):
        message = (
            f"A Delta table must let its files be removed where a run replaces its rows, but the one at {storage.url} "
            f"has {unfit[0]}. Take that from the table, choose another destination, or append."
        )
        raise DestinationUnusable(message)


def _check_whole_files(table: DeltaTable, storage: Storage, plan: Plan) -> None:
    """Raise DestinationUnusable where files that a run keeps may not be what the table holds of them."""
    if unread := find_unread_features(table):
        message = (
            f"A Delta table must hold its files as they were added where a run keeps some of them, but the one at "
            f"{storage.url} (version {table.version()}) has {', '.join(unread)} by now. Take that from the table "
            f"(REORG TABLE ... APPLY (PURGE) takes out deletion vectors), or delete {plan.folder} below the "
            "destination, and call again."
        )
        raise DestinationUnusable(message)


def _check_upsertable(table: DeltaTable, storage: Storage) -> None:
    """Raise DestinationUnusable where rows of a table can't be replaced by writing its files again."""
    unfit = _list_properties(table, _CHANGE_FEED, _APPEND_ONLY) + find_unread_features(table)
    unfit += [f"a file {path}" for path in _list_files(table) if "://" in path or path.startswith("/") or "%" in path][
        :1
    ]
    if unfit:
        message = (
            f"A Delta table must let its files be written again where rows are put into it by their keys, but the one "
            f"at {storage.url} (version {table.version()}) has {', '.join(unfit)}. Take that from the table (REORG "
            "TABLE ... APPLY (PURGE) takes out deletion vectors), or choose another destination."
        )
        raise DestinationUnusable(message)


def find_unread_features(table: DeltaTable) -> list[str]:
    """Return what of a table says that its Parquet files do not hold its rows as they are."""
    protocol, properties = table.protocol(), table.metadata().configuration
    features = set(protocol.reader_features or ())
    unread = sorted(features - _FEATURES_READ)
    if (mode := properties.get("delta.columnMapping.mode", "none")) != "none":
        unread.append(f"columnMapping by {mode}")
    if "deletionVectors" in features and (found := _deletion_vectors(table)):
        unread.append(f"deletionVectors ({found})")
    return unread


def _deletion_vectors(table: DeltaTable) -> str:
    """Say which deletion vectors a version has, nothing where it has none."""
    try:
        files = sum(batch.num_rows for batch in pa.RecordBatchReader.from_stream(table.deletion_vectors()))
    except Exception as error:  # noqa: BLE001 - deltalake can't say; what can't be ruled out is refused
        return f"unreadable: {shorten_error(error)}"
    return f"of {files} files" if files else ""


def _columns(schema: DeltaSchema) -> dict[str, str]:
    fields = pa.schema(schema.to_arrow())
    return {field.name: f"{field.type}{'' if field.nullable else ' not null'}" for field in fields}


def commit_delta(storage: Storage, plan: Plan, parts: Sequence[PartFooter]) -> None:
    """Add a run's parts to the Delta table in one commit, once: a second call finds the transaction.

    The transactions' versions are looked up on the very table that is written on, so that of two
    workers one commits, and the other's commit conflicts and finds it done. Raises DestinationUnusable
    where the table has other columns by now, PublishRefused where it takes no commit, or holds a run that was planned
    after this one: nothing goes back to an older run.
    """
    from deltalake.exceptions import DeltaError  # noqa: PLC0415

    first = storage.read(parts[0].path)
    schema = _delta_schema(pq.read_schema(pa.BufferReader(first)).remove_metadata())
    rewrites: Rewrites = {}
    for attempt in range(_TRIES):
        time.sleep(random.uniform(0, _PAUSE_SECONDS) * attempt)  # noqa: S311 - keeps workers from trying in step
        with _delta_errors(storage):
            table = _delta_table(storage)
            if table is not None and _holds_run(table, plan, storage):
                return
            try:
                _commit(storage, table, plan, schema, parts, rewrites)
            except (DeltaError, SourceChanged) as error:
                failed = error
            else:
                return
    message = (
        f"The Delta table at {storage.url} must take a commit, got: {failed}. Call again: the parts are all there."
    )
    raise PublishRefused(message) from failed


def _adds(files: Iterable[PartFooter | RewrittenFile]) -> list[AddAction]:
    from deltalake.transaction import AddAction  # noqa: PLC0415

    now = int(time.time() * 1000)
    return [
        AddAction(file.path, file.bytes, {}, now, data_change=True, stats=json.dumps({"numRecords": file.rows}))
        for file in files
    ]


def _removes(paths: Iterable[str], files: Mapping[str, tuple[int, int | None]]) -> list[RemoveAction]:
    from deltalake.transaction import RemoveAction  # noqa: PLC0415

    now = int(time.time() * 1000)
    return [RemoveAction(path, True, now, files[path][0], {}) for path in paths]  # noqa: FBT003 - it takes no names


def _run_app(run_key: str) -> str:
    return f"overnight-{run_key}"


def _plan_app(plan: Plan) -> str:
    return f"overnight-plan-{plan.digest}"


def _holds_run(table: DeltaTable, plan: Plan, storage: Storage) -> bool:
    """Return whether a table holds the parts of a plan; raises PublishRefused where it may not take them."""
    if table.transaction_version(_run_app(plan.key)) is not None:
        if table.transaction_version(_plan_app(plan)) is not None:
            return True
        message = (
            f"The Delta table at {storage.url} must hold run {plan.run} by the parts of this plan, but holds those of "
            "another plan of the run, whose records below _overnight were deleted, or of another release. Its rows are "
            "in the table, once, and nothing was added: there is nothing left to do."
        )
        raise PublishRefused(message)
    adds_only = plan.options.delta_mode == "append"
    held = table.transaction_version(_REPLACED_APP if adds_only else _ORDER_APP) or 0
    if held > plan.order:
        message = (
            f"A Delta table must not go back to an older run, but the one at {storage.url} holds run number {held} of "
            f"this destination, and run {plan.run} is number {plan.order}: it was planned before. Nothing was "
            f"published. To publish it as the newest, delete {plan.folder} below the destination and call again; its "
            "parts stay and are not scored again where the plan comes out the same."
        )
        raise PublishRefused(message)
    return False


def check_takes_run(storage: Storage, plan: Plan) -> None:
    """Raise PublishRefused where the Delta table at a destination will take no parts of a plan, as `commit_delta`."""
    import_deltalake()
    table = _delta_table(storage)
    if table is not None:
        _holds_run(table, plan, storage)


def _transactions(table: DeltaTable | None, plan: Plan) -> list[Transaction]:
    """Return what a commit says of itself: the run, its plan, and the run's number in the order of runs."""
    from deltalake import Transaction  # noqa: PLC0415

    numbers = [_ORDER_APP] if plan.options.delta_mode == "append" else [_ORDER_APP, _REPLACED_APP]
    held = {app: table.transaction_version(app) or 0 if table is not None else 0 for app in numbers}
    return [
        Transaction(_run_app(plan.key), 1),
        Transaction(_plan_app(plan), 1),
        *(Transaction(app, plan.order) for app in numbers if plan.order > held[app]),
    ]


def _commit(
    storage: Storage,
    table: DeltaTable | None,
    plan: Plan,
    schema: DeltaSchema,
    parts: Sequence[PartFooter],
    rewrites: Rewrites,
) -> None:
    """Commit a run to a table as it was loaded. `rewrites` is what earlier tries of an upsert found, and gets more."""
    from deltalake import CommitProperties  # noqa: PLC0415
    from deltalake.transaction import create_table_with_add_actions  # noqa: PLC0415

    held = {} if table is None else _list_files(table)
    # Delta's own overwrite would take out the parts that the table holds already.
    keeps = bool(plan.reused) or any(part.path in held for part in parts)
    swaps = plan.options.upserts or (plan.options.delta_mode == "replace" and keeps)
    properties = CommitProperties(
        custom_metadata={"overnight.run": plan.run, "overnight.model": plan.model.uri},
        app_transactions=_transactions(table, plan),
        # Tried again, delta-rs would make this creation the second version of a table that another has just created,
        # and put an upsert beside rows of the same keys that another has just added.
        max_commit_retries=0 if table is None or swaps else None,
    )
    if table is None:
        options = delta_options(storage)
        create_table_with_add_actions(
            storage.address(""), schema, _adds(parts), "error", storage_options=options, commit_properties=properties
        )
        return
    # Delta itself takes files of any columns into any table.
    _check_columns(table, schema, storage)
    if plan.options.delta_mode == "replace":
        _check_replaceable(table, storage)
    if swaps:
        if plan.options.upserts:
            _check_upsertable(table, storage)
        elif plan.reused:
            _check_whole_files(table, storage, plan)
        changes = find_changes(storage, plan, parts, held, rewrites)
        actions: list[AddAction | RemoveAction] = [*_removes(changes.removed, held), *_adds(changes.added)]
        table.create_write_transaction(actions, "append", schema, commit_properties=properties)
        return
    mode = "append" if plan.options.delta_mode == "append" else "overwrite"
    table.create_write_transaction([*_adds(parts)], mode, schema, commit_properties=properties)


@dataclass(frozen=True, slots=True, kw_only=True)
class TableState:
    """The current version of a Delta table: its files with their bytes and rows, and what it holds of one run.

    `rows` of a file is None where the log does not tell.
    """

    version: int
    files: Mapping[str, tuple[int, int | None]]
    holds_run: bool
    holds_plan: bool


def read_table(storage: Storage, plan: Plan) -> TableState | None:
    """Return the current version of the Delta table at a destination, None where there is none.

    Raises DestinationUnusable where its log does not read.
    """
    table = _delta_table(storage)
    if table is None:
        return None
    return TableState(
        version=table.version(),
        files=_list_files(table),
        holds_run=table.transaction_version(_run_app(plan.key)) is not None,
        holds_plan=table.transaction_version(_plan_app(plan)) is not None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TableFiles:
    """The files of the current version of a table that lie at a destination, and their bytes.

    `named` are all that the log names, `whole` those of them that no row was deleted from.
    """

    named: Mapping[str, int]
    whole: Mapping[str, int]
    is_there: bool = True


def list_table_files(storage: Storage) -> TableFiles:
    """Return the files of the Delta table at a destination, none where there is no table.

    None of a table with deletion vectors, or with columns under other names, counts as whole. Raises
    DestinationUnusable where its log does not read.
    """
    import_deltalake()
    table = _delta_table(storage)
    if table is None:
        return TableFiles(named={}, whole={}, is_there=False)
    named = {path: size for path, (size, _) in _list_files(table).items()}
    return TableFiles(named=named, whole={} if find_unread_features(table) else named)


def _list_files(table: DeltaTable) -> dict[str, tuple[int, int | None]]:
    """Return the files of a table with their bytes and rows, None where the log does not tell the rows."""
    actions = pa.table(table.get_add_actions(flatten=True)).to_pylist()
    return {each["path"]: (each["size_bytes"], each.get("num_records")) for each in actions}


def _delta_table(storage: Storage) -> DeltaTable | None:
    from deltalake import DeltaTable  # noqa: PLC0415
    from deltalake.exceptions import DeltaError  # noqa: PLC0415

    options = delta_options(storage)
    with _delta_errors(storage):
        if not DeltaTable.is_deltatable(storage.address(""), storage_options=options):
            return None
        try:
            return DeltaTable(storage.address(""), storage_options=options)
        except DeltaError as error:
            message = (
                f"The Delta table at {storage.url} must open, got: {error}. Repair it, or choose another destination."
            )
            raise DestinationUnusable(message) from error


@contextmanager
def _delta_errors(storage: Storage) -> Generator[None]:
    try:
        yield
    except OSError as error:
        got = " ".join(str(error).split())[:300]
        if _DENIED.search(str(error)):
            message = f"The Delta table at {storage.url} must be writable, got: {got}. Allow it, then call again."
            raise StorageDenied(message) from error
        message = f"The Delta table at {storage.url} must answer, got: {got}. Call again: the parts are all there."
        raise StorageFault(message) from error


def delta_options(storage: Storage) -> dict[str, str] | None:
    """Return what deltalake needs to read and write below a storage."""
    options = reader_options(storage)
    if not isinstance(storage, S3Storage):
        return options
    from boto3 import Session  # noqa: PLC0415 - only for S3

    found = Session().get_credentials()
    options = {**(options or {}), "conditional_put": "etag"}
    if found is not None:
        frozen = found.get_frozen_credentials()
        options |= {"aws_access_key_id": frozen.access_key or "", "aws_secret_access_key": frozen.secret_key or ""}
        options |= {"aws_session_token": frozen.token} if frozen.token else {}
    return options
