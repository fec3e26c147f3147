"""Endpoints and streams under requests or events: what one machine takes, always-on machines, and a scaler.

Batches are as large as the promise allows on one machine, and a pass begins as soon as a slot is free. Only a stream
lets its rows wait for others.

Shapes: T seconds, I intervals of the scaler.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from numpy.typing import NDArray

from serving.model.batching import BATCH_ROWS_MAX, BatchingConfig, CostModel
from serving.model.queueing import BatchingServer
from tasks.scheduler.queue_simulation import (
    UTILISATIONS,
    LatencyStats,
    WaitTimes,
    simulate_latency,
    simulate_waits,
)
from tasks.scheduler.scenario import Candidate, InstanceType, Scenario, find_late_violation, rank_candidate

if TYPE_CHECKING:
    from tasks.scheduler.decision import Policy, Profile

# How often a scaler looks at the load, and for how long it must have been lower before machines go.
SCALE_INTERVAL_SECONDS = 15
SCALE_DOWN_SECONDS = 300
TARGETS = tuple(share / 100 for share in range(96, 18, -2))
# Rows of a stream wait for others this share of the time that they have, at most, and never longer than a second.
_WAIT_SHARE, _WAIT_SECONDS_MAX = 0.1, 1.0
# Of the requests by which a deployed endpoint is held against its budget, so many must be in time.
_CHECKED_SHARE = 0.99
STREAM_GIVES_NO_ANSWER = "a stream gives no answer to one who waits for it"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingCapacity:
    """A batching on an instance type: what requests wait there, and what each takes beside its pass."""

    batching: BatchingConfig
    waits: WaitTimes
    overhead_seconds: float

    def find_violation(self, scenario: Scenario) -> str | None:
        """Say why this batching can't keep the promise even without traffic; None where it can."""
        pass_seconds = self.waits.server.full_pass_seconds
        needed = self.waits.server.wait_seconds + 2 * pass_seconds + self.overhead_seconds
        if needed <= scenario.deadline_seconds:
            return None
        return (
            f"a pass takes {1000 * pass_seconds:.3g} ms, and a request may come behind another: at"
            f" least {1000 * needed:.3g} ms must be allowed"
        )

    def requests_per_second_max(self, scenario: Scenario) -> float:
        """Return what a machine takes within the promise."""
        late_U = self.waits.late_shares(scenario.deadline_seconds - self.overhead_seconds) > scenario.late_share_max
        good = int(np.argmax(late_U)) if late_U.any() else len(late_U)
        return 0.0 if good == 0 else UTILISATIONS[good - 1] * self.waits.server.requests_per_second

    def requests_per_second_checked_max(self, scenario: Scenario) -> float:
        """Return what a machine takes where 99 of 100 must be in time, as an endpoint is checked, or more of them."""
        share = max(scenario.share_in_time, _CHECKED_SHARE)
        return self.requests_per_second_max(replace(scenario, share_in_time=share))


def list_serving_capacities(
    scenario: Scenario, instance_type: InstanceType, batch_sizes: Iterable[int] | None = None
) -> list[ServingCapacity]:
    """Return the batchings that an endpoint may have on an instance type, the one that takes most first."""
    profile, rows, speed = scenario.profile, scenario.rows_per_arrival, instance_type.speed
    cost, overhead_seconds = split_serving_cost(profile, rows)
    cost = CostModel(fixed_seconds=cost.fixed_seconds / speed, row_seconds=cost.row_seconds / speed)
    smallest = math.ceil(rows)
    largest = max(BATCH_ROWS_MAX, smallest)
    steps = (round(smallest * 2 ** (step / 2)) for step in range(21))
    sizes = sorted(set(batch_sizes or (size for size in steps if size <= largest)))
    servers = [
        BatchingServer(
            slots=profile.slots,
            cost=cost,
            requests_max=max(1, int(size / rows)),
            jitter=profile.jitter,
        )
        for size in sizes
        if size >= smallest
    ]
    waits = simulate_waits(servers)
    usable = [
        each for each in waits if 2 * each.server.full_pass_seconds + overhead_seconds <= scenario.deadline_seconds
    ]
    capacities = [
        ServingCapacity(
            batching=BatchingConfig(batch_size_max=max(smallest, math.ceil(each.server.requests_max * rows))),
            waits=each,
            overhead_seconds=overhead_seconds,
        )
        for each in usable or waits[:1]
    ]
    return sorted(capacities, key=lambda capacity: capacity.requests_per_second_max(scenario), reverse=True)


def split_serving_cost(profile: Profile, rows: float) -> tuple[CostModel, float]:
    """Return what n requests of so many rows take together in a slot, and the seconds that each takes beside that.

    Where a model server was measured, its figures count; its requests had one row. Else the cost is that of passes,
    and what keeps a slot busy beside them.
    """
    passes = profile.pass_time
    if profile.served is not None:
        served = profile.served
        overhead_seconds = profile.request_ms / 1000 + passes.seconds(1) - served.seconds(1)
        row_seconds = served.row_seconds + passes.row_seconds * (rows - 1)
        cost = CostModel(fixed_seconds=served.fixed_seconds, row_seconds=row_seconds)
    else:
        overhead_seconds = (profile.request_ms - profile.busy_ms) / 1000
        row_seconds = passes.row_seconds * rows + profile.busy_ms / 1000
        cost = CostModel(fixed_seconds=passes.fixed_seconds, row_seconds=row_seconds)
    return cost, max(overhead_seconds, 0.0)


def simulate_capacity(
    scenario: Scenario,
    capacity: ServingCapacity,
    machines: NDArray[np.int64] | int,
    *,
    cold_seconds: float = 0.0,
) -> LatencyStats:
    """Return the latency of a scenario's requests at so many machines, in each second or all the time."""
    return simulate_latency(
        scenario.counts_T,
        machines,
        capacity.waits,
        capacity.overhead_seconds,
        scenario.deadline_seconds,
        with_ages=not scenario.is_coarse,
        cold_seconds=cold_seconds,
    )


def make_online_candidate(
    scenario: Scenario,
    capacity: ServingCapacity,
    policy: Policy,
    machines: int,
    seconds: float,
    latency: LatencyStats,
    *,
    cold_starts: int = 0,
) -> Candidate:
    """Return an endpoint that pays for so many machine seconds."""
    server = capacity.waits.server
    work = float(scenario.counts_T.sum()) * server.full_pass_seconds / server.requests_max / server.slots
    late_violation = find_late_violation(scenario, latency.late_share, deviation=latency.late_deviation)
    return Candidate(
        mode="online",
        policy=policy,
        machines=machines,
        batching=capacity.batching,
        carried_per_second=machines * capacity.requests_per_second_checked_max(scenario),
        paid_seconds=seconds,
        busy_seconds=min(work, seconds),
        age_p50=latency.age_p50,
        age_p99=latency.age_p99,
        late_share=latency.late_share,
        cold_starts=cold_starts,
        violation=capacity.find_violation(scenario) or late_violation,
    )


def simulate_always_on(scenario: Scenario, capacity: ServingCapacity) -> Candidate:
    """Return the fewest machines that keep the promise all the time, else as many as are allowed."""
    tried: dict[int, LatencyStats] = {}

    def keeps_promise(machines: int) -> bool:
        tried[machines] = latency = simulate_capacity(scenario, capacity, machines)
        return find_late_violation(scenario, latency.late_share, deviation=latency.late_deviation) is None

    least = max(1, math.ceil(scenario.counts_T.mean() / capacity.waits.server.requests_per_second))
    allowed = range(min(least, scenario.machines_max), scenario.machines_max)
    machines = allowed.start + bisect_left(allowed, 1, key=keeps_promise)
    latency = tried.get(machines) or simulate_capacity(scenario, capacity, machines)
    return make_online_candidate(scenario, capacity, "always-on", machines, machines * scenario.seconds, latency)


def choose_autoscaler(scenario: Scenario, capacity: ServingCapacity, always_on: Candidate) -> Candidate:
    """Return the cheapest scaler that keeps the promise, by its target utilisation and its fewest machines."""
    most = max(1, always_on.machines)
    minimums = (
        {1, most // 2 or 1}
        if scenario.is_coarse
        else {1, *(1 << power for power in range(1, 10) if 1 << power < most), max(1, most - 1)}
    )
    best: Candidate | None = None
    for machines_min in sorted(minimums):
        paid_I, _ = scale_machines(scenario, capacity, machines_min, TARGETS[0])
        paid_min = float(paid_I.sum()) * SCALE_INTERVAL_SECONDS
        feasible = [each for each in (best, always_on) if each is not None and each.violation is None]
        if best is not None and any(paid_min >= each.paid_seconds for each in feasible):
            break
        found = search_autoscalers(scenario, capacity, machines_min, feasible)
        best = min(filter(None, (best, *found)), key=rank_candidate)
    assert best is not None  # noqa: S101 - the first minimum is always tried
    return best


def search_autoscalers(
    scenario: Scenario, capacity: ServingCapacity, machines_min: int, feasible: Sequence[Candidate] = ()
) -> Iterator[Candidate]:
    """Yield the scaler with the highest target that keeps the promise, and those that were tried before it.

    The search ends where a broken promise costs no less than a candidate in `feasible`.
    """
    targets = TARGETS[::4] if scenario.is_coarse else TARGETS
    low, high = 0, len(targets) - 1
    while low <= high:
        middle = (low + high) // 2
        candidate = simulate_autoscaler(scenario, capacity, machines_min, targets[middle])
        yield candidate
        low, high = (low, middle - 1) if candidate.violation is None else (middle + 1, high)
        if candidate.violation is not None and any(candidate.paid_seconds >= each.paid_seconds for each in feasible):
            break


def simulate_autoscaler(
    scenario: Scenario, capacity: ServingCapacity, machines_min: int, target_utilisation: float
) -> Candidate:
    """Return a scaler: it starts machines for the load of the last interval over the target, and they take a while."""
    paid_I, ready_I = scale_machines(scenario, capacity, machines_min, target_utilisation)
    machines_T = np.repeat(ready_I, SCALE_INTERVAL_SECONDS)[: len(scenario.counts_T)]
    latency = simulate_capacity(scenario, capacity, machines_T)
    paid_seconds = float(paid_I.sum()) * SCALE_INTERVAL_SECONDS
    seconds = paid_seconds * scenario.seconds / (len(paid_I) * SCALE_INTERVAL_SECONDS)
    candidate = make_online_candidate(scenario, capacity, "autoscaled", int(paid_I.max()), seconds, latency)
    aimed_at = target_utilisation * capacity.waits.server.requests_per_second
    return replace(
        candidate,
        machines_min=machines_min,
        target_utilisation=target_utilisation,
        # Under more than it aims at, the scaler has more machines than the fewest.
        carried_per_second=machines_min * min(aimed_at, capacity.requests_per_second_checked_max(scenario)),
    )


def scale_machines(
    scenario: Scenario, capacity: ServingCapacity, machines_min: int, target_utilisation: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the machines that are paid for, and those that work, in each interval of the scaler."""
    starts = np.arange(0, len(scenario.counts_T), SCALE_INTERVAL_SECONDS)
    load_I = np.add.reduceat(scenario.counts_T, starts) / SCALE_INTERVAL_SECONDS
    needed_I = np.ceil(load_I / (target_utilisation * capacity.waits.server.requests_per_second))
    needed_I = np.clip(needed_I, machines_min, scenario.machines_max)
    needed_I = np.concatenate([needed_I[:1], needed_I[:-1]])
    boot = math.ceil(scenario.profile.cold_start_seconds / SCALE_INTERVAL_SECONDS)
    down = SCALE_DOWN_SECONDS // SCALE_INTERVAL_SECONDS
    paid = pl.Series(needed_I).rolling_max(down + 1, min_samples=1)
    ready = paid.rolling_min(boot + 1, min_samples=1) if boot else paid
    return paid.to_numpy().astype(np.int64), ready.to_numpy().astype(np.int64)


def simulate_stream(scenario: Scenario, instance_type: InstanceType) -> Candidate:
    """Return the fewest machines on which micro-batches keep the promise all the time."""
    always_on = simulate_always_on(scenario, plan_stream_capacity(scenario, instance_type))
    candidate = replace(always_on, mode="streaming", policy="micro-batches")
    return replace(candidate, violation=STREAM_GIVES_NO_ANSWER) if scenario.consumer == "requests" else candidate


def plan_stream_capacity(scenario: Scenario, instance_type: InstanceType) -> ServingCapacity:
    """Return the batching of a stream: rows of a pass, and how long they wait for each other.

    A row costs what it costs in a pass, and no less than what was measured from broker to broker.
    """
    profile = scenario.profile
    measured = profile.stream_rows_per_second or profile.batch_rows_per_second
    row_seconds = max(profile.pass_time.row_seconds, profile.slots / measured) / instance_type.speed
    wait_seconds = 0.0 if scenario.is_coarse else min(_WAIT_SECONDS_MAX, _WAIT_SHARE * scenario.deadline_seconds)
    cost = CostModel(
        fixed_seconds=profile.pass_time.fixed_seconds / instance_type.speed,
        row_seconds=row_seconds,
    )
    # The most rows, in powers of two, of which two passes fit into the time that is left.
    rows = BATCH_ROWS_MAX
    while rows > 1 and wait_seconds + 2 * cost.seconds(rows) > scenario.deadline_seconds:
        rows //= 2
    server = BatchingServer(
        slots=profile.slots,
        cost=cost.model_copy(update={"row_seconds": row_seconds * scenario.rows_per_arrival}),
        requests_max=max(1, int(rows / scenario.rows_per_arrival)),
        wait_seconds=wait_seconds,
    )
    batching = BatchingConfig(batch_size_max=rows, wait_ms_max=1000 * wait_seconds)
    return ServingCapacity(batching=batching, waits=simulate_waits([server])[0], overhead_seconds=0.0)
