"""Events or requests that batch runs score: what has come since the last one, every so many seconds.

Shapes: T seconds, P periods.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tasks.scheduler.flow import quantiles
from tasks.scheduler.problem import Candidate, Kind, Problem, late_flaw, rank
from tasks.scheduler.simulate_spot import spot_run

# Prefect is no clock for less.
EVERY_MIN = 60
NO_ANSWER = "a batch run gives no answer to one who waits for it"
_STEP = 0.8
_MACHINES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_SPOT_SHARES = (0.3, 0.5, 0.7, 0.85)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Arrivals, summed up once. sum_T: those before each second, and all."""

    problem: Problem
    rate: float
    sum_T: NDArray[np.int64]

    @classmethod
    def of(cls, problem: Problem, kind: Kind) -> Line:
        """Return the arrivals of a problem, and the rows a second of a machine of a kind."""
        sum_T = np.concatenate([[0], np.cumsum(problem.counts_T)])
        return cls(problem=problem, rate=problem.profile.batch_rows_per_second * kind.speed, sum_T=sum_T)

    def rows(self, every: int) -> NDArray[np.float64]:
        """Return the rows of each period."""
        ends = np.minimum(np.arange(0, len(self.sum_T) - 1 + every, every), len(self.sum_T) - 1)
        return np.diff(self.sum_T[ends]) * self.problem.rows_per_arrival


def batch(problem: Problem, kind: Kind) -> Candidate:
    """Return runs on on-demand machines: as seldom as the promise allows, on as many as make that cheapest."""
    line = Line.of(problem, kind)
    if problem.consumer == "requests":
        return replace(runs(line, 1, EVERY_MIN, ages=True), flaw=NO_ANSWER)
    best: Candidate | None = None
    for machines in [count for count in _MACHINES if count <= problem.machines_max]:
        if best is not None and best.flaw is None and _least(line, machines) >= best.paid_seconds:
            break
        candidate = seldom(line, machines)
        best = candidate if best is None else min(best, candidate, key=rank)
    assert best is not None  # noqa: S101 - one machine is always allowed
    return runs(line, best.machines, int(best.every or EVERY_MIN), ages=True)


def _least(line: Line, machines: int) -> float:
    """Return what runs on so many machines cost at least: as many as there must be, and the rows."""
    problem = line.problem
    count = problem.seconds / max(problem.within - problem.profile.start_seconds, EVERY_MIN)
    rows = float(problem.counts_T.sum()) * problem.rows_per_arrival
    return count * problem.profile.start_seconds * machines + rows / line.rate


def seldom(line: Line, machines: int) -> Candidate:
    """Return runs on so many machines, as seldom as the promise allows; else those that come nearest to it.

    Runs that are made too seldom come too late, and so do those that are made too often: they pile up, since each takes
    its time to begin. What stands lies between, and is looked for in steps from above, then by halving.
    """
    high, best = max(EVERY_MIN, int(line.problem.within)), None
    low = high
    while True:
        candidate = runs(line, machines, low)
        best = candidate if best is None else min(best, candidate, key=rank)
        if candidate.flaw is None or low == EVERY_MIN:
            break
        high, low = low - 1, max(EVERY_MIN, int(low * _STEP))
    if best.flaw is not None:
        return best
    while low < high:
        middle = (low + high + 1) // 2
        candidate = runs(line, machines, middle)
        if candidate.flaw is None:
            low, best = middle, candidate
        else:
            high = middle - 1
    return best


def runs(line: Line, machines: int, every: int, *, ages: bool = False) -> Candidate:
    """Return runs every so many seconds on so many machines; one begins when the one before it is over."""
    problem, start = line.problem, line.problem.profile.start_seconds
    rows_P = line.rows(every)
    took_P = start + rows_P / (line.rate * machines)
    end_P = _ends(took_P * problem.time_margin, every)
    late, expected = _late(line, end_P, every)
    age_p50, age_p99 = _ages(line, end_P, every) if ages else (0.0, 0.0)
    paid = float(took_P.sum()) * machines
    return Candidate(
        mode="batch",
        policy="on-demand",
        machines=machines,
        every=float(every),
        paid_seconds=paid,
        busy_seconds=float(rows_P.sum()) / line.rate,
        age_p50=age_p50,
        age_p99=age_p99,
        late=late,
        flaw=late_flaw(problem, max(late, expected)),
    )


def _ends(took_P: NDArray[np.float64], every: int) -> NDArray[np.float64]:
    due_P = np.arange(1, len(took_P) + 1) * every
    sum_P = np.cumsum(took_P)
    return np.asarray(sum_P + np.maximum.accumulate(due_P - (sum_P - took_P)))


def _late(line: Line, end_P: NDArray[np.float64], every: int) -> tuple[float, float]:
    """Return the share of rows that are late, and of those that would be if each period's rows came evenly in it.

    By the latter no seconds are lucky in which, this time, nothing came.
    """
    last = len(line.sum_T) - 1
    from_P = np.minimum(np.arange(len(end_P)) * every, last)
    to_P = np.minimum(from_P + every, last)
    late_P = np.clip(np.ceil(end_P - line.problem.within).astype(np.int64), from_P, to_P)
    total = int(line.sum_T[-1])
    if not total:
        return 0.0, 0.0
    rows_P = line.sum_T[to_P] - line.sum_T[from_P]
    even = float((rows_P * (late_P - from_P) / np.maximum(to_P - from_P, 1)).sum())
    return float((line.sum_T[late_P] - line.sum_T[from_P]).sum()) / total, even / total


def _ages(line: Line, end_P: NDArray[np.float64], every: int) -> tuple[float, float]:
    counts_T = line.problem.counts_T
    second_T = np.flatnonzero(counts_T)
    return quantiles(end_P[second_T // every] - second_T, counts_T[second_T].astype(np.float64))


def batch_on_spot(
    problem: Problem, kind: Kind, on_demand: Candidate, shares: Iterable[float] | None = None
) -> Candidate | None:
    """Return runs on spot machines, somewhat more often than on on-demand ones: the slack is what spot needs."""
    if not problem.counts_T.any():
        return None
    line = Line.of(problem, kind)
    more = min(2 * on_demand.machines, problem.machines_max)
    found = [
        spot_runs(line, kind, machines, max(EVERY_MIN, int(share * (on_demand.every or problem.within))))
        for machines in sorted({on_demand.machines, on_demand.machines if problem.quick else more})
        for share in shares or (_SPOT_SHARES[1::2] if problem.quick else _SPOT_SHARES)
    ]
    return min((candidate for candidate in found if candidate is not None), key=rank, default=None)


def spot_runs(line: Line, kind: Kind, machines: int, every: int) -> Candidate | None:
    """Return runs of which each is done on spot machines before its oldest row is too old; None where one can't be."""
    problem, ratio = line.problem, kind.price_ratio
    start, left = problem.profile.start_seconds, problem.within - every
    rows_P = line.rows(every)
    work_P = rows_P / (line.rate * machines) * problem.time_margin
    some = work_P[work_P > 0]
    if ratio is None or problem.availability is None or left <= 0 or not len(some):
        return None
    sizes = np.unique(np.quantile(some, (0.5, 1) if problem.quick else (0, 0.5, 1)))
    found = [spot_run(float(size), left, start, ratio, problem.availability, quick=problem.quick) for size in sizes]
    if any(run is None or run.late for run in found):
        return None
    done = [run for run in found if run is not None]
    paid_P = np.interp(work_P, [0.0, *sizes], [start / ratio, *(run.paid_seconds for run in done)])
    return Candidate(
        mode="batch",
        policy="spot",
        machines=machines,
        every=float(every),
        paid_seconds=float(paid_P.sum()) * machines / problem.time_margin,
        busy_seconds=float(rows_P.sum()) / line.rate,
        age_p50=every / 2 + done[len(done) // 2].seconds_p50,
        age_p99=min(every + done[-1].seconds_p99, problem.within),
    )
