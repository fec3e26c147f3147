"""Cleanings beside callers: what each deletes is held against the records that stand at that moment."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from serving.errors import OvernightError
from tasks.batch.clean import CleanReport, clean
from tasks.batch.manifest import Manifest
from tasks.batch.parts import is_part_name
from tasks.batch.plan import Plan
from tasks.batch.run_records import SOURCES, OrderNumber, RunStart
from tasks.storage import open_storage
from tests.simulation.oracle import Oracle
from tests.simulation.scheduler import Actor, Killed, Process, Scheduler, Stuck
from tests.simulation.storage import SimulatedStorage

_PART = re.compile(r"run=([^/]+)/([^/]+)")
_RECORD = re.compile(r"_overnight/([^/]+)/(plan|manifest)\.json")
_START = re.compile(r"_overnight/starts/[^/]+")
_ORDER = re.compile(r"_overnight/order/(\d+)\.json")
_BESIDE = re.compile(r"_overnight/([^/]+)/([^/]+)(?:/.+)?")
_KEEPS = (None, None, 1, 1, 2, 3)


@dataclass(kw_only=True)
class Cleaning:
    """One cleaning: what it is asked for, and when it began and last listed the records, in ticks of the watch.

    `complete` are the runs that were complete when it began, or have become so since.
    """

    keep: int | None
    unfinished_before: datetime | None
    began: int
    began_step: int
    complete: set[str]
    listed: int = -1


@dataclass(kw_only=True)
class CleaningWorld:
    """Cleans a destination while callers call, one cleaning at a time, and watches all that cleanings delete.

    A record that stood when a cleaning last listed them must have all that it names. A run that was planned after
    that may lose parts: what is read of it counts as damaged from then on, until its call is made again.
    """

    scheduler: Scheduler
    url: str
    storage: SimulatedStorage
    oracle: Oracle
    is_table: bool
    lost: set[str] = field(default_factory=set)
    _cleanings: dict[Process, Cleaning] = field(default_factory=dict)
    _put_at: dict[str, int] = field(default_factory=dict)
    _ticks: int = 0
    _last: Actor | None = None

    def start(self) -> None:
        """Begin a cleaning in a process of its own, unless one goes on."""
        if self._last is not None:
            if not self._last.done:
                return
            self._end(self._last)
        chance = self.scheduler.chance
        keep = chance.choice(_KEEPS)
        before = self.scheduler.wall_clock() + timedelta(seconds=chance.uniform(-20, 5))
        self._last = self._spawn(keep, before if chance.random() < 0.3 else None)

    def wait(self) -> None:
        """Wait until the last cleaning is over, whatever came of it."""
        if self._last is not None:
            self._end(self._last)

    def list_mendable(self, inputs: Mapping[str, SimulatedStorage]) -> list[Plan]:
        """Return the plans of published runs that a cleaning took parts of, and whose sources are as they were."""
        found: list[Plan] = []
        for run in sorted(self.lost):
            plan, manifest = self._read_plan(run), self._read_manifest(run)
            if plan is None or manifest is None or plan.digest != manifest.plan_digest:
                continue
            pinned = [plan.source, *(pin.snapshot for pin in plan.features)]
            files = [(inputs[each.root].objects.get(file.path), file) for each in pinned for file in each.files]
            if all(at is not None and at[1] == file.entry for at, file in files):
                found.append(plan)
        return found

    def check_mended(self, run: str, *, mended: bool) -> None:
        """Check that a run is whole after its call was made again."""
        if not (mended and self._is_intact(run)):
            self._violate(f"run {run} lost parts, and the same call does not mend it")

    def clean_at_last(self, keep: int) -> None:
        """Clean when nobody calls any more; check that what should go is gone, and nothing else."""
        keep_asked = None if self.is_table else keep
        intact = set(self._list_intact())
        report = self._end(self._spawn(keep_asked, None))
        if report is None:
            # A record that does not read: nothing is deleted.
            return
        left = set(self._list_intact())
        dropped = set(report.runs_dropped)
        if left != intact - dropped or len(left) != min(len(intact), keep_asked or len(intact)):
            self._violate(f"of the runs {sorted(intact)} it left {sorted(left)}, asked to keep {keep_asked}")
        self._check_leftovers()
        again = self._end(self._spawn(keep_asked, None))
        if again is None or again.objects:
            self._violate(f"the same again found {again.runs if again else 'an error'}")

    def _spawn(self, keep: int | None, unfinished_before: datetime | None) -> Actor:
        process = Process(f"cleaner.{self.scheduler.steps}")
        self._cleanings[process] = Cleaning(
            keep=keep,
            unfinished_before=unfinished_before,
            began=self._ticks,
            began_step=self.scheduler.steps,
            complete=set(self._list_intact()),
        )
        self.scheduler.tell(f"{process.name} keeps {keep}, drops unfinished ones before {unfinished_before}")

        def run() -> CleanReport | None:
            storage = open_storage(self.url)
            try:
                report = clean(storage, keep=keep, unfinished_before=unfinished_before, delete=True)
            except OvernightError as error:
                self.scheduler.tell(f"the cleaning is refused: {type(error).__name__}: {error}")
                return None
            self.scheduler.tell(f"the cleaning drops {report.runs_dropped}, deletes {report.objects}; {report.notes}")
            return report

        return self.scheduler.spawn(process, process.name, run)

    def _end(self, actor: Actor) -> CleanReport | None:
        """Return what a cleaning has reported, None where it was killed or refused."""
        self.scheduler.join(actor)
        actor.process.alive = False
        try:
            report = actor.value()
        except Killed:
            return None
        except Stuck:
            raise
        except Exception as error:  # noqa: BLE001 - nobody else's error may come out of a cleaning
            self._violate(f"it ended in {type(error).__name__}: {error}")
            return None
        assert report is None or isinstance(report, CleanReport)
        return report

    # What the storage tells.

    def see_put(self, path: str) -> None:
        """Take note of when an object was put."""
        self._put_at[path] = self._tick()
        if (match := _RECORD.fullmatch(path)) and match[2] == "manifest":
            for cleaning in self._cleanings.values():
                cleaning.complete.add(match[1])

    def see_list(self, prefix: str) -> None:
        """Take note that a cleaning lists the records."""
        cleaning = self._cleanings.get(self.scheduler.process)
        if cleaning is not None and prefix == "_overnight":
            cleaning.listed = self._tick()

    def see_delete(self, path: str) -> None:
        """Check that an object may go which a cleaning is about to delete."""
        cleaning = self._cleanings.get(self.scheduler.process)
        if cleaning is None or path not in self.storage.objects:
            return
        if match := _PART.fullmatch(path):
            self._check_file(cleaning, path, match[1], is_part=is_part_name(match[2]))
        elif match := _RECORD.fullmatch(path):
            self._check_drop(cleaning, match[1], match[2])
        elif _START.fullmatch(path):
            self._check_beside(cleaning, path, RunStart.model_validate_json(self.storage.objects[path][0]).run)
        elif path.startswith(f"{SOURCES}/"):
            self._violate(f"it deletes {path}, which says whose predictions these are")
        elif match := _ORDER.fullmatch(path):
            self._check_order(cleaning, path, int(match[1]))
        elif match := _BESIDE.fullmatch(path):
            may_go = self._find(f"_overnight/{match[1]}/manifest.json") or self._is_long_unfinished(cleaning, match[1])
            if not (may_go and match[2] in ("staged", "marks")):
                self._check_beside(cleaning, path, match[1])
        else:
            self._violate(f"it deletes {path}, which is nothing of a run")

    def _check_file(self, cleaning: Cleaning, path: str, folder: str, *, is_part: bool) -> None:
        """Check a file in the folder of a run: no record that the cleaning knows of may need it."""
        if self.is_table and (self.storage.root / "_delta_log").is_dir():
            self._violate(f"it deletes {path} beside a table")
        if not is_part and self._is_long_unfinished(cleaning, folder):
            return
        for run in sorted({match[1] for each in self.storage.objects if (match := _RECORD.fullmatch(each))}):
            needed = self._list_needed(run)
            unfinished = needed is not None and not self._find(f"_overnight/{run}/manifest.json")
            if needed is None or not (path in needed or (unfinished and run == folder)):
                continue
            if self._is_known(cleaning, run):
                self._violate(f"it deletes {path}, which run {run} has")
            elif path in needed or self._is_of_plan(path, run):
                self.scheduler.tell(f"NOTE: {path} goes, which run {run} has, planned meanwhile")
                self.lost.add(run)
                self.oracle.damaged_at = self.scheduler.steps

    def _is_of_plan(self, path: str, run: str) -> bool:
        """Whether a file in the folder of a run is a part of the plan that stands now."""
        plan = self._read_plan(run)
        return plan is not None and path.endswith(f"-{plan.digest[:12]}.parquet")

    def _list_needed(self, run: str) -> set[str] | None:
        """Return the parts that the records of a run name, None where they do not read."""
        if manifest := self._read_manifest(run):
            return {part.path for part in manifest.parts}
        plan = self._read_plan(run)
        return {part.path for part in plan.reused} if plan else None

    def _is_known(self, cleaning: Cleaning, run: str) -> bool:
        """Whether a record of a run stood when a cleaning listed them, and has not been written again since.

        After a damage of another kind only those count that stood when it began.
        """
        horizon = cleaning.listed if self.oracle.damaged_at < cleaning.began_step else cleaning.began
        records = [f"_overnight/{run}/{kind}.json" for kind in ("plan", "manifest")]
        return any(self._put_at[path] <= horizon for path in records if path in self.storage.objects)

    def _check_drop(self, cleaning: Cleaning, run: str, kind: str) -> None:
        """Check that a run may be dropped, and take note of it."""
        if self.oracle.damaged_at < cleaning.began_step and not (
            self._is_old(cleaning, run) or (kind == "plan" and self._is_long_unfinished(cleaning, run))
        ):
            self._violate(f"with keep={cleaning.keep} it drops run {run}, beside {sorted(cleaning.complete)}")
        self.oracle.forget_run(run, self.scheduler.steps)

    def _is_old(self, cleaning: Cleaning, run: str) -> bool:
        """Whether a run was published, and so many others are no older."""
        if cleaning.keep is None or not self._find(f"_overnight/{run}/manifest.json"):
            return False
        others = [other for other in cleaning.complete if other != run and not self.oracle.is_newer(run, other)]
        return len(others) >= cleaning.keep

    def _is_long_unfinished(self, cleaning: Cleaning, run: str) -> bool:
        """Whether a run was planned before the moment that was given, and not published before the cleaning looked."""
        manifest = f"_overnight/{run}/manifest.json"
        published = manifest in self.storage.objects and self._put_at[manifest] <= cleaning.listed
        if cleaning.unfinished_before is None or published:
            return False
        plan = self._read_plan(run)
        return plan is not None and plan.planned_at < cleaning.unfinished_before

    def _check_beside(self, cleaning: Cleaning, path: str, run: str) -> None:
        if self._is_known(cleaning, run):
            self._violate(f"it deletes {path}, and run {run} is there")

    def _check_order(self, cleaning: Cleaning, path: str, number: int) -> None:
        holder = OrderNumber.model_validate_json(self.storage.objects[path][0]).run
        self._check_beside(cleaning, path, holder)
        numbers = [int(match[1]) for each in self.storage.objects if (match := _ORDER.fullmatch(each))]
        if number == max(numbers):
            self._violate(f"it deletes {path}, the highest number")

    def _check_leftovers(self) -> None:
        """Check that no part is left that no run has."""
        needed, folders = set[str](), set[str]()
        for path in self.storage.objects:
            if (match := _RECORD.fullmatch(path)) and (parts := self._list_needed(match[1])) is not None:
                needed |= parts
                folders |= set() if self._is_intact(match[1]) else {match[1]}
        for path in () if self.is_table else self.storage.objects:
            match = _PART.fullmatch(path)
            if match and is_part_name(match[2]) and path not in needed and match[1] not in folders:
                self._violate(f"it leaves {path}, which no run has")

    def _list_intact(self) -> Iterator[str]:
        """Yield the published runs that have all their parts."""
        for path in self.storage.objects:
            match = _RECORD.fullmatch(path)
            if match and match[2] == "manifest" and self._is_intact(match[1]):
                yield match[1]

    def _is_intact(self, run: str) -> bool:
        """Whether a run is published and has all its parts, in the sizes that its manifest states."""
        manifest = self._read_manifest(run)
        return manifest is not None and all(len(self._find(part.path) or b"") == part.bytes for part in manifest.parts)

    def _read_manifest(self, run: str) -> Manifest | None:
        with suppress(ValueError):
            return Manifest.model_validate_json(self._find(f"_overnight/{run}/manifest.json") or b"")
        return None

    def _read_plan(self, run: str) -> Plan | None:
        with suppress(ValueError):
            return Plan.model_validate_json(self._find(f"_overnight/{run}/plan.json") or b"")
        return None

    def _find(self, path: str) -> bytes | None:
        found = self.storage.objects.get(path)
        return None if found is None else found[0]

    def _tick(self) -> int:
        self._ticks += 1
        return self._ticks

    def _violate(self, text: str) -> None:
        self.oracle.violations.append(f"cleaning: {text}")
