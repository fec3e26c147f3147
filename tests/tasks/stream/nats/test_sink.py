"""Publishing over a real server: each message once, however large, whatever the stream is called."""

from __future__ import annotations

import threading
from collections.abc import Generator
from pathlib import Path

import pytest
from nats.js.errors import ServiceUnavailableError

from infra.local.nats import NatsClient, NatsServer, nats_server
from serving.errors import BrokerFault, StreamUnfit
from tasks.stream.message import Poison
from tasks.stream.nats.connection import NatsConnection
from tasks.stream.nats.sink import (
    NatsDeadLetters,
    OutgoingMessage,
    Publisher,
    count_header_bytes,
    ensure_dead_letter_stream,
)
from tasks.stream.options import FromNats
from tests.tasks.stream.messages import message


@pytest.fixture
def connection(nats: NatsServer) -> Generator[NatsConnection]:
    connection = NatsConnection(nats.url, lambda _: None, threading.Event())
    yield connection
    connection.close()


def outgoing(subject: str, payload: bytes, **headers: str) -> OutgoingMessage:
    return OutgoingMessage(subject=subject, payload=payload, id=f"{subject}.{len(payload)}", headers=headers)


def test_a_stream_may_have_any_name_even_that_of_a_failure(
    connection: NatsConnection, nats_client: NatsClient, fresh: str
) -> None:
    nats_client.make("error", fresh)

    assert [] == Publisher(connection).publish([outgoing(fresh, b"1"), outgoing(fresh, b"22")])
    assert [b"1", b"22"] == [each.payload for each in nats_client.read("error")]


def test_what_is_too_large_with_its_headers_is_refused_and_the_others_are_kept(
    connection: NatsConnection, nats_client: NatsClient, fresh: str
) -> None:
    nats_client.make(fresh, fresh)
    words = {"Overnight-Reason": "größer"}
    spare = count_header_bytes(outgoing(fresh, bytes(connection.client.max_payload - 100), **words).all_headers)
    fits = outgoing(fresh, bytes(connection.client.max_payload - spare), **words)
    large = outgoing(fresh, bytes(connection.client.max_payload - spare + 1), **words)

    assert [large] == Publisher(connection).publish([large, fits, outgoing(fresh, b"1")])
    assert [fits.payload, b"1"] == [each.payload for each in nats_client.read(fresh)]


def test_dead_letters_that_nothing_takes_end_the_stream_and_are_not_forgotten(
    nats: NatsServer, connection: NatsConnection, nats_client: NatsClient, fresh: str
) -> None:
    nats_client.make(fresh, fresh, max_msg_size=80, duplicate_window=600)
    address = FromNats(url=nats.url, stream="any", dead_letters=fresh)
    poison = Poison(message=message(bytes(100)), column="", reason="no")

    with pytest.raises(BrokerFault, match=rf"'{fresh}' .*must take dead letters of some kilobytes"):
        NatsDeadLetters(connection, address, "origin").send([poison])


def test_dead_letters_do_not_go_into_what_is_read(
    connection: NatsConnection, nats: NatsServer, nats_client: NatsClient, fresh: str
) -> None:
    nats_client.make(fresh, f"{fresh}.>", duplicate_window=600)
    whole = FromNats(url=nats.url, stream=fresh, dead_letters=f"{fresh}.dead")
    part = whole.model_copy(update={"subject": f"{fresh}.in"})
    below = whole.model_copy(update={"subject": f"{fresh}.*"})

    with pytest.raises(StreamUnfit, match=rf"The dead letters must not .*'{fresh}\.dead'.*, which is read whole"):
        connection.run(ensure_dead_letter_stream(connection, whole))
    with pytest.raises(StreamUnfit, match=rf"The dead letters must not .*, of which '{fresh}\.\*' is read"):
        connection.run(ensure_dead_letter_stream(connection, below))
    assert fresh == connection.run(ensure_dead_letter_stream(connection, part)).config.name


def test_dead_letters_that_no_stream_takes_are_named_with_what_can_be_done(
    connection: NatsConnection, nats: NatsServer, fresh: str
) -> None:
    address = FromNats(url=nats.url, stream="any", dead_letters=fresh)

    with pytest.raises(StreamUnfit, match=r"of the dead letters, .*nats stream add .*, or leave out dead_letters\."):
        connection.run(ensure_dead_letter_stream(connection, address))


def test_a_stream_of_dead_letters_that_may_not_remember_for_longer_is_named(tmp_path: Path) -> None:
    with nats_server(tmp_path) as server, NatsClient(server.url) as client:
        client.make("OVERNIGHT_DEAD", "overnight.dead.>", max_age=100, duplicate_window=100)
        connection = NatsConnection(server.url, lambda _: None, threading.Event())
        with pytest.raises(StreamUnfit, match=r"'OVERNIGHT_DEAD' must remember the message ids .* 600 s.*got 100 s"):
            connection.run(ensure_dead_letter_stream(connection, FromNats(url=server.url, stream="any")))
        connection.close()


def test_a_server_without_jetstream_is_named_and_asked_again(nats: NatsServer) -> None:
    warnings: list[str] = []
    connection = NatsConnection(nats.url, warnings.append, threading.Event())
    told: list[Exception | int] = [ServiceUnavailableError(), 7]

    async def question() -> int:
        answer = told.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert 7 == connection.run(connection.request("a stream", question))
    connection.close()
    assert [f"{nats.url} must have JetStream (nats-server -js), but nothing answers for it; asking again."] == warnings
