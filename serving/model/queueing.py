"""The queue of a batching model server, simulated one event after another.

A server has K slots, each of which runs one forward pass at a time. Requests stand in one queue. When a slot is free, a
pass begins as soon as q requests are there or the first has waited w, and takes up to q of them. k requests take
a + c * k.

Shapes: L servers, N requests of each, K slots, P passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from serving.model.batching import CostModel

_SEED = 17


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchingServer:
    """A model server that collects requests into forward passes.

    cost: what a pass of so many requests takes in a slot. requests_max: q. wait_seconds: w. jitter: the standard
    deviation of the logarithm of a pass's time.
    """

    slots: int
    cost: CostModel
    requests_max: int
    wait_seconds: float = 0.0
    jitter: float = 0.0

    @property
    def requests_per_second(self) -> float:
        """What it takes with all slots at full passes."""
        return self.slots * self.requests_max / self.full_pass_seconds

    @property
    def full_pass_seconds(self) -> float:
        """How long a pass of as many requests as allowed takes."""
        return self.cost.seconds(self.requests_max)


def simulate_servers(servers: Sequence[BatchingServer], at_LN: NDArray[np.float64]) -> NDArray[np.float64]:
    """Simulate independent servers side by side, exactly, one event after another.

    Args:
        servers: They have the same slots.
        at_LN: When the requests of each server come, in order, from 0 on.

    Returns:
        How long each request waits until its pass is over. The random times of passes are drawn once for all servers.
    """
    count, length = at_LN.shape
    lane_L = np.arange(count)
    slots = servers[0].slots
    a_L, c_L, w_L, jitter_L = np.array(
        [(each.cost.fixed_seconds, each.cost.row_seconds, each.wait_seconds, each.jitter) for each in servers]
    ).T
    drawn_N = np.random.default_rng([_SEED, 1]).standard_normal(length + 1) if jitter_L.any() else np.zeros(length + 1)
    q_L = np.array([server.requests_max for server in servers])
    # The arrivals of all servers are one sorted array, far apart, so that one search finds who has come.
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
        end_L = begin_L + (a_L + c_L * count_L) * draw_lognormal(jitter_L, drawn_N[np.minimum(next_L, length)])
        free_LK[lane_L, slot_L] = np.where(count_L > 0, end_L, np.inf)
        taken.append(count_L)
        ends.append(end_L)
        next_L += count_L
    taken_LP, ends_LP = np.array(taken).T, np.array(ends).T
    done_LN = np.repeat(ends_LP.ravel(), taken_LP.ravel()).reshape(count, length)
    return done_LN - at_LN


def draw_lognormal(jitter: NDArray[np.float64] | float, drawn: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return factors with a mean of 1 from standard normal draws; jitter: the standard deviation of their logarithm."""
    return np.asarray(np.exp(jitter * drawn - np.square(jitter) / 2))
