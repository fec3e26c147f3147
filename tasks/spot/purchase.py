"""The machines that a night buys: its options, its stays on machines and moves between them, and its report."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from pydantic import Field

from serving.errors import BadInput
from serving.model.contract import Frozen

MachineKind = Literal["spot", "on-demand"]
PlacementName = Literal["spot", "on-demand", "nowhere"]

_TIME_OF_DAY = re.compile(r"(\d{1,2}):(\d{2})")


class StandingMachines(Frozen):
    """Machines that are there by themselves, or come and go by somebody else's doing: a night starts none."""

    kind: Literal["standing"] = "standing"


class LocalMachines(Frozen):
    """Workers as processes of the machine that the night runs on, started and ended by the night."""

    kind: Literal["local"] = "local"


class AwsMachines(Frozen):
    """Machines of a stack in AWS, started and ended by the night: `overnight aws deploy` makes one."""

    kind: Literal["aws"] = "aws"
    stack: str = Field(default="overnight", description="The stack's name.")
    region: str | None = Field(default=None, description="Its region. Without: that of AWS_REGION, or of the profile.")


class PurchaseOptions(Frozen):
    """The deployments that machines are bought by, their prices, and how often a night decides."""

    spot: str = Field(
        default="batch-inference/spot", description="The deployment whose runs go to machines that may vanish."
    )
    on_demand: str = Field(
        default="batch-inference/on-demand", description="The deployment whose runs go to machines that stay."
    )
    machines: StandingMachines | LocalMachines | AwsMachines = Field(
        default=StandingMachines(),
        discriminator="kind",
        description="Who starts the machines: nobody, since they are there (standing); or the night, which ends them "
        "too: workers on this machine (local), or those of a stack in AWS (aws).",
    )
    spot_price: float = Field(gt=0, description="Price of a spot machine for an hour, in any currency.")
    on_demand_price: float = Field(gt=0, description="Price of an on-demand machine for an hour, in the same currency.")
    rows_per_second: float | None = Field(
        default=None,
        gt=0,
        description="Rows a second of one machine, from an earlier report. Without it, the first chunks are measured.",
    )
    changeover_seconds: float = Field(
        default=120.0,
        ge=0,
        description="From the decision to move until work goes on: notice, boot, load, and the chunk that is lost. "
        "Measured as the night goes on.",
    )
    interval_seconds: float = Field(default=30.0, gt=0, le=3600, description="Seconds from one decision to the next.")
    start_seconds: float = Field(
        default=300.0,
        ge=0,
        description="How long a spot machine that the night starts may take to come, before the night turns to "
        "on-demand machines without knowing its speed.",
    )

    @property
    def spot_wait_seconds(self) -> float:
        """How long a night of unknown speed waits for its first spot machine: not at all where it starts none."""
        return 0.0 if self.machines.kind == "standing" else self.start_seconds

    @property
    def price_ratio(self) -> float:
        """The price of an on-demand machine over that of a spot machine."""
        return self.on_demand_price / self.spot_price

    def price(self, kind: MachineKind) -> float:
        """Return the price of a machine for an hour."""
        return self.spot_price if kind == "spot" else self.on_demand_price


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineStay:
    """The time that a run was on one machine, in seconds since the night began; `lost` where it was taken.

    `machine` is its number among those that the run uses at a time, from 1.
    """

    kind: MachineKind
    start: float
    stop: float
    lost: bool
    machine: int = 1


class Move(Frozen):
    """One decision that sent the run, or one machine's part of it, elsewhere."""

    machine: int = Field(default=1, description="Its number among the machines that the run uses at a time, from 1.")
    seconds: float = Field(description="Seconds since the night began.")
    to: PlacementName
    rows_done: int
    why: str


class Purchase(Frozen):
    """What a night asked for, and what there was, each time that one of them changed."""

    at: datetime
    seconds: float = Field(description="Seconds since the night began.")
    kind: MachineKind
    wanted: int = Field(description="Machines asked for.")
    standing: int = Field(description="Machines that there were, those that started up included.")
    problem: str | None = Field(default=None, description="Why there were fewer, where that is known.")


class NightlyReport(Frozen):
    """The result of a batch run under a deadline."""

    run: str
    rows: int
    workers: int = Field(default=1, description="Machines that the run used at a time, at most.")
    deadline: datetime
    seconds: float = Field(description="Seconds from the call to the published predictions.")
    slack_seconds: float = Field(description="Seconds that were left until the deadline; negative where it was missed.")
    rows_per_second: float | None = Field(
        description="Rows a second of one machine, as measured; null where too short."
    )
    changeover_seconds: float = Field(
        description="Seconds from sending the run to its first new part: the longest measured, else as stated."
    )
    changeovers: tuple[float, ...] = Field(default=(), description="All of them that were measured, in order.")
    spot_seconds: float
    on_demand_seconds: float
    cost: float = Field(description="Price of the machines for the seconds that the run had them.")
    cost_on_demand: float = Field(description="Price of the same work without a move, on an on-demand machine.")
    rows_recomputed_max: int = Field(description="Rows that were being scored when machines were taken, at most.")
    moves: tuple[Move, ...]
    purchases: tuple[Purchase, ...] = Field(default=(), description="The machines that were asked for, and that came.")
    spot_seconds_bought: float = Field(
        default=0.0, description="Seconds of spot machines that there were, idle and starting up included, as counted."
    )
    on_demand_seconds_bought: float = Field(default=0.0, description="The same of on-demand machines.")
    cost_bought: float = Field(default=0.0, description="Their price, where the night started them; else 0.")

    @property
    def cost_fraction(self) -> float:
        """The cost over that of on-demand machines from the beginning."""
        return self.cost / self.cost_on_demand if self.cost_on_demand else 0.0

    @property
    def summary(self) -> str:
        """The night in a sentence."""
        late = "before" if self.slack_seconds >= 0 else "after"
        return (
            f"Run {self.run} is complete: {self.rows:,} rows, {abs(self.slack_seconds):,.0f} s {late} the deadline, "
            f"for {self.cost_fraction:.1%} of what on-demand alone costs, in {len(self.moves)} moves."
        )

    def markdown(self) -> str:
        """Return the night in a few lines."""
        rate = f"{self.rows_per_second:,.0f} rows/s" if self.rows_per_second else "too short to tell"
        bought = (
            f"- bought, with starting up: {self.spot_seconds_bought:,.0f} s of spot machines, "
            f"{self.on_demand_seconds_bought:,.0f} s on-demand, for {self.cost_bought:.4g}"
        )
        return "\n".join(
            [
                self.summary,
                "",
                f"- cost {self.cost:.4g}, on-demand alone {self.cost_on_demand:.4g} ({self.cost_fraction:.1%})",
                f"- {self.spot_seconds:,.0f} s on spot machines, {self.on_demand_seconds:,.0f} s on-demand",
                f"- one machine: {rate}; a changeover takes {self.changeover_seconds:,.1f} s",
                f"- scored again after a machine was taken: at most {self.rows_recomputed_max:,} rows",
                f"- {len(self.moves)} moves, {self.workers} machines at a time",
                *([bought] if self.purchases else []),
            ]
        )

    def purchase_table(self) -> list[dict[str, str]]:
        """Return the purchases in order."""
        return [
            {
                "at (UTC)": f"{each.at:%Y-%m-%d %H:%M:%S}",
                "after": f"{each.seconds:,.0f} s",
                "kind": each.kind,
                "asked for": str(each.wanted),
                "there": str(each.standing),
                "problem": each.problem or "",
            }
            for each in self.purchases
        ]

    def table(self) -> list[dict[str, str]]:
        """Return the moves in order, and the result."""
        moves = [
            {
                "after": f"{move.seconds:,.0f} s",
                "machine": str(move.machine),
                "to": move.to,
                "rows done": f"{move.rows_done:,}",
                "why": move.why,
            }
            for move in self.moves
        ]
        end = f"slack {self.slack_seconds:,.0f} s, cost {self.cost:.4g} ({self.cost_fraction:.1%} of on-demand)"
        done = {"machine": "", "to": "done", "rows done": f"{self.rows:,}", "why": end}
        return [*moves, {"after": f"{self.seconds:,.0f} s", **done}]


def sum_cost(stays: Sequence[MachineStay], buying: PurchaseOptions) -> float:
    """Return the cost of stays: each second at the price of its machine."""
    return sum((stay.stop - stay.start) * buying.price(stay.kind) / 3600 for stay in stays)


def sum_seconds(stays: Sequence[MachineStay], kind: MachineKind) -> float:
    """Return the seconds of all stays on one kind of machine."""
    return sum(stay.stop - stay.start for stay in stays if stay.kind == kind)


def median_rate(samples: Sequence[tuple[float, int]]) -> float | None:
    """Return the median rows a second over samples of (seconds at work, rows done); None before rows were done.

    The median, since one late observation or one slow start must not decide where the run goes.
    """
    rates = sorted(
        (rows - rows_before) / (after - before)
        for (before, rows_before), (after, rows) in itertools.pairwise(samples)
        if after > before and rows > rows_before
    )
    return rates[len(rates) // 2] if rates else None


def parse_deadline(deadline: str, now: datetime) -> datetime:
    """Return the time of a deadline: the next such time of day in UTC, or a date and time with its zone.

    Raises BadInput for any other text, and for a time that is past.
    """
    if match := _TIME_OF_DAY.fullmatch(deadline.strip()):
        hour, minute = int(match[1]), int(match[2])
        if hour < 24 and minute < 60:  # noqa: PLR2004 - hours of a day, minutes of an hour
            at = now.astimezone(UTC).replace(hour=hour, minute=minute, second=0, microsecond=0)
            return at if at > now else at + timedelta(days=1)
    try:
        moment = datetime.fromisoformat(deadline.strip())
    except ValueError:
        moment = datetime.min  # noqa: DTZ901 - it has no zone, which is refused below
    if moment.tzinfo is None:
        message = (
            "The deadline must be a time of day in UTC, such as 06:00, or a date and time with its zone, such as "
            f"2030-01-31T06:00+00:00, got {deadline!r}."
        )
        raise BadInput(message)
    if moment <= now:
        message = (
            f"The deadline must be ahead, got {moment.isoformat()}, and it is {now.isoformat(timespec='seconds')}."
        )
        raise BadInput(message)
    return moment
