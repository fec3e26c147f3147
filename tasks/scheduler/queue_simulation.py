"""Requests over days of traffic: what they wait at model servers whose queues `serving.model.queueing` simulates.

Days of traffic are simulated by the second. Within a second, arrivals are random, and wait what they wait at a server
with that utilisation. Where a second brings more than the machines take, the rest waits in a backlog. A request waits
the longer of the two. Arrivals are shared among machines at random.

Shapes: S servers, L of them at each utilisation, N requests of each; T seconds, B pieces of time, U utilisations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from serving.model.batching import CostModel
from serving.model.queueing import BatchingServer, simulate_servers

UTILISATIONS = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.84, 0.88, 0.91, 0.94, 0.96, 0.98)
_REQUESTS, _WARM_UP = 8000, 1000
_SEED = 17
_DIGITS = 9
# Utilisation is averaged over at least so many requests at the capacity: fewer differ by chance, which the simulated
# waits include already.
_REQUESTS_PER_PIECE = 400
_SECONDS_PER_PIECE_MAX = 600
_QUANTILES = 512
_EPISODE_GAP_SECONDS = 60
_COUNT_MAX = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitTimes:
    """What requests wait at a server, by its utilisation. waits_UN: U utilisations, N sorted waits of each."""

    server: BatchingServer
    waits_UN: NDArray[np.float64]

    def late_shares(self, deadline_seconds: float) -> NDArray[np.float64]:
        """Return the share of requests that wait longer, at each utilisation."""
        return np.asarray((self.waits_UN > deadline_seconds).mean(axis=1))


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyStats:
    """The latency of requests: the share that was late, and the age of half and of 99 of 100 answers, in seconds.

    late_deviation: the standard deviation of how many are late from one replay of such traffic to another.
    """

    late_share: float
    age_p50: float
    age_p99: float
    late_deviation: float = 0.0


def simulate_latency(
    counts_T: NDArray[np.int64],
    machines_T: NDArray[np.int64] | int,
    waits: WaitTimes,
    overhead_seconds: float,
    deadline_seconds: float,
    *,
    with_ages: bool = True,
    cold_seconds: float = 0.0,
) -> LatencyStats:
    """Return the latency of a traffic that machines serve.

    Args:
        counts_T: Requests of each second.
        machines_T: Machines that work in each second, or all the time.
        waits: What requests wait at one machine.
        overhead_seconds: What each request takes beside its pass.
        deadline_seconds: When an answer is late.
        with_ages: Without, only the late requests are counted.
        cold_seconds: What requests wait longer that come while no machine works.
    """
    total = int(counts_T.sum())
    if not total:
        return LatencyStats(late_share=0.0, age_p50=0.0, age_p99=0.0)
    rate = waits.server.requests_per_second
    used_B, count_B, window = _compute_utilisation(counts_T, machines_T, rate)
    late_U = waits.late_shares(deadline_seconds - overhead_seconds)
    # A product by `@` would be OpenBLAS's, whose threads keep every core busy with it and for a while after it.
    late = float((np.interp(used_B, UTILISATIONS, late_U) * count_B).sum())
    behind, delay = _find_backlogged_seconds(counts_T, machines_T, rate, float(waits.waits_UN[-1, 0]), cold_seconds)
    count, used = counts_T[behind], used_B[behind // window] if window else counts_T[behind] / (machines_T * rate)
    # All requests behind a long backlog are late, not only the share that was late already.
    missed = delay + overhead_seconds + waits.waits_UN[0, 0] > deadline_seconds
    late += float((count[missed] * (1 - np.interp(used[missed], UTILISATIONS, late_U))).sum())
    deviation = _estimate_deviation(late, count[missed], behind[missed])
    late_share = min(late / total, 1.0)
    if not with_ages:
        return LatencyStats(late_share=late_share, age_p50=0.0, age_p99=0.0, late_deviation=deviation)
    age_p50, age_p99 = _compute_ages(waits, used_B, count_B, used, count, delay)
    return LatencyStats(
        late_share=late_share,
        age_p50=age_p50 + overhead_seconds,
        age_p99=age_p99 + overhead_seconds,
        late_deviation=deviation,
    )


def _estimate_deviation(late: float, count_D: NDArray[np.int64], second_D: NDArray[np.int64]) -> float:
    """Return the standard deviation of the number of late requests, of which those of D seconds are behind a backlog.

    The others are late one by one. Those behind a backlog are late in episodes of very different sizes, a minute or
    more apart. Where episodes are as random as arrivals, the variance is the sum of their squared sizes (a compound
    Poisson process).
    """
    episode_D = np.cumsum(np.diff(second_D, prepend=second_D[:1]) > _EPISODE_GAP_SECONDS)
    late_E = np.bincount(episode_D, count_D)
    return math.sqrt(max(late - float(late_E.sum()), 0.0) + float(np.square(late_E).sum()))


def _compute_utilisation(
    counts_T: NDArray[np.int64], machines_T: NDArray[np.int64] | int, rate: float
) -> tuple[NDArray[np.float64], NDArray[np.int64], int]:
    """Return the utilisation in pieces of time, the requests of each piece, and the seconds of a piece.

    Where the number of machines never changes, seconds with as many requests are one piece; it has no place in time
    then, and its length is 0.
    """
    most = machines_T if isinstance(machines_T, int) else int(machines_T.max(initial=1))
    window = min(max(1, math.ceil(_REQUESTS_PER_PIECE / (rate * max(most, 1)))), _SECONDS_PER_PIECE_MAX, len(counts_T))
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
    # Without a machine, requests wait for one to start; the backlog counts that.
    used_B = np.divide(count_B, taken_B * rate, out=np.zeros(len(count_B)), where=taken_B > 0)
    return used_B, count_B, window


def _find_backlogged_seconds(
    counts_T: NDArray[np.int64], machines_T: NDArray[np.int64] | int, rate: float, wait_min: float, cold_seconds: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the seconds whose requests wait in a backlog for longer than `wait_min`, and how long."""
    if isinstance(machines_T, int) and counts_T.max() <= machines_T * rate:
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    taken_T = machines_T * rate if isinstance(machines_T, int) else np.asarray(machines_T * rate, dtype=np.float64)
    delay_T = compute_delays(counts_T, taken_T)
    # The waits at a full machine include short delays. Where there is no machine, nothing else includes them.
    none_T = taken_T == 0
    delay_T += np.where(none_T, cold_seconds, 0.0)
    behind = np.flatnonzero((none_T | (delay_T > wait_min)) & (counts_T > 0))
    return behind, delay_T[behind]


def compute_delays(counts_T: NDArray[np.int64], taken_T: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """Return the seconds that the last of each second's requests waits for those before it to be served."""
    left_T = compute_backlog(counts_T, taken_T)
    if isinstance(taken_T, float):
        return left_T / max(taken_T, 1e-12)
    delay_T = np.zeros(len(left_T))
    behind = np.flatnonzero(left_T > 0)
    if len(behind):
        served_T = np.cumsum(taken_T)
        target = served_T[behind] + left_T[behind]
        end = np.searchsorted(served_T, target)
        inside = np.minimum(end, len(served_T) - 1)
        over = (served_T[inside] - target) / np.maximum(taken_T[inside], 1e-12)
        # What is left after the last second is served at the highest rate.
        beyond = (target - served_T[-1]) / max(float(np.max(taken_T)), 1e-12)
        delay_T[behind] = np.where(end < len(served_T), inside - over, len(served_T) - 1 + beyond) - behind
    return np.maximum(delay_T, 0.0)


def compute_backlog(counts_T: NDArray[np.int64], taken_T: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """Return the requests that are left at the end of each second, where `taken_T` can be served in it."""
    net_T = np.cumsum(counts_T - taken_T)
    return net_T - np.minimum(np.minimum.accumulate(net_T), 0.0)


def _weigh_utilisations(used_B: NDArray[np.float64], count_B: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return how many requests came at each utilisation; those between two are divided among them."""
    place_B = np.interp(used_B, UTILISATIONS, np.arange(len(UTILISATIONS)))
    low_B = place_B.astype(np.int64)
    part_B = (place_B - low_B) * count_B
    size = len(UTILISATIONS) + 1
    weight_U = np.bincount(low_B, count_B - part_B, size) + np.bincount(low_B + 1, part_B, size)
    return np.asarray(weight_U[: len(UTILISATIONS)])


def _compute_ages(
    waits: WaitTimes,
    used_B: NDArray[np.float64],
    count_B: NDArray[np.int64],
    used_D: NDArray[np.float64],
    count_D: NDArray[np.int64],
    delay_D: NDArray[np.float64],
) -> tuple[float, float]:
    """Return the age of half and of 99 of 100 answers; D seconds of the pieces B have a backlog."""
    step = max(1, waits.waits_UN.shape[1] // _QUANTILES)
    some_UQ = waits.waits_UN[:, step // 2 :: step]
    levels, quantiles = some_UQ.shape
    weight_UQ = np.repeat(_weigh_utilisations(used_B, count_B)[:, None] / quantiles, quantiles, axis=1)
    behind_D = delay_D + float(waits.waits_UN[0, waits.waits_UN.shape[1] // 2])
    # Who waits less at the server than in the backlog waits as long as the backlog.
    shorter_D = np.zeros(len(behind_D))
    place_D = np.interp(used_D, UTILISATIONS, np.arange(levels))
    for level in np.unique(np.concatenate([np.floor(place_D), np.ceil(place_D)])).astype(np.int64):
        share_D = np.maximum(1 - np.abs(place_D - level), 0) * count_D / quantiles
        shorter_at_D = np.searchsorted(some_UQ[level], behind_D)
        shorter_D += share_D * shorter_at_D
        ending_Q = np.bincount(shorter_at_D, share_D, quantiles + 1)
        weight_UQ[level] -= np.cumsum(ending_Q[::-1])[::-1][1:]
    ages = np.concatenate([some_UQ.ravel(), behind_D])
    return compute_weighted_quantiles(ages, np.concatenate([np.maximum(weight_UQ, 0.0).ravel(), shorter_D]))


def compute_weighted_quantiles(values: NDArray[np.float64], weights: NDArray[np.float64]) -> tuple[float, float]:
    """Return the values below which half and 99 of 100 of the weight lie."""
    order = np.argsort(values)
    share = np.cumsum(weights[order])
    if not len(share) or share[-1] <= 0:
        return 0.0, 0.0
    p50, p99 = np.minimum(np.searchsorted(share, np.array([0.5, 0.99]) * share[-1]), len(order) - 1)
    return float(values[order[p50]]), float(values[order[p99]])


def simulate_waits(servers: Sequence[BatchingServer]) -> list[WaitTimes]:
    """Return what Poisson arrivals wait at servers with the same slots, for each of the utilisations."""
    # Waits are proportional to the time of a pass, so that one simulation serves all speeds.
    unit = servers[0].cost.seconds(1)
    units = _simulate_scaled_waits(tuple(_scale_server(server, 1 / unit) for server in servers))
    return [WaitTimes(server=server, waits_UN=waits_UN * unit) for server, waits_UN in zip(servers, units, strict=True)]


def _scale_server(server: BatchingServer, factor: float) -> BatchingServer:
    """Return a server whose times are multiplied by the factor, and rounded, so that equal ones are simulated once."""
    fixed_seconds, row_seconds, wait_seconds = (
        float(f"{each * factor:.{_DIGITS}g}")
        for each in (server.cost.fixed_seconds, server.cost.row_seconds, server.wait_seconds)
    )
    return replace(
        server, cost=CostModel(fixed_seconds=fixed_seconds, row_seconds=row_seconds), wait_seconds=wait_seconds
    )


@functools.lru_cache(maxsize=16)
def _simulate_scaled_waits(servers: tuple[BatchingServer, ...]) -> NDArray[np.float64]:
    # All have the same random arrivals, so that a higher utilisation always means longer waits.
    gaps_N = np.random.default_rng(_SEED).exponential(size=_REQUESTS)
    rates_SU = np.array([[server.requests_per_second * share for share in UTILISATIONS] for server in servers])
    at_LN = (np.cumsum(gaps_N) / rates_SU[:, :, None]).reshape(-1, _REQUESTS)
    repeated = [server for server in servers for _ in UTILISATIONS]
    shape = len(servers), len(UTILISATIONS), _REQUESTS
    waits_SUN = simulate_servers(repeated, at_LN).reshape(shape)[:, :, _WARM_UP:]
    return np.asarray(np.maximum.accumulate(np.sort(waits_SUN, axis=2), axis=1))
