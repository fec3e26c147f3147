"""What the cheapest way of each mode costs with more or less traffic, for the plot of a decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from tasks.scheduler.arrivals import DAY, Arrivals
from tasks.scheduler.availability import Availability
from tasks.scheduler.choose import Choice, rated
from tasks.scheduler.decide import decide, kinds_of, make_problem
from tasks.scheduler.decision import Decision, Mode, Profile
from tasks.scheduler.flips import busier
from tasks.scheduler.prices import Priced
from tasks.scheduler.simulate import simulate
from tasks.scheduler.workload import Workload

FACTORS = (0.1, 0.3, 3.0, 10.0)
# Of the arrivals, for which every factor takes a fraction of a second.
_SAMPLE_DAYS = 4

Points = Mapping[Mode, list[tuple[float, float]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Everything that a decision is computed from."""

    workload: Workload
    profile: Profile
    arrivals: Arrivals | None
    priced: Priced
    availability: Availability | None
    now: datetime


def decide_by(inputs: Inputs) -> Decision:
    """Return the decision for what was read, measured and priced. Raises BadWorkload."""
    priced = inputs.priced
    return decide(
        inputs.workload,
        inputs.profile,
        inputs.arrivals,
        priced.prices,
        inputs.availability,
        priced.priced_at,
        inputs.now,
    )


def sweep(inputs: Inputs, decision: Decision, factors: Sequence[float] = FACTORS) -> Points:
    """Return, for each mode, what its cheapest way that keeps the promise costs by the factor of the traffic.

    At a factor of 1 the decision's own figures; at others those of the first days of the arrivals, taken for all of
    them. Pairs of factor and US dollars over the horizon.
    """
    points: dict[Mode, list[tuple[float, float]]] = {}
    for factor in sorted({*factors, 1.0}):
        costs = _decided(decision) if factor == 1 else _simulated(inputs, factor)
        for mode, usd in costs.items():
            points.setdefault(mode, []).append((factor, usd))
    return points


def _decided(decision: Decision) -> dict[Mode, float]:
    costs: dict[Mode, float] = {}
    for each in decision.alternatives:
        if each.stands:
            costs[each.mode] = min(each.usd, costs.get(each.mode, each.usd))
    return costs


def _simulated(inputs: Inputs, factor: float) -> dict[Mode, float]:
    kinds = kinds_of(inputs.workload, inputs.priced.prices)
    problem = make_problem(inputs.workload, inputs.profile, inputs.arrivals, inputs.availability, inputs.now)
    seconds = min(len(problem.counts_T), _SAMPLE_DAYS * DAY)
    if seconds:
        scale = problem.scale * problem.seconds / seconds
        problem = replace(problem, counts_T=problem.counts_T[:seconds], seconds=seconds, scale=scale)
    busy = busier(problem, factor)
    found = [Choice(kind=kind, candidate=each) for kind in kinds for each in simulate(busy, kind, beside=False)]
    costs: dict[Mode, float] = {}
    for choice in sorted(found, key=rated):
        if choice.candidate.flaw is None:
            costs.setdefault(choice.candidate.mode, choice.usd * problem.scale)
    return costs
