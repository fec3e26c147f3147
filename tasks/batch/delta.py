"""Delta Lake as the output: the same parts, added to a table in one commit."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from serving.errors import DestinationUnusable, PublishRefused
from tasks.batch.parts import PartFooter
from tasks.batch.plan import Plan
from tasks.storage import LocalStorage, Storage, s3_options

if TYPE_CHECKING:
    from deltalake import DeltaTable

_TRIES = 5


def check_delta(storage: Storage, contract_schema: pa.Schema) -> None:
    """Hold the columns of a Delta table that stands at the destination against the run's.

    Raises DestinationUnusable before anything is scored.
    """
    table = _delta_table(storage)
    if table is None:
        return
    from deltalake import Schema  # noqa: PLC0415 - only for Delta output

    ours = {field.name: str(field.type) for field in Schema.from_arrow(contract_schema).fields}
    theirs = {field.name: str(field.type) for field in table.schema().fields}
    if ours != theirs:
        message = (
            f"The Delta table at {storage.url} must have the run's columns {ours}, got {theirs}. "
            "Choose another destination."
        )
        raise DestinationUnusable(message)


def commit_delta(storage: Storage, plan: Plan, parts: Sequence[PartFooter]) -> None:
    """Add a run's parts to the Delta table in one commit, once: a second call finds the transaction.

    The transaction's version is looked up on the very table that is written on, so that of two
    workers one commits, and the other's commit conflicts and finds it done.
    """
    from deltalake import CommitProperties, Transaction  # noqa: PLC0415
    from deltalake.exceptions import CommitFailedError, DeltaError  # noqa: PLC0415
    from deltalake.transaction import AddAction, create_table_with_add_actions  # noqa: PLC0415

    app = f"overnight-{plan.key}"
    now = int(time.time() * 1000)
    adds = [
        AddAction(part.path, part.bytes, {}, now, data_change=True, stats=json.dumps({"numRecords": part.rows}))
        for part in parts
    ]
    schema = _part_schema(storage, parts)
    properties = CommitProperties(
        custom_metadata={"overnight.run": plan.run, "overnight.model": plan.model.uri},
        app_transactions=[Transaction(app, 1)],
    )
    for _ in range(_TRIES):
        table = _delta_table(storage)
        try:
            if table is None:
                create_table_with_add_actions(
                    storage.url,
                    schema,
                    adds,
                    "error",
                    storage_options=_delta_options(storage),
                    commit_properties=properties,
                )
                return
            if table.transaction_version(app) is not None:
                return
            mode = "append" if plan.options.delta_mode == "append" else "overwrite"
            table.create_write_transaction([*adds], mode, schema, commit_properties=properties)
        except (CommitFailedError, DeltaError) as error:
            failed = error
            continue
        return
    message = (
        f"The Delta table at {storage.url} must take a commit, got: {failed}. Call again: the parts are all there."
    )
    raise PublishRefused(message) from failed


def _part_schema(storage: Storage, parts: Sequence[PartFooter]) -> pa.Schema:
    """Return the schema of a run's parts, as its first part has it."""
    data = storage.read(parts[0].path)
    return pq.read_schema(pa.BufferReader(data)).remove_metadata()


def _delta_table(storage: Storage) -> DeltaTable | None:
    from deltalake import DeltaTable  # noqa: PLC0415

    options = _delta_options(storage)
    if not DeltaTable.is_deltatable(storage.url, storage_options=options):
        return None
    return DeltaTable(storage.url, storage_options=options)


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
