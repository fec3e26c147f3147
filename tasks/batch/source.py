"""The source of a run, pinned: loose files by a listing, a table by the log that says which files are its own."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from serving.errors import BadInput, NoCompleteRun, SourceChanged, SourceFormat, SourceNotFound, StorageDenied
from serving.extras import import_extra
from serving.option_words import name_option
from tasks.batch.dataset import Snapshot, SourceFile, check_outside_source, pin_files, pin_listed_files
from tasks.batch.delta_source import pin_delta
from tasks.batch.manifest import find_damaged_parts, find_manifest, find_newest_run
from tasks.storage import (
    LocalStorage,
    Selection,
    Storage,
    join_location,
    join_selections,
    open_storage,
    select,
    split_location,
)

if TYPE_CHECKING:
    from pyiceberg.table import Table

ICEBERG_SCHEME = "iceberg:"
_METADATA_FILE = re.compile(r".+\.metadata\.json")
_TABLES = ("Delta", "Iceberg")

_SOURCES_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TableVersion:
    """Which version of a table is asked for: its number or snapshot id, that of a time, or the current one."""

    number: int | None = None
    timestamp: dt.datetime | None = None

    @property
    def is_current(self) -> bool:
        """Whether none is asked for by name."""
        return self.number is None and self.timestamp is None


def pin_source(
    source: str | Sequence[str],
    destination: str,
    columns: Sequence[str] | None = None,
    version: TableVersion | None = None,
    *,
    csv: bool = False,
) -> Snapshot:
    """Pin what a source holds: loose files, one version of a Delta or Iceberg table, or an Overnight run.

    A folder that holds a Delta table is read through the table's log, and an Overnight destination by the manifest of
    its newest complete run; `DESTINATION/run=NAME` is that run. An Iceberg table is named by its catalog
    (`iceberg:CATALOG.NAMESPACE.TABLE`), by one of its metadata files, or by its folder where that says which metadata
    file is the current one. Names that begin with `_` or `.` are passed over.

    Args:
        source: The address; several are those of loose files, in one store.
        destination: Where the run goes, which must lie elsewhere.
        columns: The columns that the run uses; all of them where none are given.
        version: The version of a table; its current one where none is given.
        csv: Whether files of unknown names are CSV.

    Raises:
        SourceNotFound: No file is there, or no table of that name.
        SourceFormat: The files are of several formats, of none that is known, or those of a table that can't be read
            through its log.
        NoCompleteRun: No run of the destination, or not the one named, is complete.
        SourceChanged: A file that a log lists is gone.
        BadInput: The destination's parts would be taken for the source's files, or the table has no such version.
    """
    version = version or TableVersion()
    if not isinstance(source, str):
        return _pin_several(source, destination, columns, version, csv=csv)
    if _names_iceberg_table(source):
        return _read_iceberg(source, destination, columns, version)
    selected = select(source)
    log = find_commit_log(selected, source)
    check_outside_source(selected, destination, source)
    if not version.is_current and (log is None or log.kind not in _TABLES):
        message = (
            f"{name_option('source_version')} and {name_option('source_timestamp')} must go with a Delta or "
            f"Iceberg table, got {source}, which is none. Leave them out; a run of an Overnight "
            "destination is named as DESTINATION/run=NAME."
        )
        raise BadInput(message)
    if log is None:
        return pin_files(selected, source, csv=csv)
    if log.kind == "Iceberg":
        return _read_iceberg(log.table, destination, columns, version)
    return _read_delta(log, columns, version) if log.kind == "Delta" else _read_run(log)


def is_table(source: str) -> bool:
    """Return whether a source is a Delta or Iceberg table, which has versions. Raises SourceFormat as `pin_source`."""
    if _names_iceberg_table(source):
        return True
    log = find_commit_log(select(source), source)
    return log is not None and log.kind in _TABLES


def _names_iceberg_table(source: str) -> bool:
    return source.startswith(ICEBERG_SCHEME) or _METADATA_FILE.fullmatch(source) is not None


def _pin_several(
    sources: Sequence[str], destination: str, columns: Sequence[str] | None, version: TableVersion, *, csv: bool
) -> Snapshot:
    """Pin the loose files that several addresses select, in the order of their paths."""
    if len(sources) == 1:
        return pin_source(sources[0], destination, columns, version, csv=csv)
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


def _read_iceberg(source: str, destination: str, columns: Sequence[str] | None, version: TableVersion) -> Snapshot:
    """Pin the files of a snapshot of an Iceberg table, which its catalog or one of its metadata files names."""
    reading = import_extra("tasks.batch.iceberg_source", "iceberg")
    if source.startswith(ICEBERG_SCHEME):
        table: Table = reading.open_named_table(source.removeprefix(ICEBERG_SCHEME))
    else:
        table = reading.open_located_table(source)
    home = open_storage(join_location(*split_location(table.location())))
    check_outside_source(Selection(storage=home, globs=("**",), entries=[], listed=[]), destination, source)
    pinned: Snapshot = reading.pin_iceberg(table, columns, version=version.number, timestamp=version.timestamp)
    return pinned


def _read_delta(log: CommitLog, columns: Sequence[str] | None, version: TableVersion) -> Snapshot:
    """Pin the files of a version of a Delta table."""
    storage = open_storage(log.table)
    if version.is_current:
        _check_newest(storage)
    return pin_delta(storage, columns, version=version.number, timestamp=version.timestamp)


def _check_newest(storage: Storage) -> None:
    """Raise SourceFormat where a destination has a Delta table and a newer run that did not go into it."""
    newest = find_newest_run(storage)
    if newest is not None and newest.output != "delta":
        message = (
            f"A source must have one log, got a Delta table at {storage.url} and the newer run {newest.run} in the "
            "same folder, which is not in the table. Give each of the two a destination of its own."
        )
        raise SourceFormat(message)


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
    if manifest.output == "iceberg":
        message = (
            f"Run {manifest.run} at {log.table} went to an Iceberg table, and its catalog must say what the table "
            "holds of the run. Name the table as iceberg:CATALOG.NAMESPACE.TABLE."
        )
        raise SourceFormat(message)
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
    files = pin_listed_files(storage, sizes, f"the manifest of run {manifest.run}")
    # The folder of a run has the form of a partition, and is none.
    return Snapshot(
        root=storage.url,
        format="parquet",
        files=tuple(SourceFile(path=e.path, size=e.size, tag=e.tag, partitions={}) for e in files),
        version=manifest.run,
    )


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
        if log.kind in ("Delta", "Iceberg", "Overnight"):
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
            # Other folders of a destination hold loose files, which its manifests do not describe.
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
    if log.kind in ("Delta", "Iceberg", "Overnight"):
        noun, more = "table", ""
        if log.kind == "Overnight":
            noun, more = "destination", f", or one of its runs as {log.table}/run=NAME"
        if log.kind == "Iceberg":
            more = ", or iceberg:CATALOG.NAMESPACE.TABLE"
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
