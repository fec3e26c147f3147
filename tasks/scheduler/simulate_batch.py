"""Batch runs: of what has come since the last run, or of a table that is needed by a time; on-demand or on spot.

A table may also be scored through servers that wait for it all day.

Shapes: T seconds, P periods.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from serving.model.batching import BATCH_ROWS_MAX, BatchingConfig
from tasks.common.formatting import in_words
from tasks.scheduler.keep_warm import TEN_MINUTES
from tasks.scheduler.queue_simulation import compute_weighted_quantiles
from tasks.scheduler.scenario import Candidate, InstanceType, Scenario, find_late_violation, rank_candidate
from tasks.scheduler.spot_simulation import simulate_spot_run

if TYPE_CHECKING:
    from tasks.scheduler.decision import Mode, Policy

# Prefect's schedules are too coarse for less.
PERIOD_SECONDS_MIN = 60
BATCH_GIVES_NO_ANSWER = "a batch run gives no answer to one who waits for it"
_STEP = 0.8
_MACHINE_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_SPOT_PERIOD_SHARES = (0.3, 0.5, 0.7, 0.85)
_SPOT_MACHINE_FACTORS = (1.0, 1.15, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class CumulativeArrivals:
    """Arrivals, summed up once, and the rows a second of a machine. sum_T: those before each second, and all."""

    scenario: Scenario
    rows_per_second: float
    sum_T: NDArray[np.int64]

    @classmethod
    def from_scenario(cls, scenario: Scenario, instance_type: InstanceType) -> CumulativeArrivals:
        """Return the arrivals of a scenario, for machines of an instance type."""
        return cls(
            scenario=scenario,
            rows_per_second=scenario.profile.batch_rows_per_second * instance_type.speed,
            sum_T=np.concatenate([[0], np.cumsum(scenario.counts_T)]),
        )

    def count_rows(self, period: int) -> NDArray[np.float64]:
        """Return the rows of each period."""
        ends = np.minimum(np.arange(0, len(self.sum_T) - 1 + period, period), len(self.sum_T) - 1)
        return np.diff(self.sum_T[ends]) * self.scenario.rows_per_arrival


def choose_batch_runs(scenario: Scenario, instance_type: InstanceType) -> Candidate:
    """Return runs on on-demand machines: the longest period that keeps the promise, on the cheapest number of them."""
    arrivals = CumulativeArrivals.from_scenario(scenario, instance_type)
    if scenario.consumer == "requests":
        candidate = simulate_batch_runs(arrivals, 1, PERIOD_SECONDS_MIN, with_ages=True)
        return replace(candidate, violation=BATCH_GIVES_NO_ANSWER)
    best: Candidate | None = None
    for machines in [count for count in _MACHINE_COUNTS if count <= scenario.machines_max]:
        if best is not None and best.violation is None and _bound_paid_seconds(arrivals, machines) >= best.paid_seconds:
            break
        candidate = find_longest_period(arrivals, machines)
        best = candidate if best is None else min(best, candidate, key=rank_candidate)
    assert best is not None  # noqa: S101 - one machine is always allowed
    period = int(best.period_seconds or PERIOD_SECONDS_MIN)
    return simulate_batch_runs(arrivals, best.machines, period, with_ages=True)


def _bound_paid_seconds(arrivals: CumulativeArrivals, machines: int) -> float:
    """Return what runs on so many machines cost at least: the starts that there must be, and the rows."""
    scenario = arrivals.scenario
    start = scenario.profile.start_seconds
    count = scenario.seconds / max(scenario.deadline_seconds - start, PERIOD_SECONDS_MIN)
    rows = float(scenario.counts_T.sum()) * scenario.rows_per_arrival
    return count * start * machines + rows / arrivals.rows_per_second


def find_longest_period(arrivals: CumulativeArrivals, machines: int) -> Candidate:
    """Return the runs with the longest period that keeps the promise; else those that come nearest to it.

    Runs with too long a period come too late. Those with too short a period pile up, since each takes its time to
    begin. The search for what lies between goes down in steps, then by bisection.
    """
    high, best = max(PERIOD_SECONDS_MIN, int(arrivals.scenario.deadline_seconds)), None
    low = high
    while True:
        candidate = simulate_batch_runs(arrivals, machines, low)
        best = candidate if best is None else min(best, candidate, key=rank_candidate)
        if candidate.violation is None or low == PERIOD_SECONDS_MIN:
            break
        high, low = low - 1, max(PERIOD_SECONDS_MIN, int(low * _STEP))
    if best.violation is not None:
        return best
    while low < high:
        middle = (low + high + 1) // 2
        candidate = simulate_batch_runs(arrivals, machines, middle)
        if candidate.violation is None:
            low, best = middle, candidate
        else:
            high = middle - 1
    return best


def simulate_batch_runs(
    arrivals: CumulativeArrivals, machines: int, period: int, *, with_ages: bool = False
) -> Candidate:
    """Return runs every `period` seconds on so many machines; one begins when the one before it is over."""
    scenario, start = arrivals.scenario, arrivals.scenario.profile.start_seconds
    rows_P = arrivals.count_rows(period)
    took_P = start + rows_P / (arrivals.rows_per_second * machines)
    end_P = _compute_ends(took_P * scenario.time_margin, period)
    late_share, expected_share = _compute_late_shares(arrivals, end_P, period)
    age_p50, age_p99 = _compute_batch_ages(arrivals, end_P, period) if with_ages else (0.0, 0.0)
    return Candidate(
        mode="batch",
        policy="on-demand",
        machines=machines,
        period_seconds=float(period),
        paid_seconds=float(took_P.sum()) * machines,
        busy_seconds=float(rows_P.sum()) / arrivals.rows_per_second,
        age_p50=age_p50,
        age_p99=age_p99,
        late_share=late_share,
        violation=find_late_violation(scenario, max(late_share, expected_share)),
    )


def _compute_ends(took_P: NDArray[np.float64], period: int) -> NDArray[np.float64]:
    due_P = np.arange(1, len(took_P) + 1) * period
    sum_P = np.cumsum(took_P)
    return np.asarray(sum_P + np.maximum.accumulate(due_P - (sum_P - took_P)))


def _compute_late_shares(arrivals: CumulativeArrivals, end_P: NDArray[np.float64], period: int) -> tuple[float, float]:
    """Return the share of late rows, and what it would be if the rows of each period came evenly in it.

    The latter does not depend on seconds in which, by chance, nothing came.
    """
    sum_T = arrivals.sum_T
    last = len(sum_T) - 1
    from_P = np.minimum(np.arange(len(end_P)) * period, last)
    to_P = np.minimum(from_P + period, last)
    late_P = np.clip(np.ceil(end_P - arrivals.scenario.deadline_seconds).astype(np.int64), from_P, to_P)
    total = int(sum_T[-1])
    if not total:
        return 0.0, 0.0
    rows_P = sum_T[to_P] - sum_T[from_P]
    even = float((rows_P * (late_P - from_P) / np.maximum(to_P - from_P, 1)).sum())
    return float((sum_T[late_P] - sum_T[from_P]).sum()) / total, even / total


def _compute_batch_ages(arrivals: CumulativeArrivals, end_P: NDArray[np.float64], period: int) -> tuple[float, float]:
    counts_T = arrivals.scenario.counts_T
    second_T = np.flatnonzero(counts_T)
    return compute_weighted_quantiles(end_P[second_T // period] - second_T, counts_T[second_T].astype(np.float64))


def choose_batch_runs_on_spot(
    scenario: Scenario, instance_type: InstanceType, on_demand: Candidate
) -> Candidate | None:
    """Return runs on spot machines, with a shorter period than on on-demand ones: the slack is what spot needs."""
    if not scenario.counts_T.any():
        return None
    arrivals = CumulativeArrivals.from_scenario(scenario, instance_type)
    counts = {on_demand.machines}
    if not scenario.is_coarse:
        # Spot has shorter periods, for which half of the machines may be enough.
        counts |= {math.ceil(on_demand.machines / 2), min(2 * on_demand.machines, scenario.machines_max)}
    longest = on_demand.period_seconds or scenario.deadline_seconds
    found = [
        simulate_batch_runs_on_spot(arrivals, instance_type, machines, max(PERIOD_SECONDS_MIN, int(share * longest)))
        for machines in sorted(counts)
        for share in (_SPOT_PERIOD_SHARES[1::2] if scenario.is_coarse else _SPOT_PERIOD_SHARES)
    ]
    return min((candidate for candidate in found if candidate is not None), key=rank_candidate, default=None)


def simulate_batch_runs_on_spot(
    arrivals: CumulativeArrivals, instance_type: InstanceType, machines: int, period: int
) -> Candidate | None:
    """Return runs on spot of which each is done before its oldest row is too old; None where one can't be."""
    scenario, price_ratio = arrivals.scenario, instance_type.price_ratio
    start, left = scenario.profile.start_seconds, scenario.deadline_seconds - period
    rows_P = arrivals.count_rows(period)
    work_P = rows_P / (arrivals.rows_per_second * machines) * scenario.time_margin
    some = work_P[work_P > 0]
    if price_ratio is None or scenario.availability is None or left <= 0 or not len(some):
        return None
    sizes = np.unique(np.quantile(some, (0.5, 1) if scenario.is_coarse else (0, 0.5, 1)))
    found = [
        simulate_spot_run(float(size), left, start, price_ratio, scenario.availability, is_coarse=scenario.is_coarse)
        for size in sizes
    ]
    runs = [run for run in found if run is not None and not run.late_share]
    if len(runs) < len(found):
        return None
    paid_P = np.interp(work_P, [0.0, *sizes], [start / price_ratio, *(run.paid_seconds for run in runs)])
    return Candidate(
        mode="batch",
        policy="spot",
        machines=machines,
        period_seconds=float(period),
        paid_seconds=float(paid_P.sum()) * machines / scenario.time_margin,
        busy_seconds=float(rows_P.sum()) / arrivals.rows_per_second,
        age_p50=period / 2 + runs[len(runs) // 2].seconds_p50,
        age_p99=min(period + runs[-1].seconds_p99, scenario.deadline_seconds),
    )


def simulate_table(scenario: Scenario, instance_type: InstanceType) -> list[Candidate]:
    """Return a table's runs on on-demand machines, and the servers that could score it."""
    online = _endpoint_rows_per_second(scenario, instance_type)
    stream = _stream_rows_per_second(scenario, instance_type)
    return [
        simulate_table_on_demand(scenario, instance_type),
        _simulate_always_on_servers(scenario, "online", "always-on", online),
        _simulate_keep_warm_servers(scenario, "keep-warm", online, scenario.profile.cold_start_seconds),
        _simulate_keep_warm_servers(scenario, "keep-warm-10-minutes", online, TEN_MINUTES),
        _simulate_always_on_servers(scenario, "streaming", "micro-batches", stream),
    ]


def simulate_table_on_demand(scenario: Scenario, instance_type: InstanceType) -> Candidate:
    """Return the fewest on-demand machines with which a run is done in time."""
    rows_per_second = scenario.profile.batch_rows_per_second * instance_type.speed
    start = scenario.profile.start_seconds
    machines = _count_machines_needed(scenario, rows_per_second, start)
    took = start + scenario.rows_per_table / rows_per_second / machines
    return _make_table_candidate(scenario, "batch", "on-demand", machines, took, took * machines, start * machines)


def choose_table_on_spot(
    scenario: Scenario, instance_type: InstanceType, machine_counts: Iterable[int] | None = None
) -> Candidate | None:
    """Return the machines with which a run on spot is cheapest; None where spot or its price is not known."""
    if scenario.rows_per_table <= 0:
        return None
    rows_per_second = scenario.profile.batch_rows_per_second * instance_type.speed
    least = _count_machines_needed(scenario, rows_per_second, scenario.profile.start_seconds)
    factors = _SPOT_MACHINE_FACTORS[::3] if scenario.is_coarse else _SPOT_MACHINE_FACTORS
    counts = machine_counts or {min(math.ceil(least * factor), scenario.machines_max) for factor in factors}
    allowed = {*counts, least + 1} & set(range(1, scenario.machines_max + 1))
    found = [_simulate_table_on_spot(scenario, instance_type, machines) for machines in sorted(allowed)]
    return min((candidate for candidate in found if candidate is not None), key=rank_candidate, default=None)


def _simulate_table_on_spot(scenario: Scenario, instance_type: InstanceType, machines: int) -> Candidate | None:
    price_ratio, availability = instance_type.price_ratio, scenario.availability
    if price_ratio is None or availability is None:
        return None
    work = scenario.rows_per_table / (scenario.profile.batch_rows_per_second * instance_type.speed)
    run = simulate_spot_run(
        work / machines * scenario.time_margin,
        scenario.deadline_seconds,
        scenario.profile.start_seconds,
        price_ratio,
        availability,
        is_coarse=scenario.is_coarse,
    )
    if run is None:
        return None
    paid = run.paid_seconds / scenario.time_margin * machines
    return Candidate(
        mode="batch",
        policy="spot",
        machines=machines,
        period_seconds=scenario.period_seconds,
        paid_seconds=paid * _count_tables(scenario),
        busy_seconds=min(work, paid) * _count_tables(scenario),
        age_p50=run.seconds_p50,
        age_p99=run.seconds_p99,
        late_share=run.late_share,
        violation=None if run.late_share == 0 else f"{run.late_share:.1%} of the runs came late",
    )


def _count_machines_needed(scenario: Scenario, rows_per_second: float, start: float) -> int:
    """Return the fewest machines that score the table in time, else as many as are allowed."""
    left = scenario.deadline_seconds / scenario.time_margin - start
    needed = scenario.machines_max
    if left > 0:
        needed = math.ceil(scenario.rows_per_table / rows_per_second / left - 1e-9)
    return min(max(needed, 1), scenario.machines_max)


def _simulate_always_on_servers(scenario: Scenario, mode: Mode, policy: Policy, rows_per_second: float) -> Candidate:
    """Return machines that wait for the table all day."""
    machines = _count_machines_needed(scenario, rows_per_second, 0.0)
    took = scenario.rows_per_table / rows_per_second / machines
    paid = machines * scenario.period_seconds
    return _make_table_candidate(scenario, mode, policy, machines, took, paid, paid - took * machines)


def _simulate_keep_warm_servers(
    scenario: Scenario, policy: Policy, rows_per_second: float, keep_warm_seconds: float
) -> Candidate:
    """Return machines that start for the table, and stop some time after it."""
    start = scenario.profile.cold_start_seconds
    machines = _count_machines_needed(scenario, rows_per_second, start)
    scoring = scenario.rows_per_table / rows_per_second / machines
    took = start + scoring
    awake = min(took + keep_warm_seconds, scenario.period_seconds) if scenario.rows_per_table else 0.0
    paid, idle = awake * machines, (awake - scoring) * machines
    return _make_table_candidate(
        scenario, "online", policy, machines, took, paid, idle, keep_warm_seconds=keep_warm_seconds
    )


def _make_table_candidate(
    scenario: Scenario,
    mode: Mode,
    policy: Policy,
    machines: int,
    took: float,
    paid: float,
    idle: float,
    keep_warm_seconds: float | None = None,
) -> Candidate:
    """Return a candidate; took, paid and idle are the seconds of one table."""
    is_late = took * scenario.time_margin > scenario.deadline_seconds + 1e-9
    is_free = paid == 0
    tables = _count_tables(scenario)
    return Candidate(
        mode=mode,
        policy=policy,
        machines=0 if is_free else machines,
        batching=BatchingConfig(batch_size_max=1 if mode == "batch" else BATCH_ROWS_MAX),
        keep_warm_seconds=keep_warm_seconds,
        period_seconds=scenario.period_seconds if mode == "batch" else None,
        paid_seconds=paid * tables,
        busy_seconds=max(paid - idle, 0.0) * tables,
        age_p50=0.0 if is_free else took,
        age_p99=0.0 if is_free else took,
        late_share=1.0 if is_late else 0.0,
        cold_starts=0 if keep_warm_seconds is None or is_free else math.ceil(tables),
        violation=f"the table takes {in_words(took)} on {machines} machines, {in_words(scenario.deadline_seconds)} are"
        " left for it"
        if is_late
        else None,
    )


def _count_tables(scenario: Scenario) -> float:
    return scenario.seconds / scenario.period_seconds


def _endpoint_rows_per_second(scenario: Scenario, instance_type: InstanceType) -> float:
    """Return the rows a second of an endpoint at full passes; reading and writing them is no faster than in a run."""
    profile = scenario.profile
    full_pass_seconds = profile.pass_time.seconds(BATCH_ROWS_MAX) + profile.busy_ms / 1000
    rows_per_second = profile.slots * BATCH_ROWS_MAX / full_pass_seconds
    return min(rows_per_second, profile.batch_rows_per_second) * instance_type.speed


def _stream_rows_per_second(scenario: Scenario, instance_type: InstanceType) -> float:
    profile = scenario.profile
    measured = profile.stream_rows_per_second or profile.batch_rows_per_second
    return min(profile.slots * profile.pass_time.rows_per_second(BATCH_ROWS_MAX), measured) * instance_type.speed
