"""The cheapest way to serve a workload that keeps its promise, with every alternative and its reason."""

from __future__ import annotations

from collections.abc import Sequence

from serving.model.batching import BURST_FACTOR
from tasks.common.formatting import in_fine_words
from tasks.scheduler.candidates import Choice, rank_choice, simulate_candidates
from tasks.scheduler.decision import Alternative, Decision
from tasks.scheduler.prices import format_usd
from tasks.scheduler.scenario import Candidate, DecisionInputs, Scenario, build_scenario, list_instance_types
from tasks.scheduler.sensitivity import explain_infeasibility, find_break_evens


def decide(inputs: DecisionInputs) -> Decision:
    """Return the choice for a workload, every alternative, and how near the choice is to another.

    Raises:
        NoFeasibleMode: Nothing keeps the promise; the message says what would be needed.
        BadWorkload: An instance type lacks its speed or its price, or a deadline is over.
    """
    workload, prices = inputs.workload, inputs.quote.prices
    instance_types = list_instance_types(workload, prices)
    scenario = build_scenario(inputs)
    found = [
        Choice(instance_type=instance_type, candidate=candidate)
        for instance_type in instance_types
        for candidate in simulate_candidates(scenario, instance_type)
    ]
    ordered = sorted(found, key=rank_choice)
    chosen = ordered[0]
    if chosen.candidate.violation is not None:
        raise explain_infeasibility(workload, scenario, instance_types, ordered)
    # The cheapest endpoint that is always on; where one keeps the promise, it comes before those that do not.
    always_on = next(each for each in ordered if each.candidate.policy == "always-on")
    chosen_usd, always_on_usd = (each.usd * scenario.scale for each in (chosen, always_on))
    return Decision(
        workload=workload,
        profile=inputs.profile,
        prices={each.name: prices[each.name] for each in instance_types},
        price_origin=inputs.quote.price_origin,
        decided_at=inputs.now,
        rows=_count_rows(scenario),
        chosen=_make_alternative(scenario, chosen, _explain_choice(scenario, ordered)),
        alternatives=tuple(
            _make_alternative(scenario, each, _explain_alternative(scenario, each, ordered)) for each in ordered
        ),
        waste_usd=always_on_usd - chosen_usd,
        waste_factor=always_on_usd / chosen_usd if chosen_usd > 0 else None,
        break_evens=find_break_evens(scenario, instance_types, chosen),
    )


def _count_rows(scenario: Scenario) -> int:
    if scenario.consumer == "table":
        return round(scenario.rows_per_table * scenario.seconds / scenario.period_seconds)
    return round(float(scenario.counts_T.sum()) * scenario.rows_per_arrival * scenario.scale)


def _make_alternative(scenario: Scenario, choice: Choice, reason: str) -> Alternative:
    candidate = choice.candidate
    paid = candidate.paid_seconds
    return Alternative(
        mode=candidate.mode,
        policy=candidate.policy,
        machine=choice.instance_type.name,
        machines=candidate.machines,
        machines_min=candidate.machines_min,
        target_utilisation=candidate.target_utilisation,
        batching=candidate.batching,
        checked_rate=_choose_checked_rate(scenario, candidate),
        keep_warm_seconds=candidate.keep_warm_seconds,
        period_seconds=candidate.period_seconds,
        usd=choice.usd * scenario.scale,
        age_seconds_p50=candidate.age_p50,
        age_seconds_p99=candidate.age_p99,
        late_share=candidate.late_share,
        cold_starts=round(candidate.cold_starts * scenario.scale),
        utilisation=min(candidate.busy_seconds / paid, 1.0) if paid > 0 else 0.0,
        is_feasible=candidate.violation is None,
        reason=reason,
    )


def _choose_checked_rate(scenario: Scenario, candidate: Candidate) -> float | None:
    """Return the rate at which an endpoint is checked. The check has bursts of twice that rate."""
    if candidate.mode != "online" or scenario.consumer == "table":
        return None
    return min(float(scenario.counts_T.sum()) / scenario.seconds, candidate.carried_per_second / BURST_FACTOR)


def _explain_choice(scenario: Scenario, ordered: Sequence[Choice]) -> str:
    chosen, feasible = ordered[0], [each for each in ordered if each.candidate.violation is None]
    if chosen.usd == 0:
        return "Nothing comes within the horizon: no machine is needed, and nothing is paid."
    allowed = f"where {in_fine_words(scenario.deadline_seconds)} are allowed"
    costs = f"{format_usd(chosen.usd * scenario.scale)}, {_describe_age(chosen)}, {allowed}"
    if len(feasible) == 1:
        return f"The only one that keeps the promise: {costs}."
    return f"The cheapest of the {len(feasible)} that keep the promise: {costs}."


def _explain_alternative(scenario: Scenario, choice: Choice, ordered: Sequence[Choice]) -> str:
    if choice is ordered[0]:
        return _explain_choice(scenario, ordered)
    cost, least = choice.usd * scenario.scale, ordered[0].usd * scenario.scale
    violation = choice.candidate.violation
    if violation is not None:
        promise = in_fine_words(scenario.deadline_seconds)
        return f"Breaks the promise of {promise}: {violation}; {_describe_age(choice)}, for {format_usd(cost)}."
    if cost <= least * (1 + 1e-9):
        return f"Keeps the promise at the same cost, {format_usd(cost)}; the simpler one was chosen."
    if least <= 0:
        return f"Keeps the promise, but costs {format_usd(cost)}, where nothing need be paid."
    return f"Keeps the promise, but costs {format_usd(cost)}, {cost / least:.3g} times as much as the choice."


def _describe_age(choice: Choice) -> str:
    return f"99 of 100 rows are scored within {in_fine_words(choice.candidate.age_p99)}"
