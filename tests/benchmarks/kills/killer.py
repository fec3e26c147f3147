"""Whom the killer strikes now: a schedule carried out over what the boards show, without a clock of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from tests.benchmarks.kills.schedule import Schedule, TimedKill


@dataclass(frozen=True, slots=True, kw_only=True)
class Usual:
    """Seconds that an attempt takes when nothing disturbs it: to its first batch, for one part, to publish."""

    startup: float
    write: float
    publish: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What is seen of a living attempt: its number in order of start, and seconds since it came to each point.

    None where it has not come there; `writes` is the number of the write that it is in, if it is in one.
    """

    number: int
    since_start: float
    since_begun: float | None
    since_publishing: float | None
    writes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """A kill: of which worker, and at what it was aimed."""

    worker: int
    aim: str


class Killer:
    """Carries out a schedule; asked again and again, it names one worker at a time."""

    def __init__(self, schedule: Schedule, usual: Usual) -> None:
        self._usual = usual
        self._timed = deque(schedule.timed)
        self._startups = dict(schedule.startups)
        self._publishes = {worker: deque(shares) for worker, shares in schedule.publishes.items()}
        self._aimed: deque[TimedKill] = deque()
        self._armed: tuple[int, int, int, float] | None = None

    def strike(self, now: float, worked: float, seen: Mapping[int, Seen]) -> Strike | None:
        """Return whom to kill now, None for nobody yet.

        `now` is in seconds of any steady clock; `worked` are the seconds that all attempts, the ended ones
        too, have worked.
        """
        return (
            self._at_startup(seen) or self._at_publish(seen) or self._at_time(worked, seen) or self._at_write(now, seen)
        )

    def _at_startup(self, seen: Mapping[int, Seen]) -> Strike | None:
        for worker, attempt in seen.items():
            share = self._startups.get(attempt.number)
            if share is not None and attempt.since_start >= share * self._usual.startup:
                del self._startups[attempt.number]
                return Strike(worker=worker, aim="startup")
        return None

    def _at_publish(self, seen: Mapping[int, Seen]) -> Strike | None:
        for worker, attempt in seen.items():
            shares = self._publishes.get(worker)
            if (
                shares
                and attempt.since_publishing is not None
                and (attempt.since_publishing >= shares[0] * self._usual.publish)
            ):
                shares.popleft()
                return Strike(worker=worker, aim="publish")
        return None

    def _at_time(self, worked: float, seen: Mapping[int, Seen]) -> Strike | None:
        while self._timed and self._timed[0].aimed and worked >= self._timed[0].due_seconds:
            self._aimed.append(self._timed.popleft())
        at_work = _at_work(seen)
        if not self._timed or worked < self._timed[0].due_seconds or not at_work:
            return None
        return Strike(worker=at_work[int(self._timed.popleft().draw * len(at_work))], aim="time")

    def _at_write(self, now: float, seen: Mapping[int, Seen]) -> Strike | None:
        """Wait until a worker writes, then as long as the draw says into the write; again if it ended before."""
        if not self._aimed:
            return None
        if self._armed is not None:
            worker, number, write, strike_at = self._armed
            attempt = seen.get(worker)
            if attempt is None or (attempt.number, attempt.writes) != (number, write):
                self._armed = None
            elif now >= strike_at:
                self._armed = None
                self._aimed.popleft()
                return Strike(worker=worker, aim="write")
            return None
        for worker in _at_work(seen):
            write = seen[worker].writes
            if write is not None:
                strike_at = now + self._aimed[0].draw * self._usual.write
                self._armed = (worker, seen[worker].number, write, strike_at)
        return None


def _at_work(seen: Mapping[int, Seen]) -> list[int]:
    """Return the workers that score: those that have begun and are not publishing."""
    return sorted(
        worker
        for worker, attempt in seen.items()
        if attempt.since_begun is not None and attempt.since_publishing is None
    )
