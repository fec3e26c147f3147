"""A picture of drift: the columns of a run that have moved most, each beside the baseline's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tasks.batch.column_statistics import ColumnStatistics
from tasks.batch.drift import EVERY_OTHER, VALUES_MAX, ColumnDrift, share_texts
from tasks.common.formatting import encode_png, shorten_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# More plots than these are too small to read.
_PLOTS_MAX, _PLOTS_PER_ROW = 6, 3
_BINS, _TEXTS_MAX, _TITLE_MAX, _LABEL_MAX = 40, 8, 34, 16
# A few values far out would leave one bar of all the others.
_TAIL = 0.002
# The span of a histogram's bins must be a number too.
_NUMBER_MAX = 1e307
_INK, _NOW, _THEN = "#1f2933", "#c2571a", "#9fb3c8"


def draw_drift(drifts: Sequence[ColumnDrift], run: str, baseline: str) -> bytes | None:
    """Draw the columns with the greatest population stability index, the run's values over the baseline's.

    Times are left out, since they always move.

    Args:
        drifts: The columns of a run, as `compare_tables` returns them.
        run: What the run is called.
        baseline: What the baseline is called.

    Returns:
        A PNG, or None where no column can be compared.
    """
    compared = [drift for drift in drifts if not math.isnan(drift.psi.value) and not _is_time(drift)]
    shown = sorted(compared, key=lambda drift: (-drift.psi.value, drift.title))[:_PLOTS_MAX]
    if not shown:
        return None
    from matplotlib.figure import Figure  # noqa: PLC0415 - half a second that a finished run does not need

    columns = min(_PLOTS_PER_ROW, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(max(5.2, 3.6 * columns), 0.7 + 2.5 * lines), dpi=110, layout="constrained")
    grid: Any = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    for axes, drift in zip(grid.flat, shown, strict=False):
        _draw_column(axes, drift)
    handles = grid.flat[0].get_legend_handles_labels()[0]
    titles = [f"baseline: {shorten_label(baseline, _TITLE_MAX)}", f"this run: {shorten_label(run, _TITLE_MAX)}"]
    figure.legend(handles, titles, loc="outside upper left", ncols=2, fontsize=8, frameon=False)
    left_out = len(compared) - len(shown)
    if left_out:
        figure.supxlabel(f"{left_out} more columns have moved less", x=0.01, ha="left", fontsize=8, color=_INK)
    return encode_png(figure)


def _is_time(drift: ColumnDrift) -> bool:
    return drift.current is not None and drift.current.kind == "time"


def _draw_column(axes: Axes, drift: ColumnDrift) -> None:
    now, then = drift.current, drift.baseline
    if now is None or then is None:
        return
    if now.kind == "text" and (now.frequent or then.frequent):
        _draw_texts(axes, now, then)
    elif len(np.union1d(now.quantiles.points, then.quantiles.points)) <= VALUES_MAX:
        _draw_values(axes, now, then)
    else:
        _draw_histogram(axes, now, then)
    ks = "ks of lengths" if now.kind == "text" else "ks"
    title = f"{shorten_label(drift.title, _TITLE_MAX)}\npsi {drift.psi.value:.3g}, {ks} {drift.ks.value:.3g}"
    axes.set_title(title, loc="left", fontsize=9)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_texts(axes: Axes, now: ColumnStatistics, then: ColumnStatistics) -> None:
    """Draw the shares of the most frequent texts, and of all others together."""
    names, before, after = share_texts(now, then)
    order = np.argsort(-(before + after)[:-1], kind="stable")[:_TEXTS_MAX]
    rest = len(names) - 1 - len(order)
    labels = [shorten_label(names[place], _LABEL_MAX) for place in order] + [EVERY_OTHER]
    shares = [np.append(values[order], values.sum() - values[order].sum()) for values in (before, after)]
    if not rest and shares[0][-1] + shares[1][-1] < 1e-9:  # noqa: PLR2004 - nothing but rounding
        labels, shares = labels[:-1], [values[:-1] for values in shares]
    places = np.arange(len(labels))[::-1]
    axes.barh(places + 0.2, 100 * shares[0], height=0.4, color=_THEN, label="baseline")
    axes.barh(places - 0.2, 100 * shares[1], height=0.4, color=_NOW, label="this run")
    axes.set_yticks(places, labels)
    axes.set_xlabel("% of the rows", fontsize=8)


def _draw_values(axes: Axes, now: ColumnStatistics, then: ColumnStatistics) -> None:
    """Draw the share of each value, where there are few."""
    values = np.union1d(now.quantiles.points, then.quantiles.points)
    places = np.arange(len(values))
    for column, shift, color, label in ((then, -0.2, _THEN, "baseline"), (now, 0.2, _NOW, "this run")):
        shares = np.diff(column.quantiles.share_up_to(values), prepend=0.0)
        axes.bar(places + shift, 100 * shares, width=0.4, color=color, label=label)
    step = -(-len(values) // 8)
    axes.set_xticks(places[::step], [f"{value:.4g}" for value in values[::step]])
    axes.set_ylabel("% of the rows", fontsize=8)


def _draw_histogram(axes: Axes, now: ColumnStatistics, then: ColumnStatistics) -> None:
    """Draw densities over the range that nearly all rows of either lie in."""
    sketches = [then.quantiles, now.quantiles]
    low = max(-_NUMBER_MAX, min(sketch.quantile(_TAIL) for sketch in sketches))
    high = min(_NUMBER_MAX, max(sketch.quantile(1 - _TAIL) for sketch in sketches))
    high = high if high > low else low + 1
    edges = np.linspace(low, high, _BINS + 1)
    shares = [100 * np.diff(_interpolate(column, edges)) for column in (then, now)]
    axes.stairs(shares[0], edges, fill=True, color=_THEN, label="baseline")
    axes.stairs(shares[1], edges, color=_NOW, linewidth=1.6, label="this run")
    axes.set_ylabel("% of the rows", fontsize=8)
    if now.kind == "text":
        axes.set_xlabel("characters", fontsize=8)
    ticks = np.linspace(low, high, 4)
    axes.set_xticks(ticks, [f"{value:.4g}" for value in ticks])


def _interpolate(column: ColumnStatistics, edges: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the share of rows up to each edge, on a line between two numbers of the sketch."""
    weights = np.array(column.quantiles.weights)
    middles = (np.cumsum(weights) - weights / 2) / weights.sum()
    return np.asarray(np.interp(edges, column.quantiles.points, middles, left=0.0, right=1.0))
