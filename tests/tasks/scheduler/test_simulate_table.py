from __future__ import annotations

from dataclasses import replace

import pytest

from tasks.scheduler.simulate_table import batch_on_spot, table
from tests.tasks.scheduler.values import HOUR, THIS, profile, table_problem

DAY_SECONDS = 24 * HOUR


def test_a_table_is_scored_once_a_day_by_the_fewest_machines_that_are_in_time() -> None:
    found = {(each.mode, each.policy): each for each in table(table_problem(180 * 9 * HOUR), THIS)}

    run = found["batch", "on-demand"]
    assert (2, None, DAY_SECONDS) == (run.machines, run.flaw, run.every)
    assert 3 * 2 * (30 + 4.5 * HOUR) == pytest.approx(run.paid_seconds)
    assert 4.5 * HOUR + 30 == pytest.approx(run.age_p99)


def test_servers_that_wait_for_the_table_all_day_are_paid_all_day() -> None:
    found = {(each.mode, each.policy): each for each in table(table_problem(180 * 9 * HOUR), THIS)}

    always, run = found["online", "always-on"], found["batch", "on-demand"]
    assert always.flaw is None
    assert always.machines * 3 * DAY_SECONDS == always.paid_seconds
    assert always.paid_seconds / run.paid_seconds > 5
    assert found["streaming", "micro-batches"].paid_seconds == always.paid_seconds
    assert run.paid_seconds < found["online", "keep-warm"].paid_seconds < always.paid_seconds


def test_a_table_on_spot_costs_less_and_is_in_time() -> None:
    asked = table_problem(180 * 9 * HOUR)
    on_demand = table(asked, THIS)[0]

    found = batch_on_spot(asked, THIS)

    assert found is not None
    assert (None, 0) == (found.flaw, found.late)
    assert on_demand.paid_seconds / 3 <= found.paid_seconds < on_demand.paid_seconds
    assert found.age_p99 <= asked.within


def test_a_table_that_not_even_all_machines_score_in_time_says_how_long_they_take() -> None:
    asked = table_problem(180 * 60 * HOUR, machines_max=4)

    assert all(each.flaw is not None for each in table(asked, THIS))
    assert "the table takes 15 h on 4 machines, 6 h are left for it" == table(asked, THIS)[0].flaw
    assert batch_on_spot(asked, THIS) is None


def test_a_run_that_takes_longer_to_start_than_there_is_time_is_late() -> None:
    asked = table_problem(1000, within=60.0, profile=profile(start_seconds=90.0))

    assert table(asked, THIS)[0].flaw is not None


def test_an_empty_table_costs_an_endpoint_that_sleeps_nothing() -> None:
    found = {(each.mode, each.policy): each for each in table(table_problem(0), THIS)}

    assert 0 == found["online", "keep-warm"].paid_seconds
    assert 3 * 30 == found["batch", "on-demand"].paid_seconds
    assert batch_on_spot(table_problem(0), THIS) is None


@pytest.mark.parametrize("more", [1.5, 4.0])
def test_more_rows_never_cost_less(more: float) -> None:
    one, other = (table(table_problem(10**6 * times), THIS) for times in (1, more))

    for few, many in zip(one, other, strict=True):
        assert few.paid_seconds <= many.paid_seconds


def test_spot_needs_a_price() -> None:
    assert batch_on_spot(table_problem(10**6), replace(THIS, spot=None)) is None
