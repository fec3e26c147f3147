import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.local.process import ServerCommand, ServerProcess
from tests.eventually import eventually

PS = shutil.which("ps") or "ps"
ROOT = Path(__file__).parents[3]
PythonServer = Callable[..., ServerCommand]

STARTER = """
import os, signal, sys, time
from pathlib import Path
from infra.local.process import ServerCommand, ServerProcess
{before}
folder = Path({folder!r})
code = {code!r}
server = ServerProcess(ServerCommand(
    argv=(sys.executable, "-c", code), environment={{}}, folder=folder, log_path=folder / "log",
    ready=lambda: "ready" in (folder / "log").read_text()))
{after}
print(server.pid, flush=True)
time.sleep(60)
"""
SLEEPER = "import time; print('ready', flush=True); time.sleep(60)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEPER


def ps(column: str, pid: int) -> str:
    command = [PS, "-o", f"{column}=", "-p", str(pid)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def alive(pid: int) -> bool:
    """Whether the process is there; one that has ended and awaits its parent is not."""
    return not ps("stat", pid).startswith("Z") and ps("pid", pid) == str(pid)


def start_starter(folder: Path, code: str, *, before: str = "", after: str = "") -> tuple[subprocess.Popen[str], int]:
    script = STARTER.format(folder=str(folder), code=code, before=before, after=after)
    starter = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    return starter, int(starter.stdout.readline())


def kill(starter: subprocess.Popen[str]) -> None:
    starter.kill()
    starter.wait()
    assert starter.stdout is not None
    starter.stdout.close()


def test_killing_the_starter_leaves_no_server_alive(tmp_path: Path) -> None:
    starter, server = start_starter(tmp_path, SLEEPER)
    assert alive(server)

    kill(starter)

    eventually(lambda: not alive(server))


def test_killing_the_starter_leaves_no_server_alive_though_its_forked_child_lives_on(tmp_path: Path) -> None:
    starter, server = start_starter(
        tmp_path, SLEEPER, after="if not os.fork(): os.close(1); time.sleep(5); os._exit(0)"
    )

    kill(starter)

    eventually(lambda: not alive(server))


def test_a_forked_child_of_the_starter_cannot_stop_the_server(tmp_path: Path) -> None:
    stop_in_child = "child = os.fork()\nif not child: server.stop(); os._exit(0)\nos.waitpid(child, 0)"
    starter, server = start_starter(tmp_path, SLEEPER, after=stop_in_child)

    assert alive(server)

    kill(starter)


def test_the_server_gets_default_signals_though_its_starter_ignores_and_blocks_them(tmp_path: Path) -> None:
    ignore = "signal.signal(signal.SIGINT, signal.SIG_IGN); signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])"
    report = (
        "import signal; print(signal.getsignal(signal.SIGINT) == signal.default_int_handler, "
        "signal.pthread_sigmask(signal.SIG_BLOCK, []), flush=True); " + SLEEPER
    )
    starter, _ = start_starter(tmp_path, report, before=ignore)
    kill(starter)

    assert (tmp_path / "log").read_text() == "True set()\nready\n"


def test_a_server_that_ignores_sigterm_is_killed_after_the_grace(python_server: PythonServer) -> None:
    server = ServerProcess(python_server(STUBBORN, grace_s=0.3))

    server.stop()

    assert not alive(server.pid)
    assert server.exit_code == 128 + signal.SIGKILL


def parent_of(child: str, *, then: str) -> str:
    start = f"import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', {child!r}])"
    return f"{start}; print('child', child.pid, flush=True); {then}"


def child_in(server: ServerProcess) -> int:
    """Return the child's process id. The child may be ready, and its server with it, before the log has that line."""
    told = eventually(lambda: re.search(r"^child (\d+)$", server.log_text(), re.MULTILINE))
    assert told is not None
    return int(told[1])


@pytest.mark.parametrize("child", [SLEEPER, STUBBORN], ids=["willing", "stubborn"])
def test_children_of_the_server_end_with_it(python_server: PythonServer, child: str) -> None:
    server = ServerProcess(python_server(parent_of(child, then="child.wait()")))
    child_pid = child_in(server)
    assert alive(child_pid)

    server.stop()

    eventually(lambda: not alive(child_pid))


def test_a_server_that_ends_by_itself_takes_its_children_along(python_server: PythonServer) -> None:
    with ServerProcess(python_server(parent_of(SLEEPER, then="time.sleep(0.5)"))) as server:
        guard = int(ps("ppid", server.pid))
        eventually(lambda: not alive(child_in(server)))
        eventually(lambda: not alive(guard))
        assert server.exit_code == 0


def test_stop_ends_the_server_even_after_its_guard_was_killed(python_server: PythonServer) -> None:
    server = ServerProcess(python_server(SLEEPER))

    os.kill(int(ps("ppid", server.pid)), signal.SIGKILL)
    server.stop()

    eventually(lambda: not alive(server.pid))


def test_a_guard_that_gets_sigterm_ends_its_server(python_server: PythonServer) -> None:
    with ServerProcess(python_server(SLEEPER)) as server:
        os.kill(int(ps("ppid", server.pid)), signal.SIGTERM)

        eventually(lambda: not alive(server.pid))


LEAVER = """
import subprocess, sys, time
left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print(left.pid, flush=True)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives orphans to the one who asked for them")
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_server_started_in_a_group_of_its_own_ends_with_it(
    python_server: PythonServer, ending: signal.Signals
) -> None:
    with ServerProcess(python_server(LEAVER)) as server:
        left = int(server.log_text().split()[0])
        started = alive(left)
        os.kill(server.pid, ending)

        assert started
        eventually(lambda: not alive(left))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives orphans to the one who asked for them")
def test_a_stop_ends_what_a_server_started_in_a_group_of_its_own(python_server: PythonServer) -> None:
    server = ServerProcess(python_server(LEAVER))
    left = int(server.log_text().split()[0])
    server.stop()

    assert not alive(left)
