"""A Delta table as a source: the files of one version, pinned, with the partitions that its log gives them."""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pyarrow as pa

from serving.errors import BadInput, SourceFormat, shorten_error
from serving.option_words import name_option
from tasks.batch.column_types import pack_schema, pack_types
from tasks.batch.dataset import Snapshot, SourceFile, map_parallel, pin_listed_files
from tasks.batch.delta import delta_options, find_unread_features, import_deltalake
from tasks.batch.hive_partitions import parse_hive_values
from tasks.batch.join_types import has_zone
from tasks.batch.struct_fields import list_fields
from tasks.storage import Storage

if TYPE_CHECKING:
    from deltalake import DeltaTable


_LOG = "_delta_log"
_COMMIT = re.compile(rf"{_LOG}/(\d{{20}})\.json")


def pin_delta(
    storage: Storage,
    columns: Sequence[str] | None = None,
    *,
    version: int | None = None,
    timestamp: dt.datetime | None = None,
) -> Snapshot:
    """Pin the files of one version of a table: the current one, one by its number, or that of a time.

    The snapshot states the types that the table's schema gives the columns that are used, all of them where none are
    given; and those of its partitions. Timestamps of a zone and decimals are text where they are partitions.

    Raises:
        BadInput: The table has no such version any more.
        SourceFormat: The Parquet files alone do not say what the table holds, or its log can't be read.
        SourceChanged: A file of the version is gone.
    """
    table = _open_delta(storage)
    _go_to_version(table, storage, version, timestamp)
    _check_plain_files(table, storage.url)
    told = str(table.version())
    actions = pa.table(table.get_add_actions(flatten=True)).to_pylist()
    parted = table.metadata().partition_columns
    schema = pa.schema(table.schema().to_arrow())
    kinds = {field.name: field.type for field in schema}
    by_path: dict[str, dict[str, str | None]] = {}
    for action in actions:
        path = _path_below(str(action["path"]), storage.url)
        values = {name: action[f"partition.{name}"] for name in parted}
        by_path[path] = {name: _partition_text(name, value, path, kinds[name]) for name, value in values.items()}
    read_as = {name: kinds[name] if _has_one_form(kinds[name]) else pa.string() for name in parted}
    schema = pa.schema([field.with_type(read_as.get(field.name, field.type)) for field in schema])
    types = {
        field.name: field.type
        for field in list_fields(schema)
        if field.name not in parted and (columns is None or field.name in columns)
    }
    sizes = {_path_below(str(action["path"]), storage.url): int(action["size_bytes"]) for action in actions}
    files = pin_listed_files(storage, sizes, f"version {told} of the Delta table")
    return Snapshot(
        root=storage.url,
        format="parquet",
        files=tuple(SourceFile(path=e.path, size=e.size, tag=e.tag, partitions=by_path[e.path]) for e in files),
        version=told,
        empty_schema="" if files else pack_schema(schema),
        types=pack_types(types),
        partition_types={name: str(kind) for name, kind in read_as.items() if kind != pa.string()},
    )


def _has_one_form(kind: pa.DataType) -> bool:
    """Return whether a value of a type has one form as text, so that a partition of it can be read in its type."""
    return bool(pa.types.is_primitive(kind)) and not has_zone(kind)


def _open_delta(storage: Storage) -> DeltaTable:
    import_deltalake()
    from deltalake import DeltaTable  # noqa: PLC0415 - only for Delta sources

    try:
        return DeltaTable(storage.url, storage_options=delta_options(storage))
    except Exception as error:
        message = (
            f"The log of the Delta table at {storage.url} must be one that can be read here, got: "
            f"{shorten_error(error)}. Repair the table, or write what it holds to a folder of Parquet and name that."
        )
        raise SourceFormat(message) from error


def _go_to_version(table: DeltaTable, storage: Storage, version: int | None, timestamp: dt.datetime | None) -> None:
    """Load the version that is asked for into a table. Raises BadInput where its log does not have it."""
    if version is None and timestamp is None:
        return
    newest = table.version()
    wanted, got = f"version {version}", "it does not go that far back"
    if timestamp is not None:
        wanted = f"a version of {timestamp.isoformat()} or before"
        version = _find_version(storage, timestamp)
    try:
        if version is not None:
            table.load_as_version(version)
            if table.version() == version:
                return
    except Exception as error:  # noqa: BLE001 - deltalake has several errors for a version that is not there
        got = shorten_error(error)
    message = (
        f"The log of the Delta table at {storage.url} must still have {wanted}, but its newest version is {newest}, "
        f"and: {got}. Name a version that it has."
    )
    raise BadInput(message)


def _find_version(storage: Storage, timestamp: dt.datetime) -> int | None:
    """Return the version that was the current one at a time, by what the commits say of themselves; None before all.

    deltalake itself goes by the times of the log's files, which a copy changes, and which stores round. Its history
    lacks commits that say nothing of themselves, and numbers the others as if these were not there.

    Raises BadInput where a commit that says no time may have made the version.
    """
    commits = {int(found[1]): entry.path for entry in storage.entries(_LOG) if (found := _COMMIT.fullmatch(entry.path))}
    versions = sorted(commits)
    times = map_parallel(storage, lambda version: _read_commit_time(storage, commits[version]), versions)
    current: int | None = None
    latest, silent = 0, list[int]()
    for version, time in zip(versions, times, strict=True):
        if time is None:
            silent.append(version)
            continue
        # A writer's clock that is behind does not make its version an earlier one.
        latest = max(latest, time)
        if latest > timestamp.timestamp() * 1000:
            break
        current, silent = version, []
    if silent:
        message = (
            f"The commits of the Delta table at {storage.url} must say when they were made for its version of "
            f"{timestamp.isoformat()} to be known, but version {silent[0]} does not. Give the version itself, by "
            f"{name_option('source_version')}."
        )
        raise BadInput(message)
    return current


def _read_commit_time(storage: Storage, path: str) -> int | None:
    """Return when a commit says that it was made, in milliseconds of Unix time; None where it says nothing."""
    # One that was cleaned away since it was listed says nothing either.
    for line in (storage.read(path) or b"").splitlines():
        if b'"commitInfo"' in line and (told := json.loads(line).get("commitInfo")):
            time = told.get("inCommitTimestamp") or told.get("timestamp")
            return None if time is None else int(time)
    return None


def _check_plain_files(table: DeltaTable, address: str) -> None:
    """Raise SourceFormat where a table's Parquet files alone do not say what the table holds."""
    if unread := find_unread_features(table):
        message = (
            f"The Parquet files of a Delta table must hold its rows as they are, but the table {address} (version "
            f"{table.version()}) has {', '.join(unread)}, which can't be read yet. Rewrite it without (REORG TABLE ... "
            "APPLY (PURGE) takes out deletion vectors), or write what it holds to a folder of Parquet and name that."
        )
        raise SourceFormat(message)


def _path_below(path: str, address: str) -> str:
    """Return the path of a file below its table, as the log's escaped one means it."""
    if "://" in path or path.startswith("/"):
        message = (
            f"The files of a Delta table must lie below it, got {path} in the log of {address}: a clone that shares "
            "the files of another table can't be read yet. Make a deep clone, and name that."
        )
        raise SourceFormat(message)
    return unquote(path)


def _partition_text(name: str, value: Any, path: str, kind: pa.DataType) -> str | None:
    """Return the value of a partition as a text, which Arrow parses."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float) or (isinstance(value, dt.date) and getattr(value, "tzinfo", None) is None):
        return str(value)
    # The log's own text is not to be had from deltalake, and there are several for one such value.
    found = parse_hive_values(path).get(name)
    if found is None:
        message = (
            "A partition of a Delta table must be text, a number, a date, a time without a zone or a truth value, or "
            f"be written in the path, got {name} ({kind}) of {path}. Write what the table holds to a folder of "
            "Parquet, and name that."
        )
        raise SourceFormat(message)
    return found
