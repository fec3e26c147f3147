"""An endpoint that goes to zero while nothing comes.

Shapes: T seconds, G gaps, S starts.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from tasks.scheduler.fit import Fit, candidate_of, felt_at
from tasks.scheduler.flow import backlog
from tasks.scheduler.keep_warm import Spells, Windows, fixed, histogram, load, spells
from tasks.scheduler.problem import Candidate, Problem, rank

if TYPE_CHECKING:
    from tasks.scheduler.decision import Policy

TEN_MINUTES = 600
BESIDE = "a gateway sleeps after a fixed time, and this is only what that is held against"
_KEEPS = tuple(2.0 ** (power / 2) for power in range(-8, 25))
_TRIED_MAX = 6


def keep_warm(problem: Problem, fit: Fit, machines: int) -> Candidate:
    """Return an endpoint that goes to zero after the time by which it keeps the promise at the lowest cost, else T*."""
    found, boot = traffic(problem, fit, machines), problem.profile.cold_start_seconds
    gap_G = np.sort(found.gaps)
    below_G = np.concatenate([[0.0], np.cumsum(gap_G)])
    total = max(int(problem.counts_T.sum()), 1)
    costs: dict[int, float] = {}
    for keep in {TEN_MINUTES, *(math.ceil(boot * times) for times in _KEEPS)}:
        at = int(np.searchsorted(gap_G, keep, side="right"))
        cold = len(gap_G) - at
        if boot > problem.within and (cold + 1) / total > problem.late_max:
            continue
        costs[keep] = float(below_G[at]) + cold * (keep + boot) + keep
    best = sleep(problem, fit, machines, found, math.ceil(boot), "keep-warm")
    for keep in sorted(costs, key=lambda keep: (costs[keep], keep))[: 2 if problem.quick else _TRIED_MAX]:
        candidate = sleep(problem, fit, machines, found, keep, "keep-warm")
        if candidate.flaw is None:
            return min(candidate, best, key=rank)
    return best


def keep_warm_beside(problem: Problem, fit: Fit, machines: int) -> list[Candidate]:
    """Return what endpoints that go to zero are held against: ten minutes, and the hybrid histogram."""
    found = traffic(problem, fit, machines)
    return [
        sleep(problem, fit, machines, found, TEN_MINUTES, "keep-warm-10-minutes"),
        replace(_sleeping(problem, fit, machines, found, histogram(found), "keep-warm-histogram"), flaw=BESIDE),
    ]


def traffic(problem: Problem, fit: Fit, machines: int) -> Spells:
    """Return the spells in which so many machines have work."""
    busy_T, rate = problem.counts_T > 0, fit.waits.server.rate * machines
    if problem.counts_T.max(initial=0) > rate:
        busy_T |= backlog(problem.counts_T, float(rate)) > 0
    return spells(busy_T)


def sleep(problem: Problem, fit: Fit, machines: int, found: Spells, keep: int, policy: Policy) -> Candidate:
    """Return an endpoint that goes to zero when nothing has come for so many seconds."""
    return replace(
        _sleeping(problem, fit, machines, found, fixed(keep, len(found.gaps)), policy), keep_warm=float(keep)
    )


def _sleeping(problem: Problem, fit: Fit, machines: int, found: Spells, windows: Windows, policy: Policy) -> Candidate:
    length = len(problem.counts_T)
    boot = math.ceil(problem.profile.cold_start_seconds)
    # A start begins with the request that it is for, somewhere within a second, not at that second's end; and that
    # request waits for no other one to be served.
    cold = 1 - (boot - problem.profile.cold_start_seconds) - 1 / (fit.waits.server.rate * machines)
    loaded = load(found, windows, boot, length)
    change_T = np.zeros(length + 1, dtype=np.int64)
    ready_S = np.minimum(np.minimum(loaded.start_S + boot, loaded.stop_S), length)
    np.add.at(change_T, ready_S, machines)
    np.add.at(change_T, loaded.stop_S, -machines)
    felt = felt_at(problem, fit, np.cumsum(change_T)[:length], cold=cold)
    seconds = float((loaded.stop_S - loaded.start_S).sum()) * machines
    used = machines if len(loaded.start_S) else 0
    return candidate_of(problem, fit, policy, used, seconds, felt, cold_starts=loaded.cold_starts)
