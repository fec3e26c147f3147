"""The check of a run's challengers: each of their parts is read, and held against its chunk and the list of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from serving.errors import DestinationUnusable, FormatTooNew
from tasks.batch.comparison import ChallengerParts, ChallengersRecord, challengers_path, list_parts_made
from tasks.batch.dataset import map_parallel
from tasks.batch.part_check import Damage, PartCheck, PartReader, expect_part
from tasks.batch.parts import list_parts, part_path, read_given_up
from tasks.batch.plan import Plan
from tasks.batch.run_records import read_record
from tasks.storage import Storage


@dataclass(frozen=True, slots=True, kw_only=True)
class ChallengersCheck:
    """What came of reading the parts of a run's challengers: how many were read, and what is damaged."""

    parts_read: int
    damages: tuple[Damage, ...]
    notes: tuple[str, ...]


def check_challengers(storage: Storage, plan: Plan, *, is_published: bool) -> ChallengersCheck:
    """Read every part of the challengers of a run, as those of its model are read; nothing is changed.

    A challenger that was given up has no parts to be held against anything. Once the run is published, its parts are
    those of the list beside the manifest, and what is damaged is of the kind "challenger": no call makes it again.

    Args:
        storage: The destination.
        plan: The plan of the run.
        is_published: Whether the run has its manifest.
    """
    if not plan.challengers:
        return ChallengersCheck(parts_read=0, damages=(), notes=())
    record, damages = _read_record(storage, plan) if is_published else (None, [])
    listed = {each.place: each for each in record.challengers} if record is not None else {}
    notes, parts_read = list[str](), 0
    for each in plan.challenger_plans:
        if (why := read_given_up(storage, each)) is not None:
            notes.append(f"The challenger {each.model.uri} was given up, and its parts were not read: {why}")
            continue
        checks, missing = _check_parts(storage, each, listed.get(each.place))
        parts_read += len(checks)
        found = [damage for check in checks for damage in check.damages]
        if not is_published:
            damages += found
            if missing:
                notes.append(f"{len(missing)} of {len(each.chunks)} parts of {each.model.uri} are not scored yet.")
            continue
        damages += [_make_damage(each, damage.path, f"{damage.kind}: {damage.message}") for damage in found]
        damages += [_make_damage(each, path, "The part must be there, but is gone.") for path in missing]
        if record is not None:
            damages += _check_listing(each, checks, listed.get(each.place))
    notes.append(f"{parts_read:,} parts of challengers were read too.")
    return ChallengersCheck(parts_read=parts_read, damages=tuple(damages), notes=tuple(notes))


def _read_record(storage: Storage, plan: Plan) -> tuple[ChallengersRecord | None, list[Damage]]:
    """Read the list of the parts of challengers; one that is not there, or is of another plan, is a damage."""
    path = challengers_path(plan.run, plan.digest)
    try:
        record = read_record(storage, path, ChallengersRecord)
    except (DestinationUnusable, FormatTooNew) as error:
        return None, [Damage(kind="challenger", path=path, message=str(error))]
    if record is None:
        message = "The list of the challengers' parts must be there once their run is published, but is gone."
        return None, [Damage(kind="challenger", path=path, message=message)]
    if record.plan_digest != plan.digest:
        message = f"It must be of plan {plan.digest[:12]}, got one of plan {record.plan_digest[:12]}."
        return record, [Damage(kind="challenger", path=path, message=message)]
    return record, []


def _check_parts(storage: Storage, plan: Plan, listed: ChallengerParts | None) -> tuple[list[PartCheck], list[str]]:
    """Read the parts of one challenger by its plan; return the checks, and the paths of those that are not there."""
    entries = {entry.path: entry for entry in list_parts(storage, plan).values()}
    published = {part.path: part for part in listed.parts} if listed is not None else {}
    chunks = {part_path(plan, at): chunk for at, chunk in plan.chunks.items()}
    expected = [expect_part(path, chunk, published.get(path)) for path, chunk in chunks.items()]
    reader = PartReader(storage, plan)
    there = [part for part in expected if part.path in entries]
    checks = map_parallel(storage, lambda part: reader.check(part, entries[part.path]), there)
    return checks, [part.path for part in expected if part.path not in entries]


def _check_listing(plan: Plan, checks: Sequence[PartCheck], listed: ChallengerParts | None) -> Iterable[Damage]:
    """Yield what the list says of one challenger otherwise than its plan and its parts."""
    path, pin = challengers_path(plan.run, plan.digest), plan.model
    if listed is None or (listed.model, listed.model_digest) != (pin.uri, pin.digest):
        got = "nothing" if listed is None else listed.model
        yield _make_damage(plan, path, f"It must name this challenger as number {plan.place}, got {got}.")
        return
    told = set(listed.parts)
    read = [check.footer for check in checks if check.footer is not None and not check.damages]
    made = set(list_parts_made(read))
    known = {part_path(plan, at) for at in plan.chunks}
    if wrong := sorted({part.path for part in made - told} | {part.path for part in told if part.path not in known}):
        message = f"It must say of each part what the part says itself, but does not of {len(wrong)}, as {wrong[0]}."
        yield _make_damage(plan, path, message)


def _make_damage(plan: Plan, path: str, message: str) -> Damage:
    return Damage(kind="challenger", path=path, message=f"Of {plan.model.uri}: {message}")
