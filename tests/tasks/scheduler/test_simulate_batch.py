from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.scheduler.problem import Problem
from tasks.scheduler.simulate_batch import EVERY_MIN, Line, batch, batch_on_spot, runs
from tests.tasks.scheduler.values import HOUR, THIS, problem, profile


def events(counts_T: np.ndarray | None = None, within: float = 2.0 * HOUR, **changes: object) -> Problem:
    counts_T = np.random.default_rng(3).poisson(2, 12 * HOUR) if counts_T is None else counts_T
    return problem(counts_T, consumer="events", within=within, **changes)


def row_by_row(asked: Problem, machines: int, every: int) -> tuple[float, float]:
    """The machine seconds of runs, and the share of rows that are late, as anybody would count them."""
    rate, paid, late, free = asked.profile.batch_rows_per_second * machines, 0.0, 0, 0.0
    for start in range(0, len(asked.counts_T), every):
        rows = int(asked.counts_T[start : start + every].sum())
        took = asked.profile.start_seconds + rows / rate
        free = max(start + every, free) + took * asked.time_margin
        paid += took * machines
        for second in range(start, min(start + every, len(asked.counts_T))):
            late += int(asked.counts_T[second]) * (second < free - asked.within)
    return paid, late / max(int(asked.counts_T.sum()), 1)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=300),
    st.integers(60, 200),
    st.integers(1, 3),
    st.integers(60, 300),
)
def test_runs_cost_and_are_late_as_one_counts_row_by_row(
    counts: list[int], every: int, machines: int, within: int
) -> None:
    asked = events(np.array(counts), within=float(within))

    found = runs(Line.of(asked, THIS), machines, every)

    paid, late = row_by_row(asked, machines, every)
    assert paid == pytest.approx(found.paid_seconds)
    assert late == pytest.approx(found.late)


def test_runs_are_as_seldom_as_the_promise_allows() -> None:
    asked = events()

    found = batch(asked, THIS)

    assert found.flaw is None
    assert found.every is not None
    assert 1 == found.machines
    assert runs(Line.of(asked, THIS), 1, int(found.every) + 1).flaw is not None
    assert found.every / 2 < found.age_p50 < found.age_p99 <= asked.within


def test_runs_that_begin_too_slowly_to_be_made_all_the_time_are_made_as_seldom_all_the_same() -> None:
    # Every minute they would pile up: a run takes 70 s to begin.
    asked = events(profile=profile(start_seconds=70.0))

    found = batch(asked, THIS)

    assert found.flaw is None
    assert found.every is not None
    assert found.every > HOUR
    assert runs(Line.of(asked, THIS), 1, EVERY_MIN).flaw is not None


def test_a_promise_that_is_shorter_than_a_run_is_broken() -> None:
    found = batch(events(within=45.0), THIS)

    assert found.flaw is not None
    assert EVERY_MIN == found.every
    assert found.late > 0.3


def test_who_waits_for_an_answer_gets_none_from_a_batch_run() -> None:
    found = batch(problem(within=3600.0), THIS)

    assert "a batch run gives no answer to one who waits for it" == found.flaw


def test_runs_on_spot_are_more_often_and_cost_less() -> None:
    asked = events()
    on_demand = batch(asked, THIS)

    found = batch_on_spot(asked, THIS, on_demand)

    assert found is not None
    assert found.flaw is None
    assert found.every is not None
    assert on_demand.every is not None
    assert found.every < on_demand.every
    assert found.paid_seconds < on_demand.paid_seconds
    assert found.age_p99 <= asked.within


def test_without_a_price_or_a_trace_of_spot_there_is_none() -> None:
    on_demand = batch(events(), THIS)

    assert batch_on_spot(events(), replace(THIS, spot=None), on_demand) is None
    assert batch_on_spot(events(availability=None), THIS, on_demand) is None
    assert batch_on_spot(events(np.zeros(HOUR, dtype=np.int64)), THIS, on_demand) is None
