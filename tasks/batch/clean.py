"""Cleaning a destination: what no run has any more is found, shown, and deleted where that is asked for.

What a manifest names, and what a run that is not published has, stays.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from pydantic import Field

from serving.errors import BadInput
from serving.model.contract import Frozen
from tasks.batch.chunk_scheduler import MARKS
from tasks.batch.dataset import map_parallel
from tasks.batch.parts import is_part_name
from tasks.batch.plan import CHALLENGERS, ROOT, manifest_path, plan_path
from tasks.batch.run_records import OrderNumber, list_order_numbers, order_path, read_record
from tasks.batch.survey import Records, Survey, read_records, survey_destination
from tasks.storage import Entry, Storage

RemovableKind = Literal["part", "file set aside", "torn write", "staged copy", "mark", "record"]

_BESIDE = re.compile(rf"{ROOT}/([^/]+)/(staged|{MARKS})/.+")
# What a run leaves beside plan and manifest, and not what a stream's table or the owner of a destination does. Nothing
# of it is written before the plan, as staged copies are.
_LEFTOVER = re.compile(
    rf"{ROOT}/(?!order/|starts/)([^/]+)/"
    rf"((costs|publishers|{MARKS}|{CHALLENGERS})/.+|(?!plan\.|manifest\.|log\.|owner-|beat-|ended-)[^/]+\.(json|html))"
)
_ASIDE = re.compile(r"\..+\.aside")
# Records are listed again before each batch of objects: a run that came meanwhile keeps what it has.
_OBJECTS_PER_BATCH = 500


class CleanedRun(Frozen):
    """What of one run goes."""

    run: str = Field(description="The run's name, or that of its folder.")
    why: str = Field(description="Why it goes.")
    removed: dict[str, int] = Field(description="How many objects of each kind.")
    bytes: int = Field(description="The bytes of all of them.")

    @property
    def objects(self) -> int:
        """How many objects go."""
        return sum(self.removed.values())


class CleanReport(Frozen):
    """What a cleaning of a destination has deleted, or would delete."""

    destination: str
    is_deleted: bool = Field(description="Whether it was deleted; a dry run only says what would go.")
    runs: tuple[CleanedRun, ...] = ()
    runs_dropped: tuple[str, ...] = Field(default=(), description="Runs that are no more, the oldest first.")
    runs_kept: tuple[str, ...] = Field(default=(), description="Complete runs that stay, the newest first.")
    objects: int = 0
    bytes: int = 0
    notes: tuple[str, ...] = Field(default=(), description="What stays though it might go, and why.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Removable:
    """An object that no run has any more, and the run that it was of."""

    run: str
    kind: RemovableKind
    entry: Entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The runs that are dropped, the oldest first, each with the reason; and complete ones that are kept."""

    dropped: Mapping[str, str] = field(default_factory=dict)
    kept: tuple[str, ...] = ()


def clean(
    storage: Storage, *, keep: int | None = None, unfinished_before: datetime | None = None, delete: bool = False
) -> CleanReport:
    """Find what no run of a destination has any more, and delete it where that is asked for.

    These are parts that no manifest names and no unfinished run has, files set aside, torn writes, and staged copies
    and marks of published runs. Plans and manifests of dropped runs go first, the oldest run first, and only then what
    lies beside them, and the parts that none of the others names. Ended at any point, it has taken nothing that a
    manifest still names, and the same call goes on.

    Nothing in the folders of streams, of unfinished and of damaged runs is touched, and no file of a Delta or Iceberg
    table.

    Args:
        storage: The destination.
        keep: How many of the newest complete runs stay; the older ones are dropped. None drops none.
        unfinished_before: Runs that were planned before this moment and never published are dropped. None drops none.
        delete: Whether to delete; a dry run otherwise.

    Raises:
        BadInput: `keep` is less than 1, or the destination has a table, whose runs are not dropped.
        DestinationUnusable: A record does not read: nobody knows what it names.
        FormatTooNew: A newer Overnight has written a record.
    """
    if keep is not None and keep < 1:
        message = f"At least one run must be kept, got keep={keep}. Delete the whole destination by hand to drop all."
        raise BadInput(message)
    survey = survey_destination(storage)
    if survey.has_table and (keep is not None or unfinished_before is not None):
        message = (
            f"Runs can be dropped where each is parts and a manifest, but {storage.url} has a Delta or Iceberg table: "
            "the runs are versions of it. Use the table's own means (VACUUM of Delta, expire_snapshots of Iceberg), "
            "and call this without dropping runs to delete what lies below _overnight."
        )
        raise BadInput(message)
    choice = choose_dropped(survey, keep, unfinished_before)
    removable = list_removable(survey, choice, _find_order_records(storage, survey, choice))
    notes = list(_list_notes(survey, choice, keep))
    if delete:
        removable, kept_since = _delete(storage, survey, choice, removable)
        notes += kept_since
    return _report(storage, choice, removable, notes, is_deleted=delete)


def choose_dropped(survey: Survey, keep: int | None, unfinished_before: datetime | None) -> Choice:
    """Return the complete runs that are older than the newest `keep`, and old unfinished ones.

    A damaged run does not count as one that is kept: it is dropped where it is older than all of these. A run whose
    record was not there yet when objects were listed is dropped another time: it is new, whatever its planner's clock
    says, or was published only now.
    """
    listed = {entry.path for entry in survey.beside}
    published = [manifest for manifest in survey.records.manifests.values() if not manifest.commit]
    published.sort(key=lambda manifest: manifest.position, reverse=True)
    intact = [manifest.run for manifest in published if manifest.run not in survey.damaged]
    dropped: dict[str, str] = {}
    if keep is not None and len(intact) > keep:
        last = [manifest.run for manifest in published].index(intact[keep - 1])
        older = [manifest.run for manifest in reversed(published[last + 1 :])]
        dropped = {run: f"older than the newest {keep}" for run in older if manifest_path(run) in listed}
    if unfinished_before is not None:
        plans = [plan for plan in survey.records.unfinished.values() if plan_path(plan.run) in listed]
        old = [plan for plan in plans if plan.planned_at < unfinished_before]
        old.sort(key=lambda plan: plan.planned_at)
        dropped |= {plan.run: f"unfinished since {plan.planned_at:%Y-%m-%d}" for plan in old}
    return Choice(dropped=dropped, kept=tuple(run for run in intact if run not in dropped))


def list_removable(survey: Survey, choice: Choice, orders: Mapping[str, str]) -> list[Removable]:
    """Return every object that goes, in the order in which it goes.

    Args:
        survey: What the destination holds.
        choice: The runs that are dropped.
        orders: The records of dropped runs in the order of runs, and the runs that they are of.
    """
    left = survey.records.leave_out(choice.dropped)
    return [
        *_list_beside(survey, choice, left),
        *_list_files(survey, left, is_part=False),
        *_list_torn(survey, choice, left),
        *_list_records(survey, choice, left, orders),
        *_list_files(survey, left, is_part=True),
    ]


def _list_beside(survey: Survey, choice: Choice, left: Records) -> Iterable[Removable]:
    """Yield staged copies and marks: of dropped runs, and of published ones that have all their parts."""
    done = {run for run in left.manifests if run not in survey.damaged} | choice.dropped.keys()
    for entry in survey.beside:
        match = _BESIDE.fullmatch(entry.path)
        if match and match[1] in done:
            yield Removable(run=match[1], kind="staged copy" if match[2] == "staged" else "mark", entry=entry)


def _find_kept_folders(survey: Survey, left: Records) -> set[str]:
    """Return the runs in whose folders somebody may be writing, or whose files are a table's."""
    return {*left.unfinished, *left.streams, *(survey.damaged & left.manifests.keys())}


def _list_files(survey: Survey, left: Records, *, is_part: bool) -> Iterable[Removable]:
    """Yield the parts, or the files set aside, that no run has; what Overnight has not named stays."""
    kept, needed = _find_kept_folders(survey, left), left.list_needed()
    for entry in () if survey.has_table else survey.files:
        folder, _, name = entry.path.partition("/")
        run = folder.removeprefix("run=")
        fits = is_part_name(name) if is_part else bool(_ASIDE.fullmatch(name))
        if fits and run not in kept and entry.path not in needed:
            yield Removable(run=run, kind="part" if is_part else "file set aside", entry=entry)


def _list_torn(survey: Survey, choice: Choice, left: Records) -> Iterable[Removable]:
    """Yield torn writes, where no run that goes on may be writing: also a part that an earlier run has lost."""
    kept = _find_kept_folders(survey, left)
    kept |= {part.path.partition("/")[0].removeprefix("run=") for plan in left.plans.values() for part in plan.reused}
    known = left.manifests.keys() | choice.dropped.keys()
    for entry in survey.torn:
        top, _, rest = entry.path.partition("/")
        run = rest.partition("/")[0] if top == ROOT else top.removeprefix("run=")
        # Below _overnight a run may be staged before it has any record.
        if run not in kept and (run in known if top == ROOT else not survey.has_table):
            yield Removable(run=run, kind="torn write", entry=entry)


def _list_records(survey: Survey, choice: Choice, left: Records, orders: Mapping[str, str]) -> Iterable[Removable]:
    """Yield the records of dropped runs, and those that tell of a run which is no more."""
    entries = {entry.path: entry for entry in survey.beside}
    for run in choice.dropped:
        yield from (
            Removable(run=run, kind="record", entry=entries[path]) for path in _name_records(run) if path in entries
        )
    there = left.manifests.keys() | left.planned | left.streams
    for path, entry in entries.items():
        match = _LEFTOVER.fullmatch(path)
        is_beside = match and match[1] in choice.dropped and _BESIDE.fullmatch(path)
        if match and match[1] not in there and not is_beside:
            yield Removable(run=match[1], kind="record", entry=entry)
    yield from (
        Removable(run=run, kind="record", entry=entries[path]) for path, run in orders.items() if path in entries
    )
    yield from (Removable(run=run, kind="record", entry=at) for at, run in survey.starts.items() if run not in there)


def _name_records(run: str) -> tuple[str, str]:
    """Return plan and manifest of a run in the order in which they go.

    A run that has lost its plan alone still opens, and is dropped next time. One without its manifest would be a run
    that is not published yet, and stay.
    """
    return plan_path(run), manifest_path(run)


def _find_order_records(storage: Storage, survey: Survey, choice: Choice) -> dict[str, str]:
    """Return the numbers of dropped runs in the order of runs, and the runs.

    The highest number stays, since the next run takes the one above it. So do numbers whose run has no record: it may
    be about to be planned.
    """
    held: dict[str, str] = {}
    for run in choice.dropped:
        record = survey.records.manifests.get(run) or survey.records.plans[run]
        held |= {order_path(record.order): run} if record.order else {}
    highest = list_order_numbers(storage)[-1:]
    paths = [path for path in held if path not in highest]
    holders = map_parallel(storage, lambda path: read_record(storage, path, OrderNumber), paths)
    return {
        path: held[path] for path, holder in zip(paths, holders, strict=True) if holder and holder.run == held[path]
    }


def _delete(
    storage: Storage, survey: Survey, choice: Choice, removable: Sequence[Removable]
) -> tuple[list[Removable], list[str]]:
    """Delete what goes, in its order; return what went, and notes of what stays for a run that came meanwhile."""
    one_by_one = {path for run in choice.dropped for path in _name_records(run)}
    last = [each for each in removable if each.kind in ("part", "record") and each.entry.path not in one_by_one]
    _delete_all(storage, [each for each in removable if each.kind not in ("part", "record")])
    for each in removable:
        if each.entry.path in one_by_one:
            storage.delete([each.entry.path])
    records, stay = survey.records.leave_out(choice.dropped), list[Removable]()
    gone = set[str]()
    for start in range(0, len(last), _OBJECTS_PER_BATCH):
        records = read_records(storage, records)
        needed = records.list_needed()
        batch = last[start : start + _OBJECTS_PER_BATCH]
        going = [each for each in batch if not _is_kept(each, records, needed)]
        stay += [each for each in batch if each not in going]
        _delete_all(storage, going)
        gone |= {each.entry.path for each in going}
    records = read_records(storage, records)
    _delete_empty_folders(storage, survey, records, sorted({each.run for each in removable}))
    notes = [f"{len(stay):,} objects stay, since a run that came meanwhile has them."] if stay else []
    lost = [run for run, each in records.manifests.items() if any(part.path in gone for part in each.parts)]
    notes += [f"Run {run} was published meanwhile with parts that went: make its call again." for run in lost]
    return [each for each in removable if each not in stay], notes


def _is_kept(each: Removable, records: Records, needed: Collection[str]) -> bool:
    """Return whether a part, or what lies beside a run, is of a run that was planned or published meanwhile."""
    if each.entry.path.startswith(f"{ROOT}/"):
        return each.run in records.manifests or each.run in records.planned
    return each.entry.path in needed or each.run in records.plans


def _delete_all(storage: Storage, removable: Sequence[Removable]) -> None:
    storage.delete([each.entry.path for each in removable])


def _delete_empty_folders(storage: Storage, survey: Survey, records: Records, runs: Sequence[str]) -> None:
    """Delete the folders on a disk that are empty by now, of runs that are no more and of staged copies."""
    for run in runs:
        is_gone = run not in records.manifests and run not in records.planned
        folders = [f"{ROOT}/{run}"] if is_gone else [f"{ROOT}/{run}/staged", f"{ROOT}/{run}/{MARKS}"]
        folders += [f"run={run}"] if is_gone and not survey.has_table else []
        for folder in folders:
            storage.delete_torn_writes(folder)


def _list_notes(survey: Survey, choice: Choice, keep: int | None) -> Iterable[str]:
    records = survey.records
    if survey.has_table:
        yield (
            "The files of the Delta or Iceberg table stay: VACUUM of Delta and expire_snapshots of Iceberg delete "
            "those that it has replaced."
        )
    if keep is not None and len(choice.kept) < keep:
        yield f"There are {len(choice.kept):,} complete runs, and up to {keep:,} are kept: none is dropped."
    for run in sorted(survey.damaged - choice.dropped.keys()):
        yield f"Run {run} is damaged and stays as it is: make its call again, or see `overnight verify`."
    for run, plan in sorted(records.unfinished.items()):
        if run not in choice.dropped and not survey.has_table:
            yield f"Run {run} of {plan.planned_at:%Y-%m-%d} is not published and stays, with all that it has."
    for run in sorted(records.streams):
        yield f"Table {run} of a stream stays."


def _report(
    storage: Storage, choice: Choice, removable: Sequence[Removable], notes: Sequence[str], *, is_deleted: bool
) -> CleanReport:
    by_run: dict[str, list[Removable]] = {}
    for each in removable:
        by_run.setdefault(each.run, []).append(each)
    runs = [
        CleanedRun(
            run=run,
            why=choice.dropped.get(run, "no longer of use" if run in choice.kept else "of no run any more"),
            removed=dict(Counter(each.kind for each in found)),
            bytes=sum(each.entry.size for each in found),
        )
        for run, found in by_run.items()
    ]
    return CleanReport(
        destination=storage.url,
        is_deleted=is_deleted,
        runs=tuple(runs),
        runs_dropped=tuple(choice.dropped),
        runs_kept=choice.kept,
        objects=len(removable),
        bytes=sum(each.entry.size for each in removable),
        notes=tuple(notes),
    )
