"""What came of a seed. The process that hands the seeds out imports this alone: the product takes seconds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a seed: the steps it took, the calls by how they ended, and what must never be."""

    seed: int
    steps: int
    digest: str
    refusals: Counter[str]
    violations: tuple[str, ...]
    trace: tuple[str, ...]


def simulate_seed(seed: int) -> Outcome:
    """Simulate a seed."""
    from tests.simulation.simulate import simulate

    return simulate(seed)


def simulate_briefly(seed: int) -> Outcome:
    """Simulate a seed, and leave its trace behind."""
    return replace(simulate_seed(seed), trace=())
