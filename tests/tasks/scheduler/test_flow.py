from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.scheduler.flow import backlog, delays, feel, quantiles
from tasks.scheduler.server import Server, Waits, measure_waits

counts = st.lists(st.integers(0, 20), min_size=1, max_size=40)


def waits() -> Waits:
    return measure_waits([Server(slots=1, pass_time=0.0, request_time=0.1, requests_max=1)])[0]


@given(counts, st.integers(1, 15))
def test_what_is_left_over_is_what_a_bucket_holds(counts: list[int], taken: int) -> None:
    held, expected = 0, []
    for count in counts:
        held = max(0, held + count - taken)
        expected.append(held)

    assert expected == pytest.approx(backlog(np.array(counts), float(taken)).tolist())


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

    found = delays(np.array(counts), taken_T)

    # The bucket works on from the end of a second, the line within it: they differ by a second at most.
    for at, count in enumerate(counts):
        if count and found[at] > 0:
            assert done[at] - at == pytest.approx(found[at] + 1, abs=1 + 1e-6)


@settings(deadline=None)
@given(counts, st.integers(1, 4))
def test_more_traffic_or_fewer_machines_are_never_felt_less(counts: list[int], machines: int) -> None:
    counts_T = np.array(counts)

    felt, more, fewer = (
        feel(each, count, waits(), 0.0, 0.5)
        for each, count in ((counts_T, machines + 1), (counts_T * 2, machines + 1), (counts_T, machines))
    )

    assert felt.late <= more.late + 1e-9
    assert felt.late <= fewer.late + 1e-9
    assert felt.age_p99 <= fewer.age_p99 + 1e-9


@settings(deadline=None)
@given(counts)
def test_machines_that_never_change_are_felt_the_same_said_once_or_every_second(counts: list[int]) -> None:
    counts_T = np.array(counts)

    once = feel(counts_T, 2, waits(), 0.001, 0.5)
    always = feel(counts_T, np.full(len(counts_T), 2), waits(), 0.001, 0.5)

    assert once.late == pytest.approx(always.late)
    assert once.age_p99 == pytest.approx(always.age_p99)


def test_no_traffic_is_felt_as_nothing() -> None:
    felt = feel(np.zeros(100, dtype=np.int64), 1, waits(), 0.001, 0.5)

    assert (0, 0, 0) == (felt.late, felt.age_p50, felt.age_p99)


def test_a_burst_that_takes_a_minute_to_serve_is_late() -> None:
    counts_T = np.zeros(1000, dtype=np.int64)
    counts_T[10] = 600

    felt = feel(counts_T, 1, waits(), 0.0, 5.0)

    assert 1 == felt.late
    assert 59 == pytest.approx(felt.age_p99, abs=1)


def test_bursts_that_are_late_are_counted_each_once() -> None:
    counts_T = np.zeros(1000, dtype=np.int64)
    counts_T[[10, 12, 500]] = 300

    assert 2 == feel(counts_T, 1, waits(), 0.0, 5.0).episodes
    assert 0 == feel(np.full(1000, 2), 1, waits(), 0.0, 5.0).episodes


def test_quantiles_weigh_their_values() -> None:
    assert (1, 2) == quantiles(np.array([2.0, 1.0]), np.array([2.0, 98.0]))
    assert (0, 0) == quantiles(np.zeros(0), np.zeros(0))
