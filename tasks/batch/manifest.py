"""The manifest: what a published run consists of. Readers go by it, so they see all of a run, or nothing."""

from __future__ import annotations

import hashlib
import operator
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Literal

import polars as pl
from pydantic import Field

from serving.errors import DestinationUnusable, NoCompleteRun, RunNameTaken
from serving.model.contract import Frozen
from serving.model.pin import ModelPin
from serving.option_words import name_option
from tasks.batch.dataset import list_entries_at, map_parallel
from tasks.batch.delta import TableFiles
from tasks.batch.part_footer import Reasons
from tasks.batch.parts import REJECT_REASON, list_parts
from tasks.batch.plan import FORMAT_VERSION, ROOT, Plan, manifest_path
from tasks.batch.run_records import OrderNumber, list_order_numbers, load_plan, parse_order_number, read_record
from tasks.batch.run_tables import find_table_name, read_table_files
from tasks.batch.upsert import REWRITTEN, name_rewritten
from tasks.storage import AzureStorage, GcsStorage, Storage, open_storage, reader_options


class ManifestPart(Frozen):
    """One part of a published run, and the digest of what it is made of, which a later run may be made of too.

    `digest` is the one that the part bears of its own bytes; those of earlier releases bear none.
    """

    path: str
    rows: int
    bytes: int
    digest: str = Field(default="", exclude_if=operator.not_)
    chunk: str = Field(default="", exclude_if=operator.not_)


_NUMBERS = re.compile(r"\d+")
_SCORE_FIRST = "Call batch_inference first, or stream_inference until a part is full."
OTHER_REASONS = "other reasons, which the parts have"
_REASONS_MAX = 100


class RejectCount(Frozen):
    """How many rows were rejected for one column and reason, or for all those that are not listed: OTHER_REASONS."""

    column: str
    reason: str
    rows: int


def list_rejects(rejects: Reasons) -> tuple[RejectCount, ...]:
    """Return the rejects of a run by column and reason; those of rare reasons are one kind.

    A model may name the row in its error: every row would be a kind of its own, in the manifest and all reports.
    """
    by_rows = sorted(rejects.items(), key=lambda each: (each[0] == ("", OTHER_REASONS), -each[1], each[0]))
    kept, others = by_rows[:_REASONS_MAX], by_rows[_REASONS_MAX:]
    counts = [RejectCount(column=column, reason=reason, rows=rows) for (column, reason), rows in sorted(kept)]
    if others:
        counts.append(RejectCount(column="", reason=OTHER_REASONS, rows=sum(rows for _, rows in others)))
    return tuple(counts)


class PartList(Frozen):
    """Parts that a stream's table has for good, or the digests of such lists.

    It is created once, under the digest of its bytes, and manifests refer to it: they need not list its parts.
    """

    format_version: int = FORMAT_VERSION
    lists: tuple[str, ...] = ()
    parts: tuple[ManifestPart, ...] = ()


class PartitionEnd(Frozen):
    """Where a partition of a stream's table ends: the numbers at which its last part begins, and the next one will."""

    last: int
    next: int


class Manifest(Frozen):
    """What a published run consists of.

    `order` is the run's number among those planned at the destination, `commit` that of a commit of one stream's
    table. Manifests of earlier releases have neither, and are told apart by when they were planned. `shape` and
    `made_with` are those of the plan. A commit has most of its parts in lists, of which `lists` are the digests, and
    says in `ends` where each partition ends; those of earlier releases do neither.
    """

    format_version: int = FORMAT_VERSION
    key: str
    run: str
    plan_digest: str = ""
    order: int = 0
    commit: int = 0
    planned_at: datetime
    model: ModelPin
    source: str
    output: str
    rows: int
    rejects: tuple[RejectCount, ...]
    rows_key_null: int = 0
    shape: str = Field(default="", exclude_if=operator.not_)
    made_with: tuple[str, ...] = Field(default=(), exclude_if=operator.not_)
    ends: dict[int, PartitionEnd] = Field(default_factory=dict, exclude_if=operator.not_)
    lists: tuple[str, ...] = Field(default=(), exclude_if=operator.not_)
    parts: tuple[ManifestPart, ...]

    @property
    def rows_rejected(self) -> int:
        """How many rows have no prediction."""
        return sum(count.rows for count in self.rejects)

    @property
    def position(self) -> tuple[int, int, datetime]:
        """Its position among the manifests of a destination: the highest is the newest."""
        return self.order, self.commit, self.planned_at


def find_manifest(storage: Storage, run: str) -> Manifest | None:
    """Return the manifest of a run with all of its parts, None where it is not complete.

    Raises as read_record does, also for a list of parts that is gone, or not as it was written.
    """
    manifest = read_record(storage, manifest_path(run), Manifest)
    return None if manifest is None else read_part_lists(storage, manifest)


def read_part_lists(storage: Storage, manifest: Manifest) -> Manifest:
    """Return a manifest that names all of its parts itself, those of a commit in the order of its table.

    Raises DestinationUnusable where a list of parts is gone, or not as it was written.
    """
    if not manifest.commit:
        return manifest
    table = manifest.run.rpartition("-")[0]
    parts, lists = list(manifest.parts), manifest.lists
    while lists:
        found = map_parallel(storage, lambda digest: _read_part_list(storage, table, digest), lists)
        parts += [part for each in found for part in each.parts]
        lists = tuple(digest for each in found for digest in each.lists)
    parts.sort(key=lambda part: [int(number) for number in _NUMBERS.findall(part.path.rpartition("/")[2])])
    return manifest.model_copy(update={"lists": (), "parts": tuple(parts)})


def _read_part_list(storage: Storage, table: str, digest: str) -> PartList:
    data = storage.read(part_list_path(table, digest))
    if data is None or digest_part_list(data) != digest:
        message = (
            f"{storage.address(part_list_path(table, digest))} must be the list of parts as it was written, but is "
            f"{'gone' if data is None else 'another by now'}. Put it back, or start the stream again: a commit then "
            "lists the parts that are there."
        )
        raise DestinationUnusable(message)
    return PartList.model_validate_json(data)


def digest_part_list(data: bytes) -> str:
    """Return the digest that a list of parts is named by."""
    return hashlib.sha256(data).hexdigest()


def part_list_path(table: str, digest: str) -> str:
    """Return where a list of parts of a stream's table lies.

    Not beside its parts, since polars reads no folder with files of two kinds, nor below `_overnight`, all of which an
    object store lists at each commit.
    """
    return f"{ROOT}_lists/{table}/{digest}.json"


def find_intact_manifest(storage: Storage, run: str) -> Manifest | None:
    """Return the manifest of a run, None where it is not complete, or has lost parts since."""
    manifest = find_manifest(storage, run)
    return None if manifest is None or find_damaged_parts(storage, manifest) else manifest


def find_newest_run(storage: Storage, other_than: str | None = None, *, rows_min: int = 0) -> Manifest | None:
    """Return the manifest of the complete run of a destination that was planned last, None where there is none.

    `other_than` is a run that is left out, as are runs of fewer rows than `rows_min`.
    """
    manifests = read_manifests(storage, [entry.path for entry in storage.entries(ROOT, depth=2)])
    manifests = [each for each in manifests if each.run != other_than and each.rows >= rows_min]
    newest = max(manifests, key=lambda manifest: manifest.position, default=None)
    return None if newest is None else read_part_lists(storage, newest)


def find_named_run(storage: Storage, name: str) -> Manifest | None:
    """Return the manifest of a run, or of the newest commit of a stream's table, by its name; None where neither is."""
    manifest = find_manifest(storage, name)
    while manifest is None and (numbers := list_commits(storage, name)):
        # One that is gone since it was listed was deleted because there are newer ones.
        manifest = find_manifest(storage, name_commit(name, numbers[-1]))
    return manifest


def name_commit(table: str, number: int) -> str:
    """Return the name under which a commit of a stream's table is published."""
    return f"{table}-{number:08d}"


def list_commits(storage: Storage, table: str) -> list[int]:
    """Return the numbers of the commits of a stream's table that are kept, the lowest first."""
    name = re.compile(rf"{ROOT}/{re.escape(table)}-(\d{{8}})/manifest\.json")
    return sorted(int(match[1]) for entry in storage.entries(ROOT, depth=2) if (match := name.fullmatch(entry.path)))


def find_newer_run(storage: Storage, manifest: Manifest) -> str | None:
    """Return the newest complete run that was planned after another one of a destination, None where there is none."""
    later = [path for path in list_order_numbers(storage) if parse_order_number(path) > manifest.order]
    for path in reversed(later):
        holder = read_record(storage, path, OrderNumber)
        if holder is not None and holder.run != manifest.run and storage.exists(manifest_path(holder.run)):
            return holder.run
    return None


def find_damaged_parts(storage: Storage, manifest: Manifest) -> tuple[str, ...]:
    """Return the parts of a published run that are gone, or of another size, by now, by listings alone.

    Of a Delta or Iceberg table those that its log names: it may have rewritten or replaced the others, and removed
    them. Raises as read_table_files does.
    """
    table = find_table_name(storage, manifest.run, manifest.output)
    return list_damaged_parts(storage, manifest, None if table is None else read_table_files(storage, table))


def list_damaged_parts(storage: Storage, manifest: Manifest, table: TableFiles | None) -> tuple[str, ...]:
    """Return the parts that find_damaged_parts does, of a run whose table is read already."""
    parts = [part for part in manifest.parts if table is None or part.path in table.named]
    there = list_entries_at(storage, (part.path for part in parts))
    return tuple(p.path for p in parts if p.path not in there or there[p.path].size != p.bytes)


def list_foreign_files(storage: Storage) -> list[str]:
    """Return the files right in a destination, by one listing: Overnight keeps its own in folders.

    In a Delta table they may be the table's.
    """
    return [
        entry.path for entry in storage.entries(depth=1) if "/" not in entry.path and not entry.path.startswith(".")
    ]


def check_manifest_key(manifest: Manifest, plan: Plan) -> None:
    """Raise RunNameTaken where the manifest below a run's name is of another call than the plan there."""
    if manifest.key != plan.key:
        message = (
            f"The run name {plan.run!r} must hold one run, but a run of another call was published there, by "
            f"{manifest.model.uri}: this call has another model, source or options. Choose another "
            f"{name_option('name')}, or none."
        )
        raise RunNameTaken(message)


def open_predictions(destination: str, run: str | None = None) -> pl.LazyFrame:
    """Open the newest complete run of a destination, or a named one, or a stream's table by its name, as a LazyFrame.

    Every row of the dataset is in it: key columns, predictions (null for rejects), reject_column and
    reject_reason. The newest run is the one that was planned last. Where its rows went into a Delta or Iceberg table,
    the files are those that the table has of it now.

    Raises NoCompleteRun where there is no such run, or where its table does not have all of its parts any more as they
    were written: it has replaced or rewritten some, or rows were deleted.
    """
    storage = open_storage(destination)
    manifest = find_complete_manifest(storage, run, _SCORE_FIRST)
    return scan_parts(storage, [place for _, place in _locate_all_parts(storage, manifest)])


def _locate_all_parts(storage: Storage, manifest: Manifest) -> list[tuple[str, str]]:
    """Return each part of a published run, in order, with where it is.

    Raises NoCompleteRun where its table lacks some.
    """
    table = find_table_name(storage, manifest.run, manifest.output)
    if table is None:
        return [(part.path, part.path) for part in manifest.parts]
    held = locate_parts(manifest, read_table_files(storage, table))
    if len(held) < len(manifest.parts):
        where = f"Iceberg table {table}" if manifest.output == "iceberg" else f"Delta table at {storage.url}"
        message = (
            f"The {where} must have the {len(manifest.parts):,} parts of run {manifest.run} as they were written for "
            f"the run to be read, but has {len(held):,} of them: it has replaced or rewritten the others since, or "
            "rows of them were deleted. Read the table itself, by polars.scan_delta or polars.scan_iceberg: as it is "
            "now, or in the version whose commit says overnight.run."
        )
        raise NoCompleteRun(message)
    return [(part.path, held[part.path]) for part in manifest.parts]


def locate_parts(manifest: Manifest, table: TableFiles) -> dict[str, str]:
    """Return the parts of a run that its table has as they were written, and where: a copied one is at its copy."""
    begin = f"{REWRITTEN}/{manifest.run}/"
    copies = {path.rpartition("-")[0]: path for path in table.whole if path.startswith(begin)}
    held = dict[str, str]()
    for part in manifest.parts:
        for path in (part.path, copies.get(name_rewritten(manifest.run, part.path), "")):
            if table.whole.get(path) == part.bytes:
                held[part.path] = path
    return held


def find_complete_manifest(storage: Storage, run: str | None, advice: str) -> Manifest:
    """Return the manifest of a run or a stream's table that is named, else of the newest complete run.

    Raises NoCompleteRun where there is none, with the advice as what to do next.
    """
    manifest = find_named_run(storage, run) if run else find_newest_run(storage)
    if manifest is None:
        wanted = f"run {run}" if run else "a run"
        message = f"{storage.url} must hold {wanted} that is complete, got none. {advice}"
        raise NoCompleteRun(message)
    return manifest


def open_rejects(destination: str, run: str | None = None) -> pl.LazyFrame:
    """Open the rejects of the newest complete run, or of a named run that need not be complete, or a stream's table.

    Each is a row of the dataset with its key columns, reject_column and reject_reason.
    Raises NoCompleteRun where there is no such run.
    """
    storage = open_storage(destination)
    _, held = locate_run_parts(storage, run)
    return scan_parts(storage, [place for _, place in held]).filter(pl.col(REJECT_REASON).is_not_null())


def locate_run_parts(storage: Storage, run: str | None) -> tuple[str, list[tuple[str, str]]]:
    """Return the name of the newest complete run, or of a named one, with each of its parts and where it is.

    Of a run that is not complete they are those that are there. Raises NoCompleteRun as open_rejects does.
    """
    manifest = find_run_manifest(storage, run)
    if manifest is not None:
        return manifest.run, _locate_all_parts(storage, manifest)
    return str(run), [(path, path) for path in _list_unpublished_parts(storage, str(run))]


def _list_unpublished_parts(storage: Storage, run: str) -> list[str]:
    plan = load_plan(storage, run)
    parts = {} if plan is None else list_parts(storage, plan)
    if not parts:
        message = f"{storage.url} must hold parts of run {run}, got none. Check the run's name."
        raise NoCompleteRun(message)
    return sorted(entry.path for entry in parts.values())


def find_run_manifest(storage: Storage, run: str | None) -> Manifest | None:
    """Return the manifest of the newest complete run, or of a named one; None where that is not complete.

    Raises NoCompleteRun where none is named, and none is complete.
    """
    return find_named_run(storage, run) if run else find_complete_manifest(storage, None, _SCORE_FIRST)


def scan_parts(storage: Storage, paths: Sequence[str]) -> pl.LazyFrame:
    """Open Parquet files of a destination as one LazyFrame."""
    options = reader_options(storage)
    # Addresses are meant as they stand, brackets and stars too.
    addresses = [storage.address(path) for path in paths]
    # Of the others polars asks what obstore asks, unless it is told to look for a provider of its own.
    provider: Literal["auto"] | None = None if isinstance(storage, GcsStorage | AzureStorage) else "auto"
    return pl.scan_parquet(
        addresses, storage_options=options, credential_provider=provider, hive_partitioning=False, glob=False
    )


def read_manifests(storage: Storage, paths: Sequence[str]) -> list[Manifest]:
    """Return the manifests among the objects at these paths, which may have parts in lists."""
    paths = [path for path in paths if path.endswith("/manifest.json")]
    found = map_parallel(storage, lambda path: read_record(storage, path, Manifest), paths)
    return [manifest for manifest in found if manifest is not None]
