"""What the choice costs over the cheapest that a search through all parameters finds, and whether promises hold.

The search tries every mode, policy and kind of machine, each with every number of machines and far finer steps of every
parameter, and gives itself no room to spare: what keeps the promise on just this traffic counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np

from tasks.scheduler.choose import Choice, best, rated
from tasks.scheduler.decide import kinds_of, make_problem
from tasks.scheduler.fit import Fit, fits
from tasks.scheduler.problem import Candidate, Kind, Problem
from tasks.scheduler.simulate_batch import EVERY_MIN, Line, seldom, spot_runs
from tasks.scheduler.simulate_online import SCALE_SECONDS, always_on, autoscale, scale
from tasks.scheduler.simulate_sleep import sleep, traffic
from tasks.scheduler.simulate_stream import stream, stream_fit
from tasks.scheduler.simulate_table import batch_on_spot as table_on_spot
from tasks.scheduler.simulate_table import table
from tasks.spot.policy import decide_placements
from tasks.spot.replay import Job, replay
from tests.benchmarks.modes_exact import late_share
from tests.benchmarks.modes_workloads import Case

# No deadline of a case is a date.
NOW = datetime(2026, 1, 1, tzinfo=UTC)
_TARGETS = tuple(share / 100 for share in range(99, 9, -1))
_KEEP_STEP, _KEEP_STEPS = 1.1, 110
_DIALS = 3
_SPOT_MACHINES = 3
_SPOT_SHARES = tuple(share / 20 for share in range(3, 20, 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What came of a case. regret: the choice's cost over the least found; None where nothing stands in either way."""

    name: str
    chosen: str
    least: str
    regret: float | None
    late: float
    late_allowed: float
    broken: bool
    missed: bool


def judge(case: Case) -> Found:
    """Decide on a case, search for something cheaper, and follow the choice on other traffic."""
    kinds = kinds_of(case.workload, case.prices)
    problem = make_problem(case.workload, case.profile, case.arrivals, case.availability, NOW)
    chosen = best(problem, kinds)
    least = cheapest(problem, kinds, chosen)
    told = {"name": case.workload.name, "late": 0.0, "late_allowed": 1 - problem.kept, "broken": False}
    if chosen.candidate.flaw is not None:
        missed = least is not None
        return Found(**told, chosen="nothing stands", least=_told(least), regret=None, missed=missed)
    assert least is not None
    regret = chosen.usd / least.usd if least.usd > 0 else 1.0
    late = again(case, problem, chosen)
    broken = late > 1 - problem.kept + 1e-12
    told |= {"late": late, "broken": broken}
    return Found(**told, chosen=_told(chosen), least=_told(least), regret=regret, missed=False)


def _told(choice: Choice | None) -> str:
    if choice is None:
        return "nothing"
    each = choice.candidate
    parts = {"n": each.machines, "b": each.batch_size_max, "T": each.keep_warm, "P": each.every, "u": each.target}
    extra = " ".join(f"{name}={value:g}" for name, value in parts.items() if value is not None)
    return f"{each.mode} {each.policy} {choice.kind.name} {extra} ${choice.usd:.4g}"


def again(case: Case, problem: Problem, chosen: Choice) -> float:
    """Return the share of rows that are late on the same traffic, or the same market, another time."""
    if problem.consumer == "table":
        return _table_late(case, problem, chosen)
    other = make_problem(case.workload, case.profile, case.again, case.spot_again, NOW)
    return late_share(other, chosen.kind, chosen.candidate, seed=5)


def _table_late(case: Case, problem: Problem, chosen: Choice) -> float:
    each, kind = chosen.candidate, chosen.kind
    if each.policy != "spot":
        return float(each.age_p99 > problem.within)
    ratio = kind.price_ratio
    assert ratio is not None
    work = problem.rows_per_table / (problem.profile.batch_rows_per_second * kind.speed) / each.machines
    tick = case.spot_again.tick_seconds
    job = Job(
        work_seconds=work,
        deadline_seconds=problem.within,
        changeover_seconds=problem.profile.start_seconds,
        price_ratio=ratio,
        tick_seconds=tick,
    )
    return float(replay(decide_placements, case.spot_again.spot_NT, job).late_N.mean())


def cheapest(problem: Problem, kinds: Sequence[Kind], chosen: Choice) -> Choice | None:
    """Return the cheapest that any parameters come to, on just these arrivals; None where nothing stands.

    What costs no less than the choice, by a bound that needs no simulation, is passed over.
    """
    sharp = replace(problem, late_share=1.0, time_margin=1.0, chance=0.0)
    found = [chosen] if chosen.candidate.flaw is None else []
    for kind in kinds:
        limit = chosen.usd / kind.on_demand if found else math.inf
        ways = _tables(sharp, kind) if problem.consumer == "table" else _others(sharp, kind, limit)
        found += [Choice(kind=kind, candidate=each) for each in ways if each.flaw is None]
    return min(found, key=rated, default=None)


def _tables(problem: Problem, kind: Kind) -> Iterator[Candidate]:
    yield from table(problem, kind)
    every = range(1, problem.machines_max + 1)
    spot = table_on_spot(problem, kind, every)
    if spot is not None:
        yield spot


def _others(problem: Problem, kind: Kind, limit: float) -> Iterator[Candidate]:
    rate = float(problem.counts_T.mean())
    if problem.consumer == "events":
        if _machines_at_least(rate, stream_fit(problem, kind)) * problem.seconds < limit:
            yield from stream(problem, kind)
        yield from _runs(problem, kind, limit)
    sizes = {round(2 ** (power / 2)) for power in range(21)}
    for fit in fits(problem, kind, sizes)[:_DIALS]:
        always = always_on(problem, fit)
        yield always
        yield from _scalers(problem, fit, always.machines, limit)
        yield from _sleepers(problem, fit, always.machines, limit)


def _machines_at_least(rate: float, fit: Fit) -> int:
    return max(1, math.ceil(rate / fit.waits.server.rate))


def _runs(problem: Problem, kind: Kind, limit: float) -> Iterator[Candidate]:
    """Yield batch runs on every number of machines, on demand and on spot."""
    line, start = Line.of(problem, kind), problem.profile.start_seconds
    work = float(problem.counts_T.sum()) * problem.rows_per_arrival / line.rate
    ratio = kind.price_ratio or 1.0
    for machines in range(1, min(problem.machines_max, 24) + 1):
        starts = machines * start * problem.seconds / max(problem.within - start, EVERY_MIN)
        if (work + starts) / ratio >= limit:
            break
        candidate = seldom(line, machines)
        yield candidate
        for share in _SPOT_SHARES if machines <= _SPOT_MACHINES and kind.spot is not None else ():
            every = max(EVERY_MIN, int(share * (candidate.every or 0)))
            if (work + machines * start * problem.seconds / every) / ratio < limit:
                spot = spot_runs(line, kind, machines, every)
                if spot is not None:
                    yield spot


def _scalers(problem: Problem, fit: Fit, machines: int, limit: float) -> Iterator[Candidate]:
    """Yield the cheapest scaler that keeps the promise, of every floor and target."""
    costs: dict[tuple[int, float], float] = {}
    for floor in sorted({*range(1, min(machines, 12) + 1), *range(12, machines, 4)}):
        if floor * problem.seconds >= limit:
            break
        for target in _TARGETS:
            costs[floor, target] = float(scale(problem, fit, floor, target)[0].sum()) * SCALE_SECONDS
            if costs[floor, target] >= limit:
                break
    tried = [each for each in sorted(costs, key=costs.__getitem__) if costs[each] < limit]
    # The dearer is late less, or nearly so: the first that stands is found by halving, and those before it are tried.
    low, high = 0, len(tried)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if autoscale(problem, fit, *tried[middle]).flaw is None else (middle + 1, high)
    for each in tried[max(0, low - 4) : low + 1]:
        yield autoscale(problem, fit, *each)


def _sleepers(problem: Problem, fit: Fit, machines: int, limit: float) -> Iterator[Candidate]:
    boot = problem.profile.cold_start_seconds
    keeps = sorted({math.ceil(boot / 64 * _KEEP_STEP**power) for power in range(_KEEP_STEPS)})
    for count in sorted({max(1, machines - 1), machines, machines + 1} & set(range(1, problem.machines_max + 1))):
        found = traffic(problem, fit, count)
        gap_G = np.sort(found.gaps)
        sums_G = np.concatenate([[0.0], np.cumsum(gap_G)])
        place = np.searchsorted(gap_G, keeps, side="right")
        cost = count * (sums_G[place] + (len(gap_G) - place) * (np.array(keeps) + boot))
        for at in [each for each in np.argsort(cost, kind="stable") if cost[each] < limit][:15]:
            candidate = sleep(problem, fit, count, found, keeps[at], "keep-warm")
            yield candidate
            if candidate.flaw is None:
                break
