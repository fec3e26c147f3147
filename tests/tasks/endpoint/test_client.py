from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

import numpy as np
import pytest

from serving.errors import EndpointFailed
from serving.targets import Address
from tasks.endpoint.client import InferClient, infer_path, is_ready
from tests.servers import serve_http
from tests.serving.toys import matrix

NOWHERE = Address(url="http://127.0.0.1:9", model="churn", version="2")
X = {"x": np.zeros((1, 4), np.float32)}


@contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler], None]) -> Generator[Address]:
    """A server that answers every request alike."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer(self)

        do_GET = do_POST

    with serve_http(Handler) as port:
        yield Address(url=f"http://127.0.0.1:{port}/", model="churn", version="2")


def answers(status: int, content: bytes, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(content)

    return answer


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (answers(500, b'{"error": "no row is good enough"}'), r"with 200, got 500: .*no row is good enough"),
        (answers(200, b"<html>"), r"must match the model's contract\. .*must be JSON"),
        (answers(200, b"{}", Inference_Header_Content_Length="many"), r"must be a number of bytes, got 'many'"),
        (answers(200, b"{}", Inference_Header_Content_Length="99"), r"must be from 1 to the 2 bytes"),
    ],
)
def test_an_invalid_answer_is_an_error_with_the_address(
    answer: Callable[[BaseHTTPRequestHandler], None], said: str
) -> None:
    with serving(answer) as address, InferClient(address, matrix(4)) as ask:
        with pytest.raises(EndpointFailed, match=said) as failed:
            ask(X)
        assert f"{address.url}v2/models/churn/versions/2/infer" in str(failed.value)


def test_a_server_that_is_not_there_is_not_ready_and_named() -> None:
    assert not is_ready(NOWHERE)
    with InferClient(NOWHERE, matrix(4)) as ask, pytest.raises(EndpointFailed, match=r"must answer at .*:9/v2/models"):
        ask(X)


def test_names_are_quoted_in_paths() -> None:
    assert "/v2/models/a%2Fb/infer" == infer_path(Address(url="http://h", model="a/b", version=None))
    with serving(answers(200, b"")) as address:
        assert is_ready(address)


@pytest.mark.parametrize(("value", "is_binary"), [(1.0, False), (np.nan, True), (np.inf, True)])
def test_what_json_cannot_hold_is_sent_as_binary_data(value: float, *, is_binary: bool) -> None:
    heads: list[str | None] = []

    def note(handler: BaseHTTPRequestHandler) -> None:
        heads.append(handler.headers.get("Inference-Header-Content-Length"))
        answers(500, b"")(handler)

    with serving(note) as address, InferClient(address, matrix(4)) as ask, pytest.raises(EndpointFailed):
        ask({"x": np.full((1, 4), value, np.float32)})

    assert [is_binary] == [each is not None for each in heads]
