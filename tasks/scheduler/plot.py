"""The plot of a decision: what each way costs, when rows come, and which way is cheapest with more or less traffic.

Shapes: T seconds, B bins of the plot.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from tasks.scheduler.decision import Alternative, Decision, Mode
from tasks.scheduler.money import usd
from tasks.scheduler.report import span
from tasks.scheduler.workload import Table

COLOURS: dict[Mode, str] = {"online": "#2f6f9f", "batch": "#4f8f5b", "streaming": "#c9a227"}
_INK, _LIMIT = "#1f2933", "#b3261e"
_BARS_MAX = 14
_FAR_APART = 40
_BIN_SECONDS = (1, 10, 60, 300, 600, 3600, 6 * 3600, 86_400)
_BINS_MAX = 800
_DAY = 86_400
_DAYS_SHOWN = 7

# The cheapest of each mode that stands, by the factor of the traffic.
Costs = Mapping[Mode, Sequence[tuple[float, float]]]


def plot(decision: Decision, counts_T: NDArray[np.int64] | None, costs: Costs) -> bytes:
    """Draw a decision, and return a PNG. `counts_T` are arrivals of each second, None for a table."""
    figure = Figure(figsize=(11, 6.4), dpi=120, layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 2.4), width_ratios=(3, 2))
    bars, left, right = (figure.add_subplot(place) for place in (grid[0, :], grid[1, 0], grid[1, 1]))
    _draw_bars(bars, decision)
    if isinstance(decision.workload.consumer, Table):
        _draw_tables(left, decision.workload.consumer, decision)
    elif counts_T is not None and len(counts_T):
        _draw_arrivals(left, counts_T)
    _draw_costs(right, decision, costs)
    for axes in (bars, left, right):
        axes.spines[["top", "right"]].set_visible(False)
    sink = io.BytesIO()
    figure.savefig(sink, format="png")
    return sink.getvalue()


def _draw_bars(axes: Axes, decision: Decision) -> None:
    shown = _shown(decision)
    for at, each in enumerate(shown):
        axes.barh(at, each.usd, color=COLOURS[each.mode], alpha=1.0 if each.stands else 0.25, height=0.7)
        out = "  can't be chosen" if each.policy == "keep-warm-histogram" else "  breaks the promise"
        mark = "  chosen" if each == decision.chosen else "" if each.stands else out
        axes.annotate(
            f" {usd(each.usd)}{mark}",
            (each.usd, at),
            va="center",
            fontsize=8,
            color=_INK if each.stands else _LIMIT,
            fontweight="bold" if each == decision.chosen else "normal",
        )
    axes.set_yticks(range(len(shown)), [_label(each) for each in shown], fontsize=8)
    axes.invert_yaxis()
    _scale(axes, [each.usd for each in shown])
    axes.xaxis.set_major_formatter("${x:,.4g}")
    axes.set_xlabel(f"US dollars for {decision.workload.horizon}")
    axes.set_title(f"{decision.workload.name}: what each way to serve it costs", loc="left", fontsize=11)
    modes = {each.mode: COLOURS[each.mode] for each in shown}
    handles = [Patch(color=colour, label=mode) for mode, colour in modes.items()]
    axes.legend(handles=handles, loc="upper right", bbox_to_anchor=(1, 1.12), ncols=3, frameon=False, fontsize=8)


def _scale(axes: Axes, costs: Sequence[float]) -> None:
    """Give the bars room for their figures; costs that are far apart go on a logarithmic axis, or some have no bar."""
    least, most = min((each for each in costs if each > 0), default=1.0), max(costs, default=0.0) or 1.0
    if most / least < _FAR_APART:
        axes.set_xlim(0, most * 1.2)
        return
    axes.set_xscale("log")
    axes.set_xlim(least / 3, most * (most / least) ** 0.3)


def _shown(decision: Decision) -> list[Alternative]:
    """Return the best of each mode, policy and kind of machine, in order, the chosen one always among them."""
    best: dict[tuple[str, str, str], Alternative] = {}
    for each in (decision.chosen, *decision.alternatives):
        best.setdefault((each.mode, each.policy, each.machine), each)
    return list(best.values())[:_BARS_MAX]


def _label(each: Alternative) -> str:
    return f"{each.mode}, {each.policy}\n{each.machines} x {each.machine}"


def _draw_arrivals(axes: Axes, counts_T: NDArray[np.int64]) -> None:
    width = next((each for each in _BIN_SECONDS if len(counts_T) <= _BINS_MAX * each), _BIN_SECONDS[-1])
    width = min(width, len(counts_T))
    whole = len(counts_T) // width * width
    rate_B = counts_T[:whole].reshape(-1, width).mean(axis=1)
    unit, seconds = ("days", _DAY) if len(counts_T) > 2 * _DAY else ("hours", 3600)
    at_B = (np.arange(len(rate_B)) + 0.5) * width / seconds
    axes.fill_between(at_B, rate_B, color="#9fb3c8", linewidth=0, step="mid")
    axes.set(xlabel=unit, ylabel="arrivals a second", xlim=(0, len(counts_T) / seconds), ylim=(0, None))
    axes.set_title(f"arrivals, each point an average over {span(width)}", loc="left", fontsize=10)


def _draw_tables(axes: Axes, table: Table, decision: Decision) -> None:
    slack = table.slack_seconds(decision.decided_at) / _DAY
    if table.once_by is not None:
        days, starts, title = 0.0, np.zeros(1), "one table, shaded until it is due"
    else:
        days = min(_DAYS_SHOWN * table.every_days, max(decision.workload.horizon_days, 1))
        hours, minutes = map(int, table.ready.split(":"))
        starts = np.arange(0, days, table.every_days) + (60 * hours + minutes) / 1440
        title = f"a table each time, shaded until it is due ({table.due} UTC)"
    for start in starts:
        axes.axvspan(start, start + slack, color="#dbe7dd", linewidth=0)
    axes.stem(starts, np.full(len(starts), table.rows), linefmt=_INK, markerfmt="o", basefmt=" ")
    axes.set(xlabel="days", ylabel="rows", xlim=(0, days + slack), ylim=(0, table.rows * 1.15 or 1))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_title(title, loc="left", fontsize=10)


def _draw_costs(axes: Axes, decision: Decision, costs: Costs) -> None:
    for mode, points in costs.items():
        if points:
            factors, spent_here = zip(*points, strict=True)
            axes.plot(factors, spent_here, "o-", color=COLOURS[mode], markersize=4, label=f"{mode}, its cheapest")
    axes.axvline(1, color=_INK, linestyle=":", linewidth=1)
    axes.plot([1], [decision.chosen.usd], "o", color=_LIMIT, markersize=6, zorder=3, label="chosen")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    spent = [each for points in costs.values() for _, each in points if each > 0] or [1.0]
    if max(spent) / min(spent) < _FAR_APART:
        axes.set_ylim(0, max(*spent, decision.chosen.usd) * 1.5)
    else:
        axes.set_yscale("log")
        axes.margins(y=0.25)
    axes.yaxis.set_major_formatter("${x:,.4g}")
    axes.yaxis.set_minor_formatter("")
    axes.set(xlabel="traffic, times what it is", ylabel="US dollars")
    axes.set_title("with more or less traffic", loc="left", fontsize=10)
    axes.legend(loc="best", frameon=False, fontsize=8)
