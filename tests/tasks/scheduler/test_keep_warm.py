from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.model.batching import CostModel
from tasks.scheduler.keep_warm import (
    choose_keep_warm,
    find_traffic_spells,
    simulate_keep_warm,
    simulate_loading,
    simulate_ten_minutes,
    split_spells,
)
from tasks.scheduler.scenario import Candidate, Scenario
from tasks.scheduler.simulate_online import list_serving_capacities
from tests.benchmarks.keep_warm_policies import fixed_windows, histogram_windows, optimal_cost, policy_cost
from tests.tasks.scheduler.values import HOUR, THIS, profile, scenario

gap_lists = st.lists(st.integers(1, 5000), max_size=60)
cold_starts = st.integers(1, 2000)


@given(gap_lists, cold_starts)
def test_staying_warm_for_a_cold_start_costs_at_most_twice_the_optimum(gaps: list[int], cold_start: int) -> None:
    gap_G = np.array(gaps, dtype=np.int64)

    cost = policy_cost(gap_G, fixed_windows(cold_start, len(gaps)), cold_start)

    assert cost <= 2 * optimal_cost(gap_G, cold_start) + 1e-9


@given(gap_lists, gap_lists)
def test_the_histogram_does_not_know_the_gaps_to_come(gaps: list[int], others: list[int]) -> None:
    one, other = (histogram_windows(np.array([*gaps, *rest], dtype=np.int64)) for rest in ([], others))

    assert one.keep_G.tolist() == other.keep_G[: len(gaps)].tolist()
    assert one.head_G.tolist() == other.head_G[: len(gaps)].tolist()


def test_the_histogram_learns_a_regular_gap() -> None:
    windows = histogram_windows(np.full(200, 30 * 60))

    assert (30 * 60 * 9 // 10) == windows.head_G[-1]
    assert windows.head_G[-1] + windows.keep_G[-1] > 30 * 60
    assert 4 * 3600 == windows.keep_G[0]


def test_gaps_beyond_the_histogram_leave_it_at_four_hours() -> None:
    windows = histogram_windows(np.full(50, 5 * 3600))

    assert [0, 4 * 3600] == [windows.head_G[-1], windows.keep_G[-1]]


def test_spells_are_the_seconds_with_work_in_them() -> None:
    found = split_spells(np.array([0, 1, 1, 0, 0, 1], dtype=bool))

    assert [1, 5] == found.first_R.tolist()
    assert [2, 5] == found.last_R.tolist()
    assert [3] == found.gaps.tolist()


def second_by_second(busy: list[bool], keep: int, boot: int) -> tuple[int, int]:
    """The loaded seconds and the cold starts, counted one second after another."""
    there, starts, until, ready = 0, 0, -1, 0
    for at, work in enumerate(busy):
        if work:
            if at > until:
                starts, ready = starts + 1, at + boot
            until = max(at, ready) + keep
        there += at <= until
    return there, starts


@given(st.lists(st.booleans(), min_size=1, max_size=120), st.integers(1, 20), st.integers(0, 20))
def test_loaded_periods_and_cold_starts_are_those_counted_second_by_second(
    busy: list[bool], keep: int, boot: int
) -> None:
    loaded = simulate_loading(split_spells(np.array(busy)), keep, boot, len(busy))

    assert second_by_second(busy, keep, boot) == (
        int((loaded.stop_S - loaded.start_S).sum()),
        loaded.cold_starts,
    )
    assert (loaded.start_S <= loaded.stop_S).all()
    assert (loaded.stop_S[:-1] <= loaded.start_S[1:]).all()


def test_no_traffic_loads_nothing() -> None:
    spells = split_spells(np.zeros(10, dtype=bool))

    assert 0 == simulate_loading(spells, 10, 5, 10).cold_starts
    assert pytest.approx(7) == optimal_cost(spells.gaps, 7)


def sparse(every: int = 1800, seconds: int = 24 * HOUR) -> Scenario:
    counts_T = np.zeros(seconds, dtype=np.int64)
    counts_T[100::every] = 1
    return scenario(counts_T)


def kept_warm(asked: Scenario, keep_seconds: int = 20) -> Candidate:
    capacity = list_serving_capacities(asked, THIS)[0]
    return simulate_keep_warm(asked, capacity, 1, find_traffic_spells(asked, capacity, 1), keep_seconds)


def test_an_endpoint_that_goes_to_zero_breaks_a_promise_that_is_shorter_than_its_cold_start() -> None:
    asked = sparse()

    found = kept_warm(asked)

    assert 48 == found.cold_starts
    assert 1 == found.late_share
    assert 18 < found.age_p50 < 21
    assert found.violation is not None


def test_an_endpoint_that_starts_within_the_promise_goes_to_zero_and_costs_next_to_nothing() -> None:
    asked = replace(sparse(), deadline_seconds=60.0)
    capacity = list_serving_capacities(asked, THIS)[0]

    found = choose_keep_warm(asked, capacity, 1)

    assert found.violation is None
    assert 48 == found.cold_starts
    assert found.keep_warm_seconds is not None
    assert found.keep_warm_seconds < 20
    assert found.paid_seconds < 0.03 * asked.seconds


@pytest.mark.parametrize(("within", "late"), [(3.4, 1.0), (3.8, 0.0)])
def test_the_request_that_starts_an_endpoint_waits_for_the_whole_start(within: float, late: float) -> None:
    asked = replace(sparse(), deadline_seconds=within, profile=profile(cold_start_seconds=3.6))

    found = kept_warm(asked)

    assert late == found.late_share
    assert 3.6 < found.age_p50 < 3.7


@pytest.mark.parametrize(("within", "late"), [(4.0, 1.0), (4.2, 0.0)])
def test_the_request_that_starts_a_slow_endpoint_waits_for_start_and_pass(within: float, late: float) -> None:
    slow = profile(cold_start_seconds=3.6, pass_time=CostModel(fixed_seconds=0.1, row_seconds=0.4), request_busy_ms=0.0)
    asked = replace(sparse(), deadline_seconds=within, profile=slow)

    found = kept_warm(asked)

    assert late == found.late_share
    assert 4.1 == pytest.approx(found.age_p50, abs=0.01)


def test_ten_minutes_are_simulated_for_comparison() -> None:
    asked = replace(sparse(), deadline_seconds=60.0)

    found = simulate_ten_minutes(asked, list_serving_capacities(asked, THIS)[0], 1)

    assert 48 * (600 + 20 + 1) == pytest.approx(found.paid_seconds, abs=700)
    assert 600 == found.keep_warm_seconds


def test_few_late_rows_may_be_more_by_chance() -> None:
    # A hundred rows of which three may be late, and two were: another day it may be five.
    counts_T = np.zeros(24 * HOUR, dtype=np.int64)
    counts_T[100 : 100 + 50 * 15 : 15] = 1
    counts_T[HOUR : HOUR + 50 * 15 : 15] = 1
    asked = scenario(counts_T, share_in_time=0.97)

    found = kept_warm(asked)

    assert 2 == found.cold_starts
    assert found.violation is not None


def test_without_traffic_there_is_no_machine_to_keep_warm() -> None:
    asked = scenario(np.zeros(HOUR, dtype=np.int64))
    capacity = list_serving_capacities(asked, THIS)[0]

    for found in (choose_keep_warm(asked, capacity, 1), simulate_ten_minutes(asked, capacity, 1)):
        assert (0, 0, 0) == (found.paid_seconds, found.machines, found.late_share)
