from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import EndpointFailed
from serving.protocol.oip import decode_request
from serving.targets import Address
from tasks.endpoint.load import draw_arrivals, measure_latency, run_closed_loop
from tests.servers import serve_http
from tests.serving.toys import matrix
from tests.tasks.endpoint.values import sample


@given(rate=st.floats(1, 500), seconds=st.floats(0.1, 10))
def test_as_many_are_due_as_the_rate_gives_in_order_and_in_time(rate: float, seconds: float) -> None:
    due_s = draw_arrivals(rate, seconds)

    assert max(1, round(rate * seconds)) == len(due_s)
    assert all(first <= second for first, second in itertools.pairwise(due_s))
    assert 0 <= due_s[0]
    assert seconds == pytest.approx(due_s[-1])


class Sometimes(BaseHTTPRequestHandler):
    """Answers, but for every fourth request."""

    protocol_version = "HTTP/1.1"
    counted = itertools.count()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(500 if next(self.counted) % 4 == 3 else 200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")


@pytest.fixture
def server() -> Generator[Address]:
    with serve_http(Sometimes) as port:
        yield Address(url=f"http://127.0.0.1:{port}", model="churn", version=None)


def test_what_has_no_answer_is_counted_apart(server: Address) -> None:
    found = measure_latency(server, matrix(4), sample(), rate=100, seconds=0.4)

    assert found is not None
    assert (40, 10) == (found.requests, found.errors)
    assert 30 == len(found.samples_ms)
    assert 0 < found.p50_ms <= found.p99_ms


def test_a_server_that_is_not_there_has_no_latency() -> None:
    nowhere = Address(url="http://127.0.0.1:9", model="churn", version=None)

    assert measure_latency(nowhere, matrix(4), sample(), rate=50, seconds=0.1) is None


CONTRACT = matrix(4)


class Counting(BaseHTTPRequestHandler):
    """Answers every request, and knows how many it had at a time."""

    protocol_version = "HTTP/1.1"
    counted = itertools.count()
    lock = threading.Lock()
    inside = most = 0

    def do_POST(self) -> None:
        with self.lock:
            type(self).inside += 1
            type(self).most = max(self.most, self.inside)
        decode_request(self.rfile.read(int(self.headers["Content-Length"])), CONTRACT, header_length=None, rows_max=1)
        with self.lock:
            type(self).inside -= 1
        self.answer()

    def answer(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")


class Chunked(Counting):
    def answer(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"1\r\n{\r\n")
        self.wfile.flush()
        self.wfile.write(b"1\r\n}\r\n0\r\n\r\n")


class Full(Counting):
    def answer(self) -> None:
        self.send_response(503 if next(self.counted) > 20 else 200)
        self.send_header("Content-Length", "10")
        self.end_headers()
        self.wfile.write(b"too busy.!")


class Closing(Counting):
    protocol_version = "HTTP/1.0"


@pytest.fixture
def serve() -> Generator[Callable[[type[Counting]], Address]]:
    """Start servers that answer in these ways."""
    with ExitStack() as stack:

        def start(handler: type[Counting]) -> Address:
            port = stack.enter_context(serve_http(handler))
            return Address(url=f"http://127.0.0.1:{port}", model="churn", version=None)

        yield start


@pytest.mark.parametrize("handler", [Counting, Chunked])
def test_as_many_ask_at_a_time_as_there_are_callers(
    serve: Callable[[type[Counting]], Address], handler: type[Counting]
) -> None:
    handler.most = 0
    loop = run_closed_loop(serve(handler), CONTRACT, sample(), callers=3, seconds=0.4)

    assert 1 <= handler.most <= 3
    assert (3, True) == (loop.callers, loop.answers >= 3)
    assert 0 < loop.p50_ms <= loop.p99_ms


def test_every_caller_has_its_answers_however_few_the_seconds_are(serve: Callable[[type[Counting]], Address]) -> None:
    assert run_closed_loop(serve(Counting), CONTRACT, sample(), callers=8, seconds=0.001).answers >= 8


@pytest.mark.parametrize(
    ("handler", "words"),
    [(Full, r"with 200, got: HTTP/1\.1 503 .*too busy"), (Closing, "must keep connections open")],
)
def test_an_invalid_answer_is_an_error_with_its_text(
    serve: Callable[[type[Counting]], Address], handler: type[Counting], words: str
) -> None:
    with pytest.raises(EndpointFailed, match=f"(?s){words}"):
        run_closed_loop(serve(handler), CONTRACT, sample(), callers=2, seconds=5.0)


def test_a_server_that_is_not_there_is_named(serve: Callable[[type[Counting]], Address]) -> None:
    nobody = Address(url="http://127.0.0.1:9", model="churn", version=None)
    with pytest.raises(EndpointFailed, match=r"must answer at http://127\.0\.0\.1:9"):
        run_closed_loop(nobody, CONTRACT, sample(), callers=1, seconds=0.1)
