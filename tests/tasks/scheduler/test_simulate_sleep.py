from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from serving.model.batching import CostModel
from tasks.scheduler.fit import fits
from tasks.scheduler.problem import Problem
from tasks.scheduler.simulate_sleep import keep_warm, keep_warm_beside, sleep, traffic
from tests.tasks.scheduler.values import HOUR, THIS, problem, profile


def sparse(every: int = 1800, seconds: int = 24 * HOUR) -> Problem:
    counts_T = np.zeros(seconds, dtype=np.int64)
    counts_T[100::every] = 1
    return problem(counts_T)


def test_an_endpoint_that_goes_to_zero_breaks_a_promise_that_a_cold_start_is_too_long_for() -> None:
    asked = sparse()
    fit = fits(asked, THIS)[0]

    found = sleep(asked, fit, 1, traffic(asked, fit, 1), 20, "keep-warm")

    assert 48 == found.cold_starts
    assert 1 == found.late
    assert 18 < found.age_p50 < 21
    assert found.flaw is not None


def test_an_endpoint_that_may_start_within_the_promise_goes_to_zero_and_costs_next_to_nothing() -> None:
    asked = replace(sparse(), within=60.0)
    fit = fits(asked, THIS)[0]

    found = keep_warm(asked, fit, 1)

    assert found.flaw is None
    assert 48 == found.cold_starts
    assert found.keep_warm is not None
    assert found.keep_warm < 20
    assert found.paid_seconds < 0.03 * asked.seconds


@pytest.mark.parametrize(("within", "late"), [(3.4, 1.0), (3.8, 0.0)])
def test_who_wakes_an_endpoint_waits_for_the_whole_of_its_start(within: float, late: float) -> None:
    asked = replace(sparse(), within=within, profile=profile(cold_start_seconds=3.6))
    fit = fits(asked, THIS)[0]

    found = sleep(asked, fit, 1, traffic(asked, fit, 1), 20, "keep-warm")

    assert late == found.late
    assert 3.6 < found.age_p50 < 3.7


@pytest.mark.parametrize(("within", "late"), [(4.0, 1.0), (4.2, 0.0)])
def test_a_server_that_is_slow_itself_makes_who_wakes_it_wait_for_both(within: float, late: float) -> None:
    slow = profile(cold_start_seconds=3.6, pass_time=CostModel(fixed_seconds=0.1, row_seconds=0.4), request_busy_ms=0.0)
    asked = replace(sparse(), within=within, profile=slow)
    fit = fits(asked, THIS)[0]

    found = sleep(asked, fit, 1, traffic(asked, fit, 1), 20, "keep-warm")

    assert late == found.late
    assert 4.1 == pytest.approx(found.age_p50, abs=0.01)


def test_what_keep_warm_is_held_against_is_simulated_too() -> None:
    asked = replace(sparse(), within=60.0)
    fit = fits(asked, THIS)[0]

    ten, histogram = keep_warm_beside(asked, fit, 1)

    assert 48 * (600 + 20 + 1) == pytest.approx(ten.paid_seconds, abs=700)
    assert 600 == ten.keep_warm
    assert histogram.keep_warm is None
    assert histogram.flaw is not None
    assert histogram.cold_starts <= 48


def test_few_late_rows_may_be_many_another_time() -> None:
    # A hundred rows of which three may be late, and two were: another day it may be five.
    counts_T = np.zeros(24 * HOUR, dtype=np.int64)
    counts_T[100 : 100 + 50 * 15 : 15] = 1
    counts_T[HOUR : HOUR + 50 * 15 : 15] = 1
    asked = problem(counts_T, kept=0.97)
    fit = fits(asked, THIS)[0]

    found = sleep(asked, fit, 1, traffic(asked, fit, 1), 20, "keep-warm")

    assert 2 == found.cold_starts
    assert found.flaw is not None


def test_without_traffic_there_is_no_machine_to_keep_warm() -> None:
    asked = problem(np.zeros(HOUR, dtype=np.int64))
    fit = fits(asked, THIS)[0]

    for found in (keep_warm(asked, fit, 1), *keep_warm_beside(asked, fit, 1)):
        assert (0, 0, 0) == (found.paid_seconds, found.machines, found.late)
