"""What befalls a stream of NATS between two calls and while it is read: made again, cut by retention."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from nats.js.api import AckPolicy, ConsumerConfig

from infra.local.nats import NatsClient, NatsServer
from serving.errors import MessagesLost, StreamReplaced, StreamUnfit
from serving.model.pin import ModelPin
from tasks.batch.manifest import open_predictions
from tasks.stream.message import Message, Poison
from tasks.stream.nats.connection import NatsConnection
from tasks.stream.nats.source import AckTracker, NatsSource
from tasks.stream.opener import ConnectionOpener
from tasks.stream.options import AnySink, FromNats, StreamOptions, ToNats, ToParts
from tests.eventually import eventually
from tests.tasks.stream.messages import KEYS, decoder, emit_messages, emit_next, json_row, take

PIN = ModelPin(name="sum", version="1", model_id=None, source="", digest="0" * 64)


@contextmanager
def opened(
    nats: NatsServer,
    stream: str,
    sink: AnySink,
    warn: Callable[[str], Any] = str,
    in_flight: int = 64,
    lag_seconds: float = 2.0,
    **source: Any,
) -> Any:
    opener = ConnectionOpener(
        decoder=decoder(),
        model=PIN,
        options=StreamOptions(key_columns=KEYS, in_flight=in_flight),
        warn=warn,
        give_up=threading.Event(),
        lag_seconds=lag_seconds,
    )
    with opener.open(FromNats(url=nats.url, stream=stream, **source), sink) as connections:
        yield connections


def publish(client: NatsClient, stream: str, rows: range) -> None:
    client.publish(stream, [json_row(row).payload for row in rows])


def make_again(client: NatsClient, stream: str, rows: range) -> None:
    client.call(client.js.delete_stream(stream))
    client.make(stream, stream)
    publish(client, stream, rows)


@pytest.fixture(params=["table", "messages"])
def sink(request: pytest.FixtureRequest, fresh: str, tmp_path: Path) -> AnySink:
    if request.param == "table":
        return ToParts(destination=str(tmp_path))
    return ToNats(subject=f"{fresh}-scores", stream=f"{fresh}-scores")


def test_a_stream_that_was_made_again_fills_no_table_of_the_one_before(
    nats: NatsServer, nats_client: NatsClient, fresh: str, tmp_path: Path
) -> None:
    sink = ToParts(destination=str(tmp_path))
    nats_client.make(fresh, fresh)
    publish(nats_client, fresh, range(20))
    with opened(nats, fresh, sink) as connections:
        emit_messages(connections, 20)
        make_again(nats_client, fresh, range(100, 150))

        with pytest.raises(StreamReplaced, match=r"must stay the one that was opened.*made again"):
            emit_messages(connections, 50)
    with pytest.raises(StreamReplaced, match=r"table 'stream'.*made again.*another name"), opened(nats, fresh, sink):
        pass

    assert list(range(20)) == sorted(int(each) for each in open_predictions(str(tmp_path)).collect()["id"])


def test_scores_of_a_stream_that_was_made_again_are_no_doubles_of_those_before(
    nats: NatsServer, nats_client: NatsClient, fresh: str
) -> None:
    sink = ToNats(subject=f"{fresh}-scores", stream=f"{fresh}-scores")
    nats_client.make(fresh, fresh)
    publish(nats_client, fresh, range(20))
    with opened(nats, fresh, sink) as connections:
        emit_messages(connections, 20)
    make_again(nats_client, fresh, range(20, 50))
    with opened(nats, fresh, sink) as connections:
        emit_messages(connections, 30)

    assert 50 == nats_client.info(f"{fresh}-scores").state.messages


def test_what_retention_took_before_it_was_read_is_an_error_that_counts_it(
    nats: NatsServer, nats_client: NatsClient, fresh: str, sink: AnySink
) -> None:
    nats_client.make(fresh, fresh, max_msgs=30)
    publish(nats_client, fresh, range(20))
    with opened(nats, fresh, sink) as connections:
        emit_messages(connections, 20)
    publish(nats_client, fresh, range(20, 60))

    with (
        pytest.raises(MessagesLost, match=r"10 messages are gone.*from 21 to 30.*accept_loss"),
        opened(nats, fresh, sink) as connections,
    ):
        emit_messages(connections, 30)
    warnings: list[str] = []
    with opened(nats, fresh, sink, warnings.append, accept_loss=True) as connections:
        emit_messages(connections, 30)
    assert any("10 messages are gone" in words for words in warnings)


def test_retention_that_passes_a_reader_is_an_error_too(
    nats: NatsServer, nats_client: NatsClient, fresh: str, sink: AnySink
) -> None:
    nats_client.make(fresh, fresh, max_msgs=100)
    publish(nats_client, fresh, range(20))
    with opened(nats, fresh, sink, in_flight=8, lag_seconds=0.1) as connections:
        emit_messages(connections, 20)
        # It asks for eight at most, and takes no more of them until they are fetched.
        publish(nats_client, fresh, range(20, 1_000))
        time.sleep(0.5)

        with pytest.raises(MessagesLost, match="messages are gone"):
            emit_messages(connections, 980)


def test_a_first_reader_begins_with_what_there_is(
    nats: NatsServer, nats_client: NatsClient, fresh: str, sink: AnySink
) -> None:
    nats_client.make(fresh, fresh, max_msgs=30)
    publish(nats_client, fresh, range(100))
    with opened(nats, fresh, sink, lag_seconds=0.05) as connections:
        emit_messages(connections, 30)
        # What it has read may go, however much of it.
        publish(nats_client, fresh, range(100, 120))
        emit_messages(connections, 20)
        assert [] == emit_next(connections, 1, seconds=1)


def test_of_messages_with_a_subject_at_most_so_many_are_gone(
    nats: NatsServer, nats_client: NatsClient, fresh: str, sink: AnySink
) -> None:
    nats_client.make(fresh, f"{fresh}.>", max_msgs=30)
    nats_client.publish(f"{fresh}.a", [json_row(1).payload])
    with opened(nats, fresh, sink, subject=f"{fresh}.a") as connections:
        emit_messages(connections, 1)
    nats_client.publish(f"{fresh}.b", [b"1"] * 100)

    with (
        pytest.raises(MessagesLost, match="at most 70 messages are gone"),
        opened(nats, fresh, sink, subject=f"{fresh}.a"),
    ):
        pass


def take_and_die(
    nats: NatsServer, stream: str, count: int, meanwhile: Callable[[], object] = bool, **address: Any
) -> list[Message]:
    """Fetch so many messages, hold them for a while and go as a killed scorer does: nothing is given back."""
    connection = NatsConnection(nats.url, str, threading.Event())
    try:
        source = NatsSource(
            connection, FromNats(url=nats.url, stream=stream, **address), in_flight=64, bytes_max=1 << 22, start=None
        )
        found = take(source, count)
        meanwhile()
        return found
    finally:
        connection.close()


def test_a_message_is_redelivered_after_any_number_of_dead_scorers(
    nats: NatsServer, nats_client: NatsClient, fresh: str
) -> None:
    nats_client.make(fresh, fresh)
    publish(nats_client, fresh, range(3))
    settings = {"ack_wait_seconds": 1.0, "max_deliver": 3}
    came = [take_and_die(nats, fresh, 3, **settings) for _ in range(2)]
    # From now on each may be what ends a scorer, and comes alone.
    alone = [take_and_die(nats, fresh, 1, **settings) for _ in range(9)]

    assert [[1, 2, 3]] * 2 == [sorted(each.position.number for each in found) for found in came]
    assert [1] * 9 == [len(found) for found in alone]
    assert {1, 2, 3} == {each.position.number for (each,) in alone}
    assert all(least <= each.deliveries for least, found in enumerate(came, 1) for each in found)
    assert all(each.deliveries >= 3 for (each,) in alone)
    assert max(each.deliveries for (each,) in alone) > 3


def test_messages_of_a_slow_scorer_are_redelivered_once_it_is_dead(
    nats: NatsServer, nats_client: NatsClient, fresh: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nats_client.make(fresh, fresh)
    publish(nats_client, fresh, range(3))
    settings = {"ack_wait_seconds": 1.0, "max_deliver": 3}

    def read_deliveries() -> int:
        delivered = nats_client.call(nats_client.js.consumer_info(fresh, "overnight")).delivered
        return delivered.consumer_seq if delivered else 0

    # As on a machine that leaves it no time to say that it works on them.
    with monkeypatch.context() as patch:
        patch.setattr(AckTracker, "extend_due", lambda *_: [])
        first = take_and_die(nats, fresh, 3, lambda: eventually(read_deliveries, lambda count: count >= 9), **settings)
    second = [each for _ in range(9) for each in take_and_die(nats, fresh, 1, **settings)]

    assert [1, 1, 1] == [each.deliveries for each in first]
    assert 9 == len(second)
    assert {1, 2, 3} == {each.position.number for each in second}


def test_a_consumer_that_an_earlier_version_made_gives_nothing_up_any_more(
    nats: NatsServer, nats_client: NatsClient, fresh: str
) -> None:
    nats_client.make(fresh, fresh)
    publish(nats_client, fresh, range(3))
    earlier = ConsumerConfig(
        durable_name="overnight", ack_policy=AckPolicy.EXPLICIT, ack_wait=1.0, max_deliver=3, max_ack_pending=64
    )
    nats_client.call(nats_client.js.add_consumer(fresh, config=earlier))
    with pytest.raises(StreamUnfit, match="max_deliver is 3, not 4"):
        take_and_die(nats, fresh, 3, ack_wait_seconds=1.0, max_deliver=4)
    came = [take_and_die(nats, fresh, 3, ack_wait_seconds=1.0, max_deliver=3) for _ in range(2)]
    alone = [take_and_die(nats, fresh, 1, ack_wait_seconds=1.0, max_deliver=3) for _ in range(9)]

    assert {1, 2, 3} == {each.position.number for (each,) in alone}
    assert [[1, 2, 3]] * 2 == [sorted(each.position.number for each in found) for found in came]


def test_there_is_a_warning_of_messages_that_the_consumer_of_an_earlier_version_gave_up(
    nats: NatsServer, nats_client: NatsClient, fresh: str
) -> None:
    nats_client.make(fresh, fresh)
    publish(nats_client, fresh, range(5))
    earlier = ConsumerConfig(
        durable_name="overnight", ack_policy=AckPolicy.EXPLICIT, ack_wait=0.2, max_deliver=3, max_ack_pending=64
    )
    nats_client.call(nats_client.js.add_consumer(fresh, config=earlier))

    async def let_come() -> None:
        reader = await nats_client.js.pull_subscribe_bind("overnight", fresh)
        deliveries: Counter[int] = Counter()
        # The server gives up the first two once the last of these is not acknowledged either.
        while min(deliveries[1], deliveries[2]) < 3 or len(deliveries) < 5:
            with suppress(TimeoutError):
                for each in await reader.fetch(5, timeout=1.0):
                    deliveries[each.metadata.sequence.stream] += 1
                    if each.metadata.sequence.stream > 2:
                        await each.ack_sync()
        with suppress(TimeoutError):
            await reader.fetch(1, timeout=1.0)

    nats_client.call(let_come())
    nats_client.call(nats_client.js.add_consumer(fresh, config=earlier.evolve(ack_wait=1.0)))
    warnings: list[str] = []
    sink = ToNats(subject=f"{fresh}-scores", stream=f"{fresh}-scores")
    with opened(nats, fresh, sink, warnings.append, ack_wait_seconds=1.0, max_deliver=3):
        pass

    assert any("2 messages between 1 and 5 were given up" in words for words in warnings), warnings


@pytest.mark.machines
def test_a_dead_letter_that_is_redelivered_after_the_window_is_there_once(
    nats: NatsServer, nats_client: NatsClient, fresh: str
) -> None:
    nats_client.make(fresh, fresh)
    nats_client.make(f"{fresh}-dead", f"{fresh}-dead", duplicate_window=3)
    publish(nats_client, fresh, range(3))
    sink = ToNats(subject=f"{fresh}-scores", stream=f"{fresh}-scores")
    settings = {"ack_wait_seconds": 1.0, "max_deliver": 3, "dead_letters": f"{fresh}-dead"}
    came = []
    # On its last delivery each comes alone.
    for count in (3, 3, 1, 1, 1):
        with opened(nats, fresh, sink, **settings) as connections:
            came.append(take(connections.source, count))
            connections.dead_letters.send([Poison(message=each, column="", reason="bad") for each in came[-1]])
        time.sleep(4)

    assert [3, 3, 1, 1, 1] == list(map(len, came))
    assert {1, 2, 3} == {each.position.number for found in came[2:] for each in found}
    assert 3 == nats_client.info(f"{fresh}-dead").state.messages
