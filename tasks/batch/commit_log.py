"""Commit logs: which files of a folder are a table's is what its log says, never what a listing finds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from serving.errors import SourceFormat, StorageDenied
from tasks.storage import LocalStorage, Selection, Storage, open_storage

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
        raise _must_be_the_table(source, above)
    logs = _logs_below(selected)
    if whole and (kinds := {kind for kind, folder in logs if not folder}):
        log = CommitLog(kind="Delta" if "Delta" in kinds else min(kinds), table=root)
        if log.kind in ("Delta", "Overnight"):
            return log
        raise _must_be_the_table(source, log)
    for kind, folder in logs:
        inside = re.compile(re.escape(f"{folder}/" if folder else "") + ("run=[^/]+/" if kind == "Overnight" else ""))
        if any(inside.match(entry.path) for entry in selected.entries):
            raise _must_be_the_table(source, CommitLog(kind=kind, table=selected.storage.address(folder)))
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


def must_be_loose(source: str, log: CommitLog) -> SourceFormat:
    """Return the error for a source that is read through a log where only loose files can be taken."""
    return SourceFormat(f"The source must be loose files here, got the {log.kind} log of {log.table} for {source}.")


def _must_be_the_table(source: str, log: CommitLog) -> SourceFormat:
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
