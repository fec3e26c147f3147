"""How far each input may move until another choice is cheapest.

A sample of the arrivals is decided on again and again, by coarser steps than the choice itself: a factor is right to
about a fifth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from tasks.scheduler.arrivals import DAY
from tasks.scheduler.choose import Choice, best, rated
from tasks.scheduler.decision import Flip
from tasks.scheduler.problem import Kind, Problem
from tasks.scheduler.simulate import simulate_on_demand, simulate_spot

NOTHING = "nothing: no mode keeps the promise"
_STEPS = (1.5, 3.0, 10.0, 100.0)
_HALVINGS = 4
_SAMPLE_DAYS = (1, 7)
_SAMPLE_ARRIVALS = 500
_SEED = 19

_Name = tuple[str, str] | None
_Move = Callable[[float], _Name]


def flips(problem: Problem, kinds: Sequence[Kind], chosen: Choice) -> tuple[Flip, ...]:
    """Return the flips within a hundredth and a hundred times of each input, the nearest first.

    None where a sample of the arrivals is decided otherwise than all of them.
    """
    sample = _sample(problem, kinds, chosen.name)
    if sample is None:
        return ()
    found = [
        flip
        for name, move in _moves(sample, kinds).items()
        for way in (1, -1)
        if (flip := _flip(name, move, way, chosen.name)) is not None
    ]
    return tuple(sorted(found, key=lambda flip: abs(np.log(flip.factor))))


def _sample(problem: Problem, kinds: Sequence[Kind], name: tuple[str, str]) -> Problem | None:
    if problem.consumer == "table":
        return replace(problem, quick=True)
    for days in _SAMPLE_DAYS:
        counts_T = problem.counts_T[: days * DAY]
        if counts_T.sum() < _SAMPLE_ARRIVALS and days < _SAMPLE_DAYS[-1]:
            continue
        sample = replace(problem, counts_T=counts_T, seconds=len(counts_T), quick=True)
        if best(sample, kinds, beside=False).name == name:
            return sample
    return None


def _moves(problem: Problem, kinds: Sequence[Kind]) -> dict[str, _Move]:
    """Return for each input what is chosen when it is so many times what it is."""
    on_demand = [(kind, simulate_on_demand(problem, kind, beside=False)) for kind in kinds]

    def priced(change: Callable[[Kind], Kind]) -> _Name:
        found = [
            Choice(kind=change(kind), candidate=each)
            for kind, fixed in on_demand
            for each in (*fixed, *simulate_spot(problem, change(kind), fixed))
        ]
        return _name(min(found, key=rated))

    def again(change: Problem) -> _Name:
        return _name(best(change, kinds, beside=False))

    profile = problem.profile
    moves: dict[str, _Move] = {
        "traffic": lambda by: again(busier(problem, by)),
        "on-demand price": lambda by: priced(lambda kind: replace(kind, on_demand=kind.on_demand * by)),
        "cold start": lambda by: again(
            replace(
                problem,
                profile=profile.model_copy(
                    update={
                        "cold_start_seconds": profile.cold_start_seconds * by,
                        "start_seconds": profile.start_seconds * by,
                    }
                ),
            )
        ),
        "speed": lambda by: _name(
            best(problem, [replace(kind, speed=kind.speed * by) for kind in kinds], beside=False)
        ),
        "promise": lambda by: again(replace(problem, within=problem.within * by)),
    }
    if problem.availability is not None and any(kind.spot is not None for kind in kinds):
        moves["spot price"] = lambda by: priced(
            lambda kind: kind if kind.spot is None else replace(kind, spot=kind.spot * by)
        )
    return moves


def _name(choice: Choice) -> _Name:
    return None if choice.candidate.flaw is not None else choice.name


def busier(problem: Problem, by: float) -> Problem:
    """Return a problem with so many times the traffic."""
    random = np.random.default_rng(_SEED)
    whole = int(by)
    counts_T = problem.counts_T * whole + random.binomial(problem.counts_T, by - whole)
    return replace(problem, counts_T=counts_T, rows_per_table=problem.rows_per_table * by)


def _flip(name: str, move: _Move, way: int, now: tuple[str, str]) -> Flip | None:
    """Return the nearest factor on one side at which something else is chosen."""
    same = 1.0
    for step in _STEPS:
        other, to = step**way, move(step**way)
        if to != now:
            break
        same = other
    else:
        return None
    for _ in range(_HALVINGS):
        middle = float(np.sqrt(same * other))
        found = move(middle)
        if found == now:
            same = middle
        else:
            other, to = middle, found
    return Flip(input=name, factor=float(f"{other:.3g}"), to=NOTHING if to is None else " ".join(to))
