"""A model server that collects requests into forward passes: what each waits, exactly, one event after another.

A server has K slots, each of which runs one pass at a time. Requests stand in one line. When a slot is free, the pass
begins as soon as q requests stand there or the first has waited w, and takes up to q of them; k requests take
a + c * k. Many servers are simulated side by side, each with its own figures, and know nothing of each other.

Shapes: L servers, N requests of each, K slots.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

UTILISATIONS = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.84, 0.88, 0.91, 0.94, 0.96, 0.98)
_REQUESTS, _WARM_UP = 8000, 1000
_SEED = 17
_DIGITS = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """The figures of a server. pass_time: a. request_time: c. requests_max: q. wait: w. All times in seconds.

    jitter: the standard deviation of the logarithm of what a pass takes over its mean.
    """

    slots: int
    pass_time: float
    request_time: float
    requests_max: int
    wait: float = 0.0
    jitter: float = 0.0

    @property
    def rate(self) -> float:
        """Requests a second that it takes with all slots at full passes."""
        return self.slots * self.requests_max / self.time(self.requests_max)

    def time(self, requests: int) -> float:
        """Return how long a pass of so many requests takes."""
        return self.pass_time + self.request_time * requests


@dataclass(frozen=True, slots=True, kw_only=True)
class Waits:
    """What requests wait at a server, by how much it is used. waits_UN: U utilisations, N sorted waits of each."""

    server: Server
    waits_UN: NDArray[np.float64]

    def late(self, within: float) -> NDArray[np.float64]:
        """Return the share of requests that wait longer, at each utilisation."""
        return np.asarray((self.waits_UN > within).mean(axis=1))


def measure_waits(servers: Sequence[Server]) -> list[Waits]:
    """Return what Poisson arrivals wait at servers that have the same slots, for each of the utilisations."""
    # What is twice as slow waits twice as long: servers of all speeds are one.
    unit = servers[0].time(1)
    units = _measure(tuple(_scaled(server, 1 / unit) for server in servers))
    return [Waits(server=server, waits_UN=waits_UN * unit) for server, waits_UN in zip(servers, units, strict=True)]


def _scaled(server: Server, by: float) -> Server:
    pass_time, request_time, wait = (
        float(f"{each * by:.{_DIGITS}g}") for each in (server.pass_time, server.request_time, server.wait)
    )
    return replace(server, pass_time=pass_time, request_time=request_time, wait=wait)


@functools.lru_cache(maxsize=16)
def _measure(servers: tuple[Server, ...]) -> NDArray[np.float64]:
    # All see the same chance, so that what is used more makes its requests wait longer.
    gaps_N = np.random.default_rng(_SEED).exponential(size=_REQUESTS)
    rates_SU = np.array([[server.rate * share for share in UTILISATIONS] for server in servers])
    at_LN = (np.cumsum(gaps_N) / rates_SU[:, :, None]).reshape(-1, _REQUESTS)
    repeated = [server for server in servers for _ in UTILISATIONS]
    waits_SUN = serve(repeated, at_LN).reshape(len(servers), len(UTILISATIONS), _REQUESTS)[:, :, _WARM_UP:]
    return np.asarray(np.maximum.accumulate(np.sort(waits_SUN, axis=2), axis=1))


def lognormal(jitter: NDArray[np.float64] | float, drawn: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return factors with a mean of 1, and that standard deviation of their logarithm, for standard normal draws."""
    return np.asarray(np.exp(jitter * drawn - np.square(jitter) / 2))


def serve(servers: Sequence[Server], at_LN: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how long each request waits until its pass is over. at_LN: when they come, in order, from 0 on.

    What passes differ by is drawn once for all servers, by the first request of each.
    """
    count, length = at_LN.shape
    lane_L = np.arange(count)
    slots = servers[0].slots
    a_L, c_L, w_L, jitter_L = (
        np.array([getattr(server, name) for server in servers])
        for name in ("pass_time", "request_time", "wait", "jitter")
    )
    drawn_N = np.random.default_rng([_SEED, 1]).standard_normal(length + 1) if jitter_L.any() else np.zeros(length + 1)
    q_L = np.array([server.requests_max for server in servers])
    # One line of all, each server's far from the next one's, finds who has come with one search.
    shift_L = lane_L * (2 * float(at_LN[:, -1].max()) + 2 * float(w_L.max()) + 1)
    flat = (at_LN + shift_L[:, None]).ravel()
    padded_LN = np.concatenate([at_LN, np.full((count, 1), np.inf)], axis=1)
    free_LK = np.zeros((count, slots))
    next_L = np.zeros(count, dtype=np.int64)
    taken, ends = [], []
    while (next_L < length).any():
        slot_L = free_LK.argmin(axis=1)
        first_L = padded_LN[lane_L, next_L]
        full_L = padded_LN[lane_L, np.minimum(next_L + q_L - 1, length)]
        begin_L = np.maximum(free_LK[lane_L, slot_L], np.minimum(first_L + w_L, full_L))
        sought_L = np.minimum(begin_L, at_LN[:, -1]) + shift_L
        come_L = np.searchsorted(flat, sought_L, side="right") - lane_L * length - next_L
        count_L = np.where(next_L < length, np.clip(come_L, 1, q_L), 0)
        end_L = begin_L + (a_L + c_L * count_L) * lognormal(jitter_L, drawn_N[np.minimum(next_L, length)])
        free_LK[lane_L, slot_L] = np.where(count_L > 0, end_L, np.inf)
        taken.append(count_L)
        ends.append(end_L)
        next_L += count_L
    taken_LP, ends_LP = np.array(taken).T, np.array(ends).T
    done_LN = np.repeat(ends_LP.ravel(), taken_LP.ravel()).reshape(count, length)
    return done_LN - at_LN
