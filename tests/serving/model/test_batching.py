from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from serving.errors import LatencyImpossible
from serving.model.batching import PassTime, choose_dial, fit, latency_ms, measure_passes, wait_ms
from tests.serving.model.test_tuner import PLAIN, Clock, Timed, X, matrix, rows

TIMES = st.builds(PassTime, pass_ms=st.floats(0.01, 50), row_ms=st.floats(0, 5))
BUDGETS = st.floats(0.1, 1000)
RATES = st.floats(0.1, 1e6)
REPLICAS = st.integers(1, 8)


def keeps(time: PassTime, budget_ms: float, rate: float, size: int) -> bool:
    """The rule itself: answered within the budget, and faster than rows come."""
    return latency_ms(time, size, rate) <= budget_ms and rate < 1000 * size / time.ms(size)


@given(time=TIMES, budget_ms=BUDGETS, rate=RATES, replicas=REPLICAS)
def test_the_batch_is_the_largest_that_keeps_the_budget_and_the_rate(
    time: PassTime, budget_ms: float, rate: float, replicas: int
) -> None:
    kept = [size for size in range(1, 65) if keeps(time, budget_ms, rate / replicas, size)]
    try:
        dial = choose_dial(time, budget_ms, rate, replicas=replicas, rows_max=64)
    except LatencyImpossible:
        assert [] == kept
        return

    assert max(kept) == dial.batch_size_max
    assert 1000 * (dial.batch_size_max - 1) / (rate / replicas) == pytest.approx(dial.wait_ms_max)


@given(time=TIMES, budget_ms=BUDGETS, more=st.floats(1, 10), rate=RATES)
def test_a_larger_budget_never_makes_the_batch_smaller(
    time: PassTime, budget_ms: float, more: float, rate: float
) -> None:
    assume(2 * time.ms(1) <= budget_ms)
    try:
        smaller = choose_dial(time, budget_ms, rate)
    except LatencyImpossible:
        return

    assert smaller.batch_size_max <= choose_dial(time, budget_ms * more, rate).batch_size_max


@given(time=TIMES, budget_ms=BUDGETS)
def test_a_budget_below_two_passes_of_one_row_is_refused_with_what_is_needed(time: PassTime, budget_ms: float) -> None:
    assume(budget_ms < 2 * time.ms(1))

    with pytest.raises(LatencyImpossible, match=f"must be at least {2 * time.ms(1):.3g} ms".replace("+", r"\+")):
        choose_dial(time, budget_ms, 1e-3)


def test_a_rate_that_a_replica_can_t_take_is_refused_with_the_replicas_that_can() -> None:
    # Ten milliseconds a row: 100 rows a second at the very most.
    slow = PassTime(pass_ms=1, row_ms=10)
    with pytest.raises(LatencyImpossible, match=r"1 replica must take 250 rows a second .* 3 replicas keep it"):
        choose_dial(slow, 1000, 250)

    assert choose_dial(slow, 1000, 250, replicas=3).batch_size_max > 1


def test_replicas_beyond_number_are_not_promised() -> None:
    with pytest.raises(LatencyImpossible, match="Not even 1024 replicas keep it"):
        choose_dial(PassTime(pass_ms=10, row_ms=10), 1000, 1e6)


def test_one_row_waits_for_nobody() -> None:
    dial = choose_dial(PassTime(pass_ms=4, row_ms=1), 10, 10)

    assert (1, 0) == (dial.batch_size_max, dial.wait_ms_max)
    assert 0 == wait_ms(1, 5)


def test_no_more_rows_are_collected_than_callers_wait_at_a_time() -> None:
    assert 8 == choose_dial(PassTime(pass_ms=1, row_ms=0.01), 1000, 1000, rows_max=8).batch_size_max


@given(time=TIMES, sizes=st.lists(st.integers(1, 1024), min_size=2, max_size=11, unique=True))
def test_the_fit_finds_the_line_that_the_times_lie_on(time: PassTime, sizes: list[int]) -> None:
    found = fit([(size, time.ms(size)) for size in sizes])

    assert [found.ms(size) for size in sizes] == pytest.approx([time.ms(size) for size in sizes], rel=1e-6)


@given(
    samples=st.lists(st.tuples(st.integers(1, 1024), st.floats(1e-3, 1e3)), min_size=1, max_size=20),
)
def test_whatever_was_measured_a_pass_takes_time_and_no_part_of_it_is_negative(
    samples: list[tuple[int, float]],
) -> None:
    found = fit(samples)

    assert found.pass_ms >= 0
    assert found.row_ms >= 0
    assert found.ms(1) > 0
    assert math.isfinite(found.ms(1024))


def test_times_that_grow_faster_than_their_rows_give_a_line_through_zero() -> None:
    found = fit([(1, 1.0), (2, 3.0), (4, 9.0)])

    assert 0 == found.pass_ms
    assert found.row_ms > 1


def test_passes_are_measured_in_doubling_sizes_until_one_takes_longer_than_the_budget() -> None:
    model = Timed(Clock(), {PLAIN: lambda size: 1e-3 + 1e-4 * size})
    measured = measure_passes(model, matrix(4), rows(X[:1024]), 10.0, slots=1, clock=model.clock)

    assert [1 << at for at in range(8)] == [size for size, _ in measured]
    assert [1 + 0.1 * size for size, _ in measured] == pytest.approx([ms for _, ms in measured])
    assert (1.0, 0.1) == pytest.approx((fit(measured).pass_ms, fit(measured).row_ms))


def test_no_more_rows_are_measured_than_the_sample_has() -> None:
    model = Timed(Clock(), {PLAIN: lambda size: 1e-5 * size})
    sample = rows(np.ascontiguousarray(X[:5]))

    assert [1, 2, 4] == [n for n, _ in measure_passes(model, matrix(4), sample, 1e3, slots=1, clock=model.clock)]
