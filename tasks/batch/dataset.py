"""The dataset: files pinned as a snapshot, and the row groups and schema that they hold."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TypeVar
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from serving.contract import Frozen
from serving.errors import BadInput, OvernightError, SchemaMismatch, SourceCorrupt, SourceEmpty, SourceNotFound
from tasks.storage import Entry, LocalStorage, Storage, open_storage

SOURCE_FILE, SOURCE_ROW = "source_file", "source_row"

_FORMATS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".arrows": "arrow",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}
_GLOB = re.compile(r"[*?\[]")
_READERS = 16
_PROBLEMS_SHOWN = 20

T = TypeVar("T")
R = TypeVar("R")


class SourceFile(Frozen):
    """One pinned file: path below the root, size in bytes, ETag or mtime, and the rows of each row group.

    A file that is a staged copy says of which file (`origin`) and of which of its rows it is the first.
    """

    path: str
    size: int
    tag: str
    row_groups: tuple[int, ...] = ()
    origin: str | None = None
    origin_row: int = 0

    @property
    def entry(self) -> Entry:
        """The file as storage knows it."""
        return Entry(path=self.path, size=self.size, tag=self.tag)


class Snapshot(Frozen):
    """The files that a run is tied to, in order; `root` is the address that their paths lie below."""

    root: str
    format: str
    files: tuple[SourceFile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A snapshot of Parquet files with their footers read: row counts, and one schema."""

    snapshot: Snapshot
    schema: pa.Schema
    hive: tuple[str, ...]

    @property
    def rows(self) -> int:
        """The rows of all files."""
        return sum(sum(file.row_groups) for file in self.snapshot.files)


def take_snapshot(source: str, destination: str) -> Snapshot:
    """List the files of a source and pin each by size and ETag or modification time.

    A source is one file, a folder or prefix (everything below it, hive partitions too), or a glob.
    Names that begin with `_` or `.` are passed over. Raises SourceNotFound, SourceEmpty, and
    BadInput where the destination lies inside the source.
    """
    root, pattern = _split(source)
    storage = open_storage(root)
    entries = storage.entries()
    if (isinstance(storage, LocalStorage) and storage.root.is_file()) or _is_object(storage, entries):
        root, _, name = storage.url.rpartition("/")
        root = root or "/"
        entries = [Entry(path=name, size=entries[0].size, tag=entries[0].tag)]
        storage = open_storage(root)
    elif pattern is not None:
        entries = [entry for entry in entries if pattern.fullmatch(entry.path)]
    _not_inside(storage.url, destination, whole=pattern is None and len(entries) != 1)
    entries = [entry for entry in entries if not _hidden(entry.path)]
    if not entries:
        message = f"The source must name at least one file, got none at {source}. Check the path and the bucket."
        raise SourceNotFound(message)
    files = tuple(SourceFile(path=entry.path, size=entry.size, tag=entry.tag) for entry in entries)
    return Snapshot(root=storage.url, format=_format(entries, source), files=files)


def _split(source: str) -> tuple[str, re.Pattern[str] | None]:
    """Cut a glob into the folder above it and a pattern for the paths below that."""
    if not _GLOB.search(source):
        return source, None
    parts = source.split("/")
    at = next(index for index, part in enumerate(parts) if _GLOB.search(part))
    root = "/".join(parts[:at]) or ("/" if source.startswith("/") else ".")
    return root, re.compile(_translate("/".join(parts[at:])))


def _translate(pattern: str) -> str:
    """Translate a glob as shells read it: * within a folder, ** across folders."""
    translated = getattr(glob, "translate", None)
    if translated is not None:
        return str(translated(pattern, recursive=True, include_hidden=True, seps="/"))
    out = []
    for token in re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern):
        known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
        is_set = token.startswith("[") and token.endswith("]") and len(token) > 2  # noqa: PLR2004 - the brackets
        out.append(known.get(token) or (token.replace("[!", "[^") if is_set else re.escape(token)))
    return "".join(out)


def _is_object(storage: Storage, entries: list[Entry]) -> bool:
    """Whether the S3 address is one object: listed below itself, it comes back with its whole name."""
    return not isinstance(storage, LocalStorage) and not entries and storage.exists("")


def _hidden(path: str) -> bool:
    return any(part.startswith(("_", ".")) for part in path.split("/"))


def _not_inside(root: str, destination: str, *, whole: bool) -> None:
    target = open_storage(destination).url
    if whole and (target == root or target.startswith(root.rstrip("/") + "/")):
        message = (
            f"The destination must lie outside the source, or the next run would read this one's parts; got {target} "
            f"inside {root}. Choose another destination, or name the source's files by a glob."
        )
        raise BadInput(message)


def _format(entries: list[Entry], source: str) -> str:
    by_format: dict[str | None, list[str]] = {}
    for entry in entries:
        by_format.setdefault(_FORMATS.get(PurePosixPath(entry.path).suffix.lower()), []).append(entry.path)
    if len(by_format) == 1 and None not in by_format:
        return str(next(iter(by_format)))
    found = "; ".join(f"{name or 'unknown'}: {len(paths)}, e.g. {paths[0]}" for name, paths in by_format.items())
    message = (
        f"All files of {source} must be of one format out of {sorted(_FORMATS)}, got {found}. Narrow it by a glob."
    )
    raise SourceEmpty(message)


def open_dataset(snapshot: Snapshot, columns: Sequence[str], keys: Sequence[str]) -> Dataset:
    """Read the footer of every Parquet file and hold the columns that are used against each other.

    Raises SourceCorrupt by file name, SchemaMismatch where a used column's type differs between
    files, SourceEmpty where there are no rows.
    """
    storage = open_storage(snapshot.root)
    partitions = _partitions(snapshot)
    footers = in_parallel(lambda file: _read_footer(storage, file), snapshot.files)
    with_rows = [(file, schema) for file, schema in footers if sum(file.row_groups)]
    if not with_rows:
        message = f"The source must hold at least one row, got none in {len(footers)} files below {snapshot.root}."
        raise SourceEmpty(message)
    schema = _one_schema(with_rows, [*columns, *keys])
    hive = [name for name in partitions if name not in schema.names]
    for name in hive:
        schema = schema.append(partitions[name])
    pinned = snapshot.model_copy(update={"files": tuple(file for file, _ in footers)})
    return Dataset(snapshot=pinned, schema=schema, hive=tuple(hive))


def in_parallel(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Map over items in order, up to 16 at once: footers are small reads that mostly wait."""
    if len(items) == 1:
        return [work(items[0])]
    with ThreadPoolExecutor(min(_READERS, len(items)), thread_name_prefix="footers") as pool:
        return list(pool.map(work, items))


def _read_footer(storage: Storage, file: SourceFile) -> tuple[SourceFile, pa.Schema]:
    with storage.open_pinned(file.entry) as stream, corrupt_as_named(storage.address(file.path)):
        metadata = pq.read_metadata(stream)
        groups = tuple(metadata.row_group(at).num_rows for at in range(metadata.num_row_groups))
        return file.model_copy(update={"row_groups": groups}), metadata.schema.to_arrow_schema()


class corrupt_as_named:  # noqa: N801 - a context manager reads as a verb
    """Turn Arrow's errors about a file's bytes into SourceCorrupt with the file's name."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, pa.ArrowException | OSError | ValueError) and not isinstance(error, OvernightError):
            message = (
                f"{self._where} must be readable, got: {(str(error).splitlines() or [repr(error)])[0][:300]}. "
                "Mend or remove the file, then call again; finished parts stay."
            )
            raise SourceCorrupt(message) from error


def _one_schema(footers: list[tuple[SourceFile, pa.Schema]], used: Sequence[str]) -> pa.Schema:
    first_file, first = footers[0]
    differing = []
    for file, schema in footers[1:]:
        for name in [] if schema.equals(first) else dict.fromkeys(used):
            ours, theirs = _type_of(first, name), _type_of(schema, name)
            if ours != theirs:
                here, there = theirs or "missing", ours or "missing"
                differing.append(f"  - {file.path}: column {name!r} is {here}, in {first_file.path} {there}")
    if differing:
        more = len(differing) - _PROBLEMS_SHOWN
        listed = "\n".join(differing[:_PROBLEMS_SHOWN]) + (f"\n  and {more} more" if more > 0 else "")
        message = (
            f"Every file must hold the columns that are used in the same type, got:\n{listed}\n"
            "Rewrite them, or narrow the source by a glob."
        )
        raise SchemaMismatch(message)
    return first.remove_metadata()


def _type_of(schema: pa.Schema, name: str) -> pa.DataType | None:
    at = schema.get_field_index(name)
    return schema.field(at).type if at >= 0 else None


def _partitions(snapshot: Snapshot) -> dict[str, pa.Field]:
    """Return the hive partition columns: int64 where every value is a whole number, else text."""
    values: dict[str, set[str]] = {}
    for file in snapshot.files:
        for name, value in hive_values(file.path).items():
            values.setdefault(name, set()).add(value)
    return {
        name: pa.field(name, pa.int64() if all(re.fullmatch(r"-?\d{1,18}", value) for value in found) else pa.string())
        for name, found in values.items()
    }


def hive_values(path: str) -> dict[str, str]:
    """Return name and value of each `name=value` folder of a path."""
    folders = path.split("/")[:-1]
    return {name: unquote(value) for name, sep, value in (part.partition("=") for part in folders) if sep and name}
