"""Clients that send too much, too slowly, or nothing: each connection is limited, and others are served."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import uvicorn

from serving.protocol.connection import ConnectionLimits, build_protocol
from tests.eventually import eventually

# Longer than any test takes: the clock comes there only where a test puts it forward.
LIMITS = ConnectionLimits(head_bytes_max=4096, headers_max=20, head_s_max=3600, connections_max=5)
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


class AdvancedLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock a test puts forward."""

    ahead = 0.0

    def time(self) -> float:
        return super().time() + self.ahead

    def advance(self, seconds: float) -> None:
        """Put the clock forward, from any thread."""

        def put_forward() -> None:
            self.ahead += seconds

        self.call_soon_threadsafe(put_forward)


@pytest.fixture(scope="module")
def loop() -> Generator[AdvancedLoop]:
    loop = AdvancedLoop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def server(loop: AdvancedLoop) -> Generator[uvicorn.Server]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        # What a client sends and nobody reads stays with the client.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        # Uvicorn's own limit on idle connections is not what is tested.
        config = uvicorn.Config(
            app, http=build_protocol(LIMITS), lifespan="off", log_level="critical", timeout_keep_alive=10**9
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=loop.run_until_complete, args=(server.serve([listening]),))
        thread.start()
        eventually(lambda: server.started)
        yield server
        server.should_exit = True
        thread.join()


@pytest.fixture
def port(server: uvicorn.Server) -> int:
    # Clients of earlier tests count until the server has seen them go.
    eventually(lambda: not server.server_state.connections)
    return int(server.servers[0].sockets[0].getsockname()[1])


@contextmanager
def connect(port: int) -> Generator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
        yield client


def read_answer(client: socket.socket) -> bytes:
    """One answer, whose body has one character and may come on its own."""
    answer = client.recv(1 << 16)
    while b"\r\n\r\n" not in answer[:-1]:
        more = client.recv(1 << 16)
        assert more, answer
        answer += more
    return answer


def read_to_end(client: socket.socket) -> bytes:
    """What the server sends until it closes the connection."""
    parts = []
    try:
        while part := client.recv(1 << 16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def is_closed_after(client: socket.socket, piece: bytes, loop: AdvancedLoop) -> bool:
    """Send a piece and let a quarter of the time limit pass; return whether the connection is closed by then."""
    client.settimeout(0.05)
    try:
        client.sendall(piece)
        loop.advance(LIMITS.head_s_max / 4)
        return not client.recv(1 << 16)
    except TimeoutError:
        return False
    except OSError:
        return True


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
        except OSError:
            pass

    assert sent < 1 << 20


@pytest.mark.parametrize(
    ("before", "piece"),
    [(b"", b""), (b"", b"\r\n"), (b"", b"a: b\r\n"), (GET, b"\r\n"), (GET, b"a: b\r\n")],
    ids=["nothing", "blank lines", "headers", "blank lines after an answer", "headers after an answer"],
)
def test_a_slow_client_is_disconnected(port: int, loop: AdvancedLoop, before: bytes, piece: bytes) -> None:
    with connect(port) as client:
        if before:
            client.sendall(before)
            assert read_answer(client).startswith(b"HTTP/1.1 200")
        if piece == b"a: b\r\n":
            client.sendall(b"GET / HTTP/1.1\r\n")

        eventually(lambda: is_closed_after(client, piece, loop))


def test_headers_that_come_within_the_time_limit_are_answered(port: int, loop: AdvancedLoop) -> None:
    with connect(port) as client:
        for sent in (b"", GET[:-2]):
            client.sendall(sent)
            loop.advance(LIMITS.head_s_max / 4)
        client.sendall(GET[-2:])

        assert read_answer(client).startswith(b"HTTP/1.1 200")


def test_headers_that_arrive_too_slowly_are_408(port: int, server: uvicorn.Server, loop: AdvancedLoop) -> None:
    with connect(port) as client:
        client.sendall(GET[:-2] + b"a: b")
        # Not before the server has read them: it would find that nothing came.
        eventually(lambda: any(getattr(each, "headers", None) for each in list(server.server_state.connections)))
        loop.advance(LIMITS.head_s_max)

        assert read_to_end(client).startswith(b"HTTP/1.1 408 ")


def test_the_rest_of_an_answered_request_has_the_same_time_limit(port: int, loop: AdvancedLoop) -> None:
    with connect(port) as client:
        client.sendall(UNREAD)
        assert read_answer(client).startswith(b"HTTP/1.1 200")

        eventually(lambda: is_closed_after(client, b"a", loop))


def test_connections_beyond_the_limit_are_closed_and_the_others_served(port: int) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(port)) for _ in range(5)]
        for client in clients:
            client.sendall(GET)
            assert read_answer(client).startswith(b"HTTP/1.1 200")
        with connect(port) as more:
            assert b"" == read_to_end(more)
        clients[0].sendall(GET)
        assert clients[0].recv(1 << 16).startswith(b"HTTP/1.1 200")
