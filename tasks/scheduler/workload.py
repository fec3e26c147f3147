"""The description of a workload: who consumes the predictions, when they are needed, and what machines cost."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal, Self

from pydantic import AwareDatetime, Field, model_validator

from serving.errors import BadInput, BadWorkload
from serving.model.contract import Frozen

THIS_MACHINE = "this"
_TIME_OF_DAY = r"^([01]?\d|2[0-3]):[0-5]\d$"


class Requests(Frozen):
    """Requests that wait for their answer."""

    kind: Literal["requests"] = Field(default="requests", description="The kind of consumer.")
    latency_ms: float = Field(gt=0, le=60_000, description="Milliseconds within which an answer must be there.")
    share_in_time: float = Field(
        default=0.99, gt=0, le=1, description="Share of the requests for which that must hold."
    )


class Table(Frozen):
    """A table that is needed by a time of the day, again and again or once. Its rows are known some time before."""

    kind: Literal["table"] = Field(default="table", description="The kind of consumer.")
    rows: int = Field(ge=0, le=10**12, description="Rows to be scored each time.")
    ready: str = Field(default="00:00", pattern=_TIME_OF_DAY, description="When its input is there, in UTC.")
    due: str = Field(default="06:00", pattern=_TIME_OF_DAY, description="When its predictions are needed, in UTC.")
    every_days: int = Field(default=1, ge=1, le=366, description="Days from one time to the next.")
    once_by: AwareDatetime | None = Field(
        default=None,
        description="Needed once, by this date and time with its zone, and its input is there: ready, due and "
        "every_days do not count then.",
    )

    def slack_seconds(self, now: datetime) -> float:
        """Return the seconds from the input to the deadline; a day where both are at the same time of the day.

        A table that is needed once has the time from `now` on. Raises BadWorkload where its deadline is over.
        """
        if self.once_by is None:
            return (_minutes_of_day(self.due) - _minutes_of_day(self.ready) - 1) % 1440 * 60 + 60
        left = (self.once_by - now).total_seconds()
        if left <= 0:
            message = (
                f"once_by must be after now, {now.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC, got "
                f"{self.once_by.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC. Give a later deadline."
            )
            raise BadWorkload(message)
        return left


class Events(Frozen):
    """Events whose scores are used by another system, and must not be older than a bound."""

    kind: Literal["events"] = Field(default="events", description="The kind of consumer.")
    within_seconds: float = Field(
        gt=0, le=7 * 86_400, description="Seconds from an event until its score, at most: the freshness."
    )
    share_in_time: float = Field(default=0.99, gt=0, le=1, description="Share of the events for which that must hold.")


class ArrivalTrace(Frozen):
    """Arrivals read from a file, and repeated until the horizon is full."""

    kind: Literal["trace"] = Field(default="trace", description="The kind of arrivals.")
    path: str = Field(min_length=1, description="A CSV or Parquet file.")
    content: Literal["timestamps", "per-second", "per-minute"] = Field(
        default="timestamps",
        description="timestamps: one row an arrival (seconds as numbers, or date and time). per-second, per-minute: "
        "one row a second or minute, and how many arrived in it.",
    )
    column: str | None = Field(default=None, description="Its column. Without: the only one with such values.")
    rows_per_arrival: float = Field(default=1.0, gt=0, le=1e6, description="Rows that come with each, on average.")


class MeteredArrivals(Frozen):
    """Arrivals that the gateway has metered."""

    kind: Literal["metered"] = Field(default="metered", description="The kind of arrivals.")
    folder: str = Field(min_length=1, description="The gateway's folder.")
    endpoint: str = Field(min_length=1, description="The endpoint's name.")


class ArrivalRate(Frozen):
    """Random arrivals at a rate that rises and falls over the day."""

    kind: Literal["rate"] = Field(default="rate", description="The kind of arrivals.")
    per_second: float = Field(ge=0, le=1e6, description="Arrivals a second, on average over the day.")
    peak: float = Field(default=2.0, ge=1, le=100, description="Those at the busiest moment over the average.")
    peak_at: str = Field(default="14:00", pattern=_TIME_OF_DAY, description="When the busiest moment is, in UTC.")
    rows_per_arrival: float = Field(default=1.0, gt=0, le=1e6, description="Rows that come with each, on average.")


class Prices(Frozen):
    """The prices of a machine, in US dollars for an hour."""

    on_demand: float = Field(gt=0, le=10_000, description="On-demand.")
    spot: float | None = Field(default=None, gt=0, le=10_000, description="Spot. Without: spot is not considered.")


class Machine(Frozen):
    """A kind of machine that the workload may use."""

    kind: str = Field(
        default=THIS_MACHINE,
        min_length=1,
        description="The instance type, by which its prices are found; 'this': the one the model is measured on.",
    )
    speed: float | None = Field(
        default=None,
        gt=0,
        le=10_000,
        description="How many times the rows a second of the machine that the model is measured on. Must be given for "
        "any other kind: it is never guessed.",
    )
    prices: Prices | None = Field(default=None, description="What it costs. Without: the price source is asked.")


class Spot(Frozen):
    """How often spot machines are interrupted."""

    trace: str | None = Field(
        default=None, description="A file of availability traces, JSON lines. Without: traces by the rate below."
    )
    interruptions_per_day: float = Field(default=1.0, ge=0, le=1000, description="Interruptions of a machine in a day.")
    gap_minutes: float = Field(
        default=20.0, ge=0, le=10_000, description="Minutes without a machine after each of them."
    )


class Workload(Frozen):
    """How the predictions of a model are consumed."""

    name: str = Field(
        pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", description="Whatever serves the workload has this name."
    )
    model: str = Field(description="models:/NAME@ALIAS or models:/NAME/VERSION.")
    consumer: Annotated[Requests | Table | Events, Field(discriminator="kind")] = Field(
        description="How the predictions are consumed."
    )
    arrivals: Annotated[ArrivalTrace | MeteredArrivals | ArrivalRate, Field(discriminator="kind")] | None = Field(
        default=None, description="When rows come. A table needs none, requests and events do."
    )
    horizon_days: float = Field(default=30.0, gt=0, le=366, description="Days that the costs are of.")
    machines: tuple[Machine, ...] = Field(
        default=(Machine(),), min_length=1, max_length=16, description="Kinds of machines that are allowed."
    )
    machines_max: int = Field(default=64, ge=1, le=1024, description="Machines at a time, at most.")
    price_source: Literal["table", "aws"] = Field(
        default="table", description="table: the dated table of this project. aws: today's prices, by boto3."
    )
    region: str = Field(default="us-east-1", pattern=r"^[a-z]{2}(-[a-z]+)+-\d$", description="Region of the prices.")
    spot: Spot = Field(default=Spot(), description="How often spot machines are interrupted.")

    @property
    def horizon(self) -> str:
        """The time that costs are given for, in words."""
        return "one run" if self.is_needed_once else f"{self.horizon_days:g} days"

    @property
    def is_needed_once(self) -> bool:
        """Whether it is a table that is needed once."""
        return isinstance(self.consumer, Table) and self.consumer.once_by is not None

    @model_validator(mode="after")
    def _check_arrivals(self) -> Self:
        if self.consumer.kind != "table" and self.arrivals is None:
            message = (
                f"A workload of {self.consumer.kind} must say when they come, got no arrivals; give a trace or a rate."
            )
            raise BadInput(message)
        if self.consumer.kind == "table" and self.arrivals is not None:
            message = "A table must not have arrivals beside its rows, got both; leave the arrivals out."
            raise BadInput(message)
        return self


def _minutes_of_day(time_of_day: str) -> int:
    hours, minutes = time_of_day.split(":")
    return 60 * int(hours) + int(minutes)
