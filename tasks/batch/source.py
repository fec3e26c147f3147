"""The source of a run, pinned: loose files by a listing, a table by the log that says which files are its own."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pyarrow as pa

from serving.errors import NoCompleteRun, SourceChanged, SourceFormat
from tasks.batch.commit_log import CommitLog, find_commit_log
from tasks.batch.dataset import Snapshot, SourceFile, hive_values, must_lie_outside, pin_entries, pin_files
from tasks.batch.delta import delta_options
from tasks.batch.publish import find_damage, find_manifest, find_newest_run
from tasks.storage import Entry, Storage, open_storage, select

if TYPE_CHECKING:
    from deltalake import DeltaTable

# With these a table's Parquet files alone say what it holds, as long as no file has a deletion vector and no column a
# name of its own in the files; both are looked at.
_FEATURES_READ = {"timestampNtz", "vacuumProtocolCheck", "v2Checkpoint", "deletionVectors", "columnMapping"}


def pin_source(source: str, destination: str) -> Snapshot:
    """Pin what a source holds now: loose files, the current version of a Delta table, or an Overnight run.

    A folder that holds a Delta table is read through the table's log, and an Overnight destination by the manifest of
    its newest complete run; `DESTINATION/run=NAME` is that run. Names that begin with `_` or `.` are passed over.

    Raises:
        SourceNotFound: No file is there.
        SourceFormat: The files are of several formats, of none that is known, or those of a table that can't be read
            through its log.
        NoCompleteRun: No run of the destination, or not the one named, is complete.
        SourceChanged: A file that a log lists is gone.
        BadInput: The destination's parts would be taken for the source's files.
    """
    selected = select(source, open_storage)
    log = find_commit_log(selected, source)
    must_lie_outside(selected, destination, source)
    if log is None:
        return pin_files(selected, source)
    return _read_delta(log) if log.kind == "Delta" else _read_run(log)


def _read_run(log: CommitLog) -> Snapshot:
    """Pin the parts of a published run, exactly those that its manifest lists."""
    storage = open_storage(log.table)
    manifest = find_manifest(storage, log.run) if log.run else find_newest_run(storage)
    if manifest is None:
        wanted = f"Run {log.run}" if log.run else "A run"
        message = (
            f"{wanted} of the Overnight destination {log.table} must be complete to be read as a source, but none is. "
            "Wait for it or resume it, or name loose files beside it by a glob."
        )
        raise NoCompleteRun(message)
    if manifest.output == "delta":
        message = (
            f"Run {manifest.run} went to the Delta table at {log.table}, and the table's log must say what it holds of "
            f"the run, but that log is gone. Put {log.table}/_delta_log back, or choose another source."
        )
        raise SourceFormat(message)
    if damaged := find_damage(storage, manifest):
        message = (
            f"Every part of run {manifest.run} at {log.table} must be as it was published, but {len(damaged)} are gone "
            f"or of another size, the first {damaged[0]}. Repeat the call that made the run: it scores them again."
        )
        raise SourceChanged(message)
    sizes = {part.path: part.bytes for part in manifest.parts}
    files = _pinned(storage, sizes, f"the manifest of run {manifest.run}")
    # The folder of a run has the form of a partition, and is none.
    return Snapshot(
        root=storage.url,
        format="parquet",
        files=tuple(SourceFile(path=e.path, size=e.size, tag=e.tag, partitions={}) for e in files),
        version=manifest.run,
    )


def _read_delta(log: CommitLog) -> Snapshot:
    """Pin the files of the current version of a Delta table, with the partitions that its log gives them."""
    storage = open_storage(log.table)
    _must_be_newest(storage)
    table = _open_delta(storage)
    _must_be_plain(table, storage.url)
    version = str(table.version())
    actions = pa.table(table.get_add_actions(flatten=True)).to_pylist()
    columns = table.metadata().partition_columns
    kinds = {field.name: str(field.type) for field in table.schema().fields}
    by_path: dict[str, dict[str, str | None]] = {}
    for action in actions:
        path = _path_below(str(action["path"]), storage.url)
        values = {name: action[f"partition.{name}"] for name in columns}
        by_path[path] = {name: _text_of(name, value, path, kinds[name]) for name, value in values.items()}
    sizes = {_path_below(str(action["path"]), storage.url): int(action["size_bytes"]) for action in actions}
    files = _pinned(storage, sizes, f"version {version} of the Delta table")
    return Snapshot(
        root=storage.url,
        format="parquet",
        files=tuple(SourceFile(path=e.path, size=e.size, tag=e.tag, partitions=by_path[e.path]) for e in files),
        version=version,
    )


def _must_be_newest(storage: Storage) -> None:
    """Raise SourceFormat where a destination has a Delta table and a newer run that did not go into it."""
    newest = find_newest_run(storage)
    if newest is not None and newest.output != "delta":
        message = (
            f"A source must have one log, got a Delta table at {storage.url} and the newer run {newest.run} in the "
            "same folder, which is not in the table. Give each of the two a destination of its own."
        )
        raise SourceFormat(message)


def _open_delta(storage: Storage) -> DeltaTable:
    from deltalake import DeltaTable  # noqa: PLC0415 - only for Delta sources

    try:
        return DeltaTable(storage.url, storage_options=delta_options(storage))
    except Exception as error:
        message = (
            f"The log of the Delta table at {storage.url} must be one that can be read here, got: "
            f"{_first_line(error)}. Mend the table, or write what it holds to a folder of Parquet and name that."
        )
        raise SourceFormat(message) from error


def _must_be_plain(table: DeltaTable, address: str) -> None:
    """Raise SourceFormat where a table's Parquet files alone do not say what the table holds."""
    protocol, properties = table.protocol(), table.metadata().configuration
    features = set(protocol.reader_features or ())
    unread = sorted(features - _FEATURES_READ)
    if (mode := properties.get("delta.columnMapping.mode", "none")) != "none":
        unread.append(f"columnMapping by {mode}")
    if "deletionVectors" in features and (found := _deletion_vectors(table)):
        unread.append(f"deletionVectors ({found})")
    if unread:
        message = (
            f"The Parquet files of a Delta table must hold its rows as they are, but the table {address} (version "
            f"{table.version()}) has {', '.join(unread)}, which can't be read yet. Rewrite it without (REORG TABLE ... "
            "APPLY (PURGE) takes out deletion vectors), or write what it holds to a folder of Parquet and name that."
        )
        raise SourceFormat(message)


def _deletion_vectors(table: DeltaTable) -> str:
    """Say which deletion vectors a version has, nothing where it has none."""
    try:
        files = sum(batch.num_rows for batch in pa.RecordBatchReader.from_stream(table.deletion_vectors()))
    except Exception as error:  # noqa: BLE001 - deltalake can't say; what can't be ruled out is refused
        return f"unreadable: {_first_line(error)}"
    return f"of {files} files" if files else ""


def _path_below(path: str, address: str) -> str:
    """Return the path of a file below its table, as the log's escaped one means it."""
    if "://" in path or path.startswith("/"):
        message = (
            f"The files of a Delta table must lie below it, got {path} in the log of {address}: a clone that shares "
            "the files of another table can't be read yet. Make a deep clone, and name that."
        )
        raise SourceFormat(message)
    return unquote(path)


def _text_of(name: str, value: Any, path: str, kind: str) -> str | None:
    """Return the value of a partition in the text form that its log has."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or type(value) is dt.date:
        return str(value)
    # The log's own text is not to be had from deltalake, and there are several for one such value.
    found = hive_values(path).get(name)
    if found is None:
        message = (
            f"A partition of a Delta table must be text, a whole number, a date or a truth value, or be written in the "
            f"path, got {name} ({kind}) of {path}. Write what the table holds to a folder of Parquet, and name that."
        )
        raise SourceFormat(message)
    return found


def _pinned(storage: Storage, sizes: dict[str, int], listed_by: str) -> list[Entry]:
    """Return the pinned entries of the files that a log lists, sorted by path. Raises SourceChanged by file name."""
    there = {entry.path: entry for entry in storage.entries()}
    wrong = [path for path, size in sizes.items() if path not in there or there[path].size != size]
    if wrong:
        message = (
            f"Every file that {listed_by} at {storage.url} lists must be there as it was written, but {len(wrong)} are "
            f"gone or of another size, the first {wrong[0]}. Call again: a newer version may have taken its place; if "
            "this stays, restore the files."
        )
        raise SourceChanged(message)
    return pin_entries(storage, [there[path] for path in sorted(sizes)])


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")
