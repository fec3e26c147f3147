"""Delta Lake as the output: the same parts, added to a table in one commit."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from serving.errors import DestinationUnusable, PublishRefused, StorageDenied, StorageFault
from tasks.batch.parts import PartFooter
from tasks.batch.plan import Plan
from tasks.storage import LocalStorage, Storage, s3_options

if TYPE_CHECKING:
    from deltalake import DeltaTable
    from deltalake import Schema as DeltaSchema
    from deltalake.transaction import AddAction

_TRIES = 5
# Delta's readers don't have them, though its schema does.
_UNREADABLE = ("timestamp_nanos", "timestamp_nanos_ntz", "void")
_DENIED = re.compile("AccessDenied|lacked the necessary privileges|[Pp]ermission denied|Read-only file system")


def check_delta(storage: Storage, contract_schema: pa.Schema) -> None:
    """Hold a run's columns against Delta's types, and against the table that stands at the destination.

    Raises DestinationUnusable before anything is scored.
    """
    if "%" in storage.url:
        message = (
            f"The address of a Delta table must not hold %, which its readers take for an escape, got {storage.url}. "
            "Choose another destination."
        )
        raise DestinationUnusable(message)
    schema = _delta_schema(contract_schema)
    table = _delta_table(storage)
    if table is not None:
        _must_match(table, schema, storage)


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


def _must_match(table: DeltaTable, schema: DeltaSchema, storage: Storage) -> None:
    ours, theirs = _columns(schema), _columns(table.schema())
    partitions = table.metadata().partition_columns
    if ours != theirs or partitions:
        told = f"{theirs}, partitioned by {partitions}" if partitions else theirs
        message = (
            f"The Delta table at {storage.url} must have the run's columns {ours}, unpartitioned, got {told}. "
            "Choose another destination."
        )
        raise DestinationUnusable(message)


def _columns(schema: DeltaSchema) -> dict[str, str]:
    return {field.name: f"{field.type}{'' if field.nullable else ' not null'}" for field in schema.fields}


def commit_delta(storage: Storage, plan: Plan, parts: Sequence[PartFooter]) -> None:
    """Add a run's parts to the Delta table in one commit, once: a second call finds the transaction.

    The transaction's version is looked up on the very table that is written on, so that of two
    workers one commits, and the other's commit conflicts and finds it done. Raises DestinationUnusable
    where the table has other columns by now, PublishRefused where it takes no commit.
    """
    from deltalake.exceptions import DeltaError  # noqa: PLC0415

    schema = _delta_schema(_part_schema(storage, parts))
    adds = _adds(parts)
    for _ in range(_TRIES):
        with _delta_errors(storage):
            table = _delta_table(storage)
            if table is not None and table.transaction_version(_app(plan)) is not None:
                return
            try:
                _commit(storage, table, plan, schema, adds)
            except DeltaError as error:
                failed = error
            else:
                return
    message = (
        f"The Delta table at {storage.url} must take a commit, got: {failed}. Call again: the parts are all there."
    )
    raise PublishRefused(message) from failed


def _adds(parts: Sequence[PartFooter]) -> list[AddAction]:
    from deltalake.transaction import AddAction  # noqa: PLC0415

    now = int(time.time() * 1000)
    return [
        AddAction(part.path, part.bytes, {}, now, data_change=True, stats=json.dumps({"numRecords": part.rows}))
        for part in parts
    ]


def _app(plan: Plan) -> str:
    return f"overnight-{plan.key}"


def _commit(storage: Storage, table: DeltaTable | None, plan: Plan, schema: DeltaSchema, adds: list[AddAction]) -> None:
    from deltalake import CommitProperties, Transaction  # noqa: PLC0415
    from deltalake.transaction import create_table_with_add_actions  # noqa: PLC0415

    properties = CommitProperties(
        custom_metadata={"overnight.run": plan.run, "overnight.model": plan.model.uri},
        app_transactions=[Transaction(_app(plan), 1)],
        # Tried again, delta-rs would make this creation the second version of a table that another has just created.
        max_commit_retries=0 if table is None else None,
    )
    if table is None:
        options = _delta_options(storage)
        create_table_with_add_actions(
            storage.url, schema, adds, "error", storage_options=options, commit_properties=properties
        )
        return
    # Delta itself takes files of any columns into any table.
    _must_match(table, schema, storage)
    mode = "append" if plan.options.delta_mode == "append" else "overwrite"
    table.create_write_transaction([*adds], mode, schema, commit_properties=properties)


def _part_schema(storage: Storage, parts: Sequence[PartFooter]) -> pa.Schema:
    """Return the schema of a run's parts, as its first part has it."""
    data = storage.read(parts[0].path)
    return pq.read_schema(pa.BufferReader(data)).remove_metadata()


def _delta_table(storage: Storage) -> DeltaTable | None:
    from deltalake import DeltaTable  # noqa: PLC0415
    from deltalake.exceptions import DeltaError  # noqa: PLC0415

    options = _delta_options(storage)
    with _delta_errors(storage):
        if not DeltaTable.is_deltatable(storage.url, storage_options=options):
            return None
        try:
            return DeltaTable(storage.url, storage_options=options)
        except DeltaError as error:
            message = (
                f"The Delta table at {storage.url} must open, got: {error}. Mend it, or choose another destination."
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


def _delta_options(storage: Storage) -> dict[str, str] | None:
    if isinstance(storage, LocalStorage):
        return None
    from boto3 import Session  # noqa: PLC0415 - only for S3

    found = Session().get_credentials()
    options = {**s3_options(), "conditional_put": "etag"}
    if found is not None:
        frozen = found.get_frozen_credentials()
        options |= {"aws_access_key_id": frozen.access_key or "", "aws_secret_access_key": frozen.secret_key or ""}
        options |= {"aws_session_token": frozen.token} if frozen.token else {}
    return options
