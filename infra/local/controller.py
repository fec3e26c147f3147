"""A controller of releases on this machine, as Kubernetes has: `python -m infra.local.controller --folder F`.

Each F/<endpoint>/<version>/ with a serve.json is a release, and has one server process as long as the folder exists.
A server that dies is started again on its own port, with a growing delay. Its state is in status.json beside
serve.json, which is replaced atomically. No server outlives the controller, however that ends.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from infra.local.process import (
    HOST,
    RunningServer,
    ServerCommand,
    ServerFailed,
    ServerProcess,
    base_environment,
    hold_ports,
    send_request,
)

SERVE_FILE, STATUS_FILE, LOG_FILE = "serve.json", "status.json", "server.log"
Identity = tuple[int, int, int]
_BACKOFF_S, _BACKOFF_S_MAX, _STEADY_S = 0.5, 30.0, 60.0
_SERVE_BYTES_MAX = 1 << 16
_LOG_LINES_SHOWN = 20
_PLACEHOLDER = re.compile(r"\{(folder|port[2-9]?)\}")
_PORT_TAKEN = ("address already in use", "failed to bind")
_LOCK_FILE = ".controller.lock"
_POLL_S = 0.1
_LOCK_S_MAX = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Controller(RunningServer):
    """A running controller; a context manager that stops it and every server of it."""

    folder: Path


def local_controller(folder: Path) -> Controller:
    """Start a controller that watches `folder`, and return once it does. Raises ServerFailed."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    log_path = folder / ".controller.log"
    log_start = log_path.stat().st_size if log_path.exists() else 0
    command = ServerCommand(
        argv=(sys.executable, "-m", "infra.local.controller", "--folder", str(folder)),
        environment={**base_environment(), "PYTHONPATH": str(Path(__file__).parents[2])},
        folder=folder,
        log_path=log_path,
        ready=lambda: b"watching" in log_path.read_bytes()[log_start:],
        # Servers are ended side by side, each within its own grace.
        grace_s=20.0,
    )
    return Controller(process=ServerProcess(command), folder=folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Watch a folder until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m infra.local.controller", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="the folder to watch; created if missing")
    folder: Path = parser.parse_args(arguments).folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stopping.set())
    with _lock_folder(folder):
        sys.stdout.write(f"watching {folder}\n")
        sys.stdout.flush()
        run_controller(folder, stopping)


def run_controller(folder: Path, stopping: threading.Event) -> None:
    """Keep one server running for each release below `folder` until `stopping`, then end them all."""
    supervisors: dict[Path, ReleaseSupervisor] = {}
    # The servers of an earlier controller ended with it.
    for version in _list_versions(folder):
        (version / STATUS_FILE).unlink(missing_ok=True)
    try:
        while not stopping.wait(_POLL_S):
            releases = dict(_find_releases(folder))
            for path in [path for path, supervisor in supervisors.items() if releases.get(path) != supervisor.identity]:
                supervisors.pop(path).end()
            for path in releases.keys() - supervisors.keys():
                # It may have been removed since it was found.
                with suppress(FileNotFoundError):
                    supervisors[path] = ReleaseSupervisor(path, releases[path])
    finally:
        for supervisor in supervisors.values():
            supervisor.stopping.set()
        for supervisor in supervisors.values():
            supervisor.end()


def _find_releases(folder: Path) -> Generator[tuple[Path, Identity]]:
    """Yield each folder of a release with what identifies this very folder, not another one of its name."""
    for version in _list_versions(folder):
        # It may have been removed since it was listed.
        with suppress(OSError):
            found = (version / SERVE_FILE).stat()
            yield version, (version.stat().st_ino, found.st_ino, found.st_mtime_ns)


def _list_versions(folder: Path) -> Generator[Path]:
    """Yield each <endpoint>/<version> below a folder that is complete; any may be removed meanwhile."""
    for endpoint in _list_visible_folders(folder):
        # Path.glob would raise here.
        with suppress(FileNotFoundError):
            yield from _list_visible_folders(endpoint)


def _list_visible_folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return [Path(entry) for entry in entries if not entry.name.startswith(".") and entry.is_dir()]


@contextmanager
def _lock_folder(folder: Path) -> Generator[None]:
    """Hold the lock of the folder, which shows that it is watched. Exits where another controller holds it."""
    with (folder / _LOCK_FILE).open("w") as lock:
        attempts = threading.Event()
        waited_s = 0.0
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # A check whether the folder is watched holds the lock for a moment.
                if waited_s >= _LOCK_S_MAX:
                    sys.exit(f"Only one controller may watch {folder}, and another one does. Stop it first.")
                attempts.wait(_POLL_S)
                waited_s += _POLL_S
        yield


class Serve(BaseModel):
    """serve.json: how the server of a release is run; argv and environment may hold placeholders.

    {folder} is the release's own, where the server also runs; {port}, {port2} and so on are free ports on loopback.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    argv: tuple[str, ...] = Field(min_length=1, description="The program and its arguments.")
    environment: dict[str, str] = Field(default={}, description="Its variables, beside a few that it inherits.")
    ready_path: Annotated[str, StringConstraints(pattern="^/")] = Field(description="Answers 2xx once it serves.")
    ready_s_max: float = Field(default=300.0, gt=0, description="Seconds within which it must be ready.")

    def list_ports(self) -> list[str]:
        """Return the names of the ports that it uses, {port} first."""
        text = "\0".join((*self.argv, *self.environment.values()))
        return sorted({"port", *_PLACEHOLDER.findall(text)} - {"folder"})

    def fill_placeholders(self, text: str, folder: Path, ports: Mapping[str, int]) -> str:
        """Return an argument or a value with its placeholders filled."""
        return _PLACEHOLDER.sub(lambda found: str(folder if found[1] == "folder" else ports[found[1]]), text)


class _ReleaseRemoved(Exception):
    """The release no longer exists."""


class ReleaseSupervisor:
    """Keeps the server of one release running, in its own thread."""

    def __init__(self, folder: Path, identity: Identity) -> None:
        self.identity = identity
        self.stopping = threading.Event()
        self._folder = folder
        self._ports: dict[str, int] = {}
        self._held = ExitStack()
        self._starts = 0
        # By it the status is written into this very folder, even where another one has taken its name.
        self._directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self._thread = threading.Thread(target=self._run, name=str(folder))
        self._thread.start()

    def end(self) -> None:
        """End the server and return when it has ended."""
        self.stopping.set()
        self._thread.join()
        self._held.close()
        os.close(self._directory)

    def _run(self) -> None:
        try:
            self._supervise(_read_serve(self._folder))
        except (OSError, ValueError) as error:
            self._write_status("failed", error=str(error))
            self.stopping.wait()
        except _ReleaseRemoved:
            pass
        self._write_status("ended")

    def _supervise(self, serve: Serve) -> None:
        failures = 0
        error = None
        while not self.stopping.is_set():
            self._write_status("starting", error=error)
            try:
                steady, error = self._serve_once(serve)
                failures = 0 if steady else failures
            except ServerFailed as failure:
                error = str(failure)
            self._write_status("failed", error=error)
            self.stopping.wait(min(_BACKOFF_S * 2**failures, _BACKOFF_S_MAX))
            failures += 1

    def _serve_once(self, serve: Serve) -> tuple[bool, str]:
        """Run the server until it dies; return whether it was up for long, and how it ended."""
        with self._start_server(serve) as server:
            url = f"http://{HOST}:{self._ports['port']}"
            self._write_status("ready", url=url, pid=server.pid)
            waited_s = 0.0
            while server.running and not self.stopping.wait(_POLL_S):
                waited_s += _POLL_S
            if self.stopping.is_set():
                raise _ReleaseRemoved
            tail = "\n".join(server.log_text().splitlines()[-_LOG_LINES_SHOWN:]) or "(empty)"
            program = Path(serve.argv[0]).name
            died = (
                f"{program} ended with exit code {server.exit_code} and is started again. The end of its log:\n{tail}"
            )
            return waited_s >= _STEADY_S, died

    def _start_server(self, serve: Serve) -> ServerProcess:
        """Start the server on its previous ports, so that its URL stays, or on others where they are taken."""
        self._starts += 1
        taken_before = False
        while True:
            if not self._ports or taken_before:
                names = serve.list_ports()
                # Until the release ends: a server may answer as ready before it listens at its other ports.
                self._held.close()
                ports = self._held.enter_context(hold_ports(len(names)))
                self._ports = dict(zip(names, ports, strict=True))
            try:
                return ServerProcess(self._make_command(serve))
            except ServerFailed as failure:
                taken = any(phrase in failure.log.lower() for phrase in _PORT_TAKEN)
                if taken_before or not taken:
                    raise
                taken_before = True

    def _make_command(self, serve: Serve) -> ServerCommand:
        def fill(text: str) -> str:
            return serve.fill_placeholders(text, self._folder, self._ports)

        inherited = {name: value for name, value in base_environment().items() if name != "PYTHONPATH"}
        return ServerCommand(
            argv=tuple(map(fill, serve.argv)),
            environment=inherited | {name: fill(value) for name, value in serve.environment.items()},
            folder=self._folder,
            log_path=self._folder / LOG_FILE,
            ready=lambda: self._is_ready(serve.ready_path),
            ready_s_max=serve.ready_s_max,
        )

    def _is_ready(self, path: str) -> bool:
        if self.stopping.is_set():
            raise _ReleaseRemoved
        return send_request("GET", self._ports["port"], path).ok

    def _write_status(
        self, state: str, *, url: str | None = None, error: str | None = None, pid: int | None = None
    ) -> None:
        status = {"state": state, "url": url, "error": error, "starts": self._starts, "pid": pid}
        # The folder may be being removed.
        with suppress(OSError):
            part = f"{STATUS_FILE}.part"
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            with os.fdopen(os.open(part, flags, 0o644, dir_fd=self._directory), "w") as file:
                json.dump(status, file)
            os.rename(part, STATUS_FILE, src_dir_fd=self._directory, dst_dir_fd=self._directory)


def _read_serve(folder: Path) -> Serve:
    """Return the content of serve.json. Raises ValueError with all that is wrong with it, or OSError."""
    path = folder / SERVE_FILE
    if path.stat().st_size > _SERVE_BYTES_MAX:
        message = f"{path} must have at most {_SERVE_BYTES_MAX} bytes, got {path.stat().st_size}; shorten it."
        raise ValueError(message)
    try:
        return Serve.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'it'}: {each['msg']}" for each in error.errors())
        message = f"{path} must state how to run a server, got {problems}. Correct it, and the server is started."
        raise ValueError(message) from None


if __name__ == "__main__":
    main()
