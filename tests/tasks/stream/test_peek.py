"""The first messages are looked at, and scored all the same."""

from __future__ import annotations

import time

from tasks.stream.message import Message
from tasks.stream.peek import Peeked
from tests.tasks.stream.messages import arrow_rows, decoder, json_row, message


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
    peeked = Peeked(Source(first, second, third))
    sample = peeked.peek(decoder(), lambda: False, None)

    assert sample is not None
    assert 2 == sample.num_rows
    assert [1, 2] == [each.place.number for each in peeked.fetch(2, 2, 0.1)]
    assert [3] == [each.place.number for each in peeked.fetch(9, 1, 0.1)]
    assert [4] == [each.place.number for each in peeked.fetch(9, 1, 0.1)]


def test_messages_that_come_again_are_no_sample() -> None:
    peeked = Peeked(Source([json_row(1), json_row(2, deliveries=2)]))

    assert peeked.peek(decoder(), lambda: False, None) is None
    assert [1, 2] == [each.place.number for each in peeked.fetch(9, 1, 0.1)]


def test_it_waits_no_longer_than_the_stream_does() -> None:
    asked: list[int] = []

    assert Peeked(Source()).peek(decoder(), lambda: False, 0.05) is None
    assert Peeked(Source()).peek(decoder(), lambda: len(asked) > 2 or asked.append(1) is not None, None) is None
