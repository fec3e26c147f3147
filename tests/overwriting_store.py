"""A store that ignores `If-None-Match`: the real S3 server behind a proxy that deletes what is to be overwritten.

Clients sign that header, so it can't be taken out on the way.
"""

from __future__ import annotations

import http.client
from collections.abc import Callable, Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit

import boto3

from infra.local.s3 import S3Server
from tests.servers import serve_http


@contextmanager
def overwriting_store(server: S3Server) -> Generator[str]:
    """Start a proxy in front of an S3 server, and give its endpoint."""
    upstream = server.endpoint_url
    client = boto3.client("s3", endpoint_url=upstream)

    def delete(path: str) -> None:
        bucket, _, key = unquote(path).removeprefix("/").partition("/")
        client.delete_object(Bucket=bucket, Key=key)

    with _proxy(str(urlsplit(upstream).netloc), delete) as endpoint:
        yield endpoint


@contextmanager
def _proxy(upstream: str, delete: Callable[[str], None]) -> Generator[str]:
    with serve_http(_handler(upstream, delete)) as port:
        yield f"http://127.0.0.1:{port}"


def _handler(upstream: str, delete: Callable[[str], None]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def handle_one_request(self) -> None:
            self.raw_requestline = self.rfile.readline(65_537)
            if not self.raw_requestline or not self.parse_request():
                self.close_connection = True
                return
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.command == "PUT" and self.headers.get("If-None-Match"):
                delete(self.path)
            connection = http.client.HTTPConnection(upstream, timeout=30)
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            data = answer.read()
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in {"transfer-encoding", "connection"}:
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
            connection.close()
            self.close_connection = True

    return Handler
