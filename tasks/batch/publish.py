"""Publishing: the parts of a run are counted, then committed to a table where asked for, then by the manifest."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from serving.errors import DestinationUnusable, PublishRefused, RunDamaged, StorageFault
from serving.extras import import_extra
from serving.model.pin import ModelPin
from tasks.batch.chunk_scheduler import MARKS
from tasks.batch.dataset import Snapshot, map_parallel
from tasks.batch.delta import commit_delta
from tasks.batch.manifest import (
    Manifest,
    ManifestPart,
    RejectCount,
    check_manifest_key,
    find_damaged_parts,
    find_intact_manifest,
    find_manifest,
    find_newest_run,
    list_rejects,
    read_manifests,
)
from tasks.batch.options import BatchOptions
from tasks.batch.part_footer import PartFooter, Reasons, read_footer
from tasks.batch.parts import ChunkId, list_parts
from tasks.batch.plan import ROOT, Plan, manifest_path, plan_path
from tasks.batch.run_records import (
    ORDER,
    TABLE_ORDER,
    OrderNumber,
    list_order_numbers,
    list_recorded_runs,
    order_path,
    parse_order_number,
    read_record,
)
from tasks.storage import Storage

_SHOWN = 10
# From so many chunks on a run of several workers is published by one of them.
_LARGE_CHUNKS = 10_000
# How long the others wait for it: several times what footers take from a store that answers in 30 ms.
_PUBLISH_SECONDS_MIN, _PUBLISH_SECONDS_PER_CHUNK, _POLL_SECONDS = 120.0, 0.005, 2.0
_PUBLISHERS = "publishers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What the parts of a run came to: the footers that hold, and chunks that must be scored again."""

    footers: tuple[PartFooter, ...]
    missing: tuple[ChunkId, ...]
    set_aside: tuple[str, ...]
    rows_set_aside: int

    @property
    def rows_key_null(self) -> int:
        """How many rows have a key that holds a null."""
        return sum(footer.rows_key_null for footer in self.footers)


def audit_parts(storage: Storage, plan: Plan) -> Audit:
    """Read the footer of every part; one that can't be read, or lacks rows, is set aside.

    One that another worker has set aside or scored again meanwhile is left as it is, and counts as missing.
    """
    chunks = plan.chunks
    parts = list_parts(storage, plan)
    ids = [chunk for chunk in chunks if chunk in parts]
    footers = map_parallel(storage, lambda chunk: read_footer(storage, plan, chunks[chunk], parts[chunk]), ids)
    torn = [chunk for chunk, footer in zip(ids, footers, strict=True) if footer is None]
    aside = tuple(name for chunk in torn if (name := storage.set_aside(parts[chunk])) is not None)
    return Audit(
        footers=tuple(footer for footer in footers if footer is not None),
        missing=tuple(chunk for chunk in chunks if chunk not in parts) + tuple(torn),
        set_aside=aside,
        rows_set_aside=sum(chunks[chunk].rows for chunk in torn),
    )


def wait_for_publisher(
    storage: Storage,
    plan: Plan,
    *,
    may_wait: Callable[[], bool],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Manifest | None:
    """Return the manifest of a large run once another worker has published it; None where this one is to publish.

    The publisher reads the footer of every part first: of a thousand workers one does, and the others wait. The
    first to create an object is the one; where it does not come to its end in time, another follows. Two that publish
    at once do no harm. A run of fewer than 10,000 chunks is published by each worker as soon as it can.

    Args:
        storage: The destination.
        plan: The run's plan, all of whose parts are there.
        may_wait: Whether this worker may wait any longer; it publishes where not.
        clock: Counts seconds.
        sleep: Waits for some of them.
    """
    chunks = len(plan.chunks)
    for number in itertools.count(1) if chunks >= _LARGE_CHUNKS else ():
        if storage.put_new(f"{plan.folder}/{_PUBLISHERS}/{number:03d}.json", b"{}"):
            break
        until = clock() + max(_PUBLISH_SECONDS_MIN, chunks * _PUBLISH_SECONDS_PER_CHUNK)
        while clock() < until:
            if not may_wait():
                return None
            if storage.exists(manifest_path(plan.run)):
                return find_intact_manifest(storage, plan.run)
            sleep(_POLL_SECONDS)
    return None


def publish(storage: Storage, plan: Plan, audit: Audit) -> Manifest:
    """Commit a run: one commit to a Delta or Iceberg table where asked for, then the manifest, create-only.

    Called again, or by two workers at once, it publishes once. Where the run was published meanwhile from another
    plan of the same call (its records below _overnight were deleted, and it was planned again), that stands.

    Raises PublishRefused where the parts do not add up to the rows of the dataset, or a table holds a run that
    was planned later; nothing is published then. RunNameTaken where the name holds a run of another call by now,
    RunDamaged where what is published already has parts of other sizes.
    """
    check_rows_add_up(plan, audit)
    manifest = make_manifest(plan, audit.footers)
    if plan.options.output == "delta":
        commit_delta(storage, plan, audit.footers)
    if plan.options.output == "iceberg":
        import_extra("tasks.batch.iceberg_table", "iceberg").commit_iceberg(storage, plan, audit.footers)
    storage.put_new(manifest_path(plan.run), manifest.model_dump_json().encode())
    storage.delete_torn_writes(f"run={plan.run}")
    beside = (entry.path for kind in ("staged", MARKS) for entry in storage.entries(f"{plan.folder}/{kind}"))
    storage.delete(list(beside))
    storage.delete_torn_writes(plan.folder)
    standing = find_manifest(storage, plan.run)
    if standing is None:
        message = f"The manifest of run {plan.run} must be readable once written, but is gone from {storage.url}."
        raise StorageFault(message)
    check_manifest_key(standing, plan)
    if standing.plan_digest == manifest.plan_digest or find_damaged_parts(storage, standing):
        _check_published_parts(standing, manifest)
    return standing


def make_manifest(plan: Plan, footers: Sequence[PartFooter]) -> Manifest:
    """Return the manifest of a run whose parts have these footers, in the order of the plan's chunks."""
    return Manifest(
        format_version=plan.format_version,
        key=plan.key,
        run=plan.run,
        plan_digest=plan.digest,
        order=plan.order,
        planned_at=plan.planned_at,
        model=plan.model,
        source=plan.source.title,
        output=plan.options.output,
        rows=plan.rows,
        rejects=sum_rejects(footers),
        rows_key_null=sum(footer.rows_key_null for footer in footers),
        shape=plan.shape,
        made_with=plan.made_with,
        parts=tuple(
            ManifestPart(
                path=f.path,
                rows=f.rows,
                bytes=f.bytes,
                digest=f.digest,
                chunk=f.chunk if plan.has_content_parts else "",
            )
            for f in footers
        ),
    )


def count_rejects(audit: Audit) -> tuple[RejectCount, ...]:
    """Return the rejects of a run by column and reason."""
    return sum_rejects(audit.footers)


def sum_rejects(footers: Sequence[PartFooter]) -> tuple[RejectCount, ...]:
    """Return the rejects of parts together, by column and reason."""
    rejects: Reasons = sum((footer.rejects for footer in footers), Counter())
    return list_rejects(rejects)


def check_rows_add_up(plan: Plan, audit: Audit) -> None:
    """Raise PublishRefused unless the parts of a plan hold every row of the dataset."""
    dataset = sum(sum(file.row_groups) for file in plan.snapshot.files)
    rows = sum(footer.rows for footer in audit.footers)
    if audit.missing or not dataset == plan.rows == rows:
        message = (
            f"The parts must hold the {dataset:,} rows of the dataset, got {rows:,} in {len(audit.footers)} parts, "
            f"{len(audit.missing)} parts missing. Nothing was published; call again to score what is missing. If this "
            f"stays, delete {plan.folder} below the destination, and call again to plan and score all of the run."
        )
        raise PublishRefused(message)


def _check_published_parts(standing: Manifest, manifest: Manifest) -> None:
    published = {part.path: (part.bytes, part.digest) for part in standing.parts}
    others = [part for part in manifest.parts if (part.bytes, part.digest) != published.get(part.path)]
    if others:
        listed = ", ".join(
            f"{p.path} ({_describe_bytes(p.bytes, p.digest)}, published with "
            f"{_describe_bytes(*published.get(p.path, (None, '')))})"
            for p in others[:_SHOWN]
        )
        message = (
            f"The parts of run {manifest.run} must be those that it was published with, got {len(others)} others: "
            f"{listed}. Delete them and call again on the kind of machine and with the versions that made the run, or "
            f"delete run={manifest.run} and {ROOT}/{manifest.run} below the destination, and call again for all of it."
        )
        raise RunDamaged(message)


def _describe_bytes(size: int | None, digest: str) -> str:
    return f"{size} bytes" + (f" of digest {digest[:12]}" if digest else "")


def find_earlier_keys(storage: Storage, model: ModelPin, source: Snapshot, options: BatchOptions) -> list[str]:
    """Return the keys under which an earlier release has planned this very call at a destination, with Delta output.

    Keys change with a release, and what a Delta table holds already would be added to it once more.
    """
    planned, published = list_recorded_runs(storage)
    manifests = read_manifests(storage, [manifest_path(run) for run in sorted(published)])
    runs = {manifest.run for manifest in manifests if manifest.output == "delta" and not manifest.plan_digest}
    # One that was ended between its commit to the table and its manifest has a plan alone.
    runs |= planned - published
    keys = []
    for run in sorted(runs):
        with suppress(DestinationUnusable):
            plan = read_record(storage, plan_path(run), Plan)
            if plan is not None and not plan.digest and _is_same_call(plan, model, source, options):
                keys.append(plan.key)
    return keys


def _is_same_call(plan: Plan, model: ModelPin, source: Snapshot, options: BatchOptions) -> bool:
    ours, theirs = (
        # Earlier releases pinned a local file by the first of its times alone.
        (each.root, each.format, [(file.path, file.size, file.tag.partition("/")[0]) for file in each.files])
        for each in (source, plan.source)
    )
    same_model = (plan.model.name, plan.model.version) == (model.name, model.version)
    return same_model and plan.options.key_fields() == options.key_fields() and ours == theirs


def claim_order_number(storage: Storage, run: str, *, above: int = 0, table: Storage | None = None) -> int:
    """Return the next number in the order of the runs planned at a destination, which is then this run's alone.

    Numbers are objects that are created once, so no clock decides, and no two plans have the same; a number whose
    plan was never written is passed over.

    Args:
        storage: The destination.
        run: The run.
        above: A number that is known to be taken.
        table: Where the table lies that the run goes into, if several destinations may feed it: the number is then the
            next one, and this run's alone, among the runs planned at all of them.
    """
    places = [(storage, ORDER)] if table is None else [(table, TABLE_ORDER), (storage, ORDER)]
    taken = [max(map(parse_order_number, list_order_numbers(*place)), default=0) for place in places]
    if not taken[-1] and (newest := find_newest_run(storage)) is not None:
        # The numbers were deleted, or are none of this release's yet.
        taken.append(newest.order)
    number, record = max(*taken, above) + 1, OrderNumber(run=run).model_dump_json().encode()
    while not all(place.put_new(order_path(number, folder), record) for place, folder in places):
        number += 1
    return number
