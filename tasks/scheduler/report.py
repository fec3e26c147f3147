"""What a person sees of a decision: its page, its plot, and both among the artifacts of a flow run.

Shapes: T seconds, B bins of the plot.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tasks.common.artifacts import Logger, make_image, make_markdown, make_table, put_artifacts
from tasks.common.events import MODE_CHANGED, describe_model_resource, describe_resource, send_event
from tasks.common.formatting import encode_png
from tasks.scheduler.decision import Alternative, BreakEven, Decision, Mode, Policy, Profile
from tasks.scheduler.prices import format_usd
from tasks.scheduler.workload import Events, Requests, Table, Workload

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tasks.scheduler.deployment_plan import AppliedDecision
    from tasks.scheduler.review import Review
    from tasks.scheduler.sensitivity import CostCurves

_POLICIES: dict[Policy, str] = {
    "always-on": "always on",
    "autoscaled": "autoscaled",
    "keep-warm": "asleep when idle, kept warm as long as a cold start is worth",
    "keep-warm-10-minutes": "asleep when idle, kept warm 10 minutes",
    "on-demand": "on-demand machines",
    "spot": "spot machines, on-demand where the deadline needs it",
    "micro-batches": "micro-batches",
}
COLOURS: dict[Mode, str] = {"online": "#2f6f9f", "batch": "#4f8f5b", "streaming": "#c9a227"}
_INK, _LIMIT = "#1f2933", "#b3261e"
_ROWS_MAX, _BARS_MAX = 40, 14
# Costs that differ by more than this factor go on a logarithmic axis.
_LOG_FACTOR = 40
_BIN_SECONDS = (1, 10, 60, 300, 600, 3600, 6 * 3600, 86_400)
_BINS_MAX = 800
_DAY = 86_400
_DAYS_SHOWN = 7


def render_decision(decision: Decision, notes: Sequence[str] = ()) -> str:
    """Return the decision as Markdown; `notes` say what was made of its sources."""
    workload, chosen = decision.workload, decision.chosen
    figures = list_profile_figures(decision.profile) | _list_prices(decision)
    break_evens = [describe_break_even(each) for each in decision.break_evens]
    sections = [
        f"# Workload {workload.name}: {chosen.mode}",
        summarize_decision(decision),
        f"**Why:** {chosen.reason}",
        f"**Promised:** {describe_promise(workload)}. {decision.rows:,} rows in {workload.horizon}.",
        "## What else was simulated",
        _render_table(list_alternatives(decision)),
        "## What would change the choice",
        _render_bullets(break_evens or ["Nothing that was tried, within a hundredfold."]),
        "## What it is computed from",
        _render_table([{"": name, "value": value} for name, value in figures.items()]),
    ]
    if notes:
        sections += ["## Notes", _render_bullets(notes)]
    return "\n\n".join(sections) + "\n"


def summarize_decision(decision: Decision) -> str:
    """Return the decision in a sentence or two."""
    chosen, workload = decision.chosen, decision.workload
    cost = f"{format_usd(chosen.usd)} for {workload.horizon} on {_describe_machines(chosen)}"
    return f"{workload.name} is best served by {describe_alternative(chosen)}: {cost}. {_describe_waste(decision)}"


def describe_alternative(alternative: Alternative) -> str:
    """Return mode and policy in words."""
    return f"{alternative.mode}, {_POLICIES[alternative.policy]}"


def _describe_machines(alternative: Alternative) -> str:
    return f"{alternative.machines} x {alternative.machine}"


def _describe_waste(decision: Decision) -> str:
    """Say what an always-on endpoint would cost more."""
    if decision.chosen.policy == "always-on":
        return "That is the always-on endpoint itself: nothing is wasted."
    times = format_waste_factor(decision)
    words = f", {times} times as much" if times else ""
    return f"An endpoint that is always on would cost {format_usd(decision.waste_usd)} more{words}."


def format_waste_factor(decision: Decision) -> str:
    """Return how many times the choice's cost an always-on endpoint costs; nothing where the choice costs nothing."""
    times = decision.waste_factor
    return "" if times is None else f"{times:,.0f}" if times >= 100 else f"{times:.3g}"  # noqa: PLR2004


def describe_promise(workload: Workload) -> str:
    """Say what the consumer was promised."""
    consumer = workload.consumer
    match consumer:
        case Requests():
            return f"{consumer.share_in_time:.4g} of the requests are answered within {consumer.latency_ms:g} ms"
        case Table(once_by=by) if by is not None:
            return f"{consumer.rows:,} rows are scored once, by {by.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
        case Table():
            days = "every day" if consumer.every_days == 1 else f"every {consumer.every_days} days"
            return f"{consumer.rows:,} rows that are there at {consumer.ready} UTC are scored by {consumer.due}, {days}"
        case Events():
            within = format_duration(consumer.within_seconds)
            return f"{consumer.share_in_time:.4g} of the events are scored within {within}"


def list_alternatives(decision: Decision) -> list[dict[str, str]]:
    """Return the best of each mode, policy and instance type as rows, in the decision's order, at most forty."""
    return [_make_row(each, decision) for each in _select_best(decision)[:_ROWS_MAX]]


def _select_best(decision: Decision) -> list[Alternative]:
    """Return the best of each mode, policy and instance type, in order, the chosen one first."""
    best: dict[tuple[str, str, str], Alternative] = {}
    for each in (decision.chosen, *decision.alternatives):
        best.setdefault((each.mode, each.policy, each.machine), each)
    return list(best.values())


def _make_row(each: Alternative, decision: Decision) -> dict[str, str]:
    base = decision.chosen.usd
    times = f" ({each.usd / base:.3g} x)" if base > 0 else ""
    return {
        "mode": each.mode,
        "policy": each.policy,
        "machines": _describe_machines(each),
        "cost": f"{format_usd(each.usd)}{times}",
        "p50": format_duration(each.age_seconds_p50),
        "p99": format_duration(each.age_seconds_p99),
        "late": f"{each.late_share:.2%}",
        "cold starts": f"{each.cold_starts:,}",
        "busy": f"{each.utilisation:.0%}",
        "": "chosen" if each == decision.chosen else "feasible" if each.is_feasible else "infeasible",
        "reason": each.reason,
    }


def list_profile_figures(profile: Profile) -> dict[str, str]:
    """Return the figures of a profile by their names."""
    figures = {
        "model": f"{profile.model}, measured {profile.measured_at:%Y-%m-%d %H:%M} UTC",
        "measured on": profile.machine,
        "a pass of b rows": f"{profile.pass_time.describe()}, {profile.slots} side by side",
        "a batch run": f"{profile.batch_rows_per_second:,.0f} rows/s, begins after {profile.start_seconds:.3g} s",
        "an endpoint": f"first answer after {profile.cold_start_seconds:.3g} s, a request costs "
        f"{profile.request_ms:.3g} ms beside its pass",
    }
    if profile.served is not None:
        together = f"{profile.served.describe('n')} in a slot, give or take {profile.jitter:.0%}"
        figures["n requests together"] = together
    return figures


def _list_prices(decision: Decision) -> dict[str, str]:
    prices = {
        f"an hour of {kind}": f"{format_usd(each.on_demand)} on-demand"
        + (f", {format_usd(each.spot)} spot" if each.spot is not None else "")
        for kind, each in decision.prices.items()
    }
    return prices | {"prices from": decision.price_origin}


def describe_break_even(each: BreakEven) -> str:
    """Say what change of an input would change the choice."""
    return f"{each.input} times {each.factor:.3g}: then {each.to}"


def format_duration(seconds: float) -> str:
    """Return a length of time in its own unit."""
    for unit, size in (("d", 86_400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= 2 * size or (unit == "s" and seconds >= 1):
            return f"{seconds / size:.3g} {unit}"
    return f"{1000 * seconds:.3g} ms"


def _render_table(rows: Sequence[dict[str, str]]) -> str:
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([row[name].replace("|", "\\|") for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _render_bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def draw_decision(decision: Decision, counts_T: NDArray[np.int64] | None, costs: CostCurves) -> bytes:
    """Draw a decision, and return a PNG.

    Args:
        decision: What is drawn.
        counts_T: Arrivals of each second, None for a table.
        costs: What each mode costs by the factor of the traffic.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - matplotlib takes a while to import

    figure = Figure(figsize=(11, 6.4), dpi=120, layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 2.4), width_ratios=(3, 2))
    bars, left, right = (figure.add_subplot(cell) for cell in (grid[0, :], grid[1, 0], grid[1, 1]))
    _draw_bars(bars, decision)
    if isinstance(decision.workload.consumer, Table):
        _draw_tables(left, decision.workload.consumer, decision)
    elif counts_T is not None and len(counts_T):
        _draw_arrivals(left, counts_T)
    _draw_costs(right, decision, costs)
    for axes in (bars, left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return encode_png(figure)


def _draw_bars(axes: Axes, decision: Decision) -> None:
    from matplotlib.patches import Patch  # noqa: PLC0415 - as above

    shown = _select_best(decision)[:_BARS_MAX]
    for at, each in enumerate(shown):
        axes.barh(at, each.usd, color=COLOURS[each.mode], alpha=1.0 if each.is_feasible else 0.25, height=0.7)
        mark = "  chosen" if each == decision.chosen else "" if each.is_feasible else "  breaks the promise"
        axes.annotate(
            f" {format_usd(each.usd)}{mark}",
            (each.usd, at),
            va="center",
            fontsize=8,
            color=_INK if each.is_feasible else _LIMIT,
            fontweight="bold" if each == decision.chosen else "normal",
        )
    labels = [f"{each.mode}, {each.policy}\n{each.machines} x {each.machine}" for each in shown]
    axes.set_yticks(range(len(shown)), labels, fontsize=8)
    axes.invert_yaxis()
    _scale_axis(axes, [each.usd for each in shown])
    axes.xaxis.set_major_formatter("${x:,.4g}")
    axes.set_xlabel(f"US dollars for {decision.workload.horizon}")
    axes.set_title(f"{decision.workload.name}: what each way to serve it costs", loc="left", fontsize=11)
    modes = {each.mode: COLOURS[each.mode] for each in shown}
    handles = [Patch(color=colour, label=mode) for mode, colour in modes.items()]
    axes.legend(handles=handles, loc="upper right", bbox_to_anchor=(1, 1.12), ncols=3, frameon=False, fontsize=8)


def _scale_axis(axes: Axes, costs: Sequence[float]) -> None:
    """Leave space for the figures beside the bars; costs that are far apart go on a logarithmic axis."""
    least, most = min((each for each in costs if each > 0), default=1.0), max(costs, default=0.0) or 1.0
    if most / least < _LOG_FACTOR:
        axes.set_xlim(0, most * 1.2)
        return
    axes.set_xscale("log")
    axes.set_xlim(least / 3, most * (most / least) ** 0.3)


def _draw_arrivals(axes: Axes, counts_T: NDArray[np.int64]) -> None:
    width = next((each for each in _BIN_SECONDS if len(counts_T) <= _BINS_MAX * each), _BIN_SECONDS[-1])
    width = min(width, len(counts_T))
    whole = len(counts_T) // width * width
    rate_B = counts_T[:whole].reshape(-1, width).mean(axis=1)
    unit, seconds = ("days", _DAY) if len(counts_T) > 2 * _DAY else ("hours", 3600)
    at_B = (np.arange(len(rate_B)) + 0.5) * width / seconds
    axes.fill_between(at_B, rate_B, color="#9fb3c8", linewidth=0, step="mid")
    axes.set(xlabel=unit, ylabel="arrivals a second", xlim=(0, len(counts_T) / seconds), ylim=(0, None))
    axes.set_title(f"arrivals, each point an average over {format_duration(width)}", loc="left", fontsize=10)


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


def _draw_costs(axes: Axes, decision: Decision, costs: CostCurves) -> None:
    for mode, points in costs.items():
        if points:
            factors, usd = zip(*points, strict=True)
            axes.plot(factors, usd, "o-", color=COLOURS[mode], markersize=4, label=f"{mode}, its cheapest")
    axes.axvline(1, color=_INK, linestyle=":", linewidth=1)
    axes.plot([1], [decision.chosen.usd], "o", color=_LIMIT, markersize=6, zorder=3, label="chosen")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    spent = [each for points in costs.values() for _, each in points if each > 0] or [1.0]
    if max(spent) / min(spent) < _LOG_FACTOR:
        axes.set_ylim(0, max(*spent, decision.chosen.usd) * 1.5)
    else:
        axes.set_yscale("log")
        axes.margins(y=0.25)
    axes.yaxis.set_major_formatter("${x:,.4g}")
    axes.yaxis.set_minor_formatter("")
    axes.set(xlabel="traffic, times what it is", ylabel="US dollars")
    axes.set_title("with more or less traffic", loc="left", fontsize=10)
    axes.legend(loc="best", frameon=False, fontsize=8)


def publish_decision(decision: Decision, words: str, png: bytes, logger: Logger) -> None:
    """Put a decision among the artifacts: markdown, the alternatives as a table, and the plot."""
    summary = summarize_decision(decision)
    artifacts = [
        make_markdown("mode-decision", words, summary),
        make_table("mode-alternatives", list_alternatives(decision), summary),
        make_image("mode-plot", png, "Costs, arrivals, and other traffic"),
    ]
    put_artifacts(artifacts, logger)


def publish_applied(applied: AppliedDecision, logger: Logger) -> None:
    """Put what was put into effect among the artifacts."""
    put_artifacts([make_markdown("mode-applied", applied.markdown(), applied.summary)], logger)


def publish_review(review: Review, logger: Logger) -> None:
    """Put a review among the artifacts."""
    put_artifacts([make_markdown("mode-review", review.markdown(), review.verdict.reason)], logger)


def emit_mode_changed(decision: Decision, applied: AppliedDecision, mode_before: str | None) -> None:
    """Send the event that a workload is served in another mode than before, or for the first time."""
    payload = {
        "workload": applied.workload,
        "mode": applied.mode,
        "mode_before": mode_before,
        "model": decision.workload.model,
        "summary": applied.summary,
        "retired": list(applied.retired),
        "usd": decision.chosen.usd,
    }
    resource = describe_resource("workload", applied.workload, role=False, mode=applied.mode)
    send_event(MODE_CHANGED, resource, [describe_model_resource(decision.workload.model)], payload)
