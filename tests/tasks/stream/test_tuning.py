"""The dial and the micro-batch, as functions of values."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.stream.batcher import Dial
from tasks.stream.message import Message
from tasks.stream.tuning import SampledSource, Service, choose_batching, fit_cost, fit_recent_cost
from tests.tasks.stream.messages import arrow_rows, decoder, json_row, message

SERVICE = Service(fixed=0.01, per_row=0.001)

positive = st.floats(1e-6, 1.0)


def dial(service: Service, freshness: float, most: int = 100_000, **given: float | None) -> Dial:
    return choose_batching(service, freshness, most, **{"rows": None, "wait_seconds": None} | given)  # type: ignore[arg-type]


def test_service_is_fitted_to_what_was_measured() -> None:
    points = [(rows, 0.01 + 0.001 * rows) for rows in (1, 8, 64)]

    assert pytest.approx(SERVICE.fixed) == fit_cost(points).fixed
    assert pytest.approx(SERVICE.per_row) == fit_cost(points).per_row


@pytest.mark.parametrize(
    "points", [[(10, 0.5)], [(10, 0.5), (10, 0.5)], [(10, 0.5), (20, 0.4)], [(10, 0.1), (20, 0.4)]]
)
def test_a_fit_that_would_be_negative_is_proportional(points: list[tuple[int, float]]) -> None:
    service = fit_cost(points)

    assert 0.0 == service.fixed
    assert 0.0 < service.per_row < 0.06


@pytest.mark.parametrize("rows", [1, 7])
def test_batches_of_one_size_do_not_hold_the_dial_there(rows: int) -> None:
    passes = [(size, 0.001 + 1e-6 * size) for size in (64, 256, 1024)]
    service = fit_recent_cost([(rows, 0.012)] * 50, passes)

    assert pytest.approx(0.012) == service.seconds(rows)
    assert pytest.approx(1e-6) == service.per_row
    assert 1000 < dial(service, 1.0).rows


def test_batches_of_small_sizes_do_not_hold_the_dial_there_either() -> None:
    # A row alone and two together, as long as noise has them take.
    seen = [(1, 0.012), (2, 0.024)] * 25

    assert 1000 < dial(fit_recent_cost(seen, [(64, 0.001), (1024, 0.002)]), 1.0).rows
    assert 2 < dial(fit_recent_cost(seen, ()), 1.0).rows


def test_a_line_through_noise_does_not_make_batches_of_single_rows() -> None:
    # Most batches have few rows and take as long as they must; some were held up, and a backlog was passed at once.
    seen = [(300, 0.012)] * 40 + [(60, 0.4), (300, 0.4), (2048, 0.25), (2048, 0.5), (4096, 0.9)]
    service = fit_recent_cost(seen, ())
    chosen = dial(service, 2.0, wait_seconds=0.05)

    assert 0.05 <= 2 * service.seconds(chosen.rows)
    assert chosen.rows > 100
    assert 0.05 <= 2.1 * 1e-4 * dial(Service(fixed=0.0, per_row=1e-4), 2.0, wait_seconds=0.05).rows


def test_batches_of_several_sizes_are_believed_alone() -> None:
    seen = [(size, SERVICE.seconds(size)) for size in (10, 80, 640)]

    assert pytest.approx(SERVICE.per_row) == fit_recent_cost(seen, [(64, 9.0), (128, 9.1)]).per_row
    assert pytest.approx(SERVICE.fixed) == fit_recent_cost(seen, [(64, 9.0), (128, 9.1)]).fixed


@given(positive, st.floats(1e-7, 1e-2), st.floats(0.001, 100.0), st.integers(1, 1 << 16))
def test_a_message_behind_a_full_batch_is_in_time_where_one_row_can_be(
    fixed: float, per_row: float, freshness: float, most: int
) -> None:
    service = Service(fixed=fixed, per_row=per_row)
    chosen = dial(service, freshness, most)

    assert 1 <= chosen.rows <= most
    if chosen.wait_seconds + 2 * service.seconds(1) <= freshness * (1 - 1e-9):
        assert chosen.wait_seconds + 2 * service.seconds(chosen.rows) <= freshness * (1 + 1e-9)


@given(positive, st.floats(1e-7, 1e-2), st.floats(0.01, 10.0), st.floats(1.0, 10.0))
def test_more_time_never_makes_a_batch_slower_a_row_where_there_is_enough_for_one(
    fixed: float, per_row: float, freshness: float, times: float
) -> None:
    service = Service(fixed=fixed, per_row=per_row)
    enough = max(freshness, 2 * (fixed + per_row) / 0.75 * 1.001)
    less, more = (dial(service, each).rows for each in (enough, enough * times))

    assert service.seconds(more) / more <= service.seconds(less) / less * 1.04


def test_a_larger_batch_that_is_no_faster_is_not_chosen() -> None:
    flat = Service(fixed=0.0, per_row=0.001)

    assert 50 <= dial(flat, 10.0).rows <= 100


def test_what_is_given_is_kept() -> None:
    assert Dial(rows=7, wait_seconds=3.0) == dial(SERVICE, 1.0, rows=7, wait_seconds=3.0)
    assert 7 == dial(SERVICE, 1.0, rows=7).rows
    assert 0.0 == dial(SERVICE, 1.0, wait_seconds=0.0).wait_seconds


@given(positive, st.floats(1e-7, 1e-2), st.floats(0.01, 0.99))
def test_where_the_freshness_is_out_of_reach_rows_at_least_do_not_pile_up(
    fixed: float, per_row: float, share: float
) -> None:
    service = Service(fixed=fixed, per_row=per_row)
    chosen = dial(service, share * (fixed + per_row)).rows

    assert service.seconds(chosen) / chosen <= service.seconds(100_000) / 100_000 * 1.04


class Source:
    def __init__(self, *fetches: list[Message]) -> None:
        self.left = list(fetches)

    def fetch(self, most: int, enough: int, seconds: float) -> list[Message]:
        if not self.left:
            time.sleep(min(seconds, 0.01))
            return []
        return self.left.pop(0)[:most]


def test_rows_are_looked_at_and_then_fetched_in_their_order() -> None:
    first, second, third = [message(b"no", 1)], [json_row(2), arrow_rows(3, [1.0, 2.0])], [json_row(4)]
    peeked = SampledSource(Source(first, second, third))
    sample = peeked.peek(decoder(), lambda: False, None)

    assert sample is not None
    assert 2 == sample.num_rows
    assert [1, 2] == [each.position.number for each in peeked.fetch(2, 2, 0.1)]
    assert [3] == [each.position.number for each in peeked.fetch(9, 1, 0.1)]
    assert [4] == [each.position.number for each in peeked.fetch(9, 1, 0.1)]


def test_messages_that_come_again_are_no_sample() -> None:
    peeked = SampledSource(Source([json_row(1), json_row(2, deliveries=2)]))

    assert peeked.peek(decoder(), lambda: False, None) is None
    assert [1, 2] == [each.position.number for each in peeked.fetch(9, 1, 0.1)]


def test_it_waits_no_longer_than_the_stream_does() -> None:
    asked: list[int] = []

    assert SampledSource(Source()).peek(decoder(), lambda: False, 0.05) is None
    assert SampledSource(Source()).peek(decoder(), lambda: len(asked) > 2 or asked.append(1) is not None, None) is None
