from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.scheduler.fit import fits
from tasks.scheduler.problem import Problem
from tasks.scheduler.simulate_online import (
    SCALE_DOWN_SECONDS,
    SCALE_SECONDS,
    always_on,
    autoscale,
    autoscaled,
    scale,
)
from tests.tasks.scheduler.values import HOUR, THIS, problem, profile


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
