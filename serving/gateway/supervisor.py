"""The supervisor of a gateway: it starts Envoy and the control plane, and starts each again when it ends.

Each of the two survives the kill of the other. Both outlast the supervisor's: Envoy serves on, the control plane ends,
and the next supervisor adopts Envoy.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from types import FrameType
from typing import Self

from serving.errors import EndpointFailed
from serving.gateway.envoy.bootstrap import BootstrapOptions
from serving.gateway.envoy.process import STOP_S_MAX as ENVOY_STOP_S_MAX
from serving.gateway.envoy.process import EnvoyProcess, find_envoy
from serving.gateway.keys import Keys
from serving.gateway.store import lock_folder, make_private_folder, write_atomically

_READY_S_MAX, _DRAIN_S_MAX, _END_S_MAX = 60.0, 60.0, 10.0
_POLL_S, _RESTART_S = 0.05, 1.0
# The most seconds from SIGTERM until a gateway has ended.
STOP_S_MAX = _DRAIN_S_MAX + ENVOY_STOP_S_MAX + _END_S_MAX

_log = logging.getLogger(__name__)


def run_gateway(options: BootstrapOptions, *, threads: int) -> None:
    """Serve until SIGTERM or Ctrl-C; then answer the requests that are there, and end both processes.

    Raises:
        EndpointFailed: The program envoy is missing, the port is taken, Envoy or the control plane does not start.
        OSError: The folder can't be used.
    """
    find_envoy()
    with lock_folder(options.folder), _StopSignal() as stopping:
        make_private_folder(options.sockets)
        # Raises for keys that the control plane would refuse.
        Keys(options.folder, os.environ)
        if options.port == 0:
            options = replace(options, port=_find_free_port(options.host))
        _run(options, stopping, threads)


def _run(options: BootstrapOptions, stopping: _StopSignal, threads: int) -> None:
    control_plane, envoy = _ControlPlane(options), EnvoyProcess(options, threads=threads)
    try:
        control_plane.start()
        envoy.start_or_adopt()
        scheme = "http" if options.certificate is None else "https"
        address = f"{scheme}://{options.host}:{options.port}"
        _tell(f"The gateway answers at {address}/v2; /docs describes it to the administrator.")
        _keep_running(envoy, control_plane, stopping)
        _tell(f"The gateway answers the requests that it has, for at most {_DRAIN_S_MAX:g} s.")
        envoy.drain(_DRAIN_S_MAX)
        _tell("The gateway ends Envoy and the control plane.")
    finally:
        envoy.stop()
        control_plane.stop()
    _tell("The gateway has ended.")


def _tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


class _StopSignal:
    """Whether SIGTERM or Ctrl-C has come."""

    def __init__(self) -> None:
        self.has_come = False

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._take) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, _number: int, _frame: FrameType | None) -> None:
        self.has_come = True


def _keep_running(envoy: EnvoyProcess, control_plane: _ControlPlane, stopping: _StopSignal) -> None:
    """Start again whatever ends, at most once a second each, until the gateway is to stop."""
    tried_s = 0.0
    while not stopping.has_come:
        time.sleep(_POLL_S)
        if envoy.is_running and control_plane.is_running:
            continue
        if time.monotonic() - tried_s < _RESTART_S:
            continue
        tried_s = time.monotonic()
        try:
            if not envoy.is_running:
                _log.warning("Envoy must run, but ended with %s. It is started again.", envoy.exit_code)
                envoy.start()
            if not control_plane.is_running:
                _log.warning("The control plane must run, but has ended. It is started again.")
                control_plane.start()
        except EndpointFailed as error:
            _log.warning("%s", error)


class _ControlPlane:
    """The control plane as a child process, which ends when its standard input does."""

    def __init__(self, options: BootstrapOptions) -> None:
        self._options = options
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        return self._child is not None and self._child.poll() is None

    def start(self) -> None:
        """Start it, and return once it answers. Raises EndpointFailed; the child has said why."""
        options = self._options
        command = (sys.executable, "-m", "serving.gateway.server", str(options.folder), str(options.bytes_max))
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, umask=0o077)  # noqa: S603 - ours
        write_atomically(options.folder / "control_plane.pid", str(self._child.pid).encode())
        deadline = time.monotonic() + _READY_S_MAX
        while not self._answers():
            if self._child.poll() is not None or time.monotonic() > deadline:
                self.stop()
                message = "The control plane of the gateway must start, but did not; the lines above say why."
                raise EndpointFailed(message)
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """End it, and return once it is gone. Idempotent."""
        if self._child is None:
            return
        self._child.terminate()
        try:
            self._child.wait(_END_S_MAX)
        except subprocess.TimeoutExpired:
            _log.warning("The control plane must end within %g s of SIGTERM, but has not. It is killed.", _END_S_MAX)
            self._child.kill()
            self._child.wait()
        if self._child.stdin:
            self._child.stdin.close()

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(str(self._options.control_socket))
            except OSError:
                return False
        # An earlier control plane leaves its socket, which refuses; only a living one accepts.
        return self._options.routes_file.exists()


def _find_free_port(host: str) -> int:
    with socket.socket() as found:
        found.bind((host, 0))
        return int(found.getsockname()[1])
