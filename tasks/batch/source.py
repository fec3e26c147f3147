"""The source of a run, pinned: loose files by a listing, a table by the log that says which files are its own."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pyarrow as pa

from serving.errors import NoCompleteRun, SourceChanged, SourceFormat, SourceNotFound
from tasks.batch.dataset import Snapshot, SourceFile, check_outside_source, parse_hive_values, pin_entries, pin_files
from tasks.batch.delta import delta_options
from tasks.batch.manifest import find_damaged_parts, find_manifest, find_newest_run
from tasks.storage import Entry, Storage, join_selections, open_storage, select

if TYPE_CHECKING:
    from deltalake import DeltaTable


import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from serving.errors import StorageDenied
from tasks.storage import LocalStorage, Selection

# With these a table's Parquet files alone say what it holds, as long as no file has a deletion vector and no column a
# name of its own in the files; both are looked at.
_FEATURES_READ = {"timestampNtz", "vacuumProtocolCheck", "v2Checkpoint", "deletionVectors", "columnMapping"}

_SOURCES_SHOWN = 3


def pin_source(source: str | Sequence[str], destination: str, *, csv: bool = False) -> Snapshot:
    """Pin what a source holds now: loose files, the current version of a Delta table, or an Overnight run.

    A folder that holds a Delta table is read through the table's log, and an Overnight destination by the manifest of
    its newest complete run; `DESTINATION/run=NAME` is that run. Names that begin with `_` or `.` are passed over.
    Several addresses are those of loose files, in one store. With `csv` files of unknown names are CSV.

    Raises:
        SourceNotFound: No file is there.
        SourceFormat: The files are of several formats, of none that is known, or those of a table that can't be read
            through its log.
        NoCompleteRun: No run of the destination, or not the one named, is complete.
        SourceChanged: A file that a log lists is gone.
        BadInput: The destination's parts would be taken for the source's files.
    """
    if not isinstance(source, str):
        return _pin_several(source, destination, csv=csv)
    selected = select(source)
    log = find_commit_log(selected, source)
    check_outside_source(selected, destination, source)
    if log is None:
        return pin_files(selected, source, csv=csv)
    return _read_delta(log) if log.kind == "Delta" else _read_run(log)


def _pin_several(sources: Sequence[str], destination: str, *, csv: bool) -> Snapshot:
    """Pin the loose files that several addresses select, in the order of their paths."""
    if len(sources) == 1:
        return pin_source(sources[0], destination, csv=csv)
    selections = []
    for source in sources:
        selected = select(source)
        if (log := find_commit_log(selected, source)) is not None:
            message = (
                f"A list of sources must be one of loose files, got the {log.kind} table {log.table} in it, which its "
                "own log describes. Score it in a call of its own."
            )
            raise SourceFormat(message)
        check_outside_source(selected, destination, source)
        if not selected.entries:
            # Raises the error that says which of them is not there.
            pin_files(selected, source, csv=csv)
        selections.append(selected)
    if not selections:
        message = "The source must name at least one file, got an empty list. Name files, folders or globs."
        raise SourceNotFound(message)
    more = f" and {len(sources) - _SOURCES_SHOWN} more" if len(sources) > _SOURCES_SHOWN else ""
    return pin_files(join_selections(selections), f"{', '.join(sources[:_SOURCES_SHOWN])}{more}", csv=csv)


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
    if damaged := find_damaged_parts(storage, manifest):
        message = (
            f"Every part of run {manifest.run} at {log.table} must be as it was published, but {len(damaged)} are gone "
            f"or of another size, the first {damaged[0]}. Repeat the call that made the run: it scores them again."
        )
        raise SourceChanged(message)
    sizes = {part.path: part.bytes for part in manifest.parts}
    files = _pin_listed_files(storage, sizes, f"the manifest of run {manifest.run}")
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
    _check_newest(storage)
    table = _open_delta(storage)
    _check_plain_files(table, storage.url)
    version = str(table.version())
    actions = pa.table(table.get_add_actions(flatten=True)).to_pylist()
    columns = table.metadata().partition_columns
    kinds = {field.name: str(field.type) for field in table.schema().fields}
    by_path: dict[str, dict[str, str | None]] = {}
    for action in actions:
        path = _path_below(str(action["path"]), storage.url)
        values = {name: action[f"partition.{name}"] for name in columns}
        by_path[path] = {name: _partition_text(name, value, path, kinds[name]) for name, value in values.items()}
    sizes = {_path_below(str(action["path"]), storage.url): int(action["size_bytes"]) for action in actions}
    files = _pin_listed_files(storage, sizes, f"version {version} of the Delta table")
    return Snapshot(
        root=storage.url,
        format="parquet",
        files=tuple(SourceFile(path=e.path, size=e.size, tag=e.tag, partitions=by_path[e.path]) for e in files),
        version=version,
    )


def _check_newest(storage: Storage) -> None:
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
            f"{_first_line(error)}. Repair the table, or write what it holds to a folder of Parquet and name that."
        )
        raise SourceFormat(message) from error


def _check_plain_files(table: DeltaTable, address: str) -> None:
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


def _partition_text(name: str, value: Any, path: str, kind: str) -> str | None:
    """Return the value of a partition in the text form that its log has."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or type(value) is dt.date:
        return str(value)
    # The log's own text is not to be had from deltalake, and there are several for one such value.
    found = parse_hive_values(path).get(name)
    if found is None:
        message = (
            f"A partition of a Delta table must be text, a whole number, a date or a truth value, or be written in the "
            f"path, got {name} ({kind}) of {path}. Write what the table holds to a folder of Parquet, and name that."
        )
        raise SourceFormat(message)
    return found


def _pin_listed_files(storage: Storage, sizes: dict[str, int], listed_by: str) -> list[Entry]:
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


LogKind = Literal["Delta", "Iceberg", "Hudi", "Spark", "Overnight"]

_LOGS: dict[LogKind, tuple[str, re.Pattern[str]]] = {
    "Overnight": ("_overnight", re.compile(".+")),
    "Delta": ("_delta_log", re.compile(".+")),
    "Iceberg": ("metadata", re.compile(r"[^/]+\.metadata\.json(?:\.gz)?|version-hint\.text")),
    "Hudi": (".hoodie", re.compile(".+")),
    "Spark": ("_spark_metadata", re.compile(".+")),
}
_RUN = re.compile("run=[^/]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitLog:
    """The log that says which files a source consists of: its kind, its table's address, and which run is asked for."""

    kind: LogKind
    table: str
    run: str | None = None


def find_commit_log(selected: Selection, source: str) -> CommitLog | None:
    """Return the commit log that a source is to be read through, None where it is loose files.

    A source that is one file by its name is that file, wherever it lies. Raises SourceFormat where files of a table
    would be read past its log: by a glob, from a folder inside it or above it, or where its kind is not supported.
    """
    if not selected.globs:
        return None
    root = selected.storage.url
    whole = selected.globs == ("**",)
    if above := _log_above(selected.storage):
        if above.run is not None and whole:
            return above
        raise _make_log_error(source, above)
    logs = _logs_below(selected)
    if whole and (kinds := {kind for kind, folder in logs if not folder}):
        log = CommitLog(kind="Delta" if "Delta" in kinds else min(kinds), table=root)
        if log.kind in ("Delta", "Overnight"):
            return log
        raise _make_log_error(source, log)
    for kind, folder in logs:
        inside = re.compile(re.escape(f"{folder}/" if folder else "") + ("run=[^/]+/" if kind == "Overnight" else ""))
        if any(inside.match(entry.path) for entry in selected.entries):
            raise _make_log_error(source, CommitLog(kind=kind, table=selected.storage.address(folder)))
    return None


def _logs_below(selected: Selection) -> list[tuple[LogKind, str]]:
    """Return kind and folder of each log at the root of a selection or below it."""
    storage = selected.storage
    found = dict.fromkeys(_logs_among(entry.path for entry in selected.listed))
    if isinstance(storage, LocalStorage) and "**" not in selected.globs:
        # The listing ends where the files are, and their logs lie a level deeper.
        for folder in sorted({folder for entry in selected.entries for folder in _folders_above(entry.path)}):
            found |= dict.fromkeys((kind, folder) for kind in _kinds_at(storage, folder))
    return sorted(found)


def _logs_among(paths: Iterable[str]) -> Iterable[tuple[LogKind, str]]:
    kinds = {folder: (kind, pattern) for kind, (folder, pattern) in _LOGS.items()}
    for path in paths:
        parts = path.split("/")
        for at, name in enumerate(parts[:-1]):
            if name in kinds and kinds[name][1].fullmatch("/".join(parts[at + 1 :])):
                yield kinds[name][0], "/".join(parts[:at])
                break


def _folders_above(path: str) -> list[str]:
    parts = path.split("/")[:-1]
    return ["/".join(parts[:at]) for at in range(len(parts) + 1)]


def _kinds_at(storage: Storage, folder: str, *, but: LogKind | None = None) -> list[LogKind]:
    """Return the kinds of the logs that a folder itself has, but one that is not looked for."""
    below = f"{folder}/" if folder else ""
    found: list[LogKind] = []
    for kind, (name, pattern) in _LOGS.items():
        if kind == but:
            continue
        # The runs of a destination have folders of their own below its log's.
        entries = storage.entries(f"{below}{name}", depth=2 if kind == "Overnight" else 1)
        if any(pattern.fullmatch(entry.path.removeprefix(f"{below}{name}/")) for entry in entries):
            found.append(kind)
    return found


def _log_above(storage: Storage) -> CommitLog | None:
    """Return the nearest log of a folder that a root lies in; with the run where the root is the folder of one."""
    for address, inside in _ancestors(storage):
        ancestor = open_storage(address)
        # Credentials may be for the source alone: what lies above it is then none of its readers' business.
        with suppress(StorageDenied):
            first = inside.split("/")[0]
            # What else lies in a destination is none of its runs'.
            of_runs = _RUN.fullmatch(first) or first == _LOGS["Overnight"][0]
            kinds = _kinds_at(ancestor, "", but=None if of_runs else "Overnight")
            if "Overnight" in kinds:
                run = first.removeprefix("run=") if _RUN.fullmatch(inside) and "Delta" not in kinds else None
                return CommitLog(kind="Overnight", table=address, run=run)
            if others := sorted(set(kinds) - {"Overnight"}):
                return CommitLog(kind=others[0], table=address)
    return None


def _ancestors(storage: Storage) -> Iterable[tuple[str, str]]:
    """Yield each folder above a root, the nearest first, and the path of the root below it."""
    if isinstance(storage, LocalStorage):
        # A link may lead into a table.
        for root in dict.fromkeys((Path(storage.url), Path(storage.url).resolve())):
            for above in root.parents:
                yield str(above), root.relative_to(above).as_posix()
        return
    scheme, _, place = storage.url.partition("://")
    bucket, *parts = place.split("/")
    for at in range(len(parts) - 1, -1, -1):
        yield "/".join([f"{scheme}://{bucket}", *parts[:at]]), "/".join(parts[at:])


def _make_log_error(source: str, log: CommitLog) -> SourceFormat:
    if log.kind in ("Delta", "Overnight"):
        noun, more = "table", ""
        if log.kind == "Overnight":
            noun, more = "destination", f", or one of its runs as {log.table}/run=NAME"
        return SourceFormat(
            f"Which files belong to a {noun} must come from its log, since its folder holds others too, but {source} "
            f"takes files of the {log.kind} {noun} {log.table} past its log. Name {log.table} itself{more}, or one "
            "file by its full name."
        )
    return SourceFormat(
        f"Which files belong to a table must come from its log, and logs of {log.kind} are not read yet, but {source} "
        f"takes files of the {log.kind} table {log.table}. Write what the table holds to a folder of Parquet files or "
        "to a Delta table, and name that."
    )
