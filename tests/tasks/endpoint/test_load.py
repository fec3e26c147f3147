from __future__ import annotations

import itertools
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.targets import Address
from tasks.endpoint.load import arrivals, measure_latency
from tests.serving.toys import matrix
from tests.tasks.endpoint.values import sample


@given(rate=st.floats(1, 500), seconds=st.floats(0.1, 10))
def test_as_many_are_due_as_the_rate_says_in_order_and_in_time(rate: float, seconds: float) -> None:
    due_s = arrivals(rate, seconds)

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

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Generator[Address]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Sometimes) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Address(url=f"http://127.0.0.1:{server.server_port}", model="churn", version=None)
        server.shutdown()
        thread.join()


def test_what_has_no_answer_is_counted_apart(server: Address) -> None:
    found = measure_latency(server, matrix(4), sample(), rate=100, seconds=0.4)

    assert found is not None
    assert (40, 10) == (found.requests, found.errors)
    assert 30 == len(found.samples_ms)
    assert 0 < found.p50_ms <= found.p99_ms


def test_a_server_that_is_not_there_has_no_latency() -> None:
    nowhere = Address(url="http://127.0.0.1:9", model="churn", version=None)

    assert measure_latency(nowhere, matrix(4), sample(), rate=50, seconds=0.1) is None
