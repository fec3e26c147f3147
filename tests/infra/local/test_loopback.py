import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from infra.local.loopback import Answer, ask
from infra.local.ports import free_ports


class Echo(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = f"{self.path} {self.headers['x-word']}".encode()
        self.send_response(404 if "missing" in self.path else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def echo_port() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), Echo) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_an_answer_carries_status_and_text(echo_port: int) -> None:
    answer = ask("GET", echo_port, "/here", {"x-word": "hello"})

    assert answer == Answer(status=200, text="/here hello")
    assert answer.ok


def test_a_refusal_is_an_answer_that_is_not_ok(echo_port: int) -> None:
    answer = ask("GET", echo_port, "/missing")

    assert answer.status == 404
    assert not answer.ok


def test_a_users_proxy_is_not_asked(echo_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")

    assert ask("GET", echo_port, "/here").ok


def test_a_server_that_is_not_there_yet_is_an_answer_too() -> None:
    answer = ask("GET", free_ports(1)[0], "/")

    assert answer.status == 0
    assert "ConnectionRefusedError" in answer.text
