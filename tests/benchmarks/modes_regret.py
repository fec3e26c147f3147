"""What the choice costs over the cheapest that a search through all parameters finds, and whether promises hold.

The search tries every mode, policy and kind of machine, each with every number of machines and far finer steps of every
parameter, and has no margin: what keeps the promise on just this traffic counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tasks.scheduler.candidates import Choice, choose_cheapest, rank_choice
from tasks.scheduler.keep_warm import find_traffic_spells, simulate_keep_warm
from tasks.scheduler.scenario import Candidate, InstanceType, Scenario, build_scenario, list_instance_types
from tasks.scheduler.simulate_batch import (
    PERIOD_SECONDS_MIN,
    CumulativeArrivals,
    choose_table_on_spot,
    find_longest_period,
    simulate_batch_runs_on_spot,
    simulate_table,
)
from tasks.scheduler.simulate_online import (
    SCALE_INTERVAL_SECONDS,
    ServingCapacity,
    list_serving_capacities,
    plan_stream_capacity,
    scale_machines,
    simulate_always_on,
    simulate_autoscaler,
    simulate_stream,
)
from tasks.spot.policy import decide_placements
from tasks.spot.replay import Job, replay
from tests.benchmarks.modes_exact import late_share
from tests.benchmarks.modes_workloads import Case, generate_case

_TARGETS = tuple(share / 100 for share in range(99, 9, -1))
_KEEP_STEP, _KEEP_STEPS = 1.1, 110
_BATCHINGS = 3
_SPOT_MACHINES = 3
_SPOT_SHARES = tuple(share / 20 for share in range(3, 20, 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What came of a case. regret: the choice's cost over the least found; None where nothing is feasible."""

    name: str
    chosen: str
    least: str
    regret: float | None
    late_share: float
    late_allowed: float
    broken: bool
    missed: bool


def judge_generated(seed: int, at: int) -> Found:
    """Make a workload, and judge the choice for it."""
    found = judge(generate_case(seed, at))
    return replace(found, name=f"seed {seed} {found.name}")


def judge(case: Case) -> Found:
    """Decide on a case, search for something cheaper, and follow the choice on other traffic."""
    kinds = list_instance_types(case.workload, case.prices)
    scenario = build_scenario(case.inputs)
    chosen = choose_cheapest(scenario, kinds)
    least = cheapest(scenario, kinds, chosen)
    figures = {
        "name": case.workload.name,
        "late_share": 0.0,
        "late_allowed": 1 - scenario.share_in_time,
        "broken": False,
    }
    if chosen.candidate.violation is not None:
        missed = least is not None
        return Found(**figures, chosen="nothing is feasible", least=_describe(least), regret=None, missed=missed)
    assert least is not None
    regret = chosen.usd / least.usd if least.usd > 0 else 1.0
    late = again(case, scenario, chosen)
    broken = late > 1 - scenario.share_in_time + 1e-12
    figures |= {"late_share": late, "broken": broken}
    return Found(**figures, chosen=_describe(chosen), least=_describe(least), regret=regret, missed=False)


def _describe(choice: Choice | None) -> str:
    if choice is None:
        return "nothing"
    each = choice.candidate
    parts = {
        "n": each.machines,
        "b": each.batching.batch_size_max,
        "T": each.keep_warm_seconds,
        "P": each.period_seconds,
        "u": each.target_utilisation,
    }
    extra = " ".join(f"{name}={value:g}" for name, value in parts.items() if value is not None)
    return f"{each.mode} {each.policy} {choice.instance_type.name} {extra} ${choice.usd:.4g}"


def again(case: Case, scenario: Scenario, chosen: Choice) -> float:
    """Return the share of rows that are late on the same traffic, or the same market, another time."""
    if scenario.consumer == "table":
        return _table_late(case, scenario, chosen)
    other = build_scenario(replace(case.inputs, arrivals=case.again, availability=case.spot_again))
    return late_share(other, chosen.instance_type, chosen.candidate, seed=5)


def _table_late(case: Case, scenario: Scenario, chosen: Choice) -> float:
    each, kind = chosen.candidate, chosen.instance_type
    if each.policy != "spot":
        return float(each.age_p99 > scenario.deadline_seconds)
    ratio = kind.price_ratio
    assert ratio is not None
    work = scenario.rows_per_table / (scenario.profile.batch_rows_per_second * kind.speed) / each.machines
    tick = case.spot_again.tick_seconds
    job = Job(
        work_seconds=work,
        deadline_seconds=scenario.deadline_seconds,
        changeover_seconds=scenario.profile.start_seconds,
        price_ratio=ratio,
        tick_seconds=tick,
    )
    return float(replay(decide_placements, case.spot_again.spot_NT, job).late_N.mean())


def cheapest(scenario: Scenario, kinds: Sequence[InstanceType], chosen: Choice) -> Choice | None:
    """Return the cheapest that any parameters come to, on just these arrivals; None where nothing is feasible.

    What costs no less than the choice, by a bound that needs no simulation, is passed over.
    """
    sharp = replace(scenario, late_budget_share=1.0, time_margin=1.0, deviations=0.0)
    found = [chosen] if chosen.candidate.violation is None else []
    for kind in kinds:
        limit = chosen.usd / kind.on_demand if found else math.inf
        candidates = _tables(sharp, kind) if scenario.consumer == "table" else _others(sharp, kind, limit)
        found += [Choice(instance_type=kind, candidate=each) for each in candidates if each.violation is None]
    return min(found, key=rank_choice, default=None)


def _tables(scenario: Scenario, kind: InstanceType) -> Iterator[Candidate]:
    yield from simulate_table(scenario, kind)
    every = range(1, scenario.machines_max + 1)
    spot = choose_table_on_spot(scenario, kind, every)
    if spot is not None:
        yield spot


def _others(scenario: Scenario, kind: InstanceType, limit: float) -> Iterator[Candidate]:
    rate = float(scenario.counts_T.mean())
    if scenario.consumer == "events":
        if _machines_at_least(rate, plan_stream_capacity(scenario, kind)) * scenario.seconds < limit:
            yield simulate_stream(scenario, kind)
        yield from _runs(scenario, kind, limit)
    sizes = {round(2 ** (power / 2)) for power in range(21)}
    for capacity in list_serving_capacities(scenario, kind, sizes)[:_BATCHINGS]:
        always = simulate_always_on(scenario, capacity)
        yield always
        yield from _scalers(scenario, capacity, always.machines, limit)
        yield from _sleepers(scenario, capacity, always.machines, limit)


def _machines_at_least(rate: float, capacity: ServingCapacity) -> int:
    return max(1, math.ceil(rate / capacity.waits.server.requests_per_second))


def _runs(scenario: Scenario, kind: InstanceType, limit: float) -> Iterator[Candidate]:
    """Yield batch runs on every number of machines, on demand and on spot."""
    line, start = CumulativeArrivals.from_scenario(scenario, kind), scenario.profile.start_seconds
    work = float(scenario.counts_T.sum()) * scenario.rows_per_arrival / line.rows_per_second
    ratio = kind.price_ratio or 1.0
    for machines in range(1, min(scenario.machines_max, 24) + 1):
        starts = machines * start * scenario.seconds / max(scenario.deadline_seconds - start, PERIOD_SECONDS_MIN)
        if (work + starts) / ratio >= limit:
            break
        candidate = find_longest_period(line, machines)
        yield candidate
        for share in _SPOT_SHARES if machines <= _SPOT_MACHINES and kind.spot is not None else ():
            every = max(PERIOD_SECONDS_MIN, int(share * (candidate.period_seconds or 0)))
            if (work + machines * start * scenario.seconds / every) / ratio < limit:
                spot = simulate_batch_runs_on_spot(line, kind, machines, every)
                if spot is not None:
                    yield spot


def _scalers(scenario: Scenario, capacity: ServingCapacity, machines: int, limit: float) -> Iterator[Candidate]:
    """Yield the cheapest scaler that keeps the promise, of every floor and target."""
    costs: dict[tuple[int, float], float] = {}
    for floor in sorted({*range(1, min(machines, 12) + 1), *range(12, machines, 4)}):
        if floor * scenario.seconds >= limit:
            break
        for target in _TARGETS:
            costs[floor, target] = (
                float(scale_machines(scenario, capacity, floor, target)[0].sum()) * SCALE_INTERVAL_SECONDS
            )
            if costs[floor, target] >= limit:
                break
    tried = [each for each in sorted(costs, key=costs.__getitem__) if costs[each] < limit]
    # What costs more is late less, or nearly so: bisection finds the first feasible one, and those before it are tried.
    low, high = 0, len(tried)
    while low < high:
        middle = (low + high) // 2
        low, high = (
            (low, middle)
            if simulate_autoscaler(scenario, capacity, *tried[middle]).violation is None
            else (middle + 1, high)
        )
    for each in tried[max(0, low - 4) : low + 1]:
        yield simulate_autoscaler(scenario, capacity, *each)


def _sleepers(scenario: Scenario, capacity: ServingCapacity, machines: int, limit: float) -> Iterator[Candidate]:
    boot = scenario.profile.cold_start_seconds
    keeps = sorted({math.ceil(boot / 64 * _KEEP_STEP**power) for power in range(_KEEP_STEPS)})
    for count in sorted({max(1, machines - 1), machines, machines + 1} & set(range(1, scenario.machines_max + 1))):
        found = find_traffic_spells(scenario, capacity, count)
        gap_G = np.sort(found.gaps)
        sums_G = np.concatenate([[0.0], np.cumsum(gap_G)])
        place = np.searchsorted(gap_G, keeps, side="right")
        cost = count * (sums_G[place] + (len(gap_G) - place) * (np.array(keeps) + boot))
        for at in [each for each in np.argsort(cost, kind="stable") if cost[each] < limit][:15]:
            candidate = simulate_keep_warm(scenario, capacity, count, found, keeps[at])
            yield candidate
            if candidate.violation is None:
                break
