from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from infra.local.process import (
    HttpAnswer,
    ServerCommand,
    ServerFailed,
    ServerProcess,
    base_environment,
    hold_ports,
    send_request,
    start_on_free_ports,
)
from tests.eventually import eventually
from tests.servers import serve_http

SLEEPER = "import time; print('ready', flush=True); time.sleep(60)"
PythonServer = Callable[..., ServerCommand]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_server_runs_until_it_is_stopped_and_a_second_stop_does_nothing(python_server: PythonServer) -> None:
    with ServerProcess(python_server(SLEEPER)) as server:
        before = (server.running, server.exit_code, alive(server.pid))

        server.stop()

        assert before == (True, None, True)
        assert (server.running, server.exit_code, alive(server.pid)) == (False, 128 + signal.SIGTERM, False)

        server.stop()


def test_an_exception_in_the_block_stops_the_server(python_server: PythonServer) -> None:
    with pytest.raises(KeyError), ServerProcess(python_server(SLEEPER)) as server:
        raise KeyError

    assert not alive(server.pid)


def test_a_server_that_dies_at_start_raises_with_its_exit_code_and_its_log(python_server: PythonServer) -> None:
    with pytest.raises(ServerFailed, match=r"ended with exit code 3.*\n.*the disk is on fire") as failed:
        ServerProcess(python_server("import sys; print('the disk is on fire'); sys.exit(3)"))

    assert failed.value.exit_code == 3
    assert failed.value.log == "the disk is on fire\n"
    assert str(failed.value.log_path) in str(failed.value)


STARTS_SLOWLY = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"


def test_a_server_that_is_not_ready_in_time_is_stopped(tmp_path: Path) -> None:
    command = ServerCommand(
        argv=(sys.executable, "-c", STARTS_SLOWLY),
        environment={},
        folder=tmp_path,
        log_path=tmp_path / "log",
        # Python itself may take longer to start than the server may.
        ready=lambda: not eventually((tmp_path / "log").read_text),
        ready_s_max=1,
    )
    with pytest.raises(ServerFailed, match="still not ready, and is stopped") as failed:
        ServerProcess(command)

    assert not alive(int(failed.value.log))
    assert failed.value.exit_code is None


def test_a_program_that_does_not_exist_is_named(tmp_path: Path) -> None:
    command = ServerCommand(
        argv=("no-such-program",), environment={}, folder=tmp_path, log_path=tmp_path / "log", ready=lambda: False
    )

    with pytest.raises(ServerFailed, match="no-such-program must be an executable file") as failed:
        ServerProcess(command)

    assert failed.value.exit_code == 127


def test_a_readiness_check_that_raises_stops_the_server(tmp_path: Path) -> None:
    def broken() -> bool:
        eventually(log_path.read_text)
        raise KeyError

    log_path = tmp_path / "log"
    command = ServerCommand(
        argv=(sys.executable, "-c", STARTS_SLOWLY), environment={}, folder=tmp_path, log_path=log_path, ready=broken
    )

    with pytest.raises(KeyError):
        ServerProcess(command)

    assert not alive(int(log_path.read_text()))


def test_a_second_start_shows_its_own_log_only(python_server: PythonServer) -> None:
    for _ in range(2):
        with pytest.raises(ServerFailed) as failed:
            ServerProcess(python_server("print('once')"))

        assert failed.value.log == "once\n"


def test_leftovers_that_the_log_names_are_deleted(tmp_path: Path) -> None:
    left_over = tmp_path / "left-over"
    command = ServerCommand(
        argv=(
            sys.executable,
            "-c",
            f"open({str(left_over)!r}, 'w'); print({str(left_over)!r}); import time; time.sleep(60)",
        ),
        environment={"PYTHONUNBUFFERED": "1"},
        folder=tmp_path,
        log_path=tmp_path / "log",
        ready=lambda: "left" in (tmp_path / "log").read_text(),
        leftovers=lambda log: map(Path, log.split()),
    )

    with ServerProcess(command):
        assert left_over.exists()

    assert not left_over.exists()


def test_a_command_must_name_a_program_and_wait_some_time(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="argv must name a program, got an empty tuple"):
        ServerCommand(argv=(), environment={}, folder=tmp_path, log_path=tmp_path / "log", ready=lambda: True)
    with pytest.raises(ValueError, match="ready_s_max must be above 0"):
        ServerCommand(
            argv=("x",), environment={}, folder=tmp_path, log_path=tmp_path / "log", ready=lambda: True, ready_s_max=0
        )


def test_a_users_settings_do_not_reach_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://elsewhere")
    monkeypatch.setenv("AWS_PROFILE", "work")

    assert not any(name.startswith(("PREFECT", "AWS")) for name in base_environment())
    assert base_environment()["PATH"] == os.environ["PATH"]


BIND = (
    "import socket, time; s = socket.create_server(('127.0.0.1', {port})); print('ready', flush=True); time.sleep(60)"
)


def test_held_ports_are_different_and_a_server_may_listen_there() -> None:
    with hold_ports(20) as ports:
        assert len(set(ports)) == 20
        for port in ports:
            socket.create_server(("127.0.0.1", port)).close()


def test_a_server_that_lost_the_race_for_its_port_starts_on_another(python_server: PythonServer) -> None:
    asked: list[int] = []

    def command(ports: Sequence[int]) -> ServerCommand:
        asked.append(ports[0])
        return python_server(BIND.format(port=taken if len(asked) == 1 else ports[0]))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = listener.getsockname()[1]
        process, ports = start_on_free_ports(1, command)

    with process:
        assert ports == (asked[1],)
        assert process.running


@pytest.mark.parametrize(
    ("told", "passing"),
    [
        pytest.param("Address already in use", [], id="port taken"),
        pytest.param("The node is late", ["node is late"], id="a failure that passes"),
    ],
)
def test_it_gives_up_after_four_attempts(python_server: PythonServer, told: str, passing: list[str]) -> None:
    asked: list[int] = []

    def command(ports: Sequence[int]) -> ServerCommand:
        asked.extend(ports)
        return python_server(f"import sys; sys.exit('{told}')")

    with pytest.raises(ServerFailed, match=told):
        start_on_free_ports(1, command, passing=passing)

    assert len(set(asked)) == 4


def test_any_other_failure_is_not_tried_again(python_server: PythonServer) -> None:
    asked: list[int] = []

    def command(ports: Sequence[int]) -> ServerCommand:
        asked.extend(ports)
        return python_server("import sys; sys.exit('no luck')")

    with pytest.raises(ServerFailed, match="no luck"):
        start_on_free_ports(1, command, passing=["node is late"])

    assert len(asked) == 1


class Echo(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = f"{self.path} {self.headers['x-word']}".encode()
        self.send_response(404 if "missing" in self.path else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def echo_port() -> Iterator[int]:
    with serve_http(Echo) as port:
        yield port


def test_an_answer_carries_status_and_text(echo_port: int) -> None:
    answer = send_request("GET", echo_port, "/here", {"x-word": "hello"})

    assert answer == HttpAnswer(status=200, text="/here hello")
    assert answer.ok


def test_a_refusal_is_an_answer_that_is_not_ok(echo_port: int) -> None:
    answer = send_request("GET", echo_port, "/missing")

    assert answer.status == 404
    assert not answer.ok


def test_a_users_proxy_is_not_asked(echo_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")

    assert send_request("GET", echo_port, "/here").ok


def test_a_server_that_is_not_there_yet_is_an_answer_too(held_port: int) -> None:
    answer = send_request("GET", held_port, "/")

    assert answer.status == 0
    assert "ConnectionRefusedError" in answer.text
