"""What would change a decision: break-even points, costs by traffic, and what is needed where no mode is feasible.

A sample of the arrivals is decided on many times, in coarser steps than the choice itself: a break-even factor is right
to about a fifth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from serving.errors import NoFeasibleMode
from tasks.common.formatting import in_fine_words
from tasks.scheduler.arrivals import DAY_SECONDS
from tasks.scheduler.candidates import (
    Choice,
    choose_cheapest,
    rank_choice,
    simulate_candidates,
    simulate_on_demand_candidates,
    simulate_spot_candidates,
)
from tasks.scheduler.decision import BreakEven, Decision, Mode
from tasks.scheduler.scenario import DecisionInputs, InstanceType, Scenario, build_scenario, list_instance_types
from tasks.scheduler.simulate_batch import simulate_table_on_demand
from tasks.scheduler.simulate_online import (
    list_serving_capacities,
    plan_stream_capacity,
    simulate_always_on,
    split_serving_cost,
)
from tasks.scheduler.workload import Workload

NO_MODE = "nothing: no mode keeps the promise"
_STEPS = (1.5, 3.0, 10.0, 100.0)
_HALVINGS = 4
_SAMPLE_DAYS = (1, 7)
_SAMPLE_ARRIVALS = 500
_SEED = 19

TRAFFIC_FACTORS = (0.1, 0.3, 3.0, 10.0)
# With so many days of arrivals, every factor takes a fraction of a second.
_CURVE_DAYS = 4

_MACHINE_FACTORS = (2, 4, 8, 16, 64, 256)
_DEADLINE_FACTORS = (1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0, 1000.0)

_ChoiceName = tuple[str, str] | None
_ChooseAt = Callable[[float], _ChoiceName]

CostCurves = Mapping[Mode, Sequence[tuple[float, float]]]


def find_break_evens(
    scenario: Scenario, instance_types: Sequence[InstanceType], chosen: Choice
) -> tuple[BreakEven, ...]:
    """Return the break-even points within a hundredth and a hundred times of each input, the nearest first.

    There are none where a sample of the arrivals leads to another choice than all of them.
    """
    sample = _choose_sample(scenario, instance_types, chosen.name)
    if sample is None:
        return ()
    found = [
        break_even
        for name, choose_at in _list_input_changes(sample, instance_types).items()
        for direction in (1, -1)
        if (break_even := _find_break_even(name, choose_at, direction, chosen.name)) is not None
    ]
    return tuple(sorted(found, key=lambda each: abs(np.log(each.factor))))


def _choose_sample(
    scenario: Scenario, instance_types: Sequence[InstanceType], name: tuple[str, str]
) -> Scenario | None:
    if scenario.consumer == "table":
        return replace(scenario, is_coarse=True)
    for days in _SAMPLE_DAYS:
        counts_T = scenario.counts_T[: days * DAY_SECONDS]
        if counts_T.sum() < _SAMPLE_ARRIVALS and days < _SAMPLE_DAYS[-1]:
            continue
        sample = replace(scenario, counts_T=counts_T, seconds=len(counts_T), is_coarse=True)
        if choose_cheapest(sample, instance_types, with_ten_minutes=False).name == name:
            return sample
    return None


def _list_input_changes(scenario: Scenario, instance_types: Sequence[InstanceType]) -> dict[str, _ChooseAt]:
    """Return for each input what is chosen when it is so many times what it is."""
    on_demand = [
        (each, simulate_on_demand_candidates(scenario, each, with_ten_minutes=False)) for each in instance_types
    ]
    profile = scenario.profile

    def choose(changed: Scenario, types: Sequence[InstanceType] = instance_types) -> _ChoiceName:
        return _name_choice(choose_cheapest(changed, types, with_ten_minutes=False))

    def choose_at_prices(change: Callable[[InstanceType], InstanceType]) -> _ChoiceName:
        found = [
            Choice(instance_type=change(instance_type), candidate=each)
            for instance_type, candidates in on_demand
            for each in (*candidates, *simulate_spot_candidates(scenario, change(instance_type), candidates))
        ]
        return _name_choice(min(found, key=rank_choice))

    def choose_at_cold_start(factor: float) -> _ChoiceName:
        update = {
            "cold_start_seconds": profile.cold_start_seconds * factor,
            "start_seconds": profile.start_seconds * factor,
        }
        return choose(replace(scenario, profile=profile.model_copy(update=update)))

    changes: dict[str, _ChooseAt] = {
        "traffic": lambda factor: choose(scale_traffic(scenario, factor)),
        "on-demand price": lambda factor: choose_at_prices(
            lambda each: replace(each, on_demand=each.on_demand * factor)
        ),
        "cold start": choose_at_cold_start,
        "speed": lambda factor: choose(scenario, [replace(each, speed=each.speed * factor) for each in instance_types]),
        "promise": lambda factor: choose(replace(scenario, deadline_seconds=scenario.deadline_seconds * factor)),
    }
    if scenario.availability is not None and any(each.spot is not None for each in instance_types):
        changes["spot price"] = lambda factor: choose_at_prices(
            lambda each: each if each.spot is None else replace(each, spot=each.spot * factor)
        )
    return changes


def _name_choice(choice: Choice) -> _ChoiceName:
    return None if choice.candidate.violation is not None else choice.name


def scale_traffic(scenario: Scenario, factor: float) -> Scenario:
    """Return a scenario with so many times the traffic."""
    random = np.random.default_rng(_SEED)
    whole = int(factor)
    counts_T = scenario.counts_T * whole + random.binomial(scenario.counts_T, factor - whole)
    return replace(scenario, counts_T=counts_T, rows_per_table=scenario.rows_per_table * factor)


def _find_break_even(name: str, choose_at: _ChooseAt, direction: int, now: tuple[str, str]) -> BreakEven | None:
    """Return the nearest factor in one direction at which something else is chosen."""
    same = 1.0
    for step in _STEPS:
        other, to = step**direction, choose_at(step**direction)
        if to != now:
            break
        same = other
    else:
        return None
    for _ in range(_HALVINGS):
        middle = float(np.sqrt(same * other))
        found = choose_at(middle)
        if found == now:
            same = middle
        else:
            other, to = middle, found
    return BreakEven(input=name, factor=float(f"{other:.3g}"), to=NO_MODE if to is None else " ".join(to))


def compute_cost_curves(
    inputs: DecisionInputs, decision: Decision, factors: Sequence[float] = TRAFFIC_FACTORS
) -> CostCurves:
    """Return, for each mode, what its cheapest candidate that keeps the promise costs by the factor of the traffic.

    At a factor of 1 the decision's own figures; at others those of the first days of the arrivals, taken for all of
    them. Pairs of factor and US dollars over the horizon.
    """
    curves: dict[Mode, list[tuple[float, float]]] = {}
    for factor in sorted({*factors, 1.0}):
        costs = _find_decided_costs(decision) if factor == 1 else _simulate_costs(inputs, factor)
        for mode, usd in costs.items():
            curves.setdefault(mode, []).append((factor, usd))
    return curves


def _find_decided_costs(decision: Decision) -> dict[Mode, float]:
    costs: dict[Mode, float] = {}
    for each in decision.alternatives:
        if each.is_feasible:
            costs[each.mode] = min(each.usd, costs.get(each.mode, each.usd))
    return costs


def _simulate_costs(inputs: DecisionInputs, factor: float) -> dict[Mode, float]:
    instance_types = list_instance_types(inputs.workload, inputs.quote.prices)
    scenario = build_scenario(inputs)
    seconds = min(len(scenario.counts_T), _CURVE_DAYS * DAY_SECONDS)
    if seconds:
        scale = scenario.scale * scenario.seconds / seconds
        scenario = replace(scenario, counts_T=scenario.counts_T[:seconds], seconds=seconds, scale=scale)
    scaled = scale_traffic(scenario, factor)
    found = [
        Choice(instance_type=instance_type, candidate=each)
        for instance_type in instance_types
        for each in simulate_candidates(scaled, instance_type, with_ten_minutes=False)
    ]
    costs: dict[Mode, float] = {}
    for choice in sorted(found, key=rank_choice):
        if choice.candidate.violation is None:
            costs.setdefault(choice.candidate.mode, choice.usd * scenario.scale)
    return costs


def explain_infeasibility(
    workload: Workload, scenario: Scenario, instance_types: Sequence[InstanceType], ordered: Sequence[Choice]
) -> NoFeasibleMode:
    """Return the error where no mode keeps the promise: how near the nearest comes, and what would be needed."""
    # For requests, only an endpoint gives an answer at all.
    answering = [each for each in ordered if each.candidate.mode == "online" or scenario.consumer != "requests"]
    nearest = min(answering, key=lambda choice: (choice.candidate.late_share, choice.usd))
    promise = f"{in_fine_words(scenario.deadline_seconds)} for {scenario.share_in_time:.4g} of its rows"
    nearest_words = (
        f"A mode must keep the promise of {workload.name}, {promise}, got none; the nearest is"
        f" {' '.join(nearest.name)} on {nearest.candidate.machines} machine(s) of the kind"
        f" {nearest.instance_type.name}: {nearest.candidate.violation}."
    )
    needs = [
        _explain_latency_floor(scenario, instance_types),
        _suggest_machines(scenario, instance_types),
        _suggest_deadline(scenario, instance_types),
    ]
    return NoFeasibleMode(" ".join([nearest_words, *filter(None, needs)]))


def _explain_latency_floor(scenario: Scenario, instance_types: Sequence[InstanceType]) -> str | None:
    """Say where the promise is below what a single request takes."""
    if scenario.consumer == "table":
        return None
    fastest = max(instance_types, key=lambda each: each.speed)
    cost, overhead_seconds = split_serving_cost(scenario.profile, scenario.rows_per_arrival)
    request_seconds = cost.seconds(1) / fastest.speed
    needed = 2 * request_seconds + overhead_seconds
    if needed <= scenario.deadline_seconds:
        return None
    forward = scenario.profile.pass_time.seconds(1) / fastest.speed
    return (
        f"A request takes {in_fine_words(request_seconds)} on {fastest.name}, {in_fine_words(forward)} of it the"
        " model's forward pass, and may come behind another that has just begun: with"
        f" {1000 * overhead_seconds:.3g} ms of transport, at least {in_fine_words(needed)} must be allowed, or a"
        " smaller model or a faster machine be had."
    )


def _suggest_machines(scenario: Scenario, instance_types: Sequence[InstanceType]) -> str | None:
    changes = (replace(scenario, machines_max=scenario.machines_max * factor) for factor in _MACHINE_FACTORS)
    enough = _find_feasible(changes, instance_types)
    return f"{enough.machines_max} machines would keep it: raise machines_max." if enough else None


def _suggest_deadline(scenario: Scenario, instance_types: Sequence[InstanceType]) -> str | None:
    changes = (replace(scenario, deadline_seconds=scenario.deadline_seconds * factor) for factor in _DEADLINE_FACTORS)
    enough = _find_feasible(changes, instance_types)
    if enough is None:
        return None
    earlier = "; give the input earlier or move the deadline" if scenario.consumer == "table" else ""
    return f"{in_fine_words(enough.deadline_seconds)} would be kept{earlier}."


def _find_feasible(scenarios: Iterable[Scenario], instance_types: Sequence[InstanceType]) -> Scenario | None:
    """Return the first scenario that always-on machines, or on-demand ones for a table, serve within the promise."""
    return next((each for each in scenarios if any(_is_feasible(each, one) for one in instance_types)), None)


def _is_feasible(scenario: Scenario, instance_type: InstanceType) -> bool:
    if scenario.consumer == "table":
        return simulate_table_on_demand(scenario, instance_type).violation is None
    capacities = [list_serving_capacities(scenario, instance_type)[0]]
    if scenario.consumer == "events":
        capacities.append(plan_stream_capacity(scenario, instance_type))
    return any(simulate_always_on(scenario, capacity).violation is None for capacity in capacities)
