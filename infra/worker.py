"""A Prefect process worker whose flow runs get time to drain when their machine is to end.

`overnight worker --pool overnight-spot`, or `python -m infra.worker` with the same options, runs Prefect's own worker,
one flow run at a time. On SIGTERM or SIGINT, that worker kills its flow runs at once, and their state stays Running.
This one takes no more work, passes the signal on to the flow runs only, waits until each has drained and is scheduled
again, and then ends. Where it is killed by SIGKILL, a process that it has started does so. It must be the process that
gets the signal: `KillMode=mixed` under systemd, the first process of a container.

It takes work only from a server that it reaches by https or on this machine: what the server sends is run.

The pool's `command` must be `prefect flow-run execute`, which obeys the signal, as in deployments/prefect.yaml.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

_PROC = Path("/proc")
_LOOPBACK = "127.0.0.1"
_POLL_S = 0.2
_KILL_POLL_S = 0.02
_LINES_SHOWN = 3
# What Prefect itself allows a run between SIGTERM and SIGKILL, and as much again to notify the server.
GRACE_S = 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the worker until it ends or a signal arrives; return the exit code."""
    options = parse_arguments(arguments)
    stopping = _catch_signals()
    refused = "" if options.plain_http else describe_open_connection(_read_api_url())
    if refusal := refused or _describe_missing_pool(options.pool):
        sys.stderr.write(refusal)
        return 1
    worker = subprocess.Popen(
        _make_command(options),
        env=_make_environment(options.health_port),
        # Ctrl-C in a terminal goes to every process of its group; the worker must not get it.
        start_new_session=True,
    )
    first = os.getpid() == 1
    with drain_if_killed(worker, options.grace):
        while worker.poll() is None:
            if first:
                _reap_orphans(worker.pid)
            if stopping.wait(_POLL_S) or options.parent not in (None, os.getppid()):
                drain_runs(worker, options.grace)
                return 0
    return worker.returncode


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m infra.worker", description=__doc__)
    parser.add_argument("--pool", required=True, help="the work pool to take flow runs from")
    parser.add_argument("--name", help="the worker's name in the UI")
    parser.add_argument("--limit", type=int, default=1, help="flow runs side by side (1: a run takes every core)")
    parser.add_argument("--grace", type=float, default=GRACE_S, help="seconds that runs get to drain")
    parser.add_argument("--parent", type=int, help="the process that has started it, without which it ends as well")
    parser.add_argument("--health-port", type=int, help="answer GET /health here, 503 once no work has been asked for")
    parser.add_argument("--plain-http", action="store_true", help="take work from another machine without TLS too")
    return parser.parse_args(arguments)


def describe_open_connection(api_url: str) -> str:
    """Return an error message where others on the way could read or change what the Prefect server sends, else "".

    Only http to another machine is open. An address without a host is left to Prefect, whose message names it.
    """
    parts = urlsplit(api_url)
    host = parts.hostname
    if parts.scheme != "http" or host is None or host == "localhost" or _is_loopback(host):
        return ""
    return (
        "A worker runs what its Prefect server sends, and must reach it by https or on this machine; got http to "
        f"{host}.\nGive the server TLS, or pass --plain-http where the network between them is yours alone.\n"
    )


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def _read_api_url() -> str:
    """Return the address of the Prefect server, of the environment or of Prefect's profile."""
    if url := os.environ.get("PREFECT_API_URL"):
        return url
    code = "from prefect.settings import get_current_settings; print(get_current_settings().api.url or '')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout.strip()


def _catch_signals() -> threading.Event:
    """Return an event that SIGTERM and SIGINT set; a shell's `&` may have masked them."""
    stopping = threading.Event()
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stopping.set())
    return stopping


def _describe_missing_pool(pool: str) -> str:
    """Return an error message where the pool does not exist: Prefect's worker would wait for work for ever."""
    command = [sys.executable, "-m", "prefect", "work-pool", "inspect", pool]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if not found.returncode:
        return ""
    answer = [line.strip() for line in (found.stdout + found.stderr).splitlines() if line.strip()]
    return (
        f"The work pool {pool!r} must exist on the Prefect server, which answers: {' '.join(answer[-_LINES_SHOWN:])}\n"
        f"`overnight deploy` creates those of Overnight, `prefect work-pool create {pool} --type process` any other.\n"
    )


def _reap_orphans(worker: int) -> None:
    """Take the exit codes of processes whose parents have ended, which the first process of a container inherits."""
    with suppress(ChildProcessError):
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid == worker:
                return
            os.waitpid(ended.si_pid, 0)


def _make_command(options: argparse.Namespace) -> list[str]:
    named = ["--name", options.name] if options.name else []
    watched = ["--with-healthcheck"] if options.health_port else []
    return [
        *(sys.executable, "-m", "prefect", "worker", "start", "--pool", options.pool, "--type", "process"),
        *("--limit", str(options.limit), "--no-create-pool-if-not-found", *named, *watched),
    ]


def _make_environment(health_port: int | None) -> dict[str, str]:
    """Return this environment with this interpreter's programs first, since the pool's command names `prefect`.

    The health endpoint listens on loopback unless the environment says otherwise; by Prefect's default, everywhere.
    """
    health = {"PREFECT_WORKER_WEBSERVER_PORT": str(health_port)} if health_port else {}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {"PREFECT_WORKER_WEBSERVER_HOST": _LOOPBACK, **os.environ, **health, "PATH": path}


@contextmanager
def drain_if_killed(worker: subprocess.Popen[bytes], grace_s: float) -> Generator[None]:
    """Have the flow runs drain if this process is killed in the block: a second process waits for its end."""
    end_of_this, kept_open = os.pipe()
    second = os.fork()
    if not second:
        try:
            os.close(kept_open)
            # Neither Ctrl-C nor the end of a terminal is meant for it.
            os.setsid()
            if not os.read(end_of_this, 1):
                drain_runs(worker, grace_s)
        finally:
            os._exit(0)
    os.close(end_of_this)
    try:
        yield
    finally:
        os.write(kept_open, b".")
        os.close(kept_open)
        with suppress(ChildProcessError):
            os.waitpid(second, 0)


def drain_runs(worker: subprocess.Popen[bytes], grace_s: float) -> None:
    """Let the flow runs drain, then end the worker, which is stopped meanwhile so that it takes up no run."""
    until = time.monotonic() + grace_s
    send_signal([worker.pid], signal.SIGSTOP)
    runs = list_children(worker.pid)
    # Who read the output may be gone too.
    with suppress(OSError):
        sys.stdout.write(f"Ending: {len(runs)} flow runs have {grace_s:g} s to drain.\n")
        sys.stdout.flush()
    send_signal(runs, signal.SIGTERM)
    while set(list_children(worker.pid)) & set(runs) and time.monotonic() < until:
        time.sleep(_POLL_S)
    kill_process_tree(worker.pid)
    worker.wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process of this machine; `ended` where it only waits for its parent to read its exit code."""

    pid: int
    parent: int
    ended: bool


def list_children(pid: int) -> list[int]:
    """Return the processes that `pid` has started and that still run."""
    return [process.pid for process in _list_processes() if process.parent == pid and not process.ended]


def list_process_tree(pid: int) -> list[int]:
    """Return `pid` and all that run below it, parents first."""
    processes = [process for process in _list_processes() if not process.ended]
    found = [pid]
    for parent in found:
        found += [process.pid for process in processes if process.parent == parent]
    return found


def send_signal(pids: Sequence[int], number: signal.Signals) -> None:
    """Send a signal to each, in order; processes that have ended are skipped."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_process_tree(pid: int) -> None:
    """End `pid` and all below it with SIGKILL, as the loss of their machine would; return when they are gone.

    Parents go first, so that none can report the death of its child.
    """
    # Stopped, none of them can start another one that the list lacks.
    send_signal(list_process_tree(pid), signal.SIGSTOP)
    pids = list_process_tree(pid)
    send_signal(pids, signal.SIGKILL)
    while any(process.pid in pids and not process.ended for process in _list_processes()):
        time.sleep(_KILL_POLL_S)


def _list_processes() -> Iterator[Process]:
    if not _PROC.is_dir():
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True)  # noqa: S607 - the system's own
        for pid, parent, state in (line.split()[:3] for line in listed.stdout.splitlines()):
            yield Process(pid=int(pid), parent=int(parent), ended=state.startswith("Z"))
        return
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            # A process may have ended since it was listed.
            with suppress(OSError):
                # The name comes second, in parentheses, and may itself hold spaces and parentheses.
                state, parent, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
                yield Process(pid=int(entry.name), parent=int(parent), ended=state == "Z")


if __name__ == "__main__":
    sys.exit(main())
