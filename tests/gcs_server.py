"""Google Cloud Storage's XML API on loopback, as far as obstore's client speaks it.

No emulator that pip, npm or Debian have knows `x-goog-if-generation-match` in this API, which create-only writes stand
on, so this server answers as https://cloud.google.com/storage/docs/xml-api describes.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.servers import serve_http

_PAGE = 1000


@dataclass(kw_only=True)
class GcsServer:
    """A running server: its endpoint, the tokens that may write and read, and what its one bucket, lake, holds."""

    endpoint: str
    writer: str = "writer-token"
    reader: str = "reader-token"
    objects: dict[str, bytes] = field(default_factory=dict)
    ignores_conditions: bool = False
    full: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def environment(self) -> Mapping[str, str]:
        """What obstore needs to act as the identity that may write."""
        return {"GOOGLE_BASE_URL": self.endpoint, "GOOGLE_BEARER_TOKEN": self.writer}


@contextmanager
def gcs_server() -> Generator[GcsServer]:
    """Start the server on a free port, with an empty bucket named lake."""
    served = GcsServer(endpoint="")
    with serve_http(_handler(served)) as port:
        served.endpoint = f"http://127.0.0.1:{port}"
        yield served


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'  # noqa: S324 - as the store has it


def _handler(served: GcsServer) -> type[BaseHTTPRequestHandler]:  # noqa: C901 - one handler, a method for each verb
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            if "Content_Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refuse(self, status: int, code: str, message: str) -> None:
            text = (
                f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
            )
            self.answer(status, text.encode())

        def place(self) -> tuple[str, str]:
            bucket, _, key = unquote(urlsplit(self.path).path).removeprefix("/").partition("/")
            return bucket, key

        def begins(self, *, writes: bool) -> str | None:
            """Return the name of the object that is asked for, or None where the request was refused."""
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            bucket, key = self.place()
            if token not in (served.writer, served.reader):
                self.refuse(401, "AuthenticationRequired", "Authentication required.")
            elif writes and token != served.writer:
                self.refuse(403, "AccessDenied", "Access denied.")
            elif bucket != "lake":
                self.refuse(404, "NoSuchBucket", "The specified bucket does not exist.")
            else:
                return key
            return None

        def do_PUT(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            key = self.begins(writes=True)
            if key is None:
                return
            if served.full:
                self.refuse(403, "QuotaExceeded", "The quota of the project is used up.")
                return
            with served.lock:
                if copied := self.headers.get("x-goog-copy-source"):
                    data = served.objects[unquote(copied).partition("/")[2]]
                conditional = self.headers.get("x-goog-if-generation-match") == "0" and not served.ignores_conditions
                if conditional and key in served.objects:
                    self.refuse(412, "PreconditionFailed", "At least one of the pre-conditions did not hold.")
                    return
                served.objects[key] = data
            self.answer(200, b"<CopyObjectResult/>" if copied else b"", ETag=_etag(data), x_goog_generation="1")

        def do_DELETE(self) -> None:
            key = self.begins(writes=True)
            if key is None:
                return
            with served.lock:
                found = served.objects.pop(key, None)
            if found is None:
                self.refuse(404, "NoSuchKey", "The specified key does not exist.")
            else:
                self.answer(204)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            key = self.begins(writes=False)
            if key is None:
                return
            if not key:
                self.list(parse_qs(urlsplit(self.path).query))
                return
            data = served.objects.get(key)
            if data is None:
                self.refuse(404, "NoSuchKey", "The specified key does not exist.")
            elif self.headers.get("If-Match", _etag(data)) != _etag(data) and not served.ignores_conditions:
                self.refuse(412, "PreconditionFailed", "At least one of the pre-conditions did not hold.")
            else:
                self.give(data)

        def give(self, data: bytes) -> None:
            told = {"ETag": _etag(data), "Last_Modified": formatdate(0, usegmt=True), "x_goog_generation": "1"}
            if self.command == "HEAD":
                self.answer(200, Content_Length=str(len(data)), **told)
            elif asked := self.headers.get("Range"):
                first, _, last = asked.removeprefix("bytes=").partition("-")
                start = int(first) if first else max(0, len(data) - int(last))
                part = data[start : int(last) + 1] if first and last else data[start:]
                told["Content_Range"] = f"bytes {start}-{start + len(part) - 1}/{len(data)}"
                self.answer(206, part, **told)
            else:
                self.answer(200, data, **told)

        def list(self, query: dict[str, list[str]]) -> None:
            prefix, delimiter = (query.get(name, [""])[0] for name in ("prefix", "delimiter"))
            after = max(query.get(name, [""])[0] for name in ("continuation-token", "start-after"))
            with served.lock:
                keys = sorted(key for key in served.objects if key.startswith(prefix) and key > after)
                near = [key for key in keys if not delimiter or delimiter not in key.removeprefix(prefix)]
                page = near[:_PAGE]
                sizes = {key: (len(served.objects[key]), _etag(served.objects[key])) for key in page}
            contents = "".join(
                f"<Contents><Key>{escape(key)}</Key><LastModified>1970-01-01T00:00:00.000Z</LastModified>"
                f"<ETag>{escape(etag)}</ETag><Size>{size}</Size></Contents>"
                for key, (size, etag) in sizes.items()
            )
            more = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if len(near) > _PAGE else ""
            self.answer(200, f"<ListBucketResult>{contents}{more}</ListBucketResult>".encode())

    return Handler
