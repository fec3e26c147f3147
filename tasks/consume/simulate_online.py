"""An endpoint under requests or events: always on, scaled by its load, or gone while nothing comes.

The dial is the one with which a machine takes most within the promise; a pass begins as soon as a slot is free.

Shapes: T seconds, I intervals of the scaler.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tasks.consume.flow import Felt, backlog, feel
from tasks.consume.keep_warm import Spells, Windows, fixed, histogram, load, spells
from tasks.consume.problem import Candidate, Kind, Problem, late_flaw, rank
from tasks.consume.server import UTILISATIONS, Server, Waits, measure_waits

if TYPE_CHECKING:
    from tasks.consume.decision import Policy

# How often a scaler looks at the load, and for how long it must have been lower before machines go.
SCALE_SECONDS = 15
SCALE_DOWN_SECONDS = 300
TEN_MINUTES = 600
BATCH_MAX = 1024
BESIDE = "a gateway sleeps after a fixed time, and this is only what that is held against"
TARGETS = tuple(share / 100 for share in range(96, 18, -2))
_KEEPS = tuple(2.0 ** (power / 2) for power in range(-8, 25))
_TRIED_MAX = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A dial on a kind of machine: what requests wait there, and what each takes beside its pass."""

    batch_size_max: int
    waits: Waits
    beside: float
    wait: float = 0.0

    def flaw(self, problem: Problem) -> str | None:
        """Say why the dial can't keep the promise, however little comes; None where it can."""
        server = self.waits.server
        least = self.wait + 2 * server.time(server.requests_max) + self.beside
        if least <= problem.within:
            return None
        return (
            f"a pass takes {1000 * server.time(server.requests_max):.3g} ms, and a request may come behind another: at"
            f" least {1000 * least:.3g} ms must be allowed"
        )

    def most(self, problem: Problem) -> float:
        """Return the requests a second that a machine takes within the promise."""
        late_U = self.waits.late(problem.within - self.beside)
        good = int(np.argmax(late_U > problem.late_max)) if (late_U > problem.late_max).any() else len(late_U)
        return 0.0 if good == 0 else UTILISATIONS[good - 1] * self.waits.server.rate


def online(problem: Problem, fit: Fit) -> list[Candidate]:
    """Return each policy of an endpoint, with the parameters by which it keeps the promise at the lowest cost."""
    always = always_on(problem, fit)
    return [always, autoscaled(problem, fit, always), keep_warm(problem, fit, always.machines)]


def online_beside(problem: Problem, fit: Fit, machines: int) -> list[Candidate]:
    """Return what endpoints that go to zero are held against: ten minutes, and the hybrid histogram."""
    found = traffic(problem, fit, machines)
    return [
        sleep(problem, fit, machines, found, TEN_MINUTES, "keep-warm-10-minutes"),
        replace(_sleeping(problem, fit, machines, found, histogram(found), "keep-warm-histogram"), flaw=BESIDE),
    ]


def fits(problem: Problem, kind: Kind, batches: Iterable[int] | None = None) -> list[Fit]:
    """Return the dials that an endpoint may have on a kind of machine, the one that takes most first."""
    profile, rows = problem.profile, problem.rows_per_arrival
    busy = profile.request_ms if profile.request_busy_ms is None else profile.request_busy_ms
    beside = max(profile.request_ms - busy, 0.0) / 1000
    least = math.ceil(rows)
    sizes = sorted(set(batches or (least << power for power in range(11) if least << power <= max(BATCH_MAX, least))))
    servers = [
        Server(
            slots=profile.slots,
            pass_time=profile.pass_time.pass_ms / 1000 / kind.speed,
            request_time=(profile.pass_time.row_ms * rows + busy) / 1000 / kind.speed,
            requests_max=max(1, int(size / rows)),
        )
        for size in sizes
        if size >= least
    ]
    waits = measure_waits(servers)
    usable = [each for each in waits if 2 * each.server.time(each.server.requests_max) + beside <= problem.within]
    found = [
        Fit(batch_size_max=max(least, math.ceil(each.server.requests_max * rows)), waits=each, beside=beside)
        for each in usable or waits[:1]
    ]
    return sorted(found, key=lambda fit: fit.most(problem), reverse=True)


def always_on(problem: Problem, fit: Fit) -> Candidate:
    """Return the fewest machines that keep the promise all the time, else as many as are allowed."""
    tried: dict[int, Felt] = {}

    def stands(machines: int) -> bool:
        tried[machines] = _felt(problem, fit, machines)
        return late_flaw(problem, tried[machines].late) is None

    least = max(1, math.ceil(problem.counts_T.mean() / fit.waits.server.rate))
    allowed = range(min(least, problem.machines_max), problem.machines_max)
    machines = allowed.start + bisect_left(allowed, 1, key=stands)
    felt = tried.get(machines) or _felt(problem, fit, machines)
    return _candidate(problem, fit, "always-on", machines, machines * problem.seconds, felt)


def _felt(problem: Problem, fit: Fit, machines: NDArray[np.int64] | int) -> Felt:
    return feel(problem.counts_T, machines, fit.waits, fit.beside, problem.within, ages=not problem.quick)


def _candidate(
    problem: Problem, fit: Fit, policy: Policy, machines: int, seconds: float, felt: Felt, *, cold_starts: int = 0
) -> Candidate:
    server = fit.waits.server
    work = float(problem.counts_T.sum()) * server.time(server.requests_max) / server.requests_max / server.slots
    return Candidate(
        mode="online",
        policy=policy,
        machines=machines,
        batch_size_max=fit.batch_size_max,
        wait=fit.wait,
        paid_seconds=seconds,
        busy_seconds=min(work, seconds),
        age_p50=felt.age_p50,
        age_p99=felt.age_p99,
        late=felt.late,
        cold_starts=cold_starts,
        flaw=fit.flaw(problem) or late_flaw(problem, felt.late, episodes=cold_starts),
    )


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
    felt = _felt(problem, fit, machines_T)
    seconds = float(paid_I.sum()) * SCALE_SECONDS * problem.seconds / (len(paid_I) * SCALE_SECONDS)
    found = _candidate(problem, fit, "autoscaled", int(paid_I.max()), seconds, felt)
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


def traffic(problem: Problem, fit: Fit, machines: int) -> Spells:
    """Return the spells in which so many machines have work."""
    busy_T, rate = problem.counts_T > 0, fit.waits.server.rate * machines
    if problem.counts_T.max(initial=0) > rate:
        busy_T |= backlog(problem.counts_T, float(rate)) > 0
    return spells(busy_T)


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


def sleep(problem: Problem, fit: Fit, machines: int, found: Spells, keep: int, policy: Policy) -> Candidate:
    """Return an endpoint that goes to zero when nothing has come for so many seconds."""
    return replace(
        _sleeping(problem, fit, machines, found, fixed(keep, len(found.gaps)), policy), keep_warm=float(keep)
    )


def _sleeping(problem: Problem, fit: Fit, machines: int, found: Spells, windows: Windows, policy: Policy) -> Candidate:
    length = len(problem.counts_T)
    boot = math.ceil(problem.profile.cold_start_seconds)
    loaded = load(found, windows, boot, length)
    change_T = np.zeros(length + 1, dtype=np.int64)
    ready_S = np.minimum(np.minimum(loaded.start_S + boot, loaded.stop_S), length)
    np.add.at(change_T, ready_S, machines)
    np.add.at(change_T, loaded.stop_S, -machines)
    felt = _felt(problem, fit, np.cumsum(change_T)[:length])
    seconds = float((loaded.stop_S - loaded.start_S).sum()) * machines
    used = machines if len(loaded.start_S) else 0
    return _candidate(problem, fit, policy, used, seconds, felt, cold_starts=loaded.cold_starts)
