from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.scheduler.keep_warm import Spells, Windows, fixed, histogram, least, load, paid, spells

gap_lists = st.lists(st.integers(1, 5000), max_size=60)
cold_starts = st.integers(1, 2000)


def of_gaps(gaps: list[int]) -> Spells:
    at = np.cumsum([0, *gaps])
    return Spells(first_R=at, last_R=at)


@given(gap_lists, cold_starts)
def test_a_cold_starts_worth_of_warmth_costs_at_most_twice_the_least(gaps: list[int], cold_start: int) -> None:
    gap_G = np.array(gaps, dtype=np.int64)

    cost = paid(gap_G, fixed(cold_start, len(gaps)), cold_start)

    assert cost <= 2 * least(gap_G, cold_start) + 1e-9


@given(gap_lists, gap_lists)
def test_nobody_knows_the_gaps_to_come(gaps: list[int], others: list[int]) -> None:
    one, other = (histogram(of_gaps([*gaps, *rest])) for rest in ([], others))

    assert one.keep_G.tolist() == other.keep_G[: len(gaps)].tolist()
    assert one.head_G.tolist() == other.head_G[: len(gaps)].tolist()


def test_a_regular_gap_is_learned_by_the_histogram() -> None:
    windows = histogram(of_gaps([30 * 60] * 200))

    assert (30 * 60 * 9 // 10) == windows.head_G[-1]
    assert windows.head_G[-1] + windows.keep_G[-1] > 30 * 60
    assert 4 * 3600 == windows.keep_G[0]


def test_gaps_beyond_the_histogram_leave_it_at_four_hours() -> None:
    windows = histogram(of_gaps([5 * 3600] * 50))

    assert [0, 4 * 3600] == [windows.head_G[-1], windows.keep_G[-1]]


def test_spells_are_the_seconds_with_work_in_them() -> None:
    found = spells(np.array([0, 1, 1, 0, 0, 1], dtype=bool))

    assert [1, 5] == found.first_R.tolist()
    assert [2, 5] == found.last_R.tolist()
    assert [3] == found.gaps.tolist()


def second_by_second(busy: list[bool], keep: int, boot: int) -> tuple[int, int]:
    """The seconds that a machine is there, and its cold starts, as anybody would count them."""
    there, starts, until, ready = 0, 0, -1, 0
    for at, work in enumerate(busy):
        if work:
            if at > until:
                starts, ready = starts + 1, at + boot
            until = max(at, ready) + keep
        there += at <= until
    return there, starts


@given(st.lists(st.booleans(), min_size=1, max_size=120), st.integers(1, 20), st.integers(0, 20))
def test_machines_are_there_and_start_as_often_as_one_counts_second_by_second(
    busy: list[bool], keep: int, boot: int
) -> None:
    found = spells(np.array(busy))

    loaded = load(found, fixed(keep, len(found.gaps)), boot, len(busy))

    assert second_by_second(busy, keep, boot) == (
        int((loaded.stop_S - loaded.start_S).sum()),
        loaded.cold_starts,
    )


@given(st.lists(st.booleans(), min_size=1, max_size=120), st.integers(0, 20), st.integers(1, 9), st.integers(0, 9))
def test_starts_and_stops_take_turns(busy: list[bool], boot: int, head: int, keep: int) -> None:
    found = spells(np.array(busy))
    count = len(found.gaps)
    windows = Windows(head_G=np.full(count, head), keep_G=np.full(count, keep))

    loaded = load(found, windows, boot, len(busy))

    assert len(loaded.start_S) == len(loaded.stop_S)
    assert (loaded.start_S <= loaded.stop_S).all()
    assert (loaded.stop_S[:-1] <= loaded.start_S[1:]).all()


def test_what_is_loaded_ahead_of_a_regular_gap_is_there_when_it_is_over() -> None:
    found = of_gaps([100] * 5)

    loaded = load(found, Windows(head_G=np.full(5, 80), keep_G=np.full(5, 40)), 10, 501)

    assert 1 == loaded.cold_starts
    assert [91, 181, 281, 381, 481] == loaded.start_S[1:].tolist()


def test_no_traffic_loads_nothing() -> None:
    found = spells(np.zeros(10, dtype=bool))

    assert 0 == load(found, fixed(10, len(found.gaps)), 5, 10).cold_starts
    assert pytest.approx(7) == least(found.gaps, 7)
