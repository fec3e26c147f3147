"""A killer's schedule comes from its seed alone, and chunks from the seconds between kills."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.benchmarks.kills.schedule import Pace, Schedule, chunk_rows, chunk_seconds, make_schedule, slow_pace


def a_schedule(seed: int) -> Schedule:
    return make_schedule(seed, workers=2, seconds=120.0, timed=20, aimed=5, startups=4, publishes=2)


def test_a_seed_always_gives_the_same_kills_whatever_else_draws_numbers() -> None:
    first = a_schedule(7)
    random.seed(1)
    random.random()

    assert first == a_schedule(7)
    assert first != a_schedule(8)


@given(seed=st.integers())
def test_every_kill_that_is_asked_for_is_in_the_schedule(seed: int) -> None:
    schedule = a_schedule(seed)
    dues = [kill.due_seconds for kill in schedule.timed]

    assert (20, 5) == (len(dues), sum(kill.aimed for kill in schedule.timed))
    assert sorted(dues) == dues
    assert 0 <= dues[0] <= dues[-1] <= 0.95 * 120
    assert 4 == len(schedule.startups)
    assert all(2 <= number < 22 for number in schedule.startups)
    assert {0: 2, 1: 2} == {worker: len(shares) for worker, shares in schedule.publishes.items()}


def test_kills_of_many_seeds_are_spread_over_the_whole_run() -> None:
    dues = [kill.due_seconds for seed in range(200) for kill in a_schedule(seed).timed]
    quarters = [sum(at * 28.5 <= due < (at + 1) * 28.5 for due in dues) for at in range(4)]

    assert all(850 <= count <= 1150 for count in quarters), quarters


def test_more_aimed_kills_than_kills_are_refused() -> None:
    with pytest.raises(ValueError, match="at most all of them aimed, got 3 of 2"):
        make_schedule(0, workers=2, seconds=1.0, timed=2, aimed=3, startups=0, publishes=0)


@given(rows=st.integers(1, 10**8), slots=st.integers(1, 64), seconds=st.floats(1, 1e4))
def test_the_batches_of_all_rows_take_the_seconds_asked_for(rows: int, slots: int, seconds: float) -> None:
    pace = slow_pace(rows, slots=slots, seconds=seconds, batch_seconds=0.1)

    assert pace.batch_seconds * rows / pace.batch_size / slots == pytest.approx(seconds)
    assert pace.batch_size == 1 or 0.05 <= pace.batch_seconds <= 0.1


def test_chunks_are_sized_by_the_formula_of_young_and_daly() -> None:
    assert 2.0 == chunk_seconds(0.5, 4.0)


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, 100), (0.26, 300), (0.24, 200), (1.0, 1000)])
def test_a_chunk_is_whole_batches_and_at_least_one(seconds: float, expected: int) -> None:
    assert expected == chunk_rows(seconds, Pace(batch_size=100, batch_seconds=0.1))
