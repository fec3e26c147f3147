"""Rows through machines over many seconds: where more come than are taken, they pile up.

Within a second, arrivals are spread at random, and what they wait is what they wait at a server that is used that much
(tasks.scheduler.server). Where a second brings more than the machines take, the rest waits in a backlog.
A request waits the longer of the two. Arrivals are shared among machines at random.

Shapes: T seconds, B pieces of time, U utilisations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.scheduler.server import UTILISATIONS, Waits

# How much a server is used is taken over at least so many requests at its capacity: what fewer differ by is chance,
# which its waits know already.
_REQUESTS_SEEN = 400
_SECONDS_SEEN_MAX = 600
_QUANTILES = 512
_APART_SECONDS = 60
_COUNT_MAX = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Felt:
    """What requests felt: the share that was late, and the age of half and of 99 of 100 answers, in seconds.

    episodes: how often they piled up until they were late, a minute or more apart.
    """

    late: float
    age_p50: float
    age_p99: float
    episodes: int = 0


def backlog(counts_T: NDArray[np.int64], taken_T: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """Return the requests that are left over at the end of each second; `taken_T` can be served in it."""
    net_T = np.cumsum(counts_T - taken_T)
    return net_T - np.minimum(np.minimum.accumulate(net_T), 0.0)


def delays(counts_T: NDArray[np.int64], taken_T: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """Return the seconds that the last of each second's requests waits for those before it to be served."""
    left_T = backlog(counts_T, taken_T)
    if isinstance(taken_T, float):
        return left_T / max(taken_T, 1e-12)
    delay_T = np.zeros(len(left_T))
    behind = np.flatnonzero(left_T > 0)
    if len(behind):
        served_T = np.cumsum(taken_T)
        want = served_T[behind] + left_T[behind]
        end = np.searchsorted(served_T, want)
        inside = np.minimum(end, len(served_T) - 1)
        over = (served_T[inside] - want) / np.maximum(taken_T[inside], 1e-12)
        # What is still there at the end is served as fast as ever.
        beyond = (want - served_T[-1]) / max(float(np.max(taken_T)), 1e-12)
        delay_T[behind] = np.where(end < len(served_T), inside - over, len(served_T) - 1 + beyond) - behind
    return np.maximum(delay_T, 0.0)


def feel(
    counts_T: NDArray[np.int64],
    machines_T: NDArray[np.int64] | int,
    waits: Waits,
    beside: float,
    within: float,
    *,
    ages: bool = True,
    cold: float = 0.0,
) -> Felt:
    """Return what requests feel at so many machines at work; `beside` is what each takes beside its pass.

    Without `ages`, only how many are late. `cold`: what those wait longer for whom no machine is at work.
    """
    total = int(counts_T.sum())
    if not total:
        return Felt(late=0.0, age_p50=0.0, age_p99=0.0)
    rate = waits.server.rate
    used_B, count_B, window = _use(counts_T, machines_T, rate)
    late_U = waits.late(within - beside)
    late = float(np.interp(used_B, UTILISATIONS, late_U) @ count_B)
    behind, delay = _behind(counts_T, machines_T, rate, float(waits.waits_UN[-1, 0]), cold)
    count, used = counts_T[behind], used_B[behind // window] if window else counts_T[behind] / (machines_T * rate)
    # Those that pile up for too long are late, all of them, not just the share that was late already.
    gone = delay + beside + waits.waits_UN[0, 0] > within
    late += float(count[gone] @ (1 - np.interp(used[gone], UTILISATIONS, late_U)))
    episodes = int(gone.any()) + int((np.diff(behind[gone]) > _APART_SECONDS).sum())
    if not ages:
        return Felt(late=min(late / total, 1.0), age_p50=0.0, age_p99=0.0, episodes=episodes)
    weight_U = np.maximum(_weights(used_B, count_B) - _weights(used, count), 0.0)
    age_p50, age_p99 = _ages(waits, weight_U, delay, count)
    late = min(late / total, 1.0)
    return Felt(late=late, age_p50=age_p50 + beside, age_p99=age_p99 + beside, episodes=episodes)


def _use(
    counts_T: NDArray[np.int64], machines_T: NDArray[np.int64] | int, rate: float
) -> tuple[NDArray[np.float64], NDArray[np.int64], int]:
    """Return how much machines are used in pieces of time, the requests of each, and the seconds of a piece.

    With the same machines all the time, seconds of as many requests are taken together: a piece has no time then, 0.
    """
    most = machines_T if isinstance(machines_T, int) else int(machines_T.max(initial=1))
    window = min(max(1, math.ceil(_REQUESTS_SEEN / (rate * max(most, 1)))), _SECONDS_SEEN_MAX, len(counts_T))
    starts = np.arange(0, len(counts_T), window)
    count_B = counts_T if window == 1 else np.add.reduceat(counts_T, starts)
    if isinstance(machines_T, int):
        taken = max(machines_T, 1e-9) * rate
        if window > 1:
            return count_B / (taken * np.diff(starts, append=len(counts_T))), count_B, window
        seconds_C = np.bincount(count_B) if count_B.max() < _COUNT_MAX else None
        if seconds_C is None:
            return count_B / taken, count_B, 1
        seen_C = np.flatnonzero(seconds_C)
        return seen_C / taken, seen_C * seconds_C[seen_C], 0
    taken_B = machines_T if window == 1 else np.add.reduceat(machines_T, starts)
    # Where nothing works, what comes waits for a machine, and that is told by what piles up.
    used_B = np.divide(count_B, taken_B * rate, out=np.zeros(len(count_B)), where=taken_B > 0)
    return used_B, count_B, window


def _behind(
    counts_T: NDArray[np.int64], machines_T: NDArray[np.int64] | int, rate: float, least: float, cold: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the seconds whose requests pile up for longer than the least, and how long they wait."""
    if isinstance(machines_T, int) and counts_T.max() <= machines_T * rate:
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    taken_T = machines_T * rate if isinstance(machines_T, int) else np.asarray(machines_T * rate, dtype=np.float64)
    delay_T = delays(counts_T, taken_T)
    # What a machine that is used to the full makes wait is told by its waits; where there is none, nothing else tells.
    none_T = taken_T == 0
    delay_T += np.where(none_T, cold, 0.0)
    behind = np.flatnonzero((none_T | (delay_T > least)) & (counts_T > 0))
    return behind, delay_T[behind]


def _weights(used_B: NDArray[np.float64], count_B: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return how many requests came at each utilisation, those in between shared among their neighbours."""
    place_B = np.interp(used_B, UTILISATIONS, np.arange(len(UTILISATIONS)))
    low_B = place_B.astype(np.int64)
    part_B = (place_B - low_B) * count_B
    size = len(UTILISATIONS) + 1
    weight_U = np.bincount(low_B, count_B - part_B, size) + np.bincount(low_B + 1, part_B, size)
    return np.asarray(weight_U[: len(UTILISATIONS)])


def _ages(
    waits: Waits, weight_U: NDArray[np.float64], delay_B: NDArray[np.float64], count_B: NDArray[np.int64]
) -> tuple[float, float]:
    step = max(1, waits.waits_UN.shape[1] // _QUANTILES)
    some_UQ = waits.waits_UN[:, step // 2 :: step]
    weight_UQ = np.broadcast_to(weight_U[:, None] / some_UQ.shape[1], some_UQ.shape)
    base = float(waits.waits_UN[0, waits.waits_UN.shape[1] // 2])
    ages = np.concatenate([some_UQ.ravel(), delay_B + base])
    return quantiles(ages, np.concatenate([weight_UQ.ravel(), count_B]))


def quantiles(values: NDArray[np.float64], weights: NDArray[np.float64]) -> tuple[float, float]:
    """Return the values below which half and 99 of 100 of the weight lie."""
    order = np.argsort(values)
    share = np.cumsum(weights[order])
    if not len(share) or share[-1] <= 0:
        return 0.0, 0.0
    p50, p99 = np.minimum(np.searchsorted(share, np.array([0.5, 0.99]) * share[-1]), len(order) - 1)
    return float(values[order[p50]]), float(values[order[p99]])
