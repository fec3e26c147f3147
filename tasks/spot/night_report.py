"""The artifacts of a night in Prefect: progress while it goes on, then the moves, their cost, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from tasks.common.artifacts import Logger, ProgressArtifact, make_image, make_markdown, make_table, put_artifacts
from tasks.common.formatting import encode_png
from tasks.spot.capacity import Buyer
from tasks.spot.night import Night
from tasks.spot.purchase import MachineStay, NightlyReport, sum_cost, sum_seconds

_INK, _SPOT, _ON_DEMAND = "#1f2933", "#cfe8d5", "#f4d9c6"


class NightProgress:
    """The share of rows that have their part, as an artifact of the flow run."""

    def __init__(self, rows: int, logger: Logger) -> None:
        self._rows, self._shown = rows, -1
        self._artifact = ProgressArtifact("night-progress", "Rows with a part", logger)
        self._artifact.show(0.0)

    def show(self, rows_done: int) -> None:
        """Update the artifact where rows were done since the last time."""
        if rows_done != self._shown:
            self._shown = rows_done
            self._artifact.show(min(100.0, 100.0 * rows_done / self._rows))


def report_night(
    night: Night, run: str, due: datetime, seconds: float, rows_in_flight_max: int, buyer: Buyer | None = None
) -> NightlyReport:
    """Return the report of a night; a machine that is taken was scoring at most `rows_in_flight_max` rows.

    `buyer` has started the machines, where the night did that.
    """
    bought = buyer.seconds if buyer else {}
    spent = sum_cost(night.stays, night.buying)
    rate = night.rate
    on_demand_seconds = (night.rows / rate if rate else seconds) + night.workers * night.changeover_seconds
    return NightlyReport(
        run=run,
        rows=night.rows,
        workers=night.workers,
        deadline=due,
        seconds=seconds,
        slack_seconds=(due - datetime.now(UTC)).total_seconds(),
        rows_per_second=rate,
        changeover_seconds=night.changeover_seconds,
        changeovers=tuple(night.changeovers),
        spot_seconds=sum_seconds(night.stays, "spot"),
        on_demand_seconds=sum_seconds(night.stays, "on-demand"),
        cost=spent,
        cost_on_demand=on_demand_seconds * night.buying.on_demand_price / 3600,
        rows_recomputed_max=sum(stay.lost for stay in night.stays) * rows_in_flight_max,
        moves=tuple(night.moves),
        purchases=tuple(buyer.purchases) if buyer else (),
        spot_seconds_bought=bought.get("spot", 0.0),
        on_demand_seconds_bought=bought.get("on-demand", 0.0),
        cost_bought=sum(seconds * night.buying.price(kind) / 3600 for kind, seconds in bought.items()),
    )


def publish_night(report: NightlyReport, night: Night, logger: Logger) -> None:
    """Publish moves, figures and plot of the night as artifacts of the flow run."""
    png = plot_night(night.samples, night.stays, night.rows, report.seconds + report.slack_seconds)
    artifacts = [
        make_table("night-moves", report.table(), f"Run {report.run}"),
        make_markdown("night-report", report.markdown(), f"Run {report.run}"),
        *([make_table("night-purchases", bought, f"Run {report.run}")] if (bought := report.purchase_table()) else []),
        make_image("night-plot", png, "Rows done, and on which machines"),
    ]
    put_artifacts(artifacts, logger)


def plot_night(samples: Sequence[tuple[float, int]], stays: Sequence[MachineStay], rows: int, deadline: float) -> bytes:
    """Draw the rows done over time, above a lane for each machine that the run used at a time; returns a PNG."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    lanes = max((stay.machine for stay in stays), default=1)
    for stay in stays:
        low, high = (stay.machine - 1) / lanes, stay.machine / lanes
        colour = _SPOT if stay.kind == "spot" else _ON_DEMAND
        axes.axvspan(stay.start, stay.stop, ymin=low, ymax=high, color=colour, linewidth=0)
        if stay.lost:
            axes.plot([stay.stop], [low * 1.05 * rows], marker="x", color="#b3261e", clip_on=False, zorder=3)
    axes.plot([at for at, _ in samples], [done for _, done in samples], color=_INK, drawstyle="steps-post")
    axes.axvline(deadline, color="#b3261e", linestyle="--", linewidth=1)
    axes.annotate(
        "deadline",
        (deadline, rows / 2),
        color="#b3261e",
        ha="right",
        va="center",
        rotation=90,
        xytext=(-3, 0),
        textcoords="offset points",
    )
    axes.set_xlim(0, max(deadline, samples[-1][0] if samples else 0) * 1.02)
    axes.set_ylim(0, rows * 1.05)
    axes.set_xlabel("seconds since the night began")
    axes.set_ylabel("rows done")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    shades = [Patch(color=_SPOT, label="spot"), Patch(color=_ON_DEMAND, label="on-demand")]
    axes.legend(handles=shades, loc="upper left", framealpha=1, edgecolor="white")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return encode_png(figure, dpi=130)
