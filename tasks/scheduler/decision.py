"""What was decided for a workload: the mode, every alternative with its cost, and what would change the choice."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from serving.model.batching import BatchingConfig, CostModel
from serving.model.contract import Frozen
from tasks.scheduler.workload import Prices, Workload

Mode = Literal["online", "batch", "streaming"]
Policy = Literal[
    "always-on",
    "autoscaled",
    "keep-warm",
    "keep-warm-10-minutes",
    "on-demand",
    "spot",
    "micro-batches",
]


class Profile(Frozen):
    """What a model was measured at on this machine. Nothing in it is guessed. It is kept in a tag of the version."""

    model: str = Field(description="models:/NAME/VERSION.")
    digest: str = Field(description="SHA-256 of the model's files.")
    machine: str = Field(description="What kind of machine this is.")
    slots: int = Field(ge=1, description="Forward passes side by side.")
    pass_time: CostModel = Field(description="S(b): how long a pass takes, with all slots at work.")
    batch_rows_per_second: float = Field(
        gt=0, description="Rows a second of a batch run, reading and writing included."
    )
    cold_start_seconds: float = Field(ge=0, description="From nothing to the first answer of an endpoint.")
    start_seconds: float = Field(ge=0, description="From nothing to the first scored row of a batch run.")
    request_ms: float = Field(
        ge=0, description="What a request takes beside its forward pass: server, transport, parsing; one at a time."
    )
    request_busy_ms: float | None = Field(
        default=None,
        ge=0,
        description="What of it keeps a slot from forward passes: the server's processor time for a request less that "
        "of its pass. Null where that was not measured; all of it is counted then.",
    )
    served: CostModel | None = Field(
        default=None,
        description="What n requests of one row take together in a slot of an endpoint, all that they cost there "
        "included, on the model server that was measured. Null where none was: passes and request_busy_ms count then.",
    )
    jitter: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="How much that differs from time to time: the standard deviation of its logarithm.",
    )
    stream_rows_per_second: float | None = Field(
        default=None,
        gt=0,
        description="Rows a second of a stream, broker included. Null where it was not stated; a batch run's then.",
    )
    measured_at: datetime

    @property
    def busy_ms(self) -> float:
        """What of a request keeps a slot from forward passes: all of it where that was not measured."""
        return self.request_ms if self.request_busy_ms is None else self.request_busy_ms


class Alternative(Frozen):
    """A way to serve a workload, as simulated over the horizon."""

    mode: Mode
    policy: Policy
    machine: str = Field(description="The kind of machine.")
    machines: int = Field(ge=0, description="Machines at a time, at most.")
    machines_min: int | None = Field(default=None, ge=0, description="A scaler's fewest machines.")
    target_utilisation: float | None = Field(
        default=None, description="Share of what its machines take that a scaler aims at; lower is more machines."
    )
    batching: BatchingConfig = Field(
        default=BatchingConfig(), description="Rows of a forward pass, and how long a row waits for others, at most."
    )
    checked_rate: float | None = Field(
        default=None,
        ge=0,
        description="Requests a second at which an endpoint is held against the promise when it is deployed, and then "
        "at twice that rate: the mean, or half of what its fewest machines carry where that is less. Null otherwise.",
    )
    keep_warm_seconds: float | None = Field(default=None, description="Seconds from the last request to zero.")
    period_seconds: float | None = Field(default=None, description="Seconds from one batch run to the next.")
    usd: float = Field(ge=0, description="What the machines cost over the horizon.")
    age_seconds_p50: float = Field(ge=0, description="From a row's arrival to its prediction: the median.")
    age_seconds_p99: float = Field(ge=0, description="The same for 99 of 100.")
    late_share: float = Field(
        ge=0, le=1, description="Share of rows (of tables, for a table) that came later than promised."
    )
    cold_starts: int = Field(default=0, ge=0, description="Times that a row had to wait for a machine to start.")
    utilisation: float = Field(ge=0, le=1, description="Share of the paid time in which machines had work.")
    is_feasible: bool = Field(description="Whether it keeps the promise.")
    reason: str = Field(description="Why it was chosen, or why it lost, with figures.")


class BreakEven(Frozen):
    """How far an input may change until another choice is cheapest."""

    input: str = Field(description="Which one: traffic, spot price, on-demand price, cold start, speed, promise.")
    factor: float = Field(gt=0, description="Its value there over its value now.")
    to: str = Field(description="The mode and policy that is chosen from there on.")


class Decision(Frozen):
    """The choice for a workload."""

    workload: Workload
    profile: Profile
    prices: dict[str, Prices] = Field(description="What each kind of machine costs, as used.")
    price_origin: str = Field(description="Where the prices are from, and their date.")
    decided_at: datetime
    rows: int = Field(ge=0, description="Rows that come within the horizon.")
    chosen: Alternative
    alternatives: tuple[Alternative, ...] = Field(
        description="All that was simulated, in the order of their costs; those that break the promise come last."
    )
    waste_usd: float = Field(description="What an always-on endpoint would cost more over the horizon.")
    waste_factor: float | None = Field(description="Its cost over that of the choice; null where that costs nothing.")
    break_evens: tuple[BreakEven, ...] = Field(description="What would change the choice, the nearest first.")
