import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.local.process import ServerCommand, ServerFailed, ServerProcess, base_environment

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


def test_a_server_that_is_not_ready_in_time_is_stopped(python_server: PythonServer) -> None:
    with pytest.raises(ServerFailed, match="still not ready, and is stopped") as failed:
        ServerProcess(python_server("import os, time; print(os.getpid(), flush=True); time.sleep(60)", ready_s_max=0.5))

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
        while not log_path.read_text():
            time.sleep(0.01)
        raise KeyError

    log_path = tmp_path / "log"
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    command = ServerCommand(
        argv=(sys.executable, "-c", code), environment={}, folder=tmp_path, log_path=log_path, ready=broken
    )

    with pytest.raises(KeyError):
        ServerProcess(command)

    assert not alive(int(log_path.read_text()))


def test_a_second_start_shows_its_own_log_only(python_server: PythonServer) -> None:
    for _ in range(2):
        with pytest.raises(ServerFailed) as failed:
            ServerProcess(python_server("print('once')"))

        assert failed.value.log == "once\n"


def test_what_the_log_says_is_left_over_is_deleted(tmp_path: Path) -> None:
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
