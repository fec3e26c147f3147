"""Servers as child processes on free loopback ports: started, watched until ready, stopped, never left behind.

A server runs under a guard (guard.py) that ends it when the starter closes a pipe, exits or is killed, so that `stop`
and the death of the starter take the same path. ServerFailed is the only error: its message states what happened,
where the log is and what to do next.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from importlib.util import find_spec
from pathlib import Path
from signal import SIGKILL
from types import TracebackType
from typing import Self

HOST = "127.0.0.1"
_GUARD = Path(__file__).with_name("guard.py")
_GUARD_MARGIN_S = 5.0
_READY_POLL_S = 0.05
_LOG_LINES_SHOWN = 20
_INHERITED = (
    *("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "PYTHONPATH"),
    "OMP_WAIT_POLICY",
)
_REQUEST_TIMEOUT_S = 10.0
_ATTEMPTS_MAX = 4
_TAKEN = ("already in use", "is not available on 127.0.0.1")


class ServerFailed(RuntimeError):
    """A server ended before it was ready, or was not ready in time and has been stopped."""

    def __init__(self, message: str, *, exit_code: int | None, log: str, log_path: Path) -> None:
        """Keep the exit code (None if it was stopped) and the log of this start."""
        super().__init__(message)
        self.exit_code = exit_code
        self.log = log
        self.log_path = log_path


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerCommand:
    """How to run one server: its command line and surroundings, and how to check that it is ready.

    `ready` is called every 50 ms and must return False, not raise, while the server is still starting. It should
    recognise this very server, since another one may have taken the port. `leftovers` finds in the log the files that
    the server leaves behind; they are deleted after the stop.
    """

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    folder: Path
    log_path: Path
    ready: Callable[[], bool]
    ready_s_max: float = 60.0
    grace_s: float = 10.0
    leftovers: Callable[[str], Iterable[Path]] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a command that can never start."""
        if not self.argv:
            message = "argv must name a program, got an empty tuple; pass (program, argument, ...)."
            raise ValueError(message)
        if self.ready_s_max <= 0 or self.grace_s < 0:
            message = (
                "ready_s_max must be above 0 and grace_s at least 0 seconds, "
                f"got {self.ready_s_max} and {self.grace_s}; pass seconds to wait."
            )
            raise ValueError(message)


class Stoppable(ABC):
    """A context manager that stops something at its end."""

    __slots__ = ()

    @abstractmethod
    def stop(self) -> None:
        """Stop the server and return when it is gone. Idempotent."""

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the server."""
        self.stop()


class ServerProcess(Stoppable):
    """A running server. Constructing it starts the server and returns once it is ready.

    Raises ServerFailed. Promises: one process group of its own, default signals, nothing outlives this
    object's process even after SIGKILL; `stop` is idempotent and returns when the server is gone. A forked
    child of the starter holds an inert copy: its `stop` does nothing.
    """

    def __init__(self, command: ServerCommand) -> None:
        """Start `command` and wait until it is ready; stop it again on any error or interrupt."""
        self.pid = 0
        self._command = command
        self._log_start = command.log_path.stat().st_size if command.log_path.exists() else 0
        self._owned = True
        self._guard = _start_guard(command)
        _started.add(self)
        try:
            report = self._guard.stdout.readline() if self._guard.stdout else b""
            self.pid = int(report or 0)
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    @property
    def running(self) -> bool:
        """Whether the server still runs."""
        return self._owned and self._guard.poll() is None

    @property
    def exit_code(self) -> int | None:
        """The server's exit code, 128 + N after signal N; None while it runs."""
        return self._guard.poll()

    def log_text(self) -> str:
        """Return what the server wrote since this start."""
        if not self._command.log_path.exists():
            return ""
        with self._command.log_path.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def stop(self) -> None:
        """SIGTERM to the server's group, SIGKILL after the grace; return when it is reaped. Idempotent."""
        if not self._owned:
            return
        self._close_pipes()
        try:
            self._guard.wait(self._command.grace_s + _GUARD_MARGIN_S)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()
        self._owned = False
        if self._guard.returncode < 0 and self.pid:
            # The guard itself was killed, so that nothing else is left to end its server.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, SIGKILL)
        if self._command.leftovers:
            for path in self._command.leftovers(self.log_text()):
                path.unlink(missing_ok=True)

    def disown(self) -> None:
        """Release the server without stopping it: for the copy in a forked child."""
        self._owned = False
        self._close_pipes()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._command.ready_s_max
        while time.monotonic() < deadline:
            if self._guard.poll() is not None:
                what_happened = f"ended with exit code {self.exit_code}"
                raise self._failure(what_happened, next_move="Fix what its log names")
            if self._command.ready():
                return
            time.sleep(_READY_POLL_S)
        what_happened = "was still not ready, and is stopped"
        raise self._failure(what_happened, next_move="Read its log, or raise ready_s_max")

    def _failure(self, what_happened: str, *, next_move: str) -> ServerFailed:
        log, log_path = self.log_text(), self._command.log_path
        tail = "\n".join(log.splitlines()[-_LOG_LINES_SHOWN:]) or "(empty)"
        message = (
            f"{Path(self._command.argv[0]).name} must be ready within {self._command.ready_s_max:g} s, but "
            f"{what_happened}. {next_move}, then start it again. The end of {log_path}:\n{tail}"
        )
        return ServerFailed(message, exit_code=self.exit_code, log=log, log_path=log_path)

    def _close_pipes(self) -> None:
        for pipe in (self._guard.stdin, self._guard.stdout):
            if pipe is not None:
                pipe.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningServer(Stoppable):
    """A server that runs as `process`; a context manager that stops it."""

    process: ServerProcess

    def stop(self) -> None:
        """Stop the server and return when it has ended. Idempotent."""
        self.process.stop()


def check_packages(server: str, modules: Sequence[str], extra: str) -> None:
    """Raise FileNotFoundError, naming the extra of this project, where a package that a server needs is missing."""
    if missing := [name for name in modules if find_spec(name) is None]:
        message = (
            f"{server} must find the package {missing[0]}, got none for {sys.executable}; run "
            f"`pip install 'overnight[{extra}]'`."
        )
        raise FileNotFoundError(message)


def base_environment() -> dict[str, str]:
    """Return the few variables a server may inherit; a user's PREFECT_* or AWS_* settings are not."""
    return {name: os.environ[name] for name in _INHERITED if name in os.environ}


def _start_guard(command: ServerCommand) -> subprocess.Popen[bytes]:
    """Start the guard in a session of its own, out of reach of the terminal's Ctrl-C.

    The isolated mode keeps variables such as PYTHONWARNINGS, meant for the server, away from the guard.
    """
    if command.log_path.parent != command.folder:
        # Never the folder that the server runs in: it may just be removed, and would be back with a log alone.
        command.log_path.parent.mkdir(parents=True, exist_ok=True)
    with command.log_path.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(_GUARD), str(command.grace_s), *command.argv],
            env=dict(command.environment),
            cwd=command.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            bufsize=0,
            start_new_session=True,
        )


def start_on_free_ports(
    count: int, command: Callable[[Sequence[int]], ServerCommand], *, passing: Sequence[str] = ()
) -> tuple[ServerProcess, tuple[int, ...]]:
    """Start `command(ports)`, again on new ports where its log shows that one was taken meanwhile.

    It is also started again where its log has one of the words of `passing`: of failures that pass by themselves.
    Returns the running server and its ports. Raises ServerFailed: after four attempts, or at once for any other reason.
    """
    attempts = 0
    while True:
        attempts += 1
        with hold_ports(count) as ports:
            try:
                return ServerProcess(command(ports)), ports
            except ServerFailed as failure:
                passes = any(words.lower() in failure.log.lower() for words in (*_TAKEN, *passing))
                if not passes or attempts == _ATTEMPTS_MAX:
                    raise


@contextmanager
def hold_ports(count: int) -> Generator[tuple[int, ...]]:
    """Yield `count` different free TCP ports of 127.0.0.1, for servers that start while the block runs.

    On Linux the system gives them to nobody else meanwhile: a socket that is bound and does not listen keeps each, and
    a server that sets SO_REUSEADDR, as nearly all do, may listen there all the same. Elsewhere it could not, so the
    ports are released first, and another program may take one.
    """
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            each.bind((HOST, 0))
        ports = tuple(each.getsockname()[1] for each in sockets)
        if sys.platform != "linux":
            held.close()
        yield ports


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpAnswer:
    """The answer of a server; status 0 if there was none, and then the text states why."""

    status: int
    text: str

    @property
    def ok(self) -> bool:
        """Whether the server accepted the request."""
        return self.status in range(HTTPStatus.OK, HTTPStatus.MULTIPLE_CHOICES)


def send_request(method: str, port: int, path: str, headers: Mapping[str, str] | None = None) -> HttpAnswer:
    """Send one request without a body. Raises nothing: a server that does not answer yet is an answer too.

    It uses no proxy, and builds no TLS context at every poll.
    """
    connection = HTTPConnection(HOST, port, timeout=_REQUEST_TIMEOUT_S)
    try:
        connection.request(method, path, headers=dict(headers or {}))
        response = connection.getresponse()
        return HttpAnswer(status=response.status, text=response.read().decode(errors="replace"))
    except (OSError, HTTPException) as error:
        return HttpAnswer(status=0, text=f"{type(error).__name__}: {error}")
    finally:
        connection.close()


_started: weakref.WeakSet[ServerProcess] = weakref.WeakSet()


def _disown_in_forked_child() -> None:
    # Close-on-exec does not help a child that only forks (multiprocessing): its copy of the lifeline would
    # keep the servers alive after the starter is gone.
    for server in list(_started):
        server.disown()


os.register_at_fork(after_in_child=_disown_in_forked_child)
