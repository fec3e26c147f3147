"""Every way to serve a scenario on an instance type, and the cheapest of them that keeps the promise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tasks.scheduler.decision import Mode
from tasks.scheduler.keep_warm import choose_keep_warm, simulate_ten_minutes
from tasks.scheduler.scenario import Candidate, InstanceType, Scenario
from tasks.scheduler.simulate_batch import (
    choose_batch_runs,
    choose_batch_runs_on_spot,
    choose_table_on_spot,
    simulate_table,
)
from tasks.scheduler.simulate_online import (
    choose_autoscaler,
    list_serving_capacities,
    simulate_always_on,
    simulate_stream,
)

# Of policies that cost the same, the first of this list is chosen.
_SIMPLEST_FIRST = ("micro-batches", "always-on", "on-demand", "keep-warm", "autoscaled", "spot", "keep-warm-10-minutes")
_DIGITS = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A candidate on an instance type."""

    instance_type: InstanceType
    candidate: Candidate

    @property
    def usd(self) -> float:
        """What it costs in the simulated time."""
        return self.candidate.usd(self.instance_type)

    @property
    def name(self) -> tuple[Mode, str]:
        """Its mode and its policy."""
        return self.candidate.mode, self.candidate.policy


def choose_cheapest(
    scenario: Scenario, instance_types: Sequence[InstanceType], *, with_ten_minutes: bool = True
) -> Choice:
    """Return the cheapest choice that keeps the promise, else the cheapest of those that do not."""
    found = [
        Choice(instance_type=instance_type, candidate=each)
        for instance_type in instance_types
        for each in simulate_candidates(scenario, instance_type, with_ten_minutes=with_ten_minutes)
    ]
    return min(found, key=rank_choice)


def rank_choice(choice: Choice) -> tuple[bool, float, int]:
    """Return the sort key of choices: the promise, then the cost, then which one is simpler."""
    return (
        choice.candidate.violation is not None,
        float(f"{choice.usd:.{_DIGITS}g}"),
        _SIMPLEST_FIRST.index(choice.candidate.policy),
    )


def simulate_candidates(
    scenario: Scenario, instance_type: InstanceType, *, with_ten_minutes: bool = True
) -> list[Candidate]:
    """Return every mode and policy on an instance type, each with its cheapest parameters that keep the promise.

    Spot is among them where its price and its availability are known. `with_ten_minutes` adds the endpoint that is
    kept warm for the usual ten minutes, for comparison.
    """
    found = simulate_on_demand_candidates(scenario, instance_type, with_ten_minutes=with_ten_minutes)
    return [*found, *simulate_spot_candidates(scenario, instance_type, found)]


def simulate_on_demand_candidates(
    scenario: Scenario, instance_type: InstanceType, *, with_ten_minutes: bool = True
) -> list[Candidate]:
    """Return the candidates that buy no spot machines. Their machine seconds do not depend on the prices."""
    if scenario.consumer == "table":
        return simulate_table(scenario, instance_type)
    capacity = list_serving_capacities(scenario, instance_type)[0]
    always_on = simulate_always_on(scenario, capacity)
    endpoints = [
        always_on,
        choose_autoscaler(scenario, capacity, always_on),
        choose_keep_warm(scenario, capacity, always_on.machines),
    ]
    if with_ten_minutes:
        endpoints.append(simulate_ten_minutes(scenario, capacity, always_on.machines))
    if scenario.is_coarse and scenario.consumer == "requests":
        return endpoints
    return [choose_batch_runs(scenario, instance_type), *endpoints, simulate_stream(scenario, instance_type)]


def simulate_spot_candidates(
    scenario: Scenario, instance_type: InstanceType, on_demand: list[Candidate]
) -> list[Candidate]:
    """Return the candidates that buy spot machines."""
    if scenario.consumer == "requests":
        return []
    if scenario.consumer == "table":
        found = choose_table_on_spot(scenario, instance_type)
    else:
        runs = next(each for each in on_demand if each.mode == "batch")
        found = choose_batch_runs_on_spot(scenario, instance_type, runs)
    return [] if found is None else [found]
