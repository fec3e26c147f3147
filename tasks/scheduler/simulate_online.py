"""An endpoint under requests or events: always on, scaled by its load, or gone while nothing comes.

Shapes: T seconds, I intervals of the scaler.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tasks.scheduler.fit import Fit, candidate_of, felt_at
from tasks.scheduler.flow import Felt
from tasks.scheduler.problem import Candidate, Problem, late_flaw, rank
from tasks.scheduler.simulate_sleep import keep_warm

# How often a scaler looks at the load, and for how long it must have been lower before machines go.
SCALE_SECONDS = 15
SCALE_DOWN_SECONDS = 300
TARGETS = tuple(share / 100 for share in range(96, 18, -2))


def online(problem: Problem, fit: Fit) -> list[Candidate]:
    """Return each policy of an endpoint, with the parameters by which it keeps the promise at the lowest cost."""
    always = always_on(problem, fit)
    return [always, autoscaled(problem, fit, always), keep_warm(problem, fit, always.machines)]


def always_on(problem: Problem, fit: Fit) -> Candidate:
    """Return the fewest machines that keep the promise all the time, else as many as are allowed."""
    tried: dict[int, Felt] = {}

    def stands(machines: int) -> bool:
        tried[machines] = felt_at(problem, fit, machines)
        return late_flaw(problem, tried[machines].late, episodes=tried[machines].episodes) is None

    least = max(1, math.ceil(problem.counts_T.mean() / fit.waits.server.rate))
    allowed = range(min(least, problem.machines_max), problem.machines_max)
    machines = allowed.start + bisect_left(allowed, 1, key=stands)
    felt = tried.get(machines) or felt_at(problem, fit, machines)
    return candidate_of(problem, fit, "always-on", machines, machines * problem.seconds, felt)


def autoscaled(problem: Problem, fit: Fit, always: Candidate) -> Candidate:
    """Return the scaler, by its target and its floor, that keeps the promise at the lowest cost."""
    most = max(1, always.machines)
    floors = (
        {1, most // 2 or 1}
        if problem.quick
        else {1, *(1 << power for power in range(1, 10) if 1 << power < most), max(1, most - 1)}
    )
    best: Candidate | None = None
    for floor in sorted(floors):
        least = float(scale(problem, fit, floor, TARGETS[0])[0].sum()) * SCALE_SECONDS
        standing = [each for each in (best, always) if each is not None and each.flaw is None]
        if best is not None and any(least >= each.paid_seconds for each in standing):
            break
        best = min(filter(None, (best, *autoscalers(problem, fit, floor, standing))), key=rank)
    assert best is not None  # noqa: S101 - there is always a floor
    return best


def autoscalers(problem: Problem, fit: Fit, floor: int, standing: Sequence[Candidate] = ()) -> Iterator[Candidate]:
    """Yield scalers with the highest target that keeps the promise, and those that were tried on the way.

    One is enough where the cheapest costs no less than what stands already.
    """
    targets = TARGETS[::4] if problem.quick else TARGETS
    low, high = 0, len(targets) - 1
    while low <= high:
        middle = (low + high) // 2
        candidate = autoscale(problem, fit, floor, targets[middle])
        yield candidate
        low, high = (low, middle - 1) if candidate.flaw is None else (middle + 1, high)
        if any(candidate.flaw is not None and candidate.paid_seconds >= each.paid_seconds for each in standing):
            break


def autoscale(problem: Problem, fit: Fit, floor: int, target: float) -> Candidate:
    """Return a scaler: machines for the load of the last interval over the target; they take their start to come."""
    paid_I, ready_I = scale(problem, fit, floor, target)
    machines_T = np.repeat(ready_I, SCALE_SECONDS)[: len(problem.counts_T)]
    felt = felt_at(problem, fit, machines_T)
    seconds = float(paid_I.sum()) * SCALE_SECONDS * problem.seconds / (len(paid_I) * SCALE_SECONDS)
    found = candidate_of(problem, fit, "autoscaled", int(paid_I.max()), seconds, felt)
    return replace(found, floor=floor, target=target)


def scale(problem: Problem, fit: Fit, floor: int, target: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the machines that are paid for, and those that work, in each interval of the scaler."""
    starts = np.arange(0, len(problem.counts_T), SCALE_SECONDS)
    seen_I = np.add.reduceat(problem.counts_T, starts) / SCALE_SECONDS
    want_I = np.clip(np.ceil(seen_I / (target * fit.waits.server.rate)), floor, problem.machines_max)
    want_I = np.concatenate([want_I[:1], want_I[:-1]])
    boot = math.ceil(problem.profile.cold_start_seconds / SCALE_SECONDS)
    down = SCALE_DOWN_SECONDS // SCALE_SECONDS
    paid = pl.Series(want_I).rolling_max(down + 1, min_samples=1)
    ready = paid.rolling_min(boot + 1, min_samples=1) if boot else paid
    return paid.to_numpy().astype(np.int64), ready.to_numpy().astype(np.int64)
