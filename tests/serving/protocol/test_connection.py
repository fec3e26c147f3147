"""Clients that send too much, too slowly, or nothing: each connection is limited, and others are served."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import uvicorn

from serving.protocol.connection import ConnectionLimits, build_protocol

LIMITS = ConnectionLimits(head_bytes_max=4096, headers_max=20, head_s_max=0.5, connections_max=5)
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
UNREAD = b"POST /unread HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
CHUNKED = b"POST /read HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the size of the body; for /unread without reading it."""
    size = 0
    while scope["path"] == "/read":
        message = await receive()
        size += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    content = str(size).encode()
    headers = [(b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": content})


@pytest.fixture(scope="module")
def port() -> Generator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(app, http=build_protocol(LIMITS), lifespan="off", log_level="critical")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join()


@contextmanager
def connect(port: int) -> Generator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        yield client


def read_to_end(client: socket.socket) -> bytes:
    """What the server sends until it closes the connection."""
    parts = []
    try:
        while part := client.recv(1 << 16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def send_slowly(client: socket.socket, piece: bytes, seconds: float = 10) -> float:
    """Send a piece repeatedly until the connection is closed; return the seconds until then."""
    began = time.monotonic()
    client.settimeout(0.05)
    while time.monotonic() < began + seconds:
        try:
            client.sendall(piece)
            if not client.recv(1 << 16):
                break
        except TimeoutError:
            continue
        except OSError:
            break
    return time.monotonic() - began


def test_consecutive_and_pipelined_requests_are_answered(port: int) -> None:
    with connect(port) as client:
        for sent in (
            GET,
            GET,
            GET + GET,
            CHUNKED + b"3\r\nabc\r\n0\r\n\r\n",
            CHUNKED + b"1\r\na\r\n" * 2000 + b"0\r\n\r\n",
        ):
            client.sendall(sent)
            time.sleep(0.05)
        client.shutdown(socket.SHUT_WR)
        answers = read_to_end(client)

    assert 6 == answers.count(b"HTTP/1.1 200 OK")
    assert answers.endswith(b"2000")


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 21 + b"\r\n",
        b"GET / HTTP/1.1\r\na: " + b"b" * 5000 + b"\r\n\r\n",
        b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\n\r\n",
        GET + b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 21 + b"\r\n",
    ],
    ids=["many headers", "a large header", "a long path", "many headers in the second request"],
)
def test_too_many_or_too_large_headers_are_431(port: int, sent: bytes) -> None:
    with connect(port) as client:
        for part in sent.partition(GET) if sent.startswith(GET) else (sent,):
            client.sendall(part)
            time.sleep(0.05)
        answer = read_to_end(client)

    assert b"HTTP/1.1 431 " in answer
    assert answer.endswith(b'{"error":"A request may have 20 headers of 4096 bytes in all, got more."}')


@pytest.mark.parametrize("before", [b"GET / HTTP/1.1\r\na: ", CHUNKED + b"1\r\na\r\n0\r\ntrailer: ", CHUNKED + b"1;"])
def test_a_header_without_an_end_is_not_buffered(port: int, before: bytes) -> None:
    sent = 0
    with connect(port) as client:
        client.sendall(before)
        try:
            while sent < 48 << 20:
                client.sendall(b"b" * 4096)
                sent += 4096
                time.sleep(0.001)
        except OSError:
            pass

    assert sent < 1 << 20


@pytest.mark.parametrize(
    ("before", "piece"),
    [(b"", b""), (b"", b"\r\n"), (b"", b"a: b\r\n"), (GET, b"\r\n"), (GET, b"a: b\r\n")],
    ids=["nothing", "blank lines", "headers", "blank lines after an answer", "headers after an answer"],
)
def test_a_slow_client_is_disconnected(port: int, before: bytes, piece: bytes) -> None:
    with connect(port) as client:
        if before:
            client.sendall(before)
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")
        if piece == b"a: b\r\n":
            client.sendall(b"GET / HTTP/1.1\r\n")
        seconds = send_slowly(client, piece)

    assert 0.3 < seconds < 5


def test_headers_that_arrive_too_slowly_are_408(port: int) -> None:
    with connect(port) as client:
        client.sendall(GET[:-2])

        assert read_to_end(client).startswith(b"HTTP/1.1 408 ")


def test_the_rest_of_an_answered_request_has_the_same_time_limit(port: int) -> None:
    with connect(port) as client:
        client.sendall(UNREAD)
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")

        assert 0.3 < send_slowly(client, b"a") < 5


def test_connections_beyond_the_limit_are_closed_and_the_others_served(port: int) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(port)) for _ in range(5)]
        for client in clients:
            client.sendall(GET)
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")
        with connect(port) as more:
            assert b"" == read_to_end(more)
        clients[0].sendall(GET)
        assert clients[0].recv(1 << 16).startswith(b"HTTP/1.1 200")
