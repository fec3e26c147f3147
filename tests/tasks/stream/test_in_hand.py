"""The server is told of what is in hand in time, and of nothing else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tasks.stream.in_hand import InHand
from tasks.stream.message import Place
from tests.tasks.stream.messages import message


def test_what_is_in_hand_is_told_of_each_half_wait_until_it_is_done() -> None:
    hand = InHand(10.0)
    hand.take(1, "one", 0.0)
    hand.take(2, "two", 3.0)

    assert [] == hand.due(4.9)
    assert ["one"] == hand.due(5.0)
    assert ["two"] == hand.due(8.0)
    hand.drop([message(b"", 1)])
    assert ["two"] == hand.due(20.0)


def test_a_copy_of_what_is_in_hand_is_told_apart_and_its_receipt_is_the_one_that_counts() -> None:
    hand = InHand(10.0)

    assert [True, False] == [hand.take(1, "first", 0.0), hand.take(1, "again", 2.0)]
    assert ["again"] == hand.due(7.0)
    hand.drop([message(b"", 1)])
    assert hand.take(1, "third", 8.0)


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans(), st.floats(0, 3)), max_size=60))
def test_no_message_in_hand_waits_for_longer_than_half_and_a_look(steps: list[tuple[int, bool, float]]) -> None:
    hand, told, now = InHand(8.0), dict[int, float](), 0.0
    for number, done, pause in steps:
        now += pause
        if done:
            hand.drop([message(b"", place=Place(0, number))])
            told.pop(number, None)
        else:
            hand.take(number, str(number), now)
            told[number] = now
        for receipt in hand.due(now):
            told[int(receipt)] = now

        assert all(now - last < 4.0 for last in told.values())
