"""AWS on loopback: moto's HTTP server, behind one that answers as a test says where moto can't fail as AWS does."""

from __future__ import annotations

import http.client
import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs

import boto3
import pytest

from tests.servers import serve_http

REGION = "eu-central-1"
_KEYS = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing"}
# What a connection has for itself.
_HOP = {"connection", "transfer-encoding", "content-length", "host", "keep-alive"}

Answer = tuple[int, str]


def refuse(code: str, message: str, status: int = 400) -> Answer:
    """Return an answer of AWS that refuses."""
    return status, (
        f"<ErrorResponse><Error><Type>Sender</Type><Code>{code}</Code><Message>{message}</Message></Error>"
        "<RequestId>0</RequestId></ErrorResponse>"
    )


@dataclass
class AwsServer:
    """The address of the server; `answers` has what is answered to an action in moto's place, by its name.

    An answer may be made of the parameters of the request; None has moto answer.
    """

    url: str
    answers: dict[str, Answer | Callable[[dict[str, str]], Answer | None]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    clients: dict[str, Any] = field(default_factory=dict)

    def client(self, service: str) -> Any:
        """Return the client of boto3 for a service; it is made once, since a session of boto3 reads long files."""
        if service not in self.clients:
            # Never the session that all of boto3 shares: it keeps the first credentials that it finds.
            session = boto3.Session(*_KEYS.values())
            self.clients[service] = session.client(service, region_name=REGION, endpoint_url=self.url)
        return self.clients[service]

    def list_subnets(self) -> list[str]:
        """Return the subnets of the one network that there is from the start."""
        return [each["SubnetId"] for each in self.client("ec2").describe_subnets()["Subnets"]]

    def answer(self, body: bytes) -> Answer | None:
        """Return what a test has for a request."""
        parameters = {name: values[0] for name, values in parse_qs(body.decode(errors="replace")).items()}
        action = parameters.get("Action", "")
        self.asked.append(action)
        given = self.answers.get(action)
        return given(parameters) if callable(given) else given

    def reset(self) -> None:
        """Forget everything that was made."""
        self.answers.clear()
        self.asked.clear()
        host, port = self.url.removeprefix("http://").split(":")
        connection = http.client.HTTPConnection(host, int(port))
        connection.request("POST", "/moto-api/reset")
        connection.getresponse().read()
        connection.close()


@contextmanager
def aws_server() -> Generator[AwsServer]:
    """Start both servers, and stop them at the end; a skip without moto."""
    moto = pytest.importorskip("moto.server", reason="pip install -e '.[dev]' brings moto")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    behind = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    images = pytest.MonkeyPatch()
    # Thousands of images, which moto would make after every reset, and of which no test starts a machine.
    images.setenv("MOTO_EC2_LOAD_DEFAULT_AMIS", "false")
    behind.start()
    server = AwsServer(url="")

    class Front(BaseHTTPRequestHandler):
        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            given = server.answer(body)
            if given is not None:
                self.reply(given[0], {"Content-Type": "text/xml"}, given[1].encode())
                return
            host, port = behind.get_host_and_port()
            connection = http.client.HTTPConnection(host, port, timeout=60)
            # moto tells services and buckets by the host that was asked.
            headers = {**dict(self.headers.items()), "Host": f"{host}:{port}"}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            found = answer.read()
            self.reply(answer.status, dict(answer.getheaders()), found)
            connection.close()

        def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in _HOP:
                    self.send_header(name, value)
            length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
            self.send_header("Content-Length", length)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

    try:
        with serve_http(Front) as port:
            server.url = f"http://127.0.0.1:{port}"
            yield server
    finally:
        behind.stop()
        images.undo()


@contextmanager
def use_aws(server: AwsServer) -> Generator[None]:
    """Have this process and its children take the server for AWS, with credentials that anybody may have."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": server.url,
            **_KEYS,
            "AWS_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN", "OVERNIGHT_STACK"):
            patch.delenv(name, raising=False)
        yield
