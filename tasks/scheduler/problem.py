"""What is simulated: a workload's promise and arrivals in plain figures, a kind of machine, and a way to serve it.

Times are in seconds. Shapes: T seconds of arrivals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tasks.scheduler.availability import Availability
from tasks.scheduler.decision import Mode, Policy, Profile

# A promise is held to be kept with some room to spare: of the share of late rows that is allowed, of the time that runs
# take, and of how often chance makes more rows late than expected, in standard deviations.
LATE_SHARE = 0.8
TIME_MARGIN = 1.1
CHANCE = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A workload in figures.

    within: from a row's arrival (for a table: from its input) to its prediction. kept: the share of rows for which that
    must hold. counts_T: arrivals of each second; none for a table, whose rows_per_table come every `every` seconds.
    seconds: what is simulated. scale: the horizon over that. late_share, time_margin, chance: the room to spare. quick:
    with coarser steps of every parameter, for many decisions in a row; ages are left out.
    """

    consumer: Literal["requests", "table", "events"]
    within: float
    kept: float
    counts_T: NDArray[np.int64]
    rows_per_arrival: float
    rows_per_table: float
    every: float
    seconds: float
    scale: float
    machines_max: int
    profile: Profile
    availability: Availability | None
    late_share: float = LATE_SHARE
    time_margin: float = TIME_MARGIN
    chance: float = CHANCE
    quick: bool = False

    @property
    def late_max(self) -> float:
        """The share of rows that may be late as simulated, for the promise to be kept beyond doubt."""
        return self.late_share * (1 - self.kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of machine: its name, how many times as fast as the measured one, and its prices for a second."""

    name: str
    speed: float
    on_demand: float
    spot: float | None

    @property
    def price_ratio(self) -> float | None:
        """On-demand over spot."""
        return None if self.spot is None else self.on_demand / self.spot


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A way to serve a problem on a kind of machine, simulated.

    floor: a scaler's fewest machines. target: the share of what machines take that it aims at.
    paid_seconds: of machines, all in all; those of spot count for as many on-demand seconds as they cost. flaw: why it
    does not keep the promise, in words; None where it does.
    """

    mode: Mode
    policy: Policy
    machines: int
    batch_size_max: int = 1
    wait: float = 0.0
    keep_warm: float | None = None
    every: float | None = None
    floor: int | None = None
    target: float | None = None
    paid_seconds: float = 0.0
    busy_seconds: float = 0.0
    age_p50: float = 0.0
    age_p99: float = 0.0
    late: float = 0.0
    cold_starts: int = 0
    flaw: str | None = None

    def usd(self, kind: Kind) -> float:
        """Return what its machines cost in what is simulated."""
        return self.paid_seconds * kind.on_demand


def rank(candidate: Candidate) -> tuple[bool, float]:
    """Return what candidates of a mode on one kind of machine are ordered by: the best is the least."""
    return candidate.flaw is not None, candidate.paid_seconds if candidate.flaw is None else candidate.late


def late_flaw(problem: Problem, late: float, *, episodes: int = 0) -> str | None:
    """Say why so many late rows break the promise; None where they do not.

    `episodes`: how often rows were late together, where that is known. Few of them may be many another time.
    """
    arrivals = float(problem.counts_T.sum())
    count = late * arrivals
    spread = problem.chance * math.sqrt(count * max(1.0, count / episodes)) if episodes and count else 0.0
    allowed = 1 - problem.kept
    # Sums of floating point are further off than zero.
    if late <= problem.late_max + 1e-12 and count + spread <= allowed * arrivals + 1e-9:
        return None
    if late <= allowed:
        return f"{late:.3%} of the rows came late; {allowed:.3%} may, too near for a promise"
    return f"{late:.3%} of the rows came late, {allowed:.3%} may"
