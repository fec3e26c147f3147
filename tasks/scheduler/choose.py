"""The choice among what was simulated: the cheapest that keeps the promise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tasks.scheduler.decision import Mode
from tasks.scheduler.problem import Candidate, Kind, Problem
from tasks.scheduler.simulate import simulate

# Of what costs the same, the simpler is chosen.
_SIMPLER = ("micro-batches", "always-on", "on-demand", "keep-warm", "autoscaled", "spot", "keep-warm-10-minutes")
_DIGITS = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A candidate on a kind of machine."""

    kind: Kind
    candidate: Candidate

    @property
    def usd(self) -> float:
        """What it costs in what is simulated."""
        return self.candidate.usd(self.kind)

    @property
    def name(self) -> tuple[Mode, str]:
        """Its mode and its policy."""
        return self.candidate.mode, self.candidate.policy


def rated(choice: Choice) -> tuple[bool, float, int]:
    """Return what choices are ordered by: the promise, the cost, and what is simpler."""
    policy = choice.candidate.policy
    simple = _SIMPLER.index(policy) if policy in _SIMPLER else len(_SIMPLER)
    return choice.candidate.flaw is not None, float(f"{choice.usd:.{_DIGITS}g}"), simple


def best(problem: Problem, kinds: Sequence[Kind], *, beside: bool = True) -> Choice:
    """Return the cheapest that keeps the promise, else the cheapest of those that do not."""
    found = [Choice(kind=kind, candidate=each) for kind in kinds for each in simulate(problem, kind, beside=beside)]
    return min(found, key=rated)
