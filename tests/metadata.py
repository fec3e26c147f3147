"""Metadata services on loopback that speak as those of AWS, GCP and Azure do, so that tests need no cloud."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import format_datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

from tests.servers import serve_http

_TOKEN_SECONDS_MAX = 21_600


class Service:
    """One metadata service; `clock` is its own, which need not be this machine's."""

    signature: ClassVar[Mapping[str, str]] = {}

    def __init__(self) -> None:
        self.url = ""
        self.clock: Callable[[], float] = time.time
        self.failing = False
        self.asked: list[tuple[str, int]] = []

    def answer(self, method: str, path: str, query: Mapping[str, str], headers: Mapping[str, str]) -> tuple[int, str]:
        """Return status and body of one request."""
        raise NotImplementedError

    def in_seconds(self, seconds: float) -> datetime:
        """Return a time so many seconds from now, by the service's clock."""
        return datetime.fromtimestamp(self.clock() + seconds, UTC)

    def answers(self, path: str, status: int = 200) -> int:
        """Return how often a path was answered so."""
        return self.asked.count((path, status))


class Imds(Service):
    """AWS's, version 2: nothing without a token, and a token only by PUT with its life in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: set[str] = set()
        self.action: dict[str, str] | None = None
        self.rebalance = False

    def interrupt(self, action: str, seconds: float) -> None:
        """Announce an interruption."""
        self.action = {"action": action, "time": f"{self.in_seconds(seconds):%Y-%m-%dT%H:%M:%SZ}"}

    def answer(self, method: str, path: str, query: Mapping[str, str], headers: Mapping[str, str]) -> tuple[int, str]:
        if path == "/latest/api/token":
            return self._token(method, headers.get("x-aws-ec2-metadata-token-ttl-seconds", ""))
        if headers.get("x-aws-ec2-metadata-token") not in self.tokens:
            return HTTPStatus.UNAUTHORIZED, ""
        if path == "/latest/meta-data/spot/instance-action" and self.action:
            return HTTPStatus.OK, json.dumps(self.action)
        if path == "/latest/meta-data/events/recommendations/rebalance" and self.rebalance:
            return HTTPStatus.OK, json.dumps({"noticeTime": f"{self.in_seconds(0):%Y-%m-%dT%H:%M:%SZ}"})
        return HTTPStatus.NOT_FOUND, ""

    def _token(self, method: str, seconds: str) -> tuple[int, str]:
        if method != "PUT":
            return HTTPStatus.METHOD_NOT_ALLOWED, ""
        if not seconds.isdigit() or not 1 <= int(seconds) <= _TOKEN_SECONDS_MAX:
            return HTTPStatus.BAD_REQUEST, ""
        token = uuid.uuid4().hex
        self.tokens.add(token)
        return HTTPStatus.OK, token


class GcpMetadata(Service):
    """GCP's: nothing without its header, which it sends back."""

    signature = {"Metadata-Flavor": "Google"}  # noqa: RUF012 - its base has it for the class

    def __init__(self) -> None:
        super().__init__()
        self.preempted = False

    def answer(self, method: str, path: str, query: Mapping[str, str], headers: Mapping[str, str]) -> tuple[int, str]:
        if headers.get("metadata-flavor") != "Google":
            return HTTPStatus.FORBIDDEN, "Missing Metadata-Flavor:Google header."
        if (method, path) != ("GET", "/computeMetadata/v1/instance/preempted"):
            return HTTPStatus.NOT_FOUND, ""
        return HTTPStatus.OK, "TRUE" if self.preempted else "FALSE"


class AzureMetadata(Service):
    """Azure's: nothing without its header and a version; the events are those of a whole scale set."""

    machine = "scorer_3"

    def __init__(self) -> None:
        super().__init__()
        self.events: list[dict[str, Any]] = []

    def announce(self, kind: str, seconds: float | None, machine: str = machine) -> None:
        """Add an event, None for one that has started."""
        when = "" if seconds is None else format_datetime(self.in_seconds(seconds), usegmt=True)
        self.events.append(
            {
                "EventId": str(uuid.uuid4()),
                "EventStatus": "Started" if seconds is None else "Scheduled",
                "EventType": kind,
                "ResourceType": "VirtualMachine",
                "Resources": [machine],
                "NotBefore": when,
                "Description": "",
                "EventSource": "Platform",
                "DurationInSeconds": -1,
            }
        )

    def answer(self, method: str, path: str, query: Mapping[str, str], headers: Mapping[str, str]) -> tuple[int, str]:
        if headers.get("metadata", "").lower() != "true" or "api-version" not in query or "x-forwarded-for" in headers:
            return HTTPStatus.BAD_REQUEST, json.dumps({"error": "Bad request. Required metadata header not specified"})
        if path == "/metadata/instance/compute/name" and query.get("format") == "text":
            return HTTPStatus.OK, self.machine
        if path == "/metadata/scheduledevents":
            return HTTPStatus.OK, json.dumps({"DocumentIncarnation": len(self.events), "Events": self.events})
        return HTTPStatus.NOT_FOUND, ""


@contextmanager
def serving(service: Service) -> Generator[None]:
    """Serve on a free port of loopback while the block runs; its address is in `service.url`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, body = (500, "") if service.failing else service.answer(self.command, url.path, query, headers)
            service.asked.append((url.path, status))
            self.send_response(status)
            for name, value in service.signature.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_PUT = do_GET

        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string(timestamp or service.clock())

    with serve_http(Handler) as port:
        service.url = f"http://127.0.0.1:{port}"
        yield
