"""A server that is absent or goes is waited for, it is said, and who waits may be called off."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from nats.aio.client import Client

from infra.local.nats import nats_server
from tasks.stream.connections import StreamAbandoned
from tasks.stream.nats import connection as connection_module
from tasks.stream.nats.connection import NatsConnection
from tests.eventually import eventually
from tests.flows.streams import kill_server


def test_there_is_a_warning_when_a_server_is_absent_is_gone_and_is_back(tmp_path: Path, held_port: int) -> None:
    warnings: list[str] = []
    connections: list[NatsConnection] = []
    url = f"nats://127.0.0.1:{held_port}"
    opening = threading.Thread(
        target=lambda: connections.append(NatsConnection(url, warnings.append, threading.Event(), connect_seconds=0.5))
    )
    opening.start()
    eventually(lambda: warnings)
    with nats_server(tmp_path, port=held_port) as server:
        opening.join(20)
        (connection,) = connections
        kill_server(server)
        eventually(lambda: warnings, lambda seen: len(seen) > 1)
    with nats_server(tmp_path, port=held_port):
        eventually(lambda: warnings, lambda seen: len(seen) > 2)
        connection.close()

    assert f"{url} must answer, got: no answer. Waiting for it." == warnings[0]
    assert warnings[1].startswith(f"{url} is gone: waiting for it")
    assert f"{url} is back: going on." == warnings[-1]


def test_the_wait_for_a_server_may_be_given_up(held_port: int) -> None:
    give_up = threading.Event()
    warn: Callable[[str], None] = lambda _: give_up.set()

    with pytest.raises(StreamAbandoned):
        NatsConnection(f"nats://127.0.0.1:{held_port}", warn, give_up, connect_seconds=0.5)


def test_an_attempt_that_loses_its_cancellation_ends_all_the_same(
    monkeypatch: pytest.MonkeyPatch, held_port: int
) -> None:
    class Stubborn(Client):
        """As the library's, where a time-out within it ends at the moment of the cancellation."""

        async def connect(self, *_arguments: Any, **_settings: Any) -> None:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(3600)
            await asyncio.sleep(3600)

        async def close(self) -> None:
            """It has opened nothing."""

    monkeypatch.setattr(connection_module, "Client", Stubborn)
    give_up = threading.Event()
    with pytest.raises(StreamAbandoned):
        NatsConnection(f"nats://127.0.0.1:{held_port}", lambda _: give_up.set(), give_up, connect_seconds=0.1)
