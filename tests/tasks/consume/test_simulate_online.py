from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.consume.problem import Problem
from tasks.consume.simulate_online import (
    SCALE_DOWN_SECONDS,
    SCALE_SECONDS,
    always_on,
    autoscale,
    autoscaled,
    fits,
    keep_warm,
    online_beside,
    scale,
    sleep,
    traffic,
)
from tests.tasks.consume.values import HOUR, THIS, problem, profile


def poisson(rate: float, seconds: int = 2 * HOUR, seed: int = 1) -> Problem:
    return problem(np.random.default_rng(seed).poisson(rate, seconds))


def test_an_endpoint_has_as_many_machines_as_the_promise_needs_and_no_more() -> None:
    asked = poisson(500)
    fit = fits(asked, THIS)[0]

    found = always_on(asked, fit)

    fewer = replace(asked, machines_max=found.machines - 1)
    assert found.flaw is None
    assert always_on(fewer, fit).flaw is not None
    assert found.paid_seconds == found.machines * 2 * HOUR
    assert 500 * 2 * HOUR / fit.waits.server.rate == pytest.approx(found.busy_seconds, rel=0.01)


@settings(max_examples=10, deadline=None)
@given(st.floats(0.1, 300), st.floats(1.1, 4))
def test_more_traffic_never_costs_less(rate: float, more: float) -> None:
    one, other = poisson(rate), poisson(rate)
    other = replace(other, counts_T=np.ceil(other.counts_T * more).astype(np.int64))
    fit = fits(one, THIS)[0]

    assert always_on(one, fit).paid_seconds <= always_on(other, fit).paid_seconds


@pytest.mark.parametrize("within", [0.05, 0.2, 5.0])
def test_a_dial_never_lets_a_pass_take_more_than_half_of_the_time(within: float) -> None:
    found = fits(problem(within=within), THIS)

    for fit in found:
        server = fit.waits.server
        assert 2 * server.time(server.requests_max) + fit.beside <= within
    rates = [fit.most(problem(within=within)) for fit in found]
    assert sorted(rates, reverse=True) == rates


def test_a_request_of_many_rows_fits_into_a_pass() -> None:
    found = fits(problem(rows_per_arrival=40.0, within=20.0), THIS)

    assert all(fit.batch_size_max >= 40 for fit in found)


def test_what_a_request_takes_beside_its_pass_is_felt_but_keeps_no_slot() -> None:
    heavy = problem(profile=profile(request_ms=50.0, request_busy_ms=0.0))
    busy = problem(profile=profile(request_ms=50.0, request_busy_ms=None))

    felt, kept = (always_on(each, fits(each, THIS)[0]) for each in (heavy, busy))

    assert felt.age_p50 > 0.05
    assert kept.busy_seconds > 2 * felt.busy_seconds


def test_a_kind_that_is_twice_as_fast_takes_twice_as_much() -> None:
    fast = replace(THIS, speed=2.0)

    assert 2 * fits(problem(within=5.0), THIS)[0].waits.server.rate == pytest.approx(
        fits(problem(within=5.0), fast)[0].waits.server.rate, rel=0.02
    )


def test_a_scaler_sees_the_load_late_and_its_machines_come_later_still() -> None:
    counts_T = np.zeros(HOUR, dtype=np.int64)
    counts_T[600:1200] = 1000
    asked = problem(counts_T, profile=profile(cold_start_seconds=60))
    fit = fits(asked, THIS)[0]

    paid_I, ready_I = scale(asked, fit, 1, 0.5)

    needed = int(np.ceil(1000 / (0.5 * fit.waits.server.rate)))
    first = 600 // SCALE_SECONDS
    assert [1, needed] == paid_I[first : first + 2].tolist()
    assert [1] * 4 + [needed] == ready_I[first + 1 : first + 6].tolist()
    gone = (1200 + SCALE_DOWN_SECONDS) // SCALE_SECONDS
    assert [needed, 1] == paid_I[gone : gone + 2].tolist()


def test_a_scaler_under_a_swinging_load_costs_less_than_what_is_always_on_and_keeps_the_promise() -> None:
    second = np.arange(24 * HOUR)
    rate = 300 * (1.2 + np.cos(2 * np.pi * second / (24 * HOUR)))
    asked = problem(np.random.default_rng(2).poisson(rate))
    fit = fits(asked, THIS)[0]
    always = always_on(asked, fit)

    found = autoscaled(asked, fit, always)

    assert found.flaw is None
    assert found.paid_seconds < 0.85 * always.paid_seconds


def test_a_lower_target_pays_for_more_machines_that_are_late_less() -> None:
    asked = poisson(400)
    fit = fits(asked, THIS)[0]

    found = [autoscale(asked, fit, 1, target) for target in (0.9, 0.6, 0.3)]

    assert sorted(each.paid_seconds for each in found) == [each.paid_seconds for each in found]
    assert sorted((each.late for each in found), reverse=True) == [each.late for each in found]


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


def test_what_keep_warm_is_held_against_is_simulated_too() -> None:
    asked = replace(sparse(), within=60.0)
    fit = fits(asked, THIS)[0]

    ten, histogram = online_beside(asked, fit, 1)

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

    for found in (keep_warm(asked, fit, 1), *online_beside(asked, fit, 1)):
        assert (0, 0, 0) == (found.paid_seconds, found.machines, found.late)
