from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from serving.errors import LatencyImpossible
from serving.model.batching import BatchingSetting, CostModel, fit_cost_model, list_batchings
from serving.model.tuner import measure_passes
from tests.serving.model.test_tuner import PLAIN, Clock, Timed, X, matrix, rows

COSTS = st.builds(CostModel, fixed_seconds=st.floats(1e-5, 0.05), row_seconds=st.floats(0, 0.005))
BUDGETS = st.floats(0.1, 1000)
RATES = st.floats(0.1, 1e4)
REPLICAS = st.integers(1, 6)
# Each example simulates queues.
FEW = settings(max_examples=8)


def find_settings(cost: CostModel, budget_ms: float, rate: float, replicas_max: int) -> tuple[BatchingSetting, ...]:
    """The settings, none where the budget can't be kept."""
    try:
        return list_batchings(cost, budget_ms, rate, replicas_max=replicas_max, rows_max=64)
    except LatencyImpossible:
        return ()


@FEW
@given(cost=COSTS, budget_ms=BUDGETS, rate=RATES, replicas=REPLICAS)
def test_every_setting_carries_the_rate_with_headroom_inside_the_budget(
    cost: CostModel, budget_ms: float, rate: float, replicas: int
) -> None:
    for found in find_settings(cost, budget_ms, rate, replicas):
        size = found.batching.batch_size_max

        assert 1 <= size <= 64
        assert 1 <= found.replicas <= replicas
        assert found.utilisation == pytest.approx(rate / (found.replicas * cost.rows_per_second(size)))
        assert found.utilisation <= 0.7 * (1 + 1e-9)
        assert 1000 * cost.seconds(1) <= found.p99_ms * (1 + 1e-9)
        assert max(found.p99_ms, found.burst_p99_ms, 2000 * cost.seconds(size)) <= budget_ms


@FEW
@given(cost=COSTS, budget_ms=BUDGETS, rate=RATES, replicas=REPLICAS)
def test_a_lone_caller_waits_for_nobody(cost: CostModel, budget_ms: float, rate: float, replicas: int) -> None:
    for found in find_settings(cost, budget_ms, rate, replicas):
        assert found.batching.wait_ms_max <= min(1.0, 0.05 * budget_ms)


@FEW
@given(cost=COSTS, budget_ms=BUDGETS, more=st.floats(1, 10), rate=RATES, replicas=REPLICAS)
def test_a_larger_budget_never_needs_more_replicas(
    cost: CostModel, budget_ms: float, more: float, rate: float, replicas: int
) -> None:
    found = find_settings(cost, budget_ms, rate, replicas)
    assume(found)

    assert found[0].replicas >= find_settings(cost, budget_ms * more, rate, replicas)[0].replicas


@FEW
@given(cost=COSTS, budget_ms=BUDGETS, rate=RATES, replicas=st.integers(2, 6))
def test_the_first_setting_has_the_fewest_replicas_and_nearly_the_least_latency(
    cost: CostModel, budget_ms: float, rate: float, replicas: int
) -> None:
    first, *others = find_settings(cost, budget_ms, rate, replicas) or (None,)
    assume(first is not None)
    assert first is not None

    assert () == find_settings(cost, budget_ms, rate, first.replicas - 1) or first.replicas == 1
    assert [first.replicas, *(each.replicas for each in others)] == sorted(
        [first.replicas, *(each.replicas for each in others)]
    )
    for each in others:
        if each.replicas == first.replicas:
            assert first.batching.batch_size_max < each.batching.batch_size_max
            assert first.burst_p99_ms <= each.burst_p99_ms + 0.05 * budget_ms
            assert first.batching.batch_size_max == 1 or each.burst_p99_ms > first.burst_p99_ms


@given(cost=COSTS, budget_ms=BUDGETS)
def test_a_budget_below_two_passes_of_one_row_is_refused_with_what_is_needed(cost: CostModel, budget_ms: float) -> None:
    assume(budget_ms < 2000 * cost.seconds(1))

    with pytest.raises(LatencyImpossible, match=re.escape(f"must be at least {2000 * cost.seconds(1):.3g} ms")):
        list_batchings(cost, budget_ms, 1e-3)


def test_a_rate_that_a_replica_can_t_take_is_refused_with_the_replicas_that_can() -> None:
    # Ten milliseconds a row: 100 rows a second at the very most.
    slow = CostModel(fixed_seconds=0.001, row_seconds=0.01)
    with pytest.raises(LatencyImpossible, match=r"1 replica must take 250 rows a second .* \d replicas keep it"):
        list_batchings(slow, 1000, 250)

    assert 3 <= list_batchings(slow, 1000, 250, replicas_max=8)[0].replicas <= 5


def test_replicas_beyond_number_are_not_promised() -> None:
    with pytest.raises(LatencyImpossible, match="Not even 1024 replicas keep it"):
        list_batchings(CostModel(fixed_seconds=0.01, row_seconds=0.01), 1000, 1e6)


def test_rows_are_batched_only_where_the_rate_needs_it() -> None:
    cost = CostModel(fixed_seconds=0.004, row_seconds=1e-5)

    assert 1 == list_batchings(cost, 50, 1)[0].batching.batch_size_max
    # Four milliseconds a pass: 250 rows a second, one by one.
    assert 4 <= list_batchings(cost, 50, 1000)[0].batching.batch_size_max


def test_no_more_rows_are_passed_together_than_callers_wait_at_a_time() -> None:
    cost = CostModel(fixed_seconds=0.001, row_seconds=1e-05)

    assert {8} >= {each.batching.batch_size_max for each in list_batchings(cost, 1000, 4000, rows_max=8)}


@given(cost=COSTS, sizes=st.lists(st.integers(1, 1024), min_size=2, max_size=11, unique=True))
def test_the_fit_finds_the_line_that_the_times_lie_on(cost: CostModel, sizes: list[int]) -> None:
    found = fit_cost_model([(size, cost.seconds(size)) for size in sizes])

    assert [found.seconds(size) for size in sizes] == pytest.approx([cost.seconds(size) for size in sizes], rel=1e-6)


@given(
    samples=st.lists(st.tuples(st.integers(1, 1024), st.floats(1e-3, 1e3)), min_size=1, max_size=20),
)
def test_for_any_measurements_a_pass_takes_time_and_no_term_is_negative(
    samples: list[tuple[int, float]],
) -> None:
    found = fit_cost_model(samples)

    assert found.fixed_seconds >= 0
    assert found.row_seconds >= 0
    assert found.seconds(1) > 0
    assert math.isfinite(found.seconds(1024))


def test_times_that_grow_faster_than_their_rows_give_a_line_through_zero() -> None:
    found = fit_cost_model([(1, 1.0), (2, 3.0), (4, 9.0)])

    assert 0 == found.fixed_seconds
    assert found.row_seconds > 1


def test_passes_are_measured_in_doubling_sizes_until_one_takes_longer_than_the_budget() -> None:
    model = Timed(Clock(), {PLAIN: lambda size: 1e-3 + 1e-4 * size})
    measured = measure_passes(model, matrix(4), rows(X[:1024]), 10.0, slots=1, clock=model.clock)

    assert [1 << at for at in range(8)] == [size for size, _ in measured]
    assert [1e-3 + 1e-4 * size for size, _ in measured] == pytest.approx([seconds for _, seconds in measured])
    cost = fit_cost_model(measured)
    assert (1e-3, 1e-4) == pytest.approx((cost.fixed_seconds, cost.row_seconds))


def test_no_more_rows_are_measured_than_the_sample_has() -> None:
    model = Timed(Clock(), {PLAIN: lambda size: 1e-5 * size})
    sample = rows(np.ascontiguousarray(X[:5]))

    assert [1, 2, 4] == [n for n, _ in measure_passes(model, matrix(4), sample, 1e3, slots=1, clock=model.clock)]


def test_times_that_do_not_grow_are_fixed_or_per_row_as_the_caller_chooses() -> None:
    assert CostModel(fixed_seconds=3, row_seconds=0) == fit_cost_model([(2, 3.0)])
    assert CostModel(fixed_seconds=0, row_seconds=1.5) == fit_cost_model([(2, 3.0)], if_flat="per_row")


def test_absolute_errors_weigh_the_long_batches_more() -> None:
    samples = [(1, 1.0), (10, 1.2), (1000, 100.0)]
    by_ratio, by_seconds = (fit_cost_model(samples, errors=errors) for errors in ("relative", "absolute"))

    assert abs(by_seconds.seconds(1000) - 100) < abs(by_ratio.seconds(1000) - 100)
    assert abs(by_ratio.seconds(1) - 1) < abs(by_seconds.seconds(1) - 1)


def test_a_cost_model_of_release_0_1_is_read_as_the_milliseconds_that_it_held() -> None:
    held = CostModel.model_validate_json('{"pass_ms": 4.0, "row_ms": 0.5}')

    assert (0.004, 0.0005) == pytest.approx((held.fixed_seconds, held.row_seconds))
    assert "4 ms + n x 0.5 ms" == held.describe("n")


def test_a_machine_of_half_the_speed_takes_twice_as_long() -> None:
    cost = CostModel(fixed_seconds=0.25, row_seconds=0.5)

    assert 2 * cost.seconds(7) == cost.scale(2).seconds(7)
