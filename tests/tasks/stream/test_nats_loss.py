"""What befalls a stream of NATS between two calls and while it is read: made again, cut by retention."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from infra.local.nats import NatsServer
from infra.local.nats_client import NatsClient
from serving.errors import MessagesLost, StreamReplaced
from serving.registry import ModelPin
from tasks.batch.predictions import open_predictions
from tasks.stream.addresses import AnySink, FromNats, ToNats, ToParts
from tasks.stream.ends import Ends
from tasks.stream.message import Message
from tasks.stream.opening import Opener
from tasks.stream.options import StreamOptions
from tests.tasks.stream.messages import KEYS, decoder, json_row, score

PIN = ModelPin(name="sum", version="1", model_id=None, source="", digest="0" * 64)


@contextmanager
def opened(
    nats: NatsServer,
    stream: str,
    sink: AnySink,
    say: Callable[[str], Any] = str,
    in_flight: int = 64,
    **source: Any,
) -> Any:
    opener = Opener(
        decoder=decoder(),
        model=PIN,
        options=StreamOptions(key_columns=KEYS, in_flight=in_flight),
        say=say,
        give_up=threading.Event(),
    )
    with opener.opened(FromNats(url=nats.url, stream=stream, **source), sink) as ends:
        yield ends


def run(ends: Ends, count: int, seconds: float = 60.0) -> list[Message]:
    """Fetch so many messages, emit them and acknowledge them."""
    found: list[Message] = []
    until = time.monotonic() + seconds
    while len(found) < count and time.monotonic() < until:
        got = ends.source.fetch(count - len(found), 1, 0.2)
        if got:
            ends.sink.emit([score(got)])
            ends.receipts.acknowledge(got, [])
        found += got
    return found


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
    with opened(nats, fresh, sink) as ends:
        run(ends, 20)
        make_again(nats_client, fresh, range(100, 150))

        with pytest.raises(StreamReplaced, match=r"must stay the one that was opened.*made again"):
            run(ends, 50)
    with pytest.raises(StreamReplaced, match=r"table 'stream'.*made again.*another name"), opened(nats, fresh, sink):
        pass

    assert list(range(20)) == sorted(int(each) for each in open_predictions(str(tmp_path)).collect()["id"])


def test_scores_of_a_stream_that_was_made_again_are_no_doubles_of_those_before(
    nats: NatsServer, nats_client: NatsClient, fresh: str
) -> None:
    sink = ToNats(subject=f"{fresh}-scores", stream=f"{fresh}-scores")
    nats_client.make(fresh, fresh)
    publish(nats_client, fresh, range(20))
    with opened(nats, fresh, sink) as ends:
        run(ends, 20)
    make_again(nats_client, fresh, range(20, 50))
    with opened(nats, fresh, sink) as ends:
        run(ends, 30)

    assert 50 == nats_client.info(f"{fresh}-scores").state.messages


def test_what_retention_took_before_it_was_read_is_an_error_that_counts_it(
    nats: NatsServer, nats_client: NatsClient, fresh: str, sink: AnySink
) -> None:
    nats_client.make(fresh, fresh, max_msgs=30)
    publish(nats_client, fresh, range(20))
    with opened(nats, fresh, sink) as ends:
        run(ends, 20)
    publish(nats_client, fresh, range(20, 60))

    with (
        pytest.raises(MessagesLost, match=r"10 messages are gone.*from 21 to 30.*accept_loss"),
        opened(nats, fresh, sink) as ends,
    ):
        run(ends, 30)
    said: list[str] = []
    with opened(nats, fresh, sink, said.append, accept_loss=True) as ends:
        assert 30 == len(run(ends, 30))
    assert any("10 messages are gone" in words for words in said)


def test_retention_that_passes_a_reader_is_an_error_too(
    nats: NatsServer, nats_client: NatsClient, fresh: str, sink: AnySink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.stream.nats_source._LAG_SECONDS", 0.1)
    nats_client.make(fresh, fresh, max_msgs=100)
    publish(nats_client, fresh, range(20))
    with opened(nats, fresh, sink, in_flight=8) as ends:
        run(ends, 20)
        # It asks for eight at most, and takes no more of them until they are fetched.
        publish(nats_client, fresh, range(20, 1_000))
        time.sleep(0.5)

        with pytest.raises(MessagesLost, match="messages are gone"):
            run(ends, 980)


def test_a_first_reader_begins_with_what_there_is(
    nats: NatsServer, nats_client: NatsClient, fresh: str, sink: AnySink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.stream.nats_source._LAG_SECONDS", 0.05)
    nats_client.make(fresh, fresh, max_msgs=30)
    publish(nats_client, fresh, range(100))
    with opened(nats, fresh, sink) as ends:
        assert 30 == len(run(ends, 30))
        # What it has read may go, however much of it.
        publish(nats_client, fresh, range(100, 120))
        assert 20 == len(run(ends, 20))
        assert [] == run(ends, 1, seconds=1)


def test_of_messages_with_a_subject_at_most_so_many_are_gone(
    nats: NatsServer, nats_client: NatsClient, fresh: str, sink: AnySink
) -> None:
    nats_client.make(fresh, f"{fresh}.>", max_msgs=30)
    nats_client.publish(f"{fresh}.a", [json_row(1).payload])
    with opened(nats, fresh, sink, subject=f"{fresh}.a") as ends:
        run(ends, 1)
    nats_client.publish(f"{fresh}.b", [b"1"] * 100)

    with (
        pytest.raises(MessagesLost, match="at most 70 messages are gone"),
        opened(nats, fresh, sink, subject=f"{fresh}.a"),
    ):
        pass
