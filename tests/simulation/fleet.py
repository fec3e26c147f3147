"""A thousand spot workers over ten billion rows: real plan and chunk scheduler, in simulated time.

Workers have no model and no coordinator. Each is a greenlet; storage calls and forward passes take simulated seconds.
Workers are as fast as the machines they get, come one by one, are killed without notice, and replaced.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import greenlet
import pyarrow as pa

from tasks.batch.chunk_layout import Sizes
from tasks.batch.chunk_scheduler import MARKS, ChunkClaim, ChunkScheduler, ScoringMachine
from tasks.batch.dataset import Dataset, Snapshot, SourceFile
from tasks.batch.footer import GroupBytes
from tasks.batch.options import BatchOptions
from tasks.batch.parts import ChunkId, part_path
from tasks.batch.plan import Plan, make_plan
from tasks.spot.drain import Drain
from tasks.storage import Entry
from tests.tasks.batch.small import PIN, a_contract

GROUPS, ROWS_PER_GROUP, ROW_BYTES = 8, 125_000, 256
_PAGE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The machines of a simulation: how many, how fast, how long they live, and what their storage takes to answer."""

    workers: int = 1000
    rows_per_second: float = 3000.0
    # Machines of one kind differ by so much, and chunks on one machine.
    speed_spread: float = 0.15
    chunk_spread: float = 0.05
    # Workers come over so many seconds, and take so many to load plan and model.
    come_within: float = 300.0
    load_seconds: float = 30.0
    kills_per_hour: float = 0.1
    replaced_after: float = 180.0
    head_seconds: float = 0.03
    list_seconds: float = 0.1
    put_seconds: float = 0.1


SIZES = Sizes(batch_size=512, slots=1, row_bytes=ROW_BYTES, rows_per_second=Fleet().rows_per_second)


@dataclass(slots=True, kw_only=True)
class FleetResult:
    """What came of a simulated run."""

    rows: int = 0
    rows_doubled: int = 0
    rows_lost: int = 0
    seconds: float = 0.0
    worker_seconds: float = 0.0
    kills: int = 0
    parts: int = 0
    marks: int = 0
    shard_tasks: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    # Of every minute: how many parts were there at its end.
    parts_by_minute: list[int] = field(default_factory=list)

    @property
    def doubled_work(self) -> float:
        """Rows scored by two workers, as a fraction of all."""
        return self.rows_doubled / self.rows

    @property
    def lost_work(self) -> float:
        """Rows of chunks that a kill has cut short, as a fraction of all."""
        return self.rows_lost / self.rows


def plan_fleet(*, workers: int, files: int, options: BatchOptions) -> Plan:
    """Return a plan over files of a million rows that are not there, for so many workers."""
    groups = (GroupBytes(ROWS_PER_GROUP * ROW_BYTES, 0, 0, 0),) * GROUPS
    file = SourceFile(path="", size=1, tag="", row_groups=(ROWS_PER_GROUP,) * GROUPS, group_bytes=groups)
    numbered = tuple(file.model_copy(update={"path": f"part-{at:05d}.parquet"}) for at in range(files))
    snapshot = Snapshot(root="/source", format="parquet", files=numbered)
    return make_plan(
        key="fleet",
        model=PIN,
        contract=a_contract("f0"),
        options=options.model_copy(update={"workers": workers}),
        source=snapshot,
        dataset=Dataset(snapshot=snapshot, schema=pa.schema([("f0", pa.float64())]), hive=()),
        sizes=SIZES,
    )


class _Ended(BaseException):
    """The machine of a worker is gone, or the simulation is over."""


class Clock:
    """Runs greenlets in simulated time: each sleeps by a switch to this one, which wakes the next."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, greenlet.greenlet]] = []
        self._numbers = itertools.count()
        self._hub = greenlet.getcurrent()

    def start(self, at: float, run: Callable[[], None]) -> greenlet.greenlet:
        """Begin an actor at a time."""
        actor = greenlet.greenlet(run, self._hub)
        heapq.heappush(self._queue, (at, next(self._numbers), actor))
        return actor

    def sleep(self, seconds: float) -> None:
        """Let time pass for the actor that calls."""
        heapq.heappush(self._queue, (self.now + seconds, next(self._numbers), greenlet.getcurrent()))
        self._hub.switch()

    def run(self) -> None:
        """Run until no actor is left."""
        while self._queue:
            at, _, actor = heapq.heappop(self._queue)
            if not actor.dead:
                self.now = max(self.now, at)
                actor.switch()


class FleetStorage:
    """The parts of one run in memory, by name alone. A call takes simulated time and is counted."""

    url = "memory://fleet"
    reads_at_once = 16

    def __init__(self, plan: Plan, fleet: Fleet, clock: Clock) -> None:
        self._fleet, self._clock = fleet, clock
        self.calls: Counter[str] = Counter()
        self._parts_folder = f"run={plan.run}"
        self._folders: dict[str, list[str]] = {}
        self._objects: dict[str, Entry] = {}

    def exists(self, path: str) -> bool:
        """Whether a part stands there."""
        self._call("HEAD", self._fleet.head_seconds)
        return path in self._objects

    def put_new(self, path: str, _data: bytes | memoryview) -> bool:
        """Create an object."""
        self._call("PUT", self._fleet.put_seconds)
        if path in self._objects:
            return False
        self._objects[path] = Entry(path=path, size=1, tag="")
        bisect.insort(self._folders.setdefault(path.rpartition("/")[0], []), path)
        return True

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return self.count_objects(self._parts_folder)

    def count_objects(self, folder: str) -> int:
        """Return how many objects are right in a folder."""
        return len(self._folders.get(folder, ()))

    def entries(self, prefix: str = "", depth: int | None = None) -> list[Entry]:
        """Return all objects right in a folder, page by page; there are no folders in one."""
        paths = self._folders.get(prefix, [])
        pages = len(paths) // _PAGE + 1
        self._call("LIST", pages * self._fleet.list_seconds, pages)
        return [self._objects[path] for path in paths]

    def delete(self, paths: list[str]) -> None:
        """Delete nothing: the first worker comes before there is anything."""
        assert not paths

    def entries_after(self, folder: str, name: str, count: int) -> list[Entry]:
        """Return a page of the objects right in a folder."""
        self._call("LIST", self._fleet.list_seconds)
        paths = self._folders.get(folder, [])
        start = bisect.bisect_right(paths, f"{folder}/{name}")
        return [self._objects[path] for path in paths[start : start + count]]

    def _call(self, kind: str, seconds: float, count: int = 1) -> None:
        self.calls[kind] += count
        self._clock.sleep(seconds)


def simulate_fleet(plan: Plan, fleet: Fleet, *, seed: int) -> FleetResult:
    """Score a plan by a fleet in simulated time; return what it took.

    Args:
        plan: The plan, as the real planner made it.
        fleet: The machines.
        seed: Of all that is drawn.
    """
    return _Simulation(plan, fleet, seed).run()


class _Simulation:
    def __init__(self, plan: Plan, fleet: Fleet, seed: int) -> None:
        self.plan, self.fleet = plan, fleet
        self.chance = random.Random(seed)
        self.clock = Clock()
        self.storage = FleetStorage(plan, fleet, self.clock)
        self.result = FleetResult(rows=plan.rows)
        self._chunks = len(plan.chunks)

    def run(self) -> FleetResult:
        for number in range(self.fleet.workers):
            # The first flow run starts the others, which join its run.
            self._start_worker(self.chance.uniform(0, self.fleet.come_within) if number else 0.0, joined=number > 0)
        self.clock.start(0, self._count_by_minute)
        self.clock.run()
        self.result.calls, self.result.parts = self.storage.calls, self.storage.parts
        self.result.marks = self.storage.count_objects(f"{self.plan.folder}/{MARKS}")
        return self.result

    @property
    def is_complete(self) -> bool:
        return self.storage.parts == self._chunks

    def _count_by_minute(self) -> None:
        while not self.is_complete:
            self.clock.sleep(60)
            self.result.parts_by_minute.append(self.storage.parts)

    def _start_worker(self, at: float, *, joined: bool) -> None:
        self.clock.start(at, lambda: _Worker(self, joined=joined).live())

    def replace_worker(self) -> None:
        self.result.kills += 1
        if not self.is_complete:
            self._start_worker(self.clock.now + self.fleet.replaced_after, joined=True)


class _Worker:
    """One machine with one slot: it reads one chunk ahead, and writes a part while it scores the next chunk."""

    def __init__(self, simulation: _Simulation, *, joined: bool) -> None:
        self._all, self._clock, fleet = simulation, simulation.clock, simulation.fleet
        chance = random.Random(simulation.chance.random())
        self._chance = chance
        self._rate = fleet.rows_per_second * chance.lognormvariate(0, fleet.speed_spread)
        self._began = self._clock.now
        self._dies_at = self._began + chance.expovariate(fleet.kills_per_hour / 3600) if fleet.kills_per_hour else None
        self._in_hand: ChunkId | None = None
        machine = ScoringMachine(clock=lambda: self._clock.now, wait=self._wait, random=chance)
        drain = Drain(machine.clock)
        self._scheduler = ChunkScheduler(simulation.plan, simulation.storage, drain, joined=joined, machine=machine)

    def live(self) -> None:
        try:
            self._sleep(self._all.fleet.load_seconds)
            self._scheduler.begin()
            while (shard := self._scheduler.next_shard()) is not None:
                self._all.result.shard_tasks += 1
                self._score(shard)
        except _Ended:
            if self._in_hand is not None:
                self._all.result.rows_lost += self._all.plan.chunk(self._in_hand).rows
            self._all.replace_worker()
        self._all.result.worker_seconds += self._clock.now - self._began
        self._all.result.seconds = max(self._all.result.seconds, self._clock.now)

    def _score(self, shard: int) -> None:
        idle = threading.Semaphore(1)
        claims = self._scheduler.claim_chunks(shard, idle)
        claim = next(claims, None)
        while claim is not None:
            # A chunk is read ahead while the one before it is scored, unless the slot helps.
            following = None if claim.helping else next(claims, None)
            self._score_chunk(claim)
            if claim.helping:
                idle.release()
                following = next(claims, None)
            claim = following

    def _score_chunk(self, claim: ChunkClaim) -> None:
        if not self._scheduler.is_still_missing(claim):
            return
        rows = self._all.plan.chunk(claim.chunk).rows
        started, self._in_hand = self._clock.now, claim.chunk
        self._sleep(rows / self._rate * self._chance.lognormvariate(0, self._all.fleet.chunk_spread))
        self._in_hand = None
        seconds = self._clock.now - started
        self._clock.start(self._clock.now, lambda: self._write(claim.chunk, seconds))

    def _write(self, chunk: ChunkId, seconds: float) -> None:
        won = self._all.storage.put_new(part_path(self._all.plan, chunk), b"")
        self._scheduler.note_scored(chunk, seconds, won=won)
        if not won:
            self._all.result.rows_doubled += self._all.plan.chunk(chunk).rows

    def _sleep(self, seconds: float) -> None:
        if self._dies_at is not None and self._clock.now + seconds >= self._dies_at:
            self._clock.sleep(max(0.0, self._dies_at - self._clock.now))
            raise _Ended
        self._clock.sleep(seconds)

    def _wait(self, event: threading.Event, seconds: float) -> bool:
        self._sleep(seconds)
        return event.is_set()
