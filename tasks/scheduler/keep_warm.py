"""An endpoint that goes to zero when no request has come for some time, and is loaded by the next one.

What a cold start costs, in seconds of an idle machine, is T*. To stay warm for T* after the last request costs at most
twice what an optimum with knowledge of the future would pay (the ski rental problem), and less than that on real
traffic.

Shapes: T seconds, R spells of traffic, G = R - 1 gaps between them, S starts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tasks.scheduler.queue_simulation import compute_backlog
from tasks.scheduler.scenario import Candidate, Scenario, rank_candidate
from tasks.scheduler.simulate_online import ServingCapacity, make_online_candidate, simulate_capacity

if TYPE_CHECKING:
    from tasks.scheduler.decision import Policy

TEN_MINUTES = 600
_KEEPS = tuple(2.0 ** (power / 2) for power in range(-8, 25))
_TRIED_MAX = 6
_ROUNDS_MAX = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficSpells:
    """Spells of traffic: seconds in which there is work, each spell from a first to a last."""

    first_R: NDArray[np.int64]
    last_R: NDArray[np.int64]

    @property
    def gaps(self) -> NDArray[np.int64]:
        """Seconds from one spell's last to the next one's first."""
        return self.first_R[1:] - self.last_R[:-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedPeriods:
    """When an endpoint is loaded, from each start to its stop. Every start makes a request wait."""

    start_S: NDArray[np.int64]
    stop_S: NDArray[np.int64]

    @property
    def cold_starts(self) -> int:
        """How often a request waited for a start."""
        return len(self.start_S)


def choose_keep_warm(scenario: Scenario, capacity: ServingCapacity, machines: int) -> Candidate:
    """Return the cheapest keep-warm time that keeps the promise, else T*."""
    spells, boot = find_traffic_spells(scenario, capacity, machines), scenario.profile.cold_start_seconds
    gap_G = np.sort(spells.gaps)
    below_G = np.concatenate([[0.0], np.cumsum(gap_G)])
    total = max(int(scenario.counts_T.sum()), 1)
    costs: dict[int, float] = {}
    for keep in {TEN_MINUTES, *(math.ceil(boot * times) for times in _KEEPS)}:
        at = int(np.searchsorted(gap_G, keep, side="right"))
        cold = len(gap_G) - at
        if boot > scenario.deadline_seconds and (cold + 1) / total > scenario.late_share_max:
            continue
        costs[keep] = float(below_G[at]) + cold * (keep + boot) + keep
    best = simulate_keep_warm(scenario, capacity, machines, spells, math.ceil(boot))
    for keep in sorted(costs, key=lambda keep: (costs[keep], keep))[: 2 if scenario.is_coarse else _TRIED_MAX]:
        candidate = simulate_keep_warm(scenario, capacity, machines, spells, keep)
        if candidate.violation is None:
            return min(candidate, best, key=rank_candidate)
    return best


def simulate_ten_minutes(scenario: Scenario, capacity: ServingCapacity, machines: int) -> Candidate:
    """Return an endpoint that is kept warm for ten minutes, as is usual."""
    spells = find_traffic_spells(scenario, capacity, machines)
    return simulate_keep_warm(scenario, capacity, machines, spells, TEN_MINUTES, "keep-warm-10-minutes")


def find_traffic_spells(scenario: Scenario, capacity: ServingCapacity, machines: int) -> TrafficSpells:
    """Return the spells in which so many machines have work."""
    busy_T, rate = scenario.counts_T > 0, capacity.waits.server.requests_per_second * machines
    if scenario.counts_T.max(initial=0) > rate:
        busy_T |= compute_backlog(scenario.counts_T, float(rate)) > 0
    return split_spells(busy_T)


def split_spells(busy_T: NDArray[np.bool_]) -> TrafficSpells:
    """Return the spells of seconds in which there is work."""
    edge = np.diff(busy_T.astype(np.int8), prepend=0, append=0)
    return TrafficSpells(first_R=np.flatnonzero(edge == 1), last_R=np.flatnonzero(edge == -1) - 1)


def simulate_keep_warm(
    scenario: Scenario,
    capacity: ServingCapacity,
    machines: int,
    spells: TrafficSpells,
    keep_seconds: int,
    policy: Policy = "keep-warm",
) -> Candidate:
    """Return an endpoint that goes to zero when nothing has come for so many seconds."""
    length = len(scenario.counts_T)
    boot = math.ceil(scenario.profile.cold_start_seconds)
    # A start begins with its request, somewhere within a second, not at the end of that second; and that request does
    # not wait for another one to be served.
    cold_seconds = 1 - (boot - scenario.profile.cold_start_seconds)
    cold_seconds -= 1 / (capacity.waits.server.requests_per_second * machines)
    loaded = simulate_loading(spells, keep_seconds, boot, length)
    change_T = np.zeros(length + 1, dtype=np.int64)
    ready_S = np.minimum(np.minimum(loaded.start_S + boot, loaded.stop_S), length)
    np.add.at(change_T, ready_S, machines)
    np.add.at(change_T, loaded.stop_S, -machines)
    latency = simulate_capacity(scenario, capacity, np.cumsum(change_T)[:length], cold_seconds=cold_seconds)
    seconds = float((loaded.stop_S - loaded.start_S).sum()) * machines
    used = machines if len(loaded.start_S) else 0
    candidate = make_online_candidate(
        scenario, capacity, policy, used, seconds, latency, cold_starts=loaded.cold_starts
    )
    return replace(candidate, keep_warm_seconds=float(keep_seconds))


def simulate_loading(spells: TrafficSpells, keep_seconds: int, boot_seconds: int, seconds: int) -> LoadedPeriods:
    """Return when an endpoint is loaded that is kept for so long after each request.

    It is idle once its traffic is over and it has started. A gap within which it still starts is none.

    Args:
        spells: Its traffic.
        keep_seconds: How long it stays loaded without a request.
        boot_seconds: How long it takes to start.
        seconds: The end of the simulation.
    """
    if not len(spells.first_R):
        none = np.zeros(0, dtype=np.int64)
        return LoadedPeriods(start_S=none, stop_S=none)
    gap_G = spells.gaps
    booting_G = np.zeros(len(gap_G), dtype=np.int64)
    for _ in range(_ROUNDS_MAX):
        cold_G = np.maximum(gap_G - booting_G, 0) > keep_seconds
        start_G = np.where(cold_G, spells.first_R[1:], -1)
        begun_R = np.maximum.accumulate(np.concatenate([spells.first_R[:1], start_G]))
        before, booting_G = booting_G, np.maximum(begun_R[:-1] + boot_seconds - spells.last_R[:-1], 0)
        if np.array_equal(before, booting_G):
            break
    end_G = spells.last_R[:-1] + 1 + booting_G
    last = spells.last_R[-1] + 1 + max(int(begun_R[-1]) + boot_seconds - int(spells.last_R[-1]), 0)
    start_S = np.concatenate([spells.first_R[:1], spells.first_R[1:][cold_G]])
    stop_S = np.concatenate([(end_G + keep_seconds)[cold_G], [last + keep_seconds]])
    return LoadedPeriods(start_S=np.minimum(start_S, seconds), stop_S=np.minimum(stop_S, seconds))
