"""The cheapest way to serve a workload that keeps its promise, and what it would take for another to be chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

import numpy as np

from serving.errors import BadWorkload
from tasks.common.formatting import in_fine_words, in_words
from tasks.scheduler.arrivals import DAY, Arrivals
from tasks.scheduler.availability import Availability
from tasks.scheduler.choose import Choice, rated
from tasks.scheduler.decision import Alternative, Decision, Profile
from tasks.scheduler.flips import flips
from tasks.scheduler.impossible import nothing_stands
from tasks.scheduler.money import usd
from tasks.scheduler.problem import Kind, Problem
from tasks.scheduler.simulate import simulate
from tasks.scheduler.simulate_sleep import BESIDE
from tasks.scheduler.workload import THIS_MACHINE, Machine, Prices, Table, Workload

_HOUR = 3600.0


def decide(
    workload: Workload,
    profile: Profile,
    arrivals: Arrivals | None,
    prices: Mapping[str, Prices],
    availability: Availability | None,
    priced_at: str,
    now: datetime,
    progress: Callable[[str], None] | None = None,
) -> Decision:
    """Return the choice for a workload, every alternative, and how near the choice is to another.

    `arrivals`: None for a table. `prices`: by the kind of machine. `availability`: of spot; without it, and for kinds
    without a spot price, spot is not considered. `now` has its zone. `progress` is told what is simulated next.

    Raises NothingStands where nothing keeps the promise, with what would be needed, and BadWorkload where a kind lacks
    its speed or its price, or a deadline is over.
    """
    tell = progress or (lambda _: None)
    kinds = kinds_of(workload, prices)
    problem = make_problem(workload, profile, arrivals, availability, now)
    found = []
    for kind in kinds:
        tell(f"Simulating {in_words(problem.seconds)} on machines of the kind {kind.name}")
        found += [Choice(kind=kind, candidate=candidate) for candidate in simulate(problem, kind)]
    ordered = sorted(found, key=rated)
    chosen = ordered[0]
    if chosen.candidate.flaw is not None:
        raise nothing_stands(workload, problem, kinds, ordered)
    tell("Looking for what would change the choice")
    near = flips(problem, kinds, chosen)
    always = _always_on(ordered)
    spent, wasted = (each.usd * problem.scale for each in (chosen, always))
    return Decision(
        workload=workload,
        profile=profile,
        prices={kind.name: prices[kind.name] for kind in kinds},
        priced_at=priced_at,
        decided_at=now,
        rows=_rows(problem),
        chosen=_alternative(problem, chosen, _why(problem, ordered)),
        alternatives=tuple(_alternative(problem, each, _reason(problem, each, ordered)) for each in ordered),
        waste_usd=wasted - spent,
        waste_factor=wasted / spent if spent > 0 else None,
        flips=near,
    )


def kinds_of(workload: Workload, prices: Mapping[str, Prices]) -> list[Kind]:
    """Return the kinds of machines that a workload may be put on. Raises BadWorkload where one lacks speed or price."""
    return [_kind(machine, prices) for machine in workload.machines]


def _kind(machine: Machine, prices: Mapping[str, Prices]) -> Kind:
    if machine.speed is None and machine.kind != THIS_MACHINE:
        message = (
            f"A kind of machine must have its speed, got none for {machine.kind!r}: give how many times the rows a "
            "second of the machine that the model is measured on it scores; it is never guessed."
        )
        raise BadWorkload(message)
    found = prices.get(machine.kind)
    if found is None:
        message = (
            f"A kind of machine must have a price, got none for {machine.kind!r}; give it as the machine's prices."
        )
        raise BadWorkload(message)
    return Kind(
        name=machine.kind,
        speed=machine.speed or 1.0,
        on_demand=found.on_demand / _HOUR,
        spot=None if found.spot is None else found.spot / _HOUR,
    )


def make_problem(
    workload: Workload, profile: Profile, arrivals: Arrivals | None, availability: Availability | None, now: datetime
) -> Problem:
    """Return a workload in figures. Raises BadWorkload where its arrivals are missing, or a deadline is over."""
    consumer, horizon = workload.consumer, workload.horizon_days * DAY
    if isinstance(consumer, Table):
        slack = consumer.slack_seconds(now)
        return Problem(
            consumer="table",
            within=slack,
            kept=1.0,
            counts_T=np.zeros(0, dtype=np.int64),
            rows_per_arrival=1.0,
            rows_per_table=consumer.rows,
            every=consumer.every_days * DAY if consumer.once_by is None else slack,
            seconds=horizon if consumer.once_by is None else slack,
            scale=1.0,
            machines_max=workload.machines_max,
            profile=profile,
            availability=availability,
        )
    if arrivals is None:
        message = f"A workload of {consumer.kind} must have arrivals, got none; read them first."
        raise BadWorkload(message)
    seconds = len(arrivals.counts_T)
    return Problem(
        consumer=consumer.kind,
        within=consumer.latency_ms / 1000 if consumer.kind == "requests" else consumer.within_seconds,
        kept=consumer.kept,
        counts_T=arrivals.counts_T,
        rows_per_arrival=arrivals.rows_per_arrival,
        rows_per_table=0.0,
        every=0.0,
        seconds=seconds,
        scale=horizon / seconds,
        machines_max=workload.machines_max,
        profile=profile,
        availability=availability,
    )


def _rows(problem: Problem) -> int:
    if problem.consumer == "table":
        return round(problem.rows_per_table * problem.seconds / problem.every)
    return round(float(problem.counts_T.sum()) * problem.rows_per_arrival * problem.scale)


def _always_on(ordered: Sequence[Choice]) -> Choice:
    """Return the cheapest endpoint that is always on, and keeps up where one does."""
    return next(each for each in ordered if each.candidate.policy == "always-on")


def _alternative(problem: Problem, choice: Choice, reason: str) -> Alternative:
    candidate = choice.candidate
    paid = candidate.paid_seconds
    return Alternative(
        mode=candidate.mode,
        policy=candidate.policy,
        machine=choice.kind.name,
        machines=candidate.machines,
        machines_min=candidate.floor,
        target_utilisation=candidate.target,
        batch_size_max=candidate.batch_size_max,
        wait_ms_max=1000 * candidate.wait,
        keep_warm_seconds=candidate.keep_warm,
        every_seconds=candidate.every,
        usd=choice.usd * problem.scale,
        age_seconds_p50=candidate.age_p50,
        age_seconds_p99=candidate.age_p99,
        late=candidate.late,
        cold_starts=round(candidate.cold_starts * problem.scale),
        utilisation=min(candidate.busy_seconds / paid, 1.0) if paid > 0 else 0.0,
        stands=candidate.flaw is None,
        reason=reason,
    )


def _why(problem: Problem, ordered: Sequence[Choice]) -> str:
    chosen, standing = ordered[0], [each for each in ordered if each.candidate.flaw is None]
    if chosen.usd == 0:
        return "Nothing comes within the horizon: no machine is needed, and nothing is paid."
    aged = f"99 of 100 rows are scored within {in_fine_words(chosen.candidate.age_p99)}"
    costs = f"{usd(chosen.usd * problem.scale)}, {aged}, where {in_fine_words(problem.within)} are allowed"
    if len(standing) == 1:
        return f"The only one that keeps the promise: {costs}."
    return f"The cheapest of the {len(standing)} that keep the promise: {costs}."


def _reason(problem: Problem, choice: Choice, ordered: Sequence[Choice]) -> str:
    if choice is ordered[0]:
        return _why(problem, ordered)
    cost, least = choice.usd * problem.scale, ordered[0].usd * problem.scale
    flaw = choice.candidate.flaw
    if flaw == BESIDE:
        return f"Can't be chosen, whatever it costs ({usd(cost)}): {flaw}."
    if flaw is not None:
        aged = f"99 of 100 rows are scored within {in_fine_words(choice.candidate.age_p99)}"
        return f"Breaks the promise of {in_fine_words(problem.within)}: {flaw}; {aged}, for {usd(cost)}."
    if cost <= least * (1 + 1e-9):
        return f"Keeps the promise at the same cost, {usd(cost)}; the simpler one was chosen."
    if least <= 0:
        return f"Keeps the promise, but costs {usd(cost)}, where nothing need be paid."
    return f"Keeps the promise, but costs {usd(cost)}, {cost / least:.3g} times as much as the choice."
