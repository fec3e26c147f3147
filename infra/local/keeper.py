"""One release of a model server: serve.json says how it is run, and status.json says what became of it.

serve.json is `Serve`. status.json holds `state` (starting, ready, failed or ended), the `url` where the server answers,
the last `error`, the number of `starts`, and the `pid`; serving/targets/folder.py reads it.
"""

import json
import os
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from infra.local.loopback import HOST, ask
from infra.local.ports import free_ports
from infra.local.process import ServerCommand, ServerFailed, ServerProcess, base_environment

SERVE_FILE, STATUS_FILE, LOG_FILE = "serve.json", "status.json", "server.log"
Identity = tuple[int, int, int]

_POLL_S = 0.1
_BACKOFF_S, _BACKOFF_S_MAX, _STEADY_S = 0.5, 30.0, 60.0
_SERVE_BYTES_MAX = 1 << 16
_LOG_LINES_SHOWN = 20
_PLACE = re.compile(r"\{(folder|port[2-9]?)\}")
_PORT_TAKEN = ("address already in use", "failed to bind")


class Serve(BaseModel):
    """serve.json: how the server of a release is run; in argv and environment, {folder} and {port}, {port2} and so on.

    {folder} is the release's own, where the server also runs; the ports are free ones on loopback.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    argv: tuple[str, ...] = Field(min_length=1, description="The program and its arguments.")
    environment: dict[str, str] = Field(default={}, description="Its variables, beside a few that it inherits.")
    ready_path: Annotated[str, StringConstraints(pattern="^/")] = Field(description="Answers 2xx once it serves.")
    ready_s_max: float = Field(default=300.0, gt=0, description="Seconds within which it must be ready.")

    def places(self) -> list[str]:
        """Return the names of the ports that it uses, {port} first."""
        text = "\0".join((*self.argv, *self.environment.values()))
        return sorted({"port", *_PLACE.findall(text)} - {"folder"})

    def filled(self, text: str, folder: Path, ports: Mapping[str, int]) -> str:
        """Return an argument or a value with its places filled."""
        return _PLACE.sub(lambda found: str(folder if found[1] == "folder" else ports[found[1]]), text)


class _Over(Exception):
    """The release is not wanted any more."""


class Keeper:
    """Keeps the server of one release running, in a thread of its own."""

    def __init__(self, folder: Path, identity: Identity) -> None:
        self.identity = identity
        self.over = threading.Event()
        self._folder = folder
        self._ports: dict[str, int] = {}
        self._starts = 0
        # Through it the status reaches this very folder, even when another one took its name.
        self._directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self._thread = threading.Thread(target=self._run, name=str(folder))
        self._thread.start()

    def end(self) -> None:
        """End the server and return when it is gone."""
        self.over.set()
        self._thread.join()
        os.close(self._directory)

    def _run(self) -> None:
        try:
            self._keep(_read_serve(self._folder))
        except (OSError, ValueError) as error:
            self._write_status("failed", error=str(error))
            self.over.wait()
        except _Over:
            pass
        self._write_status("ended")

    def _keep(self, serve: Serve) -> None:
        failures = 0
        error = None
        while not self.over.is_set():
            self._write_status("starting", error=error)
            try:
                steady, error = self._serve_once(serve)
                failures = 0 if steady else failures
            except ServerFailed as failure:
                error = str(failure)
            self._write_status("failed", error=error)
            self.over.wait(min(_BACKOFF_S * 2**failures, _BACKOFF_S_MAX))
            failures += 1

    def _serve_once(self, serve: Serve) -> tuple[bool, str]:
        """Run the server until it dies; return whether it had been up for long, and what became of it."""
        with self._start(serve) as server:
            url = f"http://{HOST}:{self._ports['port']}"
            self._write_status("ready", url=url, pid=server.pid)
            waited_s = 0.0
            while server.running and not self.over.wait(_POLL_S):
                waited_s += _POLL_S
            if self.over.is_set():
                raise _Over
            tail = "\n".join(server.log_text().splitlines()[-_LOG_LINES_SHOWN:]) or "(empty)"
            program = Path(serve.argv[0]).name
            died = (
                f"{program} ended with exit code {server.exit_code} and is started again. The end of its log:\n{tail}"
            )
            return waited_s >= _STEADY_S, died

    def _start(self, serve: Serve) -> ServerProcess:
        """Start the server on the ports that it had, where they are still free, so that its URL stays."""
        self._starts += 1
        taken_before = False
        while True:
            if not self._ports or taken_before:
                places = serve.places()
                self._ports = dict(zip(places, free_ports(len(places)), strict=True))
            try:
                return ServerProcess(self._command(serve))
            except ServerFailed as failure:
                taken = any(phrase in failure.log.lower() for phrase in _PORT_TAKEN)
                if taken_before or not taken:
                    raise
                taken_before = True

    def _command(self, serve: Serve) -> ServerCommand:
        def fill(text: str) -> str:
            return serve.filled(text, self._folder, self._ports)

        inherited = {name: value for name, value in base_environment().items() if name != "PYTHONPATH"}
        return ServerCommand(
            argv=tuple(map(fill, serve.argv)),
            environment=inherited | {name: fill(value) for name, value in serve.environment.items()},
            folder=self._folder,
            log_path=self._folder / LOG_FILE,
            ready=lambda: self._ready(serve.ready_path),
            ready_s_max=serve.ready_s_max,
        )

    def _ready(self, path: str) -> bool:
        if self.over.is_set():
            raise _Over
        return ask("GET", self._ports["port"], path).ok

    def _write_status(
        self, state: str, *, url: str | None = None, error: str | None = None, pid: int | None = None
    ) -> None:
        status = {"state": state, "url": url, "error": error, "starts": self._starts, "pid": pid}
        # The folder may be on its way out, with all that is in it.
        with suppress(OSError):
            part = f"{STATUS_FILE}.part"
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            with os.fdopen(os.open(part, flags, 0o644, dir_fd=self._directory), "w") as file:
                json.dump(status, file)
            os.rename(part, STATUS_FILE, src_dir_fd=self._directory, dst_dir_fd=self._directory)


def _read_serve(folder: Path) -> Serve:
    """Return what serve.json says. Raises ValueError with all that is wrong with it, or OSError."""
    path = folder / SERVE_FILE
    if path.stat().st_size > _SERVE_BYTES_MAX:
        message = f"{path} must have at most {_SERVE_BYTES_MAX} bytes, got {path.stat().st_size}; write it anew."
        raise ValueError(message)
    try:
        return Serve.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'it'}: {each['msg']}" for each in error.errors())
        message = f"{path} must say how to run a server, got {problems}. Mend it, and it is started."
        raise ValueError(message) from None
