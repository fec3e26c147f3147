"""A caller that abuses a gateway at a bounded rate, and ends by itself.

`Abuser` starts a process of this module, `python -m tests.benchmarks.endpoint_abuser`. It takes one JSON object from
standard input, prints `ready`, waits for a line, abuses for the seconds that it was given, and prints what it sent and
the processor time that this took.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

HOST = "127.0.0.1"
LARGE_BYTES, LARGE_PER_SECOND = 8 << 20, 4
CONNECTIONS, CONNECTIONS_PER_SECOND = 1000, 500
HEADER_BYTES, HEADER_CONNECTIONS_PER_SECOND = 48_000_000, 40
WRONG_KEYS, WRONG_KEYS_PER_SECOND, WRONG_KEY_CONNECTIONS = 10_000, 1250, 8
_TIMEOUT_S = 20.0
_BLOCK_BYTES = 1 << 16


@dataclass(slots=True)
class Abuser:
    """The process; a context manager that has it abuse while its block runs.

    Args:
        order: What it is to do: `kind` (a key of KINDS), `seconds`, `port`, `endpoint`, `key`; `cpu_s` for a control.
    """

    order: Mapping[str, Any]
    report: dict[str, Any] = field(default_factory=dict, init=False)
    _child: subprocess.Popen[str] | None = field(default=None, init=False)

    def __enter__(self) -> Self:
        """Start the process, and have it begin."""
        command = (sys.executable, "-m", "tests.benchmarks.endpoint_abuser")
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps(dict(self.order)) + "\n")
        self._child.stdin.flush()
        assert "ready\n" == self._child.stdout.readline()
        self._child.stdin.write("go\n")
        self._child.stdin.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for its end; `report` is what it printed."""
        assert self._child is not None
        output, _ = self._child.communicate(timeout=2 * _TIMEOUT_S + self.order["seconds"])
        if self._child.returncode:
            message = f"The abuser must print what it sent, but ended with {self._child.returncode}; see above."
            raise RuntimeError(message)
        self.report = json.loads(output)


def send_large_bodies(order: Mapping[str, Any]) -> Counter[str]:
    """Send bodies of 8 MiB, `[1,1,...]`: in turn one that says it is a row, and one whose shape says all its rows."""
    counted: Counter[str] = Counter()
    values = (LARGE_BYTES - 200) // 2
    bodies = []
    for rows in (1, values // 32):
        data = b"1," * (32 * (values // 32) - 1) + b"1"
        head = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[%d,32],"data":[' % rows
        bodies.append(head + data + b"]}]}")
    for number in pace(LARGE_PER_SECOND, order["seconds"]):
        body = bodies[number % len(bodies)]
        with connect(order) as connection:
            connection.sendall(render_head(order, order["key"], len(body)))
            # A server may refuse the body before it has all of it.
            with contextlib.suppress(OSError):
                connection.sendall(body)
            counted[read_status(connection)] += 1
    return counted


def open_halfway(order: Mapping[str, Any]) -> Counter[str]:
    """Open 1,000 connections that begin a request and never end it, and keep them until the end."""
    counted: Counter[str] = Counter()
    opened = []
    began = time.monotonic()
    for _ in pace(CONNECTIONS_PER_SECOND, order["seconds"], CONNECTIONS):
        try:
            connection = connect(order)
            connection.sendall(render_head(order, order["key"], 1)[:-2])
        except OSError as error:
            counted[type(error).__name__] += 1
            continue
        opened.append(connection)
        counted["opened"] += 1
    time.sleep(max(0.0, order["seconds"] - (time.monotonic() - began)))
    for connection in opened:
        connection.close()
    return counted


def send_endless_headers(order: Mapping[str, Any]) -> Counter[str]:
    """Send headers without an end until 48 MB are sent, on the next connection where the server closes one."""
    counted: Counter[str] = Counter()
    block = b"".join(b"x-%d: %s\r\n" % (number, b"a" * 1000) for number in range(64))
    until = time.monotonic() + order["seconds"]
    for _ in pace(HEADER_CONNECTIONS_PER_SECOND, order["seconds"]):
        with connect(order) as connection, contextlib.suppress(OSError):
            counted["connections"] += 1
            connection.sendall(render_head(order, order["key"], 1)[:-2])
            while counted["bytes"] < HEADER_BYTES and time.monotonic() < until:
                connection.sendall(block)
                counted["bytes"] += len(block)
        if counted["bytes"] >= HEADER_BYTES:
            break
    return counted


def send_wrong_keys(order: Mapping[str, Any]) -> Counter[str]:
    """Send 10,000 requests, each with another key that the gateway does not know."""
    counted: Counter[str] = Counter()
    connections = [connect(order) for _ in range(WRONG_KEY_CONNECTIONS)]
    for number in pace(WRONG_KEYS_PER_SECOND, order["seconds"], WRONG_KEYS):
        at = number % len(connections)
        try:
            # Without a body, since the gateway closes a connection whose body it has not read.
            connections[at].sendall(render_head(order, f"wrong-key-of-32-characters-{number:05d}", 0))
            status = read_status(connections[at])
        except OSError as error:
            status = type(error).__name__
        counted[status] += 1
        if not status.isdigit():
            connections[at].close()
            connections[at] = connect(order)
    for connection in connections:
        connection.close()
    return counted


KINDS: dict[str, Callable[[Mapping[str, Any]], Counter[str]]] = {
    "large_bodies": send_large_bodies,
    "half_open_connections": open_halfway,
    "endless_headers": send_endless_headers,
    "wrong_keys": send_wrong_keys,
}


def burn(order: Mapping[str, Any]) -> Counter[str]:
    """Use as much processor time as an abuser did, at the same pace, by sending to a socket that discards.

    The thread that discards is in this process, so that its processor time counts as well.
    """
    counted: Counter[str] = Counter()
    per_second = LARGE_PER_SECOND if order["kind"] == "large_bodies" else HEADER_CONNECTIONS_PER_SECOND
    with socket.create_server((HOST, 0)) as server:
        threading.Thread(target=_discard, args=(server,), daemon=True).start()
        with socket.create_connection(server.getsockname()) as connection:
            block = b"1" * _BLOCK_BYTES
            began_s = time.process_time()
            for number in pace(per_second, order["seconds"]):
                share = (number + 1) / (per_second * order["seconds"])
                while time.process_time() - began_s < order["cpu_s"] * share:
                    connection.sendall(block)
                    counted["bytes"] += len(block)
    return counted


def _discard(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        buffer = bytearray(_BLOCK_BYTES)
        while connection.recv_into(buffer):
            pass


def pace(per_second: float, seconds: float, count_max: int | None = None) -> Generator[int]:
    """Yield 0, 1, ... at this rate until the seconds are over; what was late is not caught up with."""
    began = due = time.monotonic()
    number = 0
    while due < began + seconds and number != count_max:
        time.sleep(max(0.0, due - time.monotonic()))
        yield number
        number += 1
        due = max(due + 1 / per_second, time.monotonic() - 1)


def connect(order: Mapping[str, Any]) -> socket.socket:
    """Return a connection to the gateway."""
    return socket.create_connection((HOST, order["port"]), _TIMEOUT_S)


def render_head(order: Mapping[str, Any], key: str, length: int) -> bytes:
    """Return the start and the headers of a request."""
    return (
        f"POST /v2/models/{order['endpoint']}/infer HTTP/1.1\r\nHost: {HOST}\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def read_status(connection: socket.socket) -> str:
    """Return the status of an answer, or what came in its place; reads the rest of the answer."""
    received = b""
    try:
        while b"\r\n\r\n" not in received:
            block = connection.recv(_BLOCK_BYTES)
            if not block:
                return "closed"
            received += block
        head, _, body = received.partition(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        while len(body) < length:
            body += connection.recv(_BLOCK_BYTES)
    except OSError as error:
        return type(error).__name__
    return head.split()[1].decode()


def main() -> None:
    """Do what standard input says."""
    order = json.loads(sys.stdin.readline())
    act = burn if "cpu_s" in order else KINDS[order["kind"]]
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    began_s = time.process_time()
    counted = act(order)
    report = {"cpu_s": round(time.process_time() - began_s, 3), "counted": dict(counted)}
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
