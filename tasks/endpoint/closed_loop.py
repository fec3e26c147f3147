"""Callers that each send their next request as soon as they have their answer: what a server takes at most.

One thread over plain sockets, since the client shares the machine's cores with what it measures: it takes some 20
microseconds of processor time a request, where http.client takes 430 and httpx 1,070, more than a fast server itself.
"""

from __future__ import annotations

import itertools
import re
import selectors
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import numpy as np

from serving.errors import EndpointFailed
from serving.model.contract import Contract
from serving.protocol.oip import encode_request
from serving.targets import Address
from tasks.endpoint.client import infer_path
from tasks.endpoint.samples import Sample

_BODIES_MAX = 64
_TIMEOUT_SECONDS = 60.0
_WARM_SHARE = 0.25
_READ_BYTES = 1 << 16
_SHOWN = 400
_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
_HEAD_END, _LAST_CHUNK = b"\r\n\r\n", b"\r\n0\r\n\r\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """What so many callers got: answers a second, and the milliseconds within which 50 and 99 of 100 of them came."""

    callers: int
    answers: int
    per_second: float
    p50_ms: float
    p99_ms: float


def closed_loop(address: Address, contract: Contract, sample: Sample, *, callers: int, seconds: float) -> Loop:
    """Ask for single rows by so many callers at a time, and return what came after the first quarter of the seconds.

    Goes on beyond the seconds until every caller has had two answers. Raises EndpointFailed with the first answer that
    is none, or where the server is silent for a minute.
    """
    requests = itertools.cycle(_requests(address, contract, sample))
    asking: list[_Caller] = []
    with selectors.DefaultSelector() as selector:
        try:
            for _ in range(callers):
                each = _Caller.of(address)
                asking.append(each)
                selector.register(each.connection, selectors.EVENT_READ, each)
                each.send(next(requests))
            return _measure(selector, requests, callers, seconds)
        except OSError as error:
            message = f"The model server must answer at {address.url}, got: {error!r}. Look at its log."
            raise EndpointFailed(message) from error
        finally:
            for each in asking:
                each.connection.close()


def _measure(selector: selectors.BaseSelector, requests: Iterator[bytes], callers: int, seconds: float) -> Loop:
    begun = time.perf_counter()
    measured_from: float | None = None
    answers, waited_ms = 0, list[float]()
    while True:
        found = selector.select(_TIMEOUT_SECONDS)
        if not found:
            message = f"The model server must answer within {_TIMEOUT_SECONDS:g} s, got nothing. Look at its log."
            raise EndpointFailed(message)
        for key, _ in found:
            caller: _Caller = key.data
            if not caller.receive():
                continue
            now = time.perf_counter()
            answers += 1
            if measured_from is not None:
                waited_ms.append(1000 * (now - caller.sent))
            elif answers >= callers and now - begun >= _WARM_SHARE * seconds:
                measured_from = now
            caller.send(next(requests))
        if measured_from is not None and answers >= 2 * callers and waited_ms and now - begun >= seconds:
            p50, p99 = np.percentile(waited_ms, (50, 99))
            return Loop(
                callers=callers,
                answers=len(waited_ms),
                per_second=len(waited_ms) / (now - measured_from),
                p50_ms=float(p50),
                p99_ms=float(p99),
            )


@dataclass(slots=True)
class _Caller:
    """One connection, and when its request was sent."""

    connection: socket.socket
    sent: float = 0.0
    _got: bytearray = field(default_factory=bytearray)

    @classmethod
    def of(cls, address: Address) -> _Caller:
        parts = urlsplit(address.url)
        secure = parts.scheme == "https"
        connection = socket.create_connection(
            (parts.hostname or "", parts.port or (443 if secure else 80)), _TIMEOUT_SECONDS
        )
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if secure:
            connection = ssl.create_default_context().wrap_socket(connection, server_hostname=parts.hostname)
        return cls(connection)

    def send(self, request: bytes) -> None:
        self._got.clear()
        self.sent = time.perf_counter()
        self.connection.sendall(request)

    def receive(self) -> bool:
        """Take what has come, and say whether the answer is whole. Raises EndpointFailed where it is no answer."""
        while True:
            some = self.connection.recv(_READ_BYTES)
            if not some:
                message = "The model server must keep connections open from one request to the next, got one closed."
                raise EndpointFailed(message)
            self._got += some
            # What is decrypted already wakes no selector.
            if not (isinstance(self.connection, ssl.SSLSocket) and self.connection.pending()):
                break
        head = self._got.find(_HEAD_END)
        if head < 0:
            return False
        length = _LENGTH.search(self._got, 0, head)
        whole = len(self._got) >= head + len(_HEAD_END) + int(length[1]) if length else self._got.endswith(_LAST_CHUNK)
        if whole and b" 200 " not in self._got[: self._got.find(b"\r\n")]:
            message = (
                "The model server must answer every one of many requests at a time with 200, got: "
                f"{self._got[:_SHOWN].decode(errors='replace')}"
            )
            raise EndpointFailed(message)
        return whole


def _requests(address: Address, contract: Contract, sample: Sample) -> list[bytes]:
    parts = urlsplit(address.url)
    path = parts.path.rstrip("/") + infer_path(address)
    found = []
    for piece in itertools.islice(sample.pieces(1), _BODIES_MAX):
        body = encode_request(contract, piece.inputs)
        headers = {"Host": parts.netloc, **body.headers, "Content-Length": str(len(body.content))}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        found.append(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body.content)
    return found
