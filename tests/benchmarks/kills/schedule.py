"""When a killer strikes, and how a run is cut for it: functions of values, the same for the same seed.

Kills at random times are a Poisson process on the working clock of each worker, which begins anew with its
first scored batch. Over all workers together that is one process on the sum of those clocks, and whom it
strikes is drawn among those at work. Told how many kills there are, their times are uniform draws in order.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

# A run that is a little faster than its model's seconds can't be; kills that are due by then do come.
_LAST_DUE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedKill:
    """A kill that is due once all workers together have worked so many seconds.

    `draw` in [0, 1) says which of those at work it strikes. An aimed one waits for a write, and `draw` says how
    far into it.
    """

    due_seconds: float
    draw: float
    aimed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """All kills of a run: at random times, while an attempt starts, and while a worker publishes.

    `startups` names attempts by the order in which they start, with the share of the usual start-up after which
    each is struck; `publishes` are shares of the usual seconds of publishing, for each worker as many as given.
    """

    timed: tuple[TimedKill, ...]
    startups: Mapping[int, float]
    publishes: Mapping[int, tuple[float, ...]]


def make_schedule(
    seed: int, *, workers: int, seconds: float, timed: int, aimed: int, startups: int, publishes: int
) -> Schedule:
    """Draw a schedule for workers that work so many seconds all together when nothing disturbs them.

    Of the timed kills `aimed` wait for a write; `publishes` are for each worker. Raises ValueError where more
    are to be aimed than there are.
    """
    if not 0 <= aimed <= timed or timed < 1:
        message = f"There must be at least one timed kill, and at most all of them aimed, got {aimed} of {timed}."
        raise ValueError(message)
    chosen = random.Random(seed)
    aimed_at = set(chosen.sample(range(timed), aimed))
    dues = sorted(chosen.uniform(0, _LAST_DUE * seconds) for _ in range(timed))
    starts = sorted(chosen.sample(range(workers, workers + timed), min(startups, timed)))
    return Schedule(
        timed=tuple(
            TimedKill(due_seconds=due, draw=chosen.random(), aimed=at in aimed_at) for at, due in enumerate(dues)
        ),
        startups={start: chosen.random() for start in starts},
        publishes={worker: tuple(chosen.random() for _ in range(publishes)) for worker in range(workers)},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How slow a model is made: rows of a batch, and the seconds that it takes for each."""

    batch_size: int
    batch_seconds: float


def slow_pace(rows: int, *, slots: int, seconds: float, batch_seconds: float) -> Pace:
    """Return batches, a power of two of rows each, with which so many slots take so many seconds over all rows.

    They take about `batch_seconds` each.
    """
    batches = slots * seconds / batch_seconds
    batch_size = 2 ** max(0, math.floor(math.log2(max(1.0, rows / batches))))
    return Pace(batch_size=batch_size, batch_seconds=slots * seconds / (rows / batch_size))


def chunk_seconds(checkpoint_seconds: float, seconds_between_kills: float) -> float:
    """Return the best seconds of work from checkpoint to checkpoint, to first order (Young 1974, Daly 2006)."""
    return math.sqrt(2 * checkpoint_seconds * seconds_between_kills)


def chunk_rows(seconds: float, pace: Pace) -> int:
    """Return the rows of a chunk that takes about so many seconds: whole batches, at least one."""
    return max(1, round(seconds / pace.batch_seconds)) * pace.batch_size
