"""What would be needed where nothing keeps the promise of a workload."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from serving.errors import NothingStands
from tasks.common.formatting import in_fine_words
from tasks.scheduler.choose import Choice
from tasks.scheduler.fit import fits, serving_time
from tasks.scheduler.problem import Kind, Problem
from tasks.scheduler.simulate_online import always_on
from tasks.scheduler.simulate_stream import stream_fit
from tasks.scheduler.simulate_table import batch_on_demand
from tasks.scheduler.workload import Workload

_TIMES = (1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0, 1000.0)


def nothing_stands(
    workload: Workload, problem: Problem, kinds: Sequence[Kind], ordered: Sequence[Choice]
) -> NothingStands:
    """Return the error: what must hold, how near the best comes to it, and what would be needed."""
    # What gives no answer at all, and what is only held against, is near to nothing.
    online = [each for each in ordered if each.candidate.mode == "online" or problem.consumer != "requests"]
    fair = [each for each in online if each.candidate.policy != "keep-warm-histogram"]
    nearest = min(fair, key=lambda choice: (choice.candidate.late, choice.usd))
    best = " ".join(nearest.name)
    told = (
        f"A mode must keep the promise of {workload.name}, {in_fine_words(problem.within)} for {problem.kept:.4g} of"
        f" its rows, got none; the nearest is {best} on {nearest.candidate.machines} machine(s) of the kind"
        f" {nearest.kind.name}: {nearest.candidate.flaw}."
    )
    needs = [need for need in (_forward(problem, kinds), _machines(problem, kinds), _time(problem, kinds)) if need]
    return NothingStands(" ".join([told, *needs]))


def _forward(problem: Problem, kinds: Sequence[Kind]) -> str | None:
    """Say where the promise is below what a single request takes."""
    if problem.consumer == "table":
        return None
    fastest = max(kinds, key=lambda kind: kind.speed)
    each, beside = serving_time(problem.profile, problem.rows_per_arrival)
    one = each.seconds(1) / fastest.speed
    least = 2 * one + beside
    if least <= problem.within:
        return None
    forward = problem.profile.pass_time.seconds(1) / fastest.speed
    return (
        f"A request takes {in_fine_words(one)} on {fastest.name}, {in_fine_words(forward)} of it the model's forward"
        f" pass, and may come behind another that has just begun: with {1000 * beside:.3g} ms of transport, at least"
        f" {in_fine_words(least)} must be allowed, or a smaller model or a faster machine be had."
    )


def _machines(problem: Problem, kinds: Sequence[Kind]) -> str | None:
    tried = (problem.machines_max * times for times in (2, 4, 8, 16, 64, 256))
    enough = next((count for count in tried if _keeps(replace(problem, machines_max=count), kinds)), None)
    return None if enough is None else f"{enough} machines would keep it: raise machines_max."


def _time(problem: Problem, kinds: Sequence[Kind]) -> str | None:
    enough = next((by for by in _TIMES if _keeps(replace(problem, within=problem.within * by), kinds)), None)
    if enough is None:
        return None
    earlier = "; give the input earlier or move the deadline" if problem.consumer == "table" else ""
    return f"{in_fine_words(problem.within * enough)} would be kept{earlier}."


def _keeps(problem: Problem, kinds: Sequence[Kind]) -> bool:
    """Say whether machines that are always on, or on-demand ones for a table, keep the promise."""
    tries: list[Callable[[Kind], str | None]]
    if problem.consumer == "table":
        tries = [lambda kind: batch_on_demand(problem, kind).flaw]
    else:
        tries = [lambda kind: always_on(problem, fits(problem, kind)[0]).flaw]
        if problem.consumer == "events":
            tries.append(lambda kind: always_on(problem, stream_fit(problem, kind)).flaw)
    return any(each(kind) is None for kind in kinds for each in tries)
