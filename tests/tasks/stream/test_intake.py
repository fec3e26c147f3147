"""Micro-batches are full by rows, by messages or by bytes, whichever comes first."""

from __future__ import annotations

from collections.abc import Sequence

from tasks.stream.intake import Intake, Terms
from tasks.stream.message import Message
from tasks.stream.microbatch import Dial
from tests.tasks.stream.messages import arrow_rows, json_row, message


class Source:
    """Gives whatever it is asked for."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self.left = list(messages)

    def fetch(self, most: int, enough: int, seconds: float) -> list[Message]:
        got, self.left = self.left[:most], self.left[most:]
        return got


def intake(messages: Sequence[Message], *, rows: int = 1 << 16, in_flight: int = 8192, mb: int = 64) -> Intake:
    return Intake(
        source=Source(messages),
        terms=Terms(in_flight=in_flight, in_flight_bytes=mb << 20, slots=2),
        dial=lambda: Dial(rows=rows, wait_seconds=0.0),
        rests=lambda: False,
        look=lambda: None,
    )


def sizes(taking: Intake) -> list[int]:
    return [len(taking.take(None)) for _ in range(6)]


def test_large_messages_make_batches_of_few_however_many_rows_there_might_be() -> None:
    taken = sizes(intake([message(bytes(1 << 20))] * 100, mb=60))

    assert [10] * 6 == taken


def test_batches_of_small_messages_grow_to_what_fits() -> None:
    taken = sizes(intake([json_row(1)] * 5000, in_flight=400))

    assert taken[0] <= 100
    assert [100] * 4 == taken[1:5]


def test_messages_of_many_rows_count_by_their_rows() -> None:
    taken = sizes(intake([arrow_rows(1, [1.0] * 50)] * 40, rows=200))

    assert [4, 4] == taken[1:3]


def test_no_more_is_taken_than_is_left_to_take() -> None:
    assert 3 == len(intake([json_row(1)] * 10).take(3))
    assert 0 == len(intake([]).take(3))
