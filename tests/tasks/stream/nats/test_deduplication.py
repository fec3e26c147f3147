"""What the output holds is known when its server has forgotten it: after a long time without the server."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from infra.local.nats import NatsClient, nats_server
from tasks.stream.nats.connection import NatsConnection
from tasks.stream.nats.deduplication import EmittedIds
from tasks.stream.nats.sink import OutgoingMessage, Publisher
from tasks.stream.nats.source import NatsSource
from tasks.stream.options import FromNats
from tests.flows.streams import kill_server
from tests.tasks.stream.messages import take

pytestmark = pytest.mark.servers


@pytest.mark.parametrize("remembered", [3, 1])
def test_a_server_that_was_gone_for_longer_than_its_window_gets_no_score_twice(
    tmp_path: Path, remembered: int, held_port: int
) -> None:
    """A server that is killed may remember fewer deliveries than there were: those whose scores it has already."""
    source = FromNats(stream="ROWS")
    server = nats_server(tmp_path, port=held_port)
    connection = NatsConnection(server.url, lambda _: None, threading.Event())
    sink_connection = NatsConnection(server.url, lambda _: None, threading.Event())
    with NatsClient(server.url) as client:
        client.make("ROWS", "rows")
        client.make("SCORES", "scores", duplicate_window=1.0)
        client.publish("rows", [b"1", b"2", b"3"])
    reader = NatsSource(connection, source, in_flight=remembered, bytes_max=1 << 20, start=None)
    take(reader, remembered)
    emitted_ids = EmittedIds(
        connection=connection,
        source=source,
        sink_connection=sink_connection,
        sink_stream="SCORES",
        origin="o",
        window_seconds=1.0,
    )
    emitted_ids.read_after_pause()
    publisher = Publisher(sink_connection, emitted_ids.find_known)
    scores = [OutgoingMessage(subject="scores", payload=b"%d" % at, id=f"o.0.{at}", headers={}) for at in (1, 2, 3)]
    publisher.publish(scores[:2])
    # The third has not gone out, and none of them is acknowledged.
    kill_server(server)
    time.sleep(1.5)
    server.stop()
    with nats_server(tmp_path, port=server.port) as again:
        publisher.publish(scores)
        with NatsClient(again.url) as client:
            stored = Counter(each.payload for each in client.read("SCORES"))
        reader.close()
        sink_connection.close()
        connection.close()

    assert Counter([b"1", b"2", b"3"]) == stored


def test_a_server_that_is_back_is_used_once_it_is_known_how_long_it_was_gone(tmp_path: Path, held_port: int) -> None:
    server = nats_server(tmp_path, port=held_port)
    connection = NatsConnection(server.url, lambda _: None, threading.Event())
    reconnected, may_say_so = threading.Event(), threading.Event()
    flush = connection.client.flush

    async def flush_slowly(*given: Any, **named: Any) -> None:
        await flush(*given, **named)
        reconnected.set()
        await asyncio.to_thread(may_say_so.wait)

    connection.client.flush = flush_slowly  # type: ignore[method-assign]  # the library says so after it
    kill_server(server)
    server.stop()
    with nats_server(tmp_path, port=server.port), ThreadPoolExecutor(1) as pool:
        assert reconnected.wait(60)
        waiting = pool.submit(connection.run, connection.wait_until_connected())
        assert connection.client.is_connected
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        may_say_so.set()
        waiting.result(60)
        connection.close()

    assert 1 == len(connection.outages)


def test_an_emitted_score_is_found_long_after_the_window_and_repeatedly(tmp_path: Path) -> None:
    source = FromNats(stream="ROWS", ack_wait_seconds=1.0, max_deliver=3)
    with nats_server(tmp_path) as server:
        connection = NatsConnection(server.url, lambda _: None, threading.Event())
        with NatsClient(server.url) as client:
            client.make("ROWS", "rows")
            client.make("SCORES", "scores", duplicate_window=1.0)
            client.publish("rows", [b"1", b"2", b"3", b"4"])
            reader = NatsSource(connection, source, in_flight=10, bytes_max=1 << 20, start=None)
            messages = take(reader, 4)
            emitted_ids = EmittedIds(
                connection=connection,
                source=source,
                sink_connection=connection,
                sink_stream="SCORES",
                origin="o",
                window_seconds=1.0,
            )
            found = [emitted_ids.find_emitted(messages)]
            client.publish("scores", [b"1"], [{"Nats-Msg-Id": "o.0.1"}])
            # Longer than three deliveries take.
            time.sleep(4)
            client.publish("scores", [b"3"], [{"Nats-Msg-Id": "o.0.3"}])
            found.append(emitted_ids.find_emitted(messages))
            time.sleep(1.5)
            client.publish("scores", [b"4"], [{"Nats-Msg-Id": "o.0.4"}])
            found.append(emitted_ids.find_emitted(messages))
        reader.close()
        connection.close()

    assert [[], [1, 3], [1, 3, 4]] == [sorted(place.number for place in each) for each in found]
