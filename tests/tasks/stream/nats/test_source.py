"""NATS as a source: within bounds, in order where a table is filled, and what becomes of a consumer that is deleted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.local.nats import NatsClient, NatsServer
from serving.errors import BrokerFault, StreamUnfit
from tasks.stream.message import Message, Position
from tasks.stream.nats.connection import NatsConnection
from tasks.stream.nats.consumer import subjects_overlap
from tasks.stream.nats.source import AckTracker, NatsSource
from tasks.stream.options import FromNats
from tests.eventually import eventually
from tests.tasks.stream.messages import message, take


def test_a_tracked_message_is_extended_at_half_of_the_ack_wait_until_it_is_done() -> None:
    tracker = AckTracker(10.0)
    tracker.track(1, "one", 0.0)
    tracker.track(2, "two", 3.0)

    assert [] == tracker.extend_due(4.9)
    assert ["one"] == tracker.extend_due(5.0)
    assert ["two"] == tracker.extend_due(8.0)
    tracker.forget([message(b"", 1)])
    assert ["two"] == tracker.extend_due(20.0)


def test_a_copy_of_a_tracked_message_is_no_new_one_but_its_receipt_is_used() -> None:
    tracker = AckTracker(10.0)

    assert [True, False] == [tracker.track(1, "first", 0.0), tracker.track(1, "again", 2.0)]
    assert ["again"] == tracker.extend_due(7.0)
    tracker.forget([message(b"", 1)])
    assert tracker.track(1, "third", 8.0)


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans(), st.floats(0, 3)), max_size=60))
def test_no_tracked_message_waits_for_longer_than_half_of_the_ack_wait(steps: list[tuple[int, bool, float]]) -> None:
    tracker, told, now = AckTracker(8.0), dict[int, float](), 0.0
    for number, done, pause in steps:
        now += pause
        if done:
            tracker.forget([message(b"", position=Position(0, number))])
            told.pop(number, None)
        else:
            tracker.track(number, str(number), now)
            told[number] = now
        for receipt in tracker.extend_due(now):
            told[int(receipt)] = now

        assert all(now - last < 4.0 for last in told.values())


@contextmanager
def reading(
    server: NatsServer,
    stream: str,
    *,
    start: int | None = None,
    in_flight: int = 100,
    bytes_max: int = 4 << 20,
    limit: int | None = None,
    lag_seconds: float = 2.0,
    clock: Callable[[], float] = time.monotonic,
    **address: Any,
) -> Generator[NatsSource]:
    warnings: list[str] = []
    connection = NatsConnection(server.url, warnings.append, threading.Event())
    try:
        source = NatsSource(
            connection,
            FromNats(stream=stream, **address),
            in_flight=in_flight,
            bytes_max=bytes_max,
            start=start,
            limit=limit,
            lag_seconds=lag_seconds,
            clock=clock,
        )
        yield source
        source.close()
    finally:
        connection.close()


def numbers(messages: list[Message]) -> list[int]:
    return [message.position.number for message in messages]


@pytest.mark.parametrize(
    ("one", "other", "fits"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a.c", False),
        ("a.*", "a.b", True),
        ("a.*", "a.b.c", False),
        (">", "a.b.c", True),
        ("a.>", "a", False),
        ("a.>", "a.b.c", True),
        ("*.b", "a.*", True),
        ("*.b", "a.c", False),
    ],
)
def test_two_patterns_overlap_where_a_subject_can_fit_both(one: str, other: str, fits: bool) -> None:  # noqa: FBT001
    assert fits == subjects_overlap(one, other) == subjects_overlap(other, one)


def test_suspects_are_delivered_few_at_a_time_and_the_next_ones_once_those_are_done(
    nats: NatsServer, nats_client: NatsClient, fresh: str
) -> None:
    nats_client.make(fresh, fresh)
    nats_client.publish(fresh, [b"%d" % at for at in range(100)])
    for _ in range(3):
        with reading(nats, fresh, in_flight=200, ack_wait_seconds=1.0) as source:
            take(source, 100)
    with reading(nats, fresh, in_flight=200, ack_wait_seconds=1.0) as source:
        steps: list[list[int]] = []
        while sum(map(len, steps)) < 100:
            found = take(source, 1)
            # Whatever else comes before these are done.
            time.sleep(0.3)
            found += source.fetch(100, 0, 0.0)
            steps.append([message.deliveries for message in found])
            source.acknowledge(found, [])

    # How many of the others are due again at once is up to the server.
    assert [4] == steps[0]
    assert {4} == {each for step in steps for each in step}
    assert max(map(len, steps)) <= 64


def test_messages_in_flight_are_bounded_and_unfetched_ones_are_redelivered_at_once(
    nats: NatsServer, nats_client: NatsClient, fresh: str
) -> None:
    nats_client.make(fresh, fresh)
    nats_client.publish(fresh, [b"%d" % at for at in range(300)])
    with reading(nats, fresh, in_flight=50) as source:
        first = take(source, 20)
        eventually(
            lambda: nats_client.call(nats_client.js.consumer_info(fresh, "overnight")).num_ack_pending,
            lambda pending: pending == 50,
        )
        source.acknowledge(first[:10], first[10:])
        lag = source.lag()
    with reading(nats, fresh, in_flight=50) as source:
        # A request that was open when twenty were acknowledged may have brought more: they are returned as well.
        second = take(source, 50)

    assert list(range(1, 21)) == numbers(first)
    assert lag is not None
    assert 200 <= lag <= 280
    assert set(range(21, 51)) <= set(numbers(second))


@pytest.mark.parametrize("work", ["_request_more", "_look_for_loss"])
def test_an_error_that_ends_the_work_behind_a_source_is_raised_where_messages_are_fetched(
    work: str, nats: NatsServer, nats_client: NatsClient, fresh: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise KeyError(work)

    nats_client.make(fresh, fresh)
    with reading(nats, fresh, lag_seconds=0.01) as source:
        monkeypatch.setattr(source, work, fail)
        with pytest.raises(
            BrokerFault, match=rf"requested until the stream is left, but that ended with KeyError\('{work}"
        ):
            source.fetch(1, 1, 60)


def test_what_is_scored_for_longer_than_the_wait_for_its_acknowledgement_does_not_come_again(
    nats: NatsServer, nats_client: NatsClient, fresh: str
) -> None:
    nats_client.make(fresh, fresh)
    nats_client.publish(fresh, [b"%d" % at for at in range(30)])
    # Its clock is so fast that it finds the time due whenever it looks, which a busy machine may keep it from.
    with reading(nats, fresh, ack_wait_seconds=3.0, clock=lambda: 100 * time.monotonic()) as source:
        first = take(source, 20)
        time.sleep(4)
        rest = take(source, 10)
        state = nats_client.call(nats_client.js.consumer_info(fresh, "overnight"))
        source.acknowledge([*first, *rest], [])
        more = source.fetch(1, 1, 0.3)

    assert list(range(1, 31)) == numbers(first) + numbers(rest)
    assert (0, 30) == (state.num_redelivered, state.num_ack_pending)
    assert [] == more


def test_no_more_is_taken_than_the_limit_so_that_what_is_left_has_not_come_in_vain(
    nats: NatsServer, nats_client: NatsClient, fresh: str
) -> None:
    nats_client.make(fresh, fresh)
    nats_client.publish(fresh, [b"%d" % at for at in range(300)])
    found = []
    for _ in range(3):
        with reading(nats, fresh, limit=70) as source:
            found.append(take(source, 70))
            source.acknowledge(found[-1], [])

    state = nats_client.call(nats_client.js.consumer_info(fresh, "overnight"))
    assert list(range(1, 211)) == [number for each in found for number in numbers(each)]
    assert (210, 0) == (state.delivered.consumer_seq if state.delivered else 0, state.num_redelivered)


def test_the_lag_grows_while_nothing_is_taken(nats: NatsServer, nats_client: NatsClient, fresh: str) -> None:
    nats_client.make(fresh, fresh)
    nats_client.publish(fresh, [b"1"] * 100)
    with reading(nats, fresh, in_flight=40, lag_seconds=0.1) as source:
        take(source, 1)
        nats_client.publish(fresh, [b"1"] * 500)
        eventually(source.lag, lambda lag: lag == 599)


def test_bytes_are_bounded_too(nats: NatsServer, nats_client: NatsClient, fresh: str) -> None:
    nats_client.make(fresh, fresh)
    nats_client.publish(fresh, [bytes(500_000)] * 30)
    with reading(nats, fresh, bytes_max=2 << 20) as source:
        take(source, 1)
        time.sleep(1.0)
        state = nats_client.call(nats_client.js.consumer_info(fresh, "overnight"))
        rest = take(source, 29)

    assert state.num_ack_pending <= 12
    assert list(range(2, 31)) == numbers(rest)


def test_a_table_is_read_in_order_from_where_it_ends_and_again_where_its_consumer_is_lost(
    nats: NatsServer, nats_client: NatsClient, fresh: str
) -> None:
    nats_client.make(fresh, fresh)
    nats_client.publish(fresh, [b"%d" % at for at in range(200)])
    nats_client.call(nats_client.js.delete_msg(fresh, 60))
    with reading(nats, fresh, start=50, in_flight=40) as source:
        first = take(source, 30)
        (consumer,) = nats_client.call(nats_client.js.consumers_info(fresh))
        nats_client.call(nats_client.js.delete_consumer(fresh, consumer.name))
        rest = take(source, 120)

    assert [number for number in range(50, 201) if number != 60] == numbers(first) + numbers(rest)


def test_a_consumer_that_is_deleted_ends_the_stream_by_name(
    nats: NatsServer, nats_client: NatsClient, fresh: str
) -> None:
    nats_client.make(fresh, fresh)
    with reading(nats, fresh) as source:
        source.fetch(1, 1, 0.1)
        nats_client.call(nats_client.js.delete_consumer(fresh, "overnight"))

        with pytest.raises(BrokerFault, match=rf"The consumer 'overnight' of '{fresh}' must stay, but was deleted"):
            take(source, 1)


def test_a_stream_that_deletes_what_is_acknowledged_fills_no_table(
    nats: NatsServer, nats_client: NatsClient, fresh: str
) -> None:
    nats_client.make(fresh, fresh, retention="workqueue")

    with pytest.raises(StreamUnfit, match="must keep its messages for a table of parts"), reading(nats, fresh, start=0):
        pass
