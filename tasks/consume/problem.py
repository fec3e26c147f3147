"""What is simulated: a workload's promise and arrivals in plain figures, a kind of machine, and a way to serve it.

Times are in seconds. Shapes: T seconds of arrivals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tasks.consume.availability import Availability
from tasks.consume.decision import Mode, Policy, Profile

# What is predicted is this much worse than predicted where a promise is judged: the share of late rows that is allowed,
# and the time that passes and runs take.
LATE_SHARE = 0.8
TIME_MARGIN = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A workload in figures.

    within: from a row's arrival (for a table: from its input) to its prediction. kept: the share of rows for which that
    must hold. counts_T: arrivals of each second; none for a table, whose rows_per_table come every `every` seconds.
    seconds: what is simulated. scale: the horizon over that.
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

    @property
    def late_max(self) -> float:
        """The share of rows that may be late as simulated, for the promise to be kept beyond doubt."""
        return LATE_SHARE * (1 - self.kept)


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
    """A way to serve a problem on a kind of machine, simulated; machine seconds are of what is simulated.

    flaw: why it does not keep the promise, in words; None where it does.
    """

    mode: Mode
    policy: Policy
    machines: int
    batch_size_max: int = 1
    wait: float = 0.0
    keep_warm: float | None = None
    every: float | None = None
    on_demand_seconds: float = 0.0
    spot_seconds: float = 0.0
    busy_seconds: float = 0.0
    age_p50: float = 0.0
    age_p99: float = 0.0
    late: float = 0.0
    cold_starts: int = 0
    flaw: str | None = None

    def usd(self, kind: Kind) -> float:
        """Return what its machines cost in what is simulated."""
        return self.on_demand_seconds * kind.on_demand + self.spot_seconds * (kind.spot or 0.0)


def late_flaw(problem: Problem, late: float) -> str | None:
    """Say why so many late rows break the promise; None where they do not."""
    # Sums of floating point are further off than zero.
    if late <= problem.late_max + 1e-12:
        return None
    allowed = 1 - problem.kept
    if late <= allowed:
        return f"{late:.3%} of the rows came late; {allowed:.3%} may, too near for a promise"
    return f"{late:.3%} of the rows came late, {allowed:.3%} may"
