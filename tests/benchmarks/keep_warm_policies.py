"""Policies of when an idle endpoint goes to zero, and what each costs: a fixed time, a histogram, and the optimum.

The hybrid histogram of "Serverless in the Wild" (Shahrad et al., ATC 2020): idle times in bins of a minute, up to four
hours. Where they say enough, the endpoint goes to zero at once, is loaded again before the 5th percentile, and is kept
until the 99th, each with a tenth of margin; else it is kept for the four hours. Its forecast by ARIMA, for idle times
beyond four hours, is left out.

Shapes: G gaps between spells of traffic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_BIN, _BINS = 60, 240
_HEAD, _TAIL, _MARGIN = 0.05, 0.99, 0.10
_CV_MIN, _OUTSIDE_MAX = 2.0, 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """When an endpoint is loaded after the traffic before each gap, and for how long it is kept then, in seconds.

    A head of 0: it stays loaded.
    """

    head_G: NDArray[np.int64]
    keep_G: NDArray[np.int64]


def fixed_windows(seconds: int, gaps: int) -> Windows:
    """Return the windows of an endpoint that is kept for so long after each request."""
    return Windows(head_G=np.zeros(gaps, dtype=np.int64), keep_G=np.full(gaps, seconds, dtype=np.int64))


def histogram_windows(gap_G: NDArray[np.int64]) -> Windows:
    """Return the windows of the hybrid histogram; each knows only the gaps before it."""
    windows = fixed_windows(_BIN * _BINS, len(gap_G))
    seen, outside = np.zeros(_BINS), 0
    for number, gap in enumerate(gap_G):
        windows.head_G[number], windows.keep_G[number] = _choose_window(seen, outside)
        place = int(gap) // _BIN
        if place < _BINS:
            seen[place] += 1
        else:
            outside += 1
    return windows


def _choose_window(seen: NDArray[np.float64], outside: int) -> tuple[int, int]:
    total = float(seen.sum())
    if total == 0 or outside > _OUTSIDE_MAX * (total + outside) or seen.std() < _CV_MIN * seen.mean():
        return 0, _BIN * _BINS
    share = np.cumsum(seen) / total
    head = _BIN * float(np.searchsorted(share, _HEAD))
    tail = _BIN * float(np.searchsorted(share, _TAIL) + 1)
    head *= 1 - _MARGIN
    return int(head), int(tail * (1 + _MARGIN) - head)


def policy_cost(gap_G: NDArray[np.int64], windows: Windows, cold_start: float) -> float:
    """Return what is paid for gaps by the windows, in idle seconds; each start costs as much as a cold start."""
    idle_G = np.clip(gap_G - windows.head_G, 0, windows.keep_G)
    late_G = gap_G > windows.head_G + windows.keep_G
    early_G = (windows.head_G > 0) & (gap_G <= windows.head_G)
    again_G = (windows.head_G > 0) & (gap_G > windows.head_G)
    return float(idle_G.sum()) + cold_start * (1 + int(late_G.sum()) + int(early_G.sum()) + int(again_G.sum()))


def optimal_cost(gap_G: NDArray[np.int64], cold_start: float) -> float:
    """Return what one pays who knows the gaps: idle seconds or a cold start for each, and the first cold start."""
    return float(np.minimum(gap_G, cold_start).sum()) + cold_start
