from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.scheduler.scenario import Scenario
from tasks.scheduler.simulate_batch import (
    PERIOD_SECONDS_MIN,
    CumulativeArrivals,
    choose_batch_runs,
    choose_batch_runs_on_spot,
    choose_table_on_spot,
    simulate_batch_runs,
    simulate_table,
)
from tests.tasks.scheduler.values import HOUR, THIS, profile, scenario, table_scenario


def events(counts_T: np.ndarray | None = None, **changes: object) -> Scenario:
    counts_T = np.random.default_rng(3).poisson(2, 12 * HOUR) if counts_T is None else counts_T
    return scenario(counts_T, consumer="events", **({"deadline_seconds": 2.0 * HOUR} | changes))


def row_by_row(asked: Scenario, machines: int, every: int) -> tuple[float, float]:
    """The machine seconds of runs, and the share of rows that are late, counted one after another."""
    rate, paid, late, free = asked.profile.batch_rows_per_second * machines, 0.0, 0, 0.0
    for start in range(0, len(asked.counts_T), every):
        rows = int(asked.counts_T[start : start + every].sum())
        took = asked.profile.start_seconds + rows / rate
        free = max(start + every, free) + took * asked.time_margin
        paid += took * machines
        for second in range(start, min(start + every, len(asked.counts_T))):
            late += int(asked.counts_T[second]) * (second < free - asked.deadline_seconds)
    return paid, late / max(int(asked.counts_T.sum()), 1)


@settings(max_examples=30)
@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=300),
    st.integers(60, 200),
    st.integers(1, 3),
    st.integers(60, 300),
)
def test_cost_and_late_rows_of_runs_are_those_counted_row_by_row(
    counts: list[int], every: int, machines: int, within: int
) -> None:
    asked = events(np.array(counts), deadline_seconds=float(within))

    found = simulate_batch_runs(CumulativeArrivals.from_scenario(asked, THIS), machines, every)

    paid, late = row_by_row(asked, machines, every)
    assert paid == pytest.approx(found.paid_seconds)
    assert late == pytest.approx(found.late_share)


def test_runs_have_the_longest_period_that_keeps_the_promise() -> None:
    asked = events()

    found = choose_batch_runs(asked, THIS)

    assert found.violation is None
    assert found.period_seconds is not None
    assert 1 == found.machines
    assert (
        simulate_batch_runs(CumulativeArrivals.from_scenario(asked, THIS), 1, int(found.period_seconds) + 1).violation
        is not None
    )
    assert found.period_seconds / 2 < found.age_p50 < found.age_p99 <= asked.deadline_seconds


def test_runs_that_start_too_slowly_for_a_short_period_have_a_long_one() -> None:
    # Every minute they would pile up: a run takes 70 s to begin.
    asked = events(profile=profile(start_seconds=70.0))

    found = choose_batch_runs(asked, THIS)

    assert found.violation is None
    assert found.period_seconds is not None
    assert found.period_seconds > HOUR
    assert (
        simulate_batch_runs(CumulativeArrivals.from_scenario(asked, THIS), 1, PERIOD_SECONDS_MIN).violation is not None
    )


def test_a_promise_that_is_shorter_than_a_run_is_broken() -> None:
    found = choose_batch_runs(events(deadline_seconds=45.0), THIS)

    assert found.violation is not None
    assert PERIOD_SECONDS_MIN == found.period_seconds
    assert found.late_share > 0.3


def test_a_batch_run_gives_no_answer_to_requests() -> None:
    found = choose_batch_runs(scenario(deadline_seconds=3600.0), THIS)

    assert "a batch run gives no answer to one who waits for it" == found.violation


def test_runs_on_spot_have_a_shorter_period_and_cost_less() -> None:
    asked = events()
    on_demand = choose_batch_runs(asked, THIS)

    found = choose_batch_runs_on_spot(asked, THIS, on_demand)

    assert found is not None
    assert found.violation is None
    assert found.period_seconds is not None
    assert on_demand.period_seconds is not None
    assert found.period_seconds < on_demand.period_seconds
    assert found.paid_seconds < on_demand.paid_seconds
    assert found.age_p99 <= asked.deadline_seconds


def test_runs_on_spot_need_a_price_and_a_trace() -> None:
    on_demand = choose_batch_runs(events(), THIS)

    assert choose_batch_runs_on_spot(events(), replace(THIS, spot=None), on_demand) is None
    assert choose_batch_runs_on_spot(events(availability=None), THIS, on_demand) is None
    assert choose_batch_runs_on_spot(events(np.zeros(HOUR, dtype=np.int64)), THIS, on_demand) is None


DAY_SECONDS = 24 * HOUR


def test_a_table_is_scored_once_a_day_by_the_fewest_machines_that_are_in_time() -> None:
    found = {(each.mode, each.policy): each for each in simulate_table(table_scenario(180 * 9 * HOUR), THIS)}

    run = found["batch", "on-demand"]
    assert (2, None, DAY_SECONDS) == (run.machines, run.violation, run.period_seconds)
    assert 3 * 2 * (30 + 4.5 * HOUR) == pytest.approx(run.paid_seconds)
    assert 4.5 * HOUR + 30 == pytest.approx(run.age_p99)


def test_servers_that_wait_for_the_table_all_day_are_paid_all_day() -> None:
    found = {(each.mode, each.policy): each for each in simulate_table(table_scenario(180 * 9 * HOUR), THIS)}

    always, run = found["online", "always-on"], found["batch", "on-demand"]
    assert always.violation is None
    assert always.machines * 3 * DAY_SECONDS == always.paid_seconds
    assert always.paid_seconds / run.paid_seconds > 5
    assert found["streaming", "micro-batches"].paid_seconds == always.paid_seconds
    assert run.paid_seconds < found["online", "keep-warm"].paid_seconds < always.paid_seconds


def test_a_table_on_spot_costs_less_and_is_in_time() -> None:
    asked = table_scenario(180 * 9 * HOUR)
    on_demand = simulate_table(asked, THIS)[0]

    found = choose_table_on_spot(asked, THIS)

    assert found is not None
    assert (None, 0) == (found.violation, found.late_share)
    assert on_demand.paid_seconds / 3 <= found.paid_seconds < on_demand.paid_seconds
    assert found.age_p99 <= asked.deadline_seconds


def test_a_table_that_all_machines_score_too_late_has_a_violation_with_their_time() -> None:
    asked = table_scenario(180 * 60 * HOUR, machines_max=4)

    assert all(each.violation is not None for each in simulate_table(asked, THIS))
    assert "the table takes 15 h on 4 machines, 6 h are left for it" == simulate_table(asked, THIS)[0].violation
    assert choose_table_on_spot(asked, THIS) is None


def test_a_run_that_takes_longer_to_start_than_there_is_time_is_late() -> None:
    asked = table_scenario(1000, deadline_seconds=60.0, profile=profile(start_seconds=90.0))

    assert simulate_table(asked, THIS)[0].violation is not None


def test_an_empty_table_costs_an_endpoint_that_sleeps_nothing() -> None:
    found = {(each.mode, each.policy): each for each in simulate_table(table_scenario(0), THIS)}

    assert 0 == found["online", "keep-warm"].paid_seconds
    assert 3 * 30 == found["batch", "on-demand"].paid_seconds
    assert choose_table_on_spot(table_scenario(0), THIS) is None


@pytest.mark.parametrize("more", [1.5, 4.0])
def test_more_rows_never_cost_less(more: float) -> None:
    one, other = (simulate_table(table_scenario(10**6 * times), THIS) for times in (1, more))

    for few, many in zip(one, other, strict=True):
        assert few.paid_seconds <= many.paid_seconds


def test_spot_needs_a_price() -> None:
    assert choose_table_on_spot(table_scenario(10**6), replace(THIS, spot=None)) is None
