"""A proxy on loopback before an S3 server that keeps a list of what was asked for, and how many bytes were sent.

It passes on every header, the Host too, which the signature covers.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit

from tests.benchmarks.kills.reads import Read
from tests.servers import serve_http

_RANGE = re.compile(r"bytes=(\d+)-")
# These are of one connection, not of what travels over it.
_OF_CONNECTION = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass(slots=True, kw_only=True)
class Proxy:
    """Where the proxy listens, and what it has passed on: bytes of objects, and other requests by method."""

    url: str
    reads: list[Read] = field(default_factory=list)
    requests: dict[str, int] = field(default_factory=dict)


@contextmanager
def counting_proxy(server: str) -> Generator[Proxy]:
    """Pass requests on to a server, and count them, while the block runs."""
    proxy = Proxy(url="")
    lock = threading.Lock()
    upstream = str(urlsplit(server).netloc)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            self.upstream = HTTPConnection(upstream)

        def finish(self) -> None:
            self.upstream.close()
            super().finish()

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            connection = self.upstream
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body or None)
            response = connection.getresponse()
            data = response.read()
            with lock:
                _count(proxy, self.command, self.path, self.headers.get("Range"), response.status, len(data))
            self.send_response_only(response.status)
            for name, value in response.getheaders():
                if name.lower() not in _OF_CONNECTION:
                    self.send_header(name, value)
            length = response.getheader("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = pass_on

    with serve_http(Handler) as port:
        proxy.url = f"http://127.0.0.1:{port}"
        yield proxy


def _count(proxy: Proxy, method: str, target: str, range_: str | None, status: int, size: int) -> None:
    path, query = unquote(urlsplit(target).path), urlsplit(target).query
    of_object = method == "GET" and "list-type" not in query
    kind = "LIST" if method == "GET" and not of_object else method
    proxy.requests[kind] = proxy.requests.get(kind, 0) + 1
    if of_object and status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
        match = _RANGE.match(range_ or "")
        start = int(match[1]) if match and status == HTTPStatus.PARTIAL_CONTENT else 0
        proxy.reads.append(Read(address=f"s3:/{path}", start=start, size=size, at=time.time()))
