"""The plot of what jobs cost under each policy.

Shapes: J jobs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

mpl.use("Agg")
from matplotlib import pyplot as plt

MARKS = {"greedy": ("v", "tab:red"), "uniform progress": ("s", "tab:orange"), "ours": ("o", "tab:blue")}
MARKS |= {"optimum": ("_", "black")}


def draw(
    panels: Mapping[str, Mapping[str, NDArray[np.float64]]], labels: Sequence[str], group: int, path: Path
) -> Path:
    """Draw a panel for each title, a place for each job, a mark for each policy; rule off groups of jobs."""
    figure, axes = plt.subplots(len(panels), 1, figsize=(13, 9.5), sharey=True, layout="constrained")
    at_J = np.arange(len(labels))
    for axis, (title, costs) in zip(axes, panels.items(), strict=True):
        for place, (name, (mark, colour)) in enumerate(MARKS.items()):
            # Side by side, so that no mark hides another; the least is a line across the job's place.
            beside, size = (0.0, 26) if name == "optimum" else (0.2 * (place - 1), 7)
            axis.plot(
                at_J + beside,
                costs[name],
                mark,
                color=colour,
                label=name,
                markersize=size,
                markeredgewidth=1.5,
                zorder=3,
            )
        axis.set_xticks(at_J, labels, fontsize=8)
        axis.set_xlim(-0.5, len(at_J) - 0.5)
        for edge in range(group, len(at_J), group):
            axis.axvline(edge - 0.5, color="lightgrey", linewidth=1)
        axis.set_ylabel("mean cost over on-demand")
        axis.set_title(title, fontsize=10)
        axis.grid(axis="y", alpha=0.3)
    axes[-1].set_xlabel("hours of work in hours to the deadline; d: changeover in hours")
    marks, names = axes[0].get_legend_handles_labels()
    legend = figure.legend(marks, names, loc="outside upper center", ncols=len(MARKS))
    for mark in legend.legend_handles:
        mark.set_markersize(9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
