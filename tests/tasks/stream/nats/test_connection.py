"""A server that is absent or goes is waited for, it is said, and who waits may be called off."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.local.nats import nats_server
from infra.local.process import free_ports
from tasks.stream.connections import StreamAbandoned
from tasks.stream.nats.connection import NatsConnection
from tests.flows.streams import kill_server, wait_until


def test_there_is_a_warning_when_a_server_is_absent_is_gone_and_is_back(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    warnings: list[str] = []
    connections: list[NatsConnection] = []
    url = f"nats://127.0.0.1:{port}"
    opening = threading.Thread(
        target=lambda: connections.append(NatsConnection(url, warnings.append, threading.Event(), connect_seconds=0.5))
    )
    opening.start()
    wait_until(lambda: bool(warnings), "a word of the absent server")
    with nats_server(tmp_path, port=port) as server:
        opening.join(20)
        (connection,) = connections
        kill_server(server)
        wait_until(lambda: len(warnings) > 1, "a word of its end")
    with nats_server(tmp_path, port=port):
        wait_until(lambda: len(warnings) > 2, "a word of its return")
        connection.close()

    assert f"{url} must answer, got: no answer. Waiting for it." == warnings[0]
    assert warnings[1].startswith(f"{url} is gone: waiting for it")
    assert f"{url} is back: going on." == warnings[-1]


def test_the_wait_for_a_server_may_be_given_up() -> None:
    (port,) = free_ports(1)
    give_up = threading.Event()
    warn: Callable[[str], None] = lambda _: give_up.set()

    with pytest.raises(StreamAbandoned):
        NatsConnection(f"nats://127.0.0.1:{port}", warn, give_up, connect_seconds=0.5)
