"""Micro-batches are full by rows, by messages or by bytes, whichever comes first."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from serving.model.batching import BatchingConfig
from tasks.stream.batcher import Batcher, StreamLimits, compute_wait, quarantine_size
from tasks.stream.message import Message
from tests.tasks.stream.messages import arrow_rows, json_row, message


class Source:
    """Gives whatever it is asked for."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self.left = list(messages)

    def fetch(self, messages_max: int, messages_min: int, timeout_seconds: float) -> list[Message]:
        got, self.left = self.left[:messages_max], self.left[messages_max:]
        return got


def batcher(messages: Sequence[Message], *, rows: int = 1 << 16, in_flight: int = 8192, mb: int = 64) -> Batcher:
    return Batcher(
        source=Source(messages),
        limits=StreamLimits(in_flight=in_flight, in_flight_bytes=mb << 20, slots=2),
        batching=lambda: BatchingConfig(batch_size_max=rows),
        is_stopping=lambda: False,
        check_running=lambda: None,
    )


def sizes(taking: Batcher) -> list[int]:
    return [len(taking.next_batch(None)) for _ in range(6)]


def test_batches_of_large_messages_are_full_by_their_bytes() -> None:
    taken = sizes(batcher([message(bytes(1 << 20))] * 100, mb=60))

    assert [10] * 6 == taken


def test_batches_of_small_messages_grow_to_what_fits() -> None:
    taken = sizes(batcher([json_row(1)] * 5000, in_flight=400))

    assert taken[0] <= 100
    assert [100] * 4 == taken[1:5]


def test_messages_of_many_rows_count_by_their_rows() -> None:
    taken = sizes(batcher([arrow_rows(1, [1.0] * 50)] * 40, rows=200))

    assert [4, 4] == taken[1:3]


def test_no_more_is_taken_than_is_left_to_take() -> None:
    assert 3 == len(batcher([json_row(1)] * 10).next_batch(3))
    assert 0 == len(batcher([]).next_batch(3))


@given(st.integers(1, 1000), st.integers(0, 2000), st.floats(0, 10))
def test_a_batch_waits_until_it_is_full_or_its_time_is_up(full: int, rows: int, waited: float) -> None:
    pause = compute_wait(BatchingConfig(batch_size_max=full, wait_ms_max=2000), rows, waited)

    assert (pause == 0.0) == (rows >= full or waited >= 2.0)
    assert pause <= 2.0


def test_a_redelivered_message_is_scored_with_fewer_others_each_time() -> None:
    assert [None, None, 64, 16, 4, 1, 1] == [quarantine_size(deliveries, 20) for deliveries in (1, 3, 4, 5, 6, 7, 15)]
    assert [None, 64, 1] == [quarantine_size(deliveries, None) for deliveries in (3, 4, 100)]


def test_a_message_whose_last_deliveries_are_near_is_scored_alone() -> None:
    assert [None, 1, 1] == [quarantine_size(deliveries, 6) for deliveries in (3, 4, 5)]


def test_a_message_on_its_last_delivery_is_alone_even_if_it_is_no_suspect() -> None:
    assert [None, None, 1] == [quarantine_size(deliveries, 3) for deliveries in (1, 2, 3)]
