"""What a decision is computed from: its inputs, the scenario that is simulated, and the ways to serve it.

Times are in seconds. Shapes: T seconds of arrivals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from serving.errors import BadWorkload
from serving.model.batching import BatchingConfig
from tasks.scheduler.arrivals import DAY_SECONDS, Arrivals
from tasks.scheduler.decision import Mode, Policy, Profile
from tasks.scheduler.prices import PriceQuote
from tasks.scheduler.spot_simulation import SpotAvailability
from tasks.scheduler.workload import THIS_MACHINE, Machine, Prices, Table, Workload

# A promise must be kept with a margin: in the share of late rows, in the time that runs take, and in how many rows
# chance makes late, which is counted in standard deviations.
LATE_BUDGET_SHARE = 0.8
TIME_MARGIN = 1.1
DEVIATIONS = 3.0
_HOUR = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionInputs:
    """Everything that a decision is computed from.

    arrivals: None for a table. availability: of spot; where it is None, spot is not considered. now: with its zone.
    """

    workload: Workload
    profile: Profile
    arrivals: Arrivals | None
    quote: PriceQuote
    availability: SpotAvailability | None
    now: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A workload in figures.

    deadline_seconds: from a row's arrival (for a table: from its input) to its prediction. share_in_time: the share of
    rows for which that must hold. counts_T: arrivals of each second; empty for a table, which has rows_per_table every
    period_seconds. seconds: the time that is simulated. scale: the horizon over that. late_budget_share, time_margin,
    deviations: the margins. is_coarse: parameters have larger steps and ages are left out, for many decisions in a row.
    """

    consumer: Literal["requests", "table", "events"]
    deadline_seconds: float
    share_in_time: float
    counts_T: NDArray[np.int64]
    rows_per_arrival: float
    rows_per_table: float
    period_seconds: float
    seconds: float
    scale: float
    machines_max: int
    profile: Profile
    availability: SpotAvailability | None
    late_budget_share: float = LATE_BUDGET_SHARE
    time_margin: float = TIME_MARGIN
    deviations: float = DEVIATIONS
    is_coarse: bool = False

    @property
    def late_share_max(self) -> float:
        """The share of rows that may be late in the simulation, the margin taken off."""
        return self.late_budget_share * (1 - self.share_in_time)


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceType:
    """A kind of machine. speed: over that of the measured one. Prices are in US dollars a second."""

    name: str
    speed: float
    on_demand: float
    spot: float | None

    @property
    def price_ratio(self) -> float | None:
        """The on-demand price over the spot price."""
        return None if self.spot is None else self.on_demand / self.spot


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A way to serve a scenario on an instance type, simulated.

    machines_min, target_utilisation: of a scaler. carried_per_second: the requests that the fewest machines of an
    endpoint answer in time, 99 of 100 of them. paid_seconds: machine seconds in all; those of spot count for as many
    on-demand seconds as they cost. violation: why the promise is not kept, in words; None where it is.
    """

    mode: Mode
    policy: Policy
    machines: int
    batching: BatchingConfig = field(default_factory=BatchingConfig)
    keep_warm_seconds: float | None = None
    period_seconds: float | None = None
    machines_min: int | None = None
    target_utilisation: float | None = None
    carried_per_second: float = 0.0
    paid_seconds: float = 0.0
    busy_seconds: float = 0.0
    age_p50: float = 0.0
    age_p99: float = 0.0
    late_share: float = 0.0
    cold_starts: int = 0
    violation: str | None = None

    def usd(self, instance_type: InstanceType) -> float:
        """Return what its machines cost in the simulated time."""
        return self.paid_seconds * instance_type.on_demand


def rank_candidate(candidate: Candidate) -> tuple[bool, float]:
    """Return the sort key of candidates of one mode on one instance type: the best comes first."""
    broken = candidate.violation is not None
    return broken, candidate.late_share if broken else candidate.paid_seconds


def find_late_violation(scenario: Scenario, late_share: float, *, deviation: float = 0.0) -> str | None:
    """Say why this share of late rows breaks the promise; None where it does not.

    Args:
        scenario: Its promise and its margins.
        late_share: The share of rows that were late in the simulation.
        deviation: The standard deviation of how many rows are late from one replay to another, where that is known.
    """
    arrivals = float(scenario.counts_T.sum())
    spread = scenario.deviations * deviation
    allowed = 1 - scenario.share_in_time
    # The tolerances are for rounding errors of the sums.
    if late_share <= scenario.late_share_max + 1e-12 and late_share * arrivals + spread <= allowed * arrivals + 1e-9:
        return None
    if late_share <= allowed:
        return f"{late_share:.3%} of the rows came late; {allowed:.3%} may, too near for a promise"
    return f"{late_share:.3%} of the rows came late, {allowed:.3%} may"


def build_scenario(inputs: DecisionInputs) -> Scenario:
    """Return a workload in figures. Raises BadWorkload where its arrivals are missing, or a deadline is over."""
    consumer, horizon = inputs.workload.consumer, inputs.workload.horizon_days * DAY_SECONDS
    machines_max, profile, availability = inputs.workload.machines_max, inputs.profile, inputs.availability
    if isinstance(consumer, Table):
        slack = consumer.slack_seconds(inputs.now)
        return Scenario(
            consumer="table",
            deadline_seconds=slack,
            share_in_time=1.0,
            counts_T=np.zeros(0, dtype=np.int64),
            rows_per_arrival=1.0,
            rows_per_table=consumer.rows,
            period_seconds=consumer.every_days * DAY_SECONDS if consumer.once_by is None else slack,
            seconds=horizon if consumer.once_by is None else slack,
            scale=1.0,
            machines_max=machines_max,
            profile=profile,
            availability=availability,
        )
    arrivals = inputs.arrivals
    if arrivals is None:
        message = f"A workload of {consumer.kind} must have arrivals, got none; read them first."
        raise BadWorkload(message)
    seconds = len(arrivals.counts_T)
    return Scenario(
        consumer=consumer.kind,
        deadline_seconds=consumer.latency_ms / 1000 if consumer.kind == "requests" else consumer.within_seconds,
        share_in_time=consumer.share_in_time,
        counts_T=arrivals.counts_T,
        rows_per_arrival=arrivals.rows_per_arrival,
        rows_per_table=0.0,
        period_seconds=0.0,
        seconds=seconds,
        scale=horizon / seconds,
        machines_max=machines_max,
        profile=profile,
        availability=availability,
    )


def list_instance_types(workload: Workload, prices: Mapping[str, Prices]) -> list[InstanceType]:
    """Return the instance types that a workload allows. Raises BadWorkload where one lacks its speed or its price."""
    return [_make_instance_type(machine, prices) for machine in workload.machines]


def _make_instance_type(machine: Machine, prices: Mapping[str, Prices]) -> InstanceType:
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
    return InstanceType(
        name=machine.kind,
        speed=machine.speed or 1.0,
        on_demand=found.on_demand / _HOUR,
        spot=None if found.spot is None else found.spot / _HOUR,
    )
