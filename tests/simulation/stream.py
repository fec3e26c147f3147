"""Scorers of one stream into one table over a simulated storage: each reads the log from where the table ends."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
import polars as pl

from serving.errors import OvernightError
from tasks.batch.manifest import open_predictions
from tasks.batch.parts import REJECT_REASON
from tasks.storage import open_storage
from tasks.stream.decode import Decoder
from tasks.stream.message import Message, Position
from tasks.stream.options import ToParts
from tasks.stream.parts_sink import NUMBER, PARTITION, PartsSink, build_table_plan
from tasks.stream.score import MicroScorer
from tests.simulation.data import CONTRACT, ToyModel, ToyResolved, answer
from tests.simulation.scheduler import Killed, Process, Scheduler, Stuck
from tests.simulation.storage import SimulatedStorage

_KEYS = ("id",)
_NAME = "stream"
_MISCHIEF_SECONDS = 4.0
_MANIFEST = re.compile(rf"_overnight/({_NAME}-\d+)/manifest\.json")


@dataclass(kw_only=True)
class Log:
    """Messages by partition, in order of their numbers, which may have gaps; None stands for one that can't be read."""

    rows: dict[int, dict[int, tuple[float, float] | None]]

    def take(self, partition: int, start: int, count: int) -> list[Message]:
        """Return so many messages from a number on."""
        numbers = [number for number in self.rows[partition] if number >= start][:count]
        return [self._message(partition, number) for number in numbers]

    def _message(self, partition: int, number: int) -> Message:
        row = self.rows[partition][number]
        payload = b"no" if row is None else orjson.dumps({"id": number, "a": row[0], "b": row[1]})
        return Message(position=Position(partition, number), payload=payload, event_time=0.0, arrived=0.0)


def make_log(chance: random.Random) -> Log:
    """Return a log of one or two partitions."""
    rows: dict[int, dict[int, tuple[float, float] | None]] = {}
    for partition in range(chance.randint(1, 2)):
        rows[partition], number = {}, chance.randint(0, 3)
        for _ in range(chance.randint(1, 60)):
            row = (round(chance.uniform(-9, 9), 3), round(chance.uniform(-9, 9), 3))
            rows[partition][number] = None if chance.random() < 0.05 else row
            number += chance.choice([1, 1, 1, 4])
    return Log(rows=rows)


@dataclass(kw_only=True)
class StreamWorld:
    """One table of one stream, and all that happens to it."""

    scheduler: Scheduler
    chance: random.Random
    destination: SimulatedStorage
    log: Log
    mischief: list[str]
    scorers: int
    attempts: int
    refusals: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    version: int = 1
    damaged_at: int = -1
    is_over: bool = False
    _seen: dict[int, int] = field(default_factory=dict)

    def run(self) -> None:
        """Let scorers come and go while things go wrong, then score what is left on a calm day."""
        self.destination.on_put = self._see_put
        self.scheduler.kill_rate = self.destination.weather.kill
        names = [f"scorer-{at}" for at in range(self.scorers)]
        actors = [self.scheduler.spawn(Process(name), name, self._score_often) for name in names]
        fiend = self.scheduler.spawn(Process("fiend"), "fiend", self._do_mischief)
        for actor in actors:
            self.scheduler.join(actor).value()
        self.is_over = True
        self.scheduler.join(fiend).value()
        self.scheduler.kill_rate = 0.0
        self.destination.weather = self.destination.weather.without_faults()
        if self._attempt_apart(most=1000):
            self._check(None, is_whole=True)
        while self.destination.has_late:
            self.destination.deliver()
        self._check(None)

    def _score_often(self) -> None:
        for _ in range(self.attempts):
            self._attempt_apart(most=self.chance.randint(1, 6))
            self.scheduler.sleep(self.chance.expovariate(1.0))

    def _attempt_apart(self, most: int) -> bool:
        """Run a scorer in a process of its own for so many micro-batches; return whether it came to its end."""
        process = Process(f"scorer.{self.scheduler.steps}")
        actor = self.scheduler.spawn(process, process.name, lambda: self._score(most))
        self.scheduler.join(actor)
        try:
            actor.value()
        except Killed:
            self.refusals["killed"] += 1
        except OvernightError as error:
            self.refusals[type(error).__name__] += 1
            self.scheduler.tell(f"refused: {type(error).__name__}: {error}")
        except Stuck:
            raise
        except Exception as error:  # noqa: BLE001 - nobody else's error may come out of a sink
            self.violations.append(f"a sink ended in {type(error).__name__}: {error}")
        else:
            self.refusals["none"] += 1
            return True
        return False

    def _score(self, most: int) -> None:
        resolved = ToyResolved(self.version)
        decoder = Decoder(CONTRACT, _KEYS, fix_key_types=True)
        address = ToParts(destination=self.destination.url, name=_NAME)
        plan = build_table_plan(address, "a stream", model=resolved.pin, contract=CONTRACT, keys=_KEYS)
        sink = PartsSink(open_storage(self.destination.url), plan, resolved.pin, decoder.key_types)
        model: Any = ToyModel(resolved.version)
        scorer = MicroScorer(model, CONTRACT, decoder, 64, lambda: self.scheduler.now)
        cursors = {partition: sink.next_numbers.get(partition, 0) for partition in self.log.rows}
        for _ in range(most):
            partitions = [p for p in cursors if self.chance.random() < 0.7]
            taken = [m for p in partitions for m in self.log.take(p, cursors[p], self.chance.randint(1, 12))]
            cursors |= {message.position.partition: message.position.number + 1 for message in taken}
            if taken:
                sink.emit([scorer.score(taken)])
                self._check(None)
            elif not any(self.log.take(p, cursors[p], 1) for p in cursors):
                return

    def _see_put(self, path: str, is_late: bool) -> None:  # noqa: FBT001 - as the storage calls it
        if match := _MANIFEST.fullmatch(path):
            self._check(match[1])
            self._check(None)

    def _check(self, run: str | None, *, is_whole: bool = False) -> None:
        """Check that the table holds each message up to where each partition ends, once, with the model's answer."""
        try:
            table = open_predictions(str(self.destination.root), run).collect()
        except OvernightError as error:
            if "list of parts" in str(error):
                self.violations.append(f"a commit refers to what is not there: {error}")
            return
        except (OSError, pl.exceptions.PolarsError) as error:
            if self.damaged_at < 0:
                self.violations.append(f"the table can't be read: {type(error).__name__}: {error}")
            return
        for partition, rows in self.log.rows.items():
            part = table.filter(pl.col(PARTITION) == partition)
            numbers = part[NUMBER].to_list()
            end = max(numbers, default=-1) + 1
            if sorted(numbers) != [number for number in rows if number < end]:
                self.violations.append(f"the table holds messages {sorted(numbers)} of partition {partition}")
            elif wrong := self._wrong(rows, part):
                self.violations.append(f"the table holds wrong answers to messages {wrong}")
            self._check_end(partition, end, is_newest=run is None, is_whole=is_whole)

    def _check_end(self, partition: int, end: int, *, is_newest: bool, is_whole: bool) -> None:
        if is_newest and self.damaged_at < 0:
            if end < self._seen.get(partition, 0):
                self.violations.append(f"the table went back to {end} from {self._seen[partition]}")
            self._seen[partition] = end
        if is_whole and end <= max(self.log.rows[partition]):
            self.violations.append(f"partition {partition} is scored to its end, but the table ends at {end}")

    def _wrong(self, rows: dict[int, tuple[float, float] | None], part: pl.DataFrame) -> Sequence[int]:
        told = zip(part[NUMBER].to_list(), part["y"].to_list(), part[REJECT_REASON].to_list(), strict=True)
        return [number for number, y, reason in told if not _fits(rows[number], y, reason)]

    def _do_mischief(self) -> None:
        while not self.is_over:
            self.scheduler.sleep(self.chance.expovariate(1 / _MISCHIEF_SECONDS))
            if self.mischief:
                what = self.chance.choice(self.mischief)
                self.scheduler.tell(f"mischief: {what}")
                getattr(self, f"_{what}")()

    def _promote_model(self) -> None:
        self.version = self.chance.randint(1, 4)

    def _delete_everything(self) -> None:
        self._erase(r"_overnight/.*")

    def _delete_plan(self) -> None:
        self._erase(rf"_overnight/{_NAME}/plan\.json")

    def _damage_part(self) -> None:
        if parts := sorted(path for path in self.destination.objects if path.endswith(".parquet")):
            self._erase(re.escape(self.chance.choice(parts)))

    def _erase(self, pattern: str) -> None:
        self.destination.erase([path for path in self.destination.objects if re.fullmatch(pattern, path)])
        self.damaged_at = self.scheduler.steps


def _fits(row: tuple[float, float] | None, y: float | None, reason: str | None) -> bool:
    if row is None:
        return y is None and reason is not None
    return reason is None and y in {answer(version, *row) for version in range(1, 5)}
