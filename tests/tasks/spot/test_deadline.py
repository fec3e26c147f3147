from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import DeadlineImpossible
from tasks.spot.deadline import must_be_possible, workers_needed

spans = st.integers(0, 10**6)


def test_a_deadline_that_on_demand_alone_would_miss_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(DeadlineImpossible) as refused:
        must_be_possible(6 * 3600, 5.5 * 3600, 240, reserve_seconds=60)

    assert str(refused.value) == (
        "On-demand from now on must be done by the deadline: 6 h of work over 1 worker(s) take 6 h, with 4 min of "
        "changeover and 1 min of reserve 6 h 5 min, got 5 h 30 min. Move the deadline by at least 35 min, or allow 2 "
        "workers."
    )


def test_workers_are_no_help_where_the_changeover_alone_takes_too_long() -> None:
    with pytest.raises(DeadlineImpossible, match=r"Move the deadline by at least 10 min 10 s\.$"):
        must_be_possible(10, 0, 600)


def test_a_deadline_that_is_just_met_is_possible() -> None:
    must_be_possible(3600, 3660, 60)
    must_be_possible(0, 0, 60)


def test_a_deadline_that_has_passed_is_refused() -> None:
    with pytest.raises(DeadlineImpossible, match="got -1 min"):
        must_be_possible(3600, -60, 60)


@pytest.mark.parametrize(
    ("work", "left", "changeover", "workers"),
    # (work / n + 2d) / left: 0.8 exactly with 1; 0.81 with 1; 10 h in 2 h less two changeovers; nothing to do.
    [(8000, 10000, 0, 1), (8100, 10000, 0, 2), (36000, 7200, 360, 8), (0, 100, 60, 1)],
)
def test_workers_are_as_many_as_leave_a_fifth(work: float, left: float, changeover: float, workers: int) -> None:
    assert workers == workers_needed(work, left, changeover, workers_max=64)


def test_all_the_workers_allowed_where_they_are_in_time_but_leave_no_fifth() -> None:
    assert 4 == workers_needed(36000, 9100, 60, workers_max=4)
    assert 4 == workers_needed(36000, 9100, 4000 / 2 - 1900, workers_max=4)


def test_a_deadline_that_all_workers_would_miss_is_refused() -> None:
    with pytest.raises(DeadlineImpossible, match="over 2 worker"):
        workers_needed(36000, 9100, 60, workers_max=2)


def test_there_must_be_a_worker() -> None:
    with pytest.raises(ValueError, match="workers_max must be at least 1, got 0"):
        workers_needed(1, 1, 0, workers_max=0)


@settings(deadline=None, max_examples=150)
@given(spans.filter(bool), spans.filter(bool), st.floats(0, 1e5), st.integers(1, 50))
def test_one_worker_less_would_leave_too_little_slack(work: int, left: int, changeover: float, most: int) -> None:
    try:
        workers = workers_needed(work, left, changeover, workers_max=most)
    except DeadlineImpossible:
        assert work / most + changeover > left
        return

    share = lambda n: (work / n + 2 * changeover) / left
    assert workers == 1 or share(workers - 1) > 0.8 - 1e-6
    assert workers == most or share(workers) <= 0.8 + 1e-6
