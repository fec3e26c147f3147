"""When an idle endpoint goes to zero: after a fixed time, or as the idle times it has seen so far say.

What a cold start costs, in seconds of an idle machine, is T*. To stay warm for T* after the last request costs at most
twice what one who knew the next request would pay (as in renting skis); it is cheaper than that on real traffic.

The hybrid histogram of "Serverless in the Wild" (Shahrad et al., ATC 2020), beside it: idle times in bins of a minute,
up to four hours. Where they say enough, the endpoint goes to zero at once, is loaded again before the 5th percentile,
and is kept until the 99th, each with a tenth of margin; else it is kept for the four hours. Its forecast by ARIMA, for
idle times beyond four hours, is left out.

Shapes: R spells of traffic, G = R - 1 gaps between them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_BIN, _BINS = 60, 240
_HEAD, _TAIL, _MARGIN = 0.05, 0.99, 0.10
_CV_MIN, _OUTSIDE_MAX = 2.0, 0.5
_ROUNDS_MAX = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """How long after the traffic before each gap an endpoint is loaded, and for how long it is kept then; in seconds.

    A head of 0: it stays loaded. last: how long it stays after the last traffic.
    """

    head_G: NDArray[np.int64]
    keep_G: NDArray[np.int64]
    last: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Spells:
    """Spells of traffic: seconds in which there is work, each spell from a first to a last."""

    first_R: NDArray[np.int64]
    last_R: NDArray[np.int64]

    @property
    def gaps(self) -> NDArray[np.int64]:
        """Seconds from one spell's last to the next one's first."""
        return self.first_R[1:] - self.last_R[:-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """When an endpoint is loaded, from each start to its stop, and how many of the starts a request waited for."""

    start_S: NDArray[np.int64]
    stop_S: NDArray[np.int64]
    cold_starts: int


def spells(busy_T: NDArray[np.bool_]) -> Spells:
    """Return the spells of seconds in which there is work."""
    edge = np.diff(busy_T.astype(np.int8), prepend=0, append=0)
    return Spells(first_R=np.flatnonzero(edge == 1), last_R=np.flatnonzero(edge == -1) - 1)


def fixed(seconds: int, gaps: int) -> Windows:
    """Return the windows of an endpoint that is kept for so long after each request."""
    return Windows(head_G=np.zeros(gaps, dtype=np.int64), keep_G=np.full(gaps, seconds, dtype=np.int64), last=seconds)


def histogram(found: Spells) -> Windows:
    """Return the windows of the hybrid histogram; each knows the gaps before it."""
    gap_G = found.gaps
    windows = fixed(_BIN * _BINS, len(gap_G))
    # Idle times within a spell are short: they count, and are of no other consequence.
    short_R = found.last_R - found.first_R
    seen, outside = np.zeros(_BINS), 0
    for at, gap in enumerate(gap_G):
        seen[0] += short_R[at]
        windows.head_G[at], windows.keep_G[at] = _window(seen, outside)
        place = int(gap) // _BIN
        if place < _BINS:
            seen[place] += 1
        else:
            outside += 1
    return windows


def _window(seen: NDArray[np.float64], outside: int) -> tuple[int, int]:
    total = float(seen.sum())
    if total == 0 or outside > _OUTSIDE_MAX * (total + outside) or seen.std() < _CV_MIN * seen.mean():
        return 0, _BIN * _BINS
    share = np.cumsum(seen) / total
    head = _BIN * float(np.searchsorted(share, _HEAD))
    tail = _BIN * float(np.searchsorted(share, _TAIL) + 1)
    head *= 1 - _MARGIN
    return int(head), int(tail * (1 + _MARGIN) - head)


def load(found: Spells, windows: Windows, boot: int, seconds: int) -> Loaded:
    """Return when an endpoint is loaded that takes `boot` seconds to start, within so many seconds.

    It is idle once its traffic is over and it has started. A gap within which it still starts is none.
    """
    none = np.zeros(0, dtype=np.int64)
    if not len(found.first_R):
        return Loaded(start_S=none, stop_S=none, cold_starts=0)
    head_G, keep_G, gap_G = windows.head_G, windows.keep_G, found.gaps
    booting_G = np.zeros(len(gap_G), dtype=np.int64)
    for _ in range(_ROUNDS_MAX):
        idle_G = np.maximum(gap_G - booting_G, 0)
        again_G = (head_G > 0) & (idle_G > head_G)
        cold_G = (idle_G > head_G + keep_G) | ((head_G > 0) & (idle_G > 0) & (idle_G <= head_G))
        start_G = np.where(cold_G, found.first_R[1:], np.where(again_G, found.last_R[:-1] + booting_G + head_G, -1))
        begun_R = np.maximum.accumulate(np.concatenate([found.first_R[:1], start_G]))
        before, booting_G = booting_G, np.maximum(begun_R[:-1] + boot - found.last_R[:-1], 0)
        if np.array_equal(before, booting_G):
            break
    end_G = found.last_R[:-1] + 1 + booting_G
    at_once_G = (head_G > 0) & (idle_G > 0)
    late_G = (idle_G > head_G + keep_G) & ((head_G == 0) | again_G)
    last = found.last_R[-1] + 1 + max(int(begun_R[-1]) + boot - int(found.last_R[-1]), 0)
    starts = [found.first_R[:1], found.first_R[1:][cold_G], (end_G + head_G)[again_G]]
    stops = [end_G[at_once_G], (end_G + head_G + keep_G)[late_G], np.array([last + windows.last])]
    # A stop at the second of a start comes before it.
    start_S, stop_S = np.sort(np.concatenate(starts)), np.sort(np.concatenate(stops))
    return Loaded(
        start_S=np.minimum(start_S, seconds),
        stop_S=np.minimum(stop_S, seconds),
        cold_starts=1 + int(cold_G.sum()),
    )


def least(gap_G: NDArray[np.int64], cold_start: float) -> float:
    """Return what one pays who knows the gaps: idle seconds or a cold start for each, and the first cold start."""
    return float(np.minimum(gap_G, cold_start).sum()) + cold_start


def paid(gap_G: NDArray[np.int64], windows: Windows, cold_start: float) -> float:
    """Return what is paid for gaps by the windows, in idle seconds: each start is one cold start's worth."""
    idle_G = np.clip(gap_G - windows.head_G, 0, windows.keep_G)
    late_G = gap_G > windows.head_G + windows.keep_G
    early_G = (windows.head_G > 0) & (gap_G <= windows.head_G)
    again_G = (windows.head_G > 0) & (gap_G > windows.head_G)
    return float(idle_G.sum()) + cold_start * (1 + int(late_G.sum()) + int(early_G.sum()) + int(again_G.sum()))
