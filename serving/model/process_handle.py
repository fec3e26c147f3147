"""Processes that answer requests: the first one for each Python, and the copies that it and others make of themselves.

serving/model/process_program.py has the other side.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from serving import errors
from serving.errors import ModelFailed, ModelUnfit
from serving.model import process_program
from serving.model.process_protocol import THREAD_VARIABLES, VERSION, Message, receive_message, send_message

# The package is put together by hand: the model's environment has none of ours, and its own may have others of theirs.
_BOOT = f"""\
import sys, types
package = types.ModuleType("serving")
package.__path__ = [sys.argv[1]]
sys.modules["serving"] = package
from {process_program.__name__} import main
main(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
"""
PACKAGE = Path(errors.__file__).parent
_POLL_SECONDS = 0.2
# A first process imports MLflow, which takes seconds, more on a busy machine.
START_SECONDS_MAX, END_SECONDS_MAX, _MESSAGE_SECONDS_MAX = 300.0, 30.0, 60.0


class ChildEnded(Exception):
    """The process at the other end has ended; `status` is its wait status, None where it was not to be had."""

    def __init__(self, status: int | None) -> None:
        super().__init__(status)
        self.status = status


class ChildProcess:
    """A process at the other end of a socket: started here, or a copy that another one has made of itself."""

    def __init__(
        self,
        channel: socket.socket,
        *,
        started: subprocess.Popen[bytes] | None = None,
        maker: ChildProcess | None = None,
    ) -> None:
        # A process reads a request at once, and sends an answer in one go.
        channel.settimeout(_MESSAGE_SECONDS_MAX)
        self._channel, self._started, self._maker = channel, started, maker
        self._lock = threading.Lock()
        self._number = 0
        self.id = started.pid if started else 0
        self.may_fork = False
        # The libraries of models that it was told to import.
        self.imported: frozenset[str] = frozenset()

    def ask(
        self,
        do: str,
        blob: bytes = b"",
        descriptors: Sequence[int] = (),
        *,
        seconds_max: float = END_SECONDS_MAX,
        check: Callable[[], None] = lambda: None,
        **values: Any,
    ) -> Message:
        """Send a request and return the answer.

        Raises ChildEnded, TimeoutError, and what `check` raises, which is called a few times a second.
        """
        until = time.monotonic() + seconds_max
        with self._lock:
            self._number += 1
            try:
                send_message(self._channel, {"do": do, "number": self._number, **values}, blob, descriptors)
            except OSError:
                raise ChildEnded(self.find_status()) from None
            while True:
                self._wait(until, check)
                answer = receive_message(self._channel)
                if answer is None:
                    raise ChildEnded(self.find_status())
                # An answer that nobody waited for any longer may come before.
                if answer.body["number"] == self._number:
                    return answer

    def tell_import(self, libraries: Iterable[str]) -> None:
        """Have the process import libraries that it has not imported, and go on; its next answer comes after that."""
        missing = frozenset(libraries) - self.imported
        if not missing:
            return
        self.imported |= missing
        with self._lock, suppress(OSError):
            # Where it has ended, the next request finds out.
            self._number += 1
            send_message(self._channel, {"do": "import", "number": self._number, "modules": sorted(missing)})

    def _wait(self, until: float, check: Callable[[], None]) -> None:
        waiting = select.poll()
        waiting.register(self._channel, select.POLLIN)
        while not waiting.poll(1000 * _POLL_SECONDS):
            check()
            # What a model has started may keep the socket open when the model's process is gone.
            if (status := self._read_status()) is not None:
                raise ChildEnded(status)
            if time.monotonic() > until:
                raise TimeoutError

    def fork(self) -> ChildProcess:
        """Have the process make a copy of itself, and return it."""
        here, there = socket.socketpair()
        with ExitStack() as unless_made, there:
            unless_made.enter_context(here)
            answer = self.ask("fork", descriptors=[there.fileno()], seconds_max=START_SECONDS_MAX)
            if "error" in answer.body:
                # The system has no memory, or no number, for another process.
                raise ChildEnded(None)
            unless_made.pop_all()
        copy = ChildProcess(here, maker=self)
        copy.id, copy.may_fork = answer.body["id"], True
        return copy

    def find_status(self) -> int | None:
        """Return the wait status of a process that is ending, None where it does not end."""
        until = time.monotonic() + END_SECONDS_MAX
        while (status := self._read_status()) is None and time.monotonic() < until:
            time.sleep(0.01)
        return status

    def _read_status(self) -> int | None:
        if self._started is not None:
            code = self._started.poll()
            return None if code is None else -code if code < 0 else code << 8
        try:
            return self._maker.ask("status", id=self.id).body["status"] if self._maker else None
        except TimeoutError:
            # It is slow, or stopped: nothing is known.
            return None
        except ChildEnded:
            return signal.SIGKILL

    def close(self) -> None:
        """End the process, whatever it does, and what it has started."""
        if self._maker is not None:
            with suppress(ChildEnded, TimeoutError):
                self._maker.ask("kill", id=self.id)
        self.leave()

    def leave(self) -> None:
        """Have the process end by itself, by closing its socket; one that was started here is killed. Asks nobody."""
        self._channel.close()
        if self._started is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._started.pid, signal.SIGKILL)
            self._started.wait()


class _FirstProcesses:
    """The first process for each Python, which has MLflow imported and starts all others; made when it is needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Those that are known to have imported MLflow, and those that were started and nobody has waited for.
        self._children: dict[str, ChildProcess] = {}
        self._starting: dict[str, ChildProcess] = {}
        self._owner = os.getpid()
        # The kernel ends a child with the thread that started it, so that thread must stay.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="model-process-starter")

    def prepare(self, python: str, libraries: Iterable[str] = ()) -> None:
        """Start the first process for a Python, unless it is there; it imports MLflow while this one goes on.

        Args:
            python: The interpreter.
            libraries: Modules that models will need, to be imported too.
        """
        with self._lock:
            self._forget_others()
            if python in self._starting:
                self._starting[python].tell_import(libraries)
            elif python not in self._children:
                self._starting[python] = self._start_first(python, libraries)

    def start(self, python: str, libraries: Iterable[str] = ()) -> ChildProcess:
        """Return a process that can load a model: a copy of the first, or a new one where copies can't be made.

        Args:
            python: The interpreter.
            libraries: Modules that the model needs; the first process imports them, for this copy and later ones.
        """
        with self._lock:
            self._forget_others()
            for _ in range(2):
                first = self._children.pop(python, None)
                if first is None:
                    first = self._starting.pop(python, None) or self._start_first(python, libraries)
                    _greet_child(first, python)
                try:
                    copy = _make_copy(first, libraries)
                except (ChildEnded, TimeoutError):
                    first.close()
                    continue
                if copy is None:
                    return first
                self._children[python] = first
                return copy
        message = (
            "A process for models must start, got one that ended twice. Look for what ends processes here (memory?)."
        )
        raise ModelFailed(message)

    def _start_first(self, python: str, libraries: Iterable[str]) -> ChildProcess:
        return self._starter.submit(_start_child, python, frozenset(libraries)).result()

    def _forget_others(self) -> None:
        """Forget the children where this process is itself a copy: they are those of the original."""
        if self._owner != os.getpid():
            self._children, self._starting, self._owner = {}, {}, os.getpid()
            self._starter = ThreadPoolExecutor(1, thread_name_prefix="model-process-starter")

    def close(self) -> None:
        """End the first processes, and with them all others."""
        with self._lock:
            if self._owner == os.getpid():
                for child in (*self._children.values(), *self._starting.values()):
                    child.close()
            self._children, self._starting = {}, {}


FIRST_PROCESSES = _FirstProcesses()
atexit.register(FIRST_PROCESSES.close)


def _make_copy(first: ChildProcess, libraries: Iterable[str]) -> ChildProcess | None:
    """Return a copy of a first process that has imported what a model needs; None where copies can't be made.

    Raises ChildEnded and TimeoutError.
    """
    missing = frozenset(libraries) - first.imported
    if first.may_fork and missing:
        first.may_fork = first.ask("import", seconds_max=START_SECONDS_MAX, modules=sorted(missing)).body["may_fork"]
        first.imported |= missing
    return first.fork() if first.may_fork else None


def _start_child(python: str, libraries: frozenset[str]) -> ChildProcess:
    """Start a process on a Python; it imports MLflow and libraries, which takes a while. Raises ModelUnfit."""
    here, there = socket.socketpair()
    with there:
        try:
            started = subprocess.Popen(  # noqa: S603 - this very Python, or that of an environment made for the model
                [
                    # Another Python than this sees none of our folders.
                    *(python, *([] if python == sys.executable else ["-I"]), "-c", _BOOT),
                    *(str(PACKAGE), str(there.fileno()), str(os.getpid()), *sorted(libraries)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=2,
                env=make_child_environment(python) | dict.fromkeys(THREAD_VARIABLES, "1"),
                pass_fds=(there.fileno(),),
                start_new_session=True,
            )
        except OSError as error:
            here.close()
            message = (
                f"A model process must start on {python}, got {type(error).__name__}: {error.strerror}. Look whether "
                "the model's environment was removed: what starts next makes it again."
            )
            raise ModelUnfit(message) from None
    child = ChildProcess(here, started=started)
    child.imported = libraries
    return child


def _greet_child(child: ChildProcess, python: str) -> None:
    """Wait until a process that was started has imported MLflow. Raises ModelUnfit and ModelFailed."""
    try:
        greeting = child.ask("greet", seconds_max=START_SECONDS_MAX).body
    except (ChildEnded, TimeoutError) as error:
        child.close()
        message = (
            f"A model process must start on {python} and import MLflow, got one that "
            f"{describe_end(error)}. What it said is above; try by hand: {python} -c 'import mlflow.pyfunc'."
        )
        raise ModelUnfit(message) from None
    if greeting["version"] != VERSION:
        child.close()
        message = (
            f"A model process must speak version {VERSION} of the protocol, got {greeting['version']}: Overnight was "
            "updated while this process ran. Start it again."
        )
        raise ModelFailed(message)
    child.may_fork = greeting["may_fork"]


def make_child_environment(python: str) -> dict[str, str]:
    """Return the environment variables of a child: those of this process, without what is for its own Python."""
    if python == sys.executable:
        return dict(os.environ)
    return {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }


def describe_end(error: ChildEnded | TimeoutError) -> str:
    """Say what a process has done in place of an answer."""
    if isinstance(error, TimeoutError):
        return "did not answer in time"
    status = error.status
    if status is None:
        return "closed its socket"
    if os.WIFSIGNALED(status):
        return f"died ({signal.Signals(os.WTERMSIG(status)).name})"
    return f"ended (exit code {os.waitstatus_to_exitcode(status)})"
