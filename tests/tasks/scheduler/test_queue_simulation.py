from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from serving.model.batching import CostModel
from serving.model.queueing import BatchingServer, simulate_servers
from tasks.scheduler.queue_simulation import (
    UTILISATIONS,
    WaitTimes,
    compute_backlog,
    compute_delays,
    compute_weighted_quantiles,
    simulate_latency,
    simulate_waits,
)

counts = st.lists(st.integers(0, 20), min_size=1, max_size=40)


def make_server(fixed_seconds: float, row_seconds: float, requests_max: int, **changes: Any) -> BatchingServer:
    cost = CostModel(fixed_seconds=fixed_seconds, row_seconds=row_seconds)
    return BatchingServer(cost=cost, requests_max=requests_max, **({"slots": 2} | changes))


def waits() -> WaitTimes:
    return simulate_waits([make_server(0.0, 0.1, 1, slots=1)])[0]


@given(counts, st.integers(1, 15))
def test_the_backlog_is_what_a_leaky_bucket_holds(counts: list[int], taken: int) -> None:
    held, expected = 0, []
    for count in counts:
        held = max(0, held + count - taken)
        expected.append(held)

    assert expected == pytest.approx(compute_backlog(np.array(counts), float(taken)).tolist())


@given(counts, st.lists(st.integers(0, 6), min_size=40, max_size=40))
def test_the_last_of_a_second_waits_until_those_before_it_are_served(counts: list[int], taken: list[int]) -> None:
    seconds = len(counts)
    taken_T = np.array([*taken[: seconds - 1], 6], dtype=np.float64)
    queue: deque[int] = deque()
    done: dict[int, float] = {}
    for at in range(seconds + 500):
        if at < seconds:
            queue.extend([at] * counts[at])
        room = int(taken_T[at]) if at < seconds else int(taken_T.max())
        for place in range(min(room, len(queue))):
            done[queue.popleft()] = at + (place + 1) / room

    found = compute_delays(np.array(counts), taken_T)

    # The bucket works on from the end of a second, the line within it: they differ by a second at most.
    for at, count in enumerate(counts):
        if count and found[at] > 0:
            assert done[at] - at == pytest.approx(found[at] + 1, abs=1 + 1e-6)


@given(counts, st.integers(1, 4))
def test_more_traffic_never_lowers_the_latency(counts: list[int], machines: int) -> None:
    latency, more = (
        simulate_latency(each, machines, waits(), 0.0, 0.5) for each in (np.array(counts), np.array(counts) * 2)
    )

    assert latency.late_share <= more.late_share + 1e-9
    assert latency.age_p99 <= more.age_p99 + 1e-9


# Seconds over which utilisation is averaged for four machines; fewer have longer pieces, so that all see one piece.
short_counts = st.lists(st.integers(0, 20), min_size=1, max_size=10)


@given(short_counts, st.integers(1, 3))
@example([19, 20, 20], 1)
def test_fewer_machines_never_lower_the_latency(counts: list[int], machines: int) -> None:
    latency, fewer = (
        simulate_latency(np.array(counts), count, waits(), 0.0, 0.5) for count in (machines + 1, machines)
    )

    assert latency.late_share <= fewer.late_share + 1e-9
    assert latency.age_p99 <= fewer.age_p99 + 1e-9


@given(counts)
def test_a_number_of_machines_gives_the_same_latency_as_an_array_of_it(counts: list[int]) -> None:
    counts_T = np.array(counts)

    once = simulate_latency(counts_T, 2, waits(), 0.001, 0.5)
    always = simulate_latency(counts_T, np.full(len(counts_T), 2), waits(), 0.001, 0.5)

    assert once.late_share == pytest.approx(always.late_share)
    assert once.age_p99 == pytest.approx(always.age_p99)


def test_no_traffic_has_no_latency() -> None:
    latency = simulate_latency(np.zeros(100, dtype=np.int64), 1, waits(), 0.001, 0.5)

    assert (0, 0, 0) == (latency.late_share, latency.age_p50, latency.age_p99)


def test_a_burst_that_takes_a_minute_to_serve_is_late() -> None:
    counts_T = np.zeros(1000, dtype=np.int64)
    counts_T[10] = 600

    latency = simulate_latency(counts_T, 1, waits(), 0.0, 5.0)

    assert 1 == latency.late_share
    assert 59 == pytest.approx(latency.age_p99, abs=1)


def test_a_large_late_burst_varies_more_than_the_same_requests_in_small_ones() -> None:
    large_T, small_T = np.zeros((2, 3000), dtype=np.int64)
    large_T[[10, 12]] = 300
    small_T[[10, 500, 1000, 1500, 2000, 2500]] = 100
    large, small = (simulate_latency(each_T, 1, waits(), 0.0, 1.0) for each_T in (large_T, small_T))

    assert (600, 600) == (large_T.sum(), small_T.sum())
    # Bursts that are a minute or more apart are episodes of their own.
    assert large.late_share * 600 == pytest.approx(large.late_deviation)
    assert small.late_share * 600 == pytest.approx(math.sqrt(6) * small.late_deviation)
    assert 0 == simulate_latency(np.full(1000, 2), 1, waits(), 0.0, 5.0).late_deviation


def test_quantiles_count_the_weights_of_their_values() -> None:
    assert (1, 2) == compute_weighted_quantiles(np.array([2.0, 1.0]), np.array([2.0, 98.0]))
    assert (0, 0) == compute_weighted_quantiles(np.zeros(0), np.zeros(0))


def one_after_another(server: BatchingServer, at: NDArray[np.float64]) -> list[float]:
    """What each request waits at the same server, simulated one event after another."""
    free, done, next_one = [0.0] * server.slots, [], 0
    while next_one < len(at):
        slot = min(range(server.slots), key=free.__getitem__)
        last = next_one + server.requests_max - 1
        full = at[last] if last < len(at) else np.inf
        begin = max(free[slot], min(at[next_one] + server.wait_seconds, full))
        taken = [each for each in at[next_one : last + 1] if each <= begin]
        free[slot] = begin + server.cost.seconds(len(taken))
        done += [free[slot] - each for each in taken]
        next_one += len(taken)
    return done


servers = st.builds(
    make_server,
    fixed_seconds=st.floats(0.001, 1),
    row_seconds=st.floats(0.001, 1),
    requests_max=st.integers(1, 5),
    wait_seconds=st.floats(0, 2),
)


@given(
    st.lists(servers, min_size=1, max_size=4),
    st.lists(st.integers(0, 64).map(lambda gap: gap / 64), min_size=12, max_size=12),
)
def test_servers_that_are_simulated_together_serve_as_each_alone(
    found: list[BatchingServer], gaps: list[float]
) -> None:
    at_LN = np.array([np.cumsum(np.roll(gaps, turn)) for turn in range(len(found))])

    waits_LN = simulate_servers(found, at_LN)

    for server, at_N, waits_N in zip(found, at_LN, waits_LN, strict=True):
        assert one_after_another(server, at_N) == pytest.approx(waits_N.tolist(), abs=1e-9)


def test_a_single_queue_waits_as_pollaczek_and_khinchine_say() -> None:
    server = make_server(0.0, 1.0, 1, slots=1)

    waits = simulate_waits([server])[0].waits_UN

    # Pollaczek-Khinchine: of a queue with equal service times.
    for share in (0.3, 0.6, 0.8):
        expected = 1 + share / (2 * (1 - share))
        assert expected == pytest.approx(waits[UTILISATIONS.index(share)].mean(), rel=0.1)


@pytest.mark.parametrize("requests_max", [1, 8])
def test_waits_grow_with_the_utilisation_and_in_proportion_to_the_cost(requests_max: int) -> None:
    fast = make_server(0.004, 0.001, requests_max)
    slow = make_server(0.008, 0.002, requests_max)

    found = [simulate_waits([server])[0] for server in (fast, slow)]

    assert (np.diff(found[0].waits_UN, axis=0) >= 0).all()
    assert found[1].waits_UN == pytest.approx(2 * found[0].waits_UN)
    assert (np.diff(found[0].late_shares(0.02)) >= 0).all()


def test_jitter_makes_the_slowest_wait_longer_and_keeps_the_mean() -> None:
    even = make_server(0.004, 0.001, 4, slots=1)
    at_N = np.arange(4000) * 1.0
    (waits_N,) = simulate_servers([replace(even, jitter=0.3)], at_N[None])

    assert 0.005 == pytest.approx(waits_N.mean(), rel=0.02)
    assert 0.3 == pytest.approx(np.log(waits_N).std(), rel=0.05)
    assert simulate_waits([replace(even, jitter=0.3)])[0].waits_UN[0, -1] > simulate_waits([even])[0].waits_UN[0, -1]


def test_the_capacity_of_a_server_is_that_of_full_passes() -> None:
    server = make_server(0.01, 0.01, 4)

    assert 2 * 4 / 0.05 == pytest.approx(server.requests_per_second)
