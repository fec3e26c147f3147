"""The batching of micro-batches as a function of values, and the sample of a stream."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.model.batching import BatchingConfig, CostModel
from tasks.stream.message import Message
from tasks.stream.tuning import SampledSource, choose_stream_batching, fit_recent_cost
from tests.tasks.stream.messages import arrow_rows, decoder, json_row, message

COST = CostModel(fixed_seconds=0.01, row_seconds=0.001)

positive = st.floats(1e-6, 1.0)


def choose(cost: CostModel, freshness: float, rows_max: int = 100_000, **given: float | None) -> BatchingConfig:
    return choose_stream_batching(cost, freshness, rows_max, **{"rows": None, "wait_seconds": None} | given)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [1, 7])
def test_batches_of_one_size_do_not_stay_that_small(rows: int) -> None:
    passes = [(size, 0.001 + 1e-6 * size) for size in (64, 256, 1024)]
    cost = fit_recent_cost([(rows, 0.012)] * 50, passes)

    assert pytest.approx(0.012) == cost.seconds(rows)
    assert pytest.approx(1e-6) == cost.row_seconds
    assert 1000 < choose(cost, 1.0).batch_size_max


def test_batches_of_two_small_sizes_do_not_stay_that_small() -> None:
    # One row and two rows, where noise doubles the time.
    recent = [(1, 0.012), (2, 0.024)] * 25

    assert 1000 < choose(fit_recent_cost(recent, [(64, 0.001), (1024, 0.002)]), 1.0).batch_size_max
    assert 2 < choose(fit_recent_cost(recent, ()), 1.0).batch_size_max


def test_a_line_through_noise_does_not_make_batches_of_single_rows() -> None:
    # Most batches have few rows and are fast; some were delayed, and a backlog made large ones.
    recent = [(300, 0.012)] * 40 + [(60, 0.4), (300, 0.4), (2048, 0.25), (2048, 0.5), (4096, 0.9)]
    cost = fit_recent_cost(recent, ())
    chosen = choose(cost, 2.0, wait_seconds=0.05)

    assert 0.05 <= 2 * cost.seconds(chosen.batch_size_max)
    assert chosen.batch_size_max > 100
    assert (
        0.05
        <= 2.1 * 1e-4 * choose(CostModel(fixed_seconds=0.0, row_seconds=1e-4), 2.0, wait_seconds=0.05).batch_size_max
    )


def test_batches_of_several_sizes_are_fitted_without_passes() -> None:
    recent = [(size, COST.seconds(size)) for size in (10, 80, 640)]

    assert pytest.approx(COST.row_seconds) == fit_recent_cost(recent, [(64, 9.0), (128, 9.1)]).row_seconds
    assert pytest.approx(COST.fixed_seconds) == fit_recent_cost(recent, [(64, 9.0), (128, 9.1)]).fixed_seconds


@given(positive, st.floats(1e-7, 1e-2), st.floats(0.001, 100.0), st.integers(1, 1 << 16))
def test_a_message_after_a_full_batch_is_in_time_where_one_row_can_be(
    fixed: float, per_row: float, freshness: float, rows_max: int
) -> None:
    cost = CostModel(fixed_seconds=fixed, row_seconds=per_row)
    chosen = choose(cost, freshness, rows_max)

    assert 1 <= chosen.batch_size_max <= rows_max
    if chosen.wait_seconds_max + 2 * cost.seconds(1) <= freshness * (1 - 1e-9):
        assert chosen.wait_seconds_max + 2 * cost.seconds(chosen.batch_size_max) <= freshness * (1 + 1e-9)


@given(positive, st.floats(1e-7, 1e-2), st.floats(0.01, 10.0), st.floats(1.0, 10.0))
def test_more_time_never_makes_a_batch_slower_per_row_where_there_is_enough_for_one(
    fixed: float, per_row: float, freshness: float, times: float
) -> None:
    cost = CostModel(fixed_seconds=fixed, row_seconds=per_row)
    enough = max(freshness, 2 * (fixed + per_row) / 0.75 * 1.001)
    less, more = (choose(cost, each).batch_size_max for each in (enough, enough * times))

    assert cost.seconds(more) / more <= cost.seconds(less) / less * 1.04


def test_a_larger_batch_that_is_no_faster_is_not_chosen() -> None:
    flat = CostModel(fixed_seconds=0.0, row_seconds=0.001)

    assert 50 <= choose(flat, 10.0).batch_size_max <= 100


def test_given_rows_and_waits_are_kept() -> None:
    assert BatchingConfig(batch_size_max=7, wait_ms_max=3000) == choose(COST, 1.0, rows=7, wait_seconds=3.0)
    assert 7 == choose(COST, 1.0, rows=7).batch_size_max
    assert 0.0 == choose(COST, 1.0, wait_seconds=0.0).wait_seconds_max


@given(positive, st.floats(1e-7, 1e-2), st.floats(0.01, 0.99))
def test_where_the_freshness_is_out_of_reach_a_backlog_does_not_grow(
    fixed: float, per_row: float, share: float
) -> None:
    cost = CostModel(fixed_seconds=fixed, row_seconds=per_row)
    chosen = choose(cost, share * (fixed + per_row)).batch_size_max

    assert cost.seconds(chosen) / chosen <= cost.seconds(100_000) / 100_000 * 1.04


class Source:
    def __init__(self, *fetches: list[Message]) -> None:
        self.left = list(fetches)

    def fetch(self, messages_max: int, messages_min: int, timeout_seconds: float) -> list[Message]:
        if not self.left:
            time.sleep(min(timeout_seconds, 0.01))
            return []
        return self.left.pop(0)[:messages_max]


def test_messages_that_are_all_poison_wait_for_few_fetches_for_a_readable_one() -> None:
    source = SampledSource(Source([message(b"no", 1)], *([] for _ in range(9)), [json_row(2)]))

    assert source.read_sample(decoder(), lambda: False, None) is None
    assert [1] == [each.position.number for each in source.fetch(2, 1, 0.1)]


def test_the_messages_of_a_sample_are_fetched_afterwards_in_their_order() -> None:
    first, second, third = [message(b"no", 1)], [json_row(2), arrow_rows(3, [1.0, 2.0])], [json_row(4)]
    source = SampledSource(Source(first, second, third))
    sample = source.read_sample(decoder(), lambda: False, None)

    assert sample is not None
    assert 2 == sample.num_rows
    assert [1, 2] == [each.position.number for each in source.fetch(2, 2, 0.1)]
    assert [3] == [each.position.number for each in source.fetch(9, 1, 0.1)]
    assert [4] == [each.position.number for each in source.fetch(9, 1, 0.1)]


def test_redelivered_messages_are_no_sample() -> None:
    source = SampledSource(Source([json_row(1), json_row(2, deliveries=2)]))

    assert source.read_sample(decoder(), lambda: False, None) is None
    assert [1, 2] == [each.position.number for each in source.fetch(9, 1, 0.1)]


def test_a_sample_is_waited_for_no_longer_than_the_stream_runs() -> None:
    asked: list[int] = []

    assert SampledSource(Source()).read_sample(decoder(), lambda: False, 0.05) is None
    assert (
        SampledSource(Source()).read_sample(decoder(), lambda: len(asked) > 2 or asked.append(1) is not None, None)
        is None
    )
