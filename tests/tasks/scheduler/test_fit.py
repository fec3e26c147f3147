from __future__ import annotations

from dataclasses import replace

import pytest

from serving.model.batching import CostModel
from tasks.scheduler.fit import fits, serving_time
from tasks.scheduler.simulate_online import always_on
from tests.tasks.scheduler.values import THIS, problem, profile


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


def test_what_was_measured_on_a_model_server_counts_instead_of_passes() -> None:
    served = CostModel(fixed_seconds=0.004, row_seconds=0.002)
    known = profile(request_ms=3.0, served=served, jitter=0.2)
    single, beside = serving_time(known, 1.0)
    several, _ = serving_time(known, 3.0)
    found = fits(problem(profile=known), THIS)[0]

    # One alone takes 3 + 11 ms, of which 6 in the slot.
    assert (served, 0.008) == (single, pytest.approx(beside))
    assert pytest.approx((0.004, 0.022)) == (several.fixed_seconds, several.row_seconds)
    assert (0.004, 0.002, 0.2) == (
        *(found.waits.server.pass_time, found.waits.server.request_time, found.waits.server.jitter),
    )


def test_a_kind_that_is_twice_as_fast_takes_twice_as_much() -> None:
    fast = replace(THIS, speed=2.0)

    assert 2 * fits(problem(within=5.0), THIS)[0].waits.server.rate == pytest.approx(
        fits(problem(within=5.0), fast)[0].waits.server.rate, rel=0.02
    )
