"""Load on an endpoint: single rows at a steady rate (an open loop), or by callers that wait for each answer (closed).

The open loop measures how long independent callers wait. The closed loop measures how many answers a second a server
gives at most. It is one thread over plain sockets, since the client shares the machine's cores with what it measures:
it takes some 20 microseconds of processor time a request, where http.client takes 430 and httpx 1,070, more than a fast
server itself.
"""

from __future__ import annotations

import itertools
import re
import selectors
import socket
import ssl
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import numpy as np
from pydantic import Field

from serving.errors import EndpointFailed
from serving.model.contract import Contract, Frozen
from serving.protocol.oip import encode_request
from serving.targets import Address
from tasks.endpoint.client import infer_path
from tasks.endpoint.resolve import Sample

# One Python process sends no more. A higher rate is measured at this one, and the report has the rate.
RATE_MAX = 5000.0
_CONNECTIONS_MAX = 256
_TIMEOUT_SECONDS = 30.0
_BODIES_MAX = 64
_SEED = 7
_SILENCE_SECONDS_MAX = 60.0
_WARM_SHARE = 0.25
_READ_BYTES = 1 << 16
_SHOWN = 400
_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
_HEAD_END, _LAST_CHUNK = b"\r\n\r\n", b"\r\n0\r\n\r\n"


class Latency(Frozen):
    """How long requests of one row waited: from the time that each was due until its answer."""

    rate: float = Field(description="Requests a second that were sent.")
    requests: int = Field(description="Requests in all.")
    errors: int = Field(description="Those without an answer.")
    p50_ms: float = Field(description="Milliseconds within which half of the answers came.")
    p99_ms: float = Field(description="Milliseconds within which 99 of 100 came.")
    samples_ms: tuple[float, ...] = Field(description="Milliseconds of each answer, sorted.", repr=False)


def measure_latency(
    address: Address,
    contract: Contract,
    sample: Sample,
    *,
    rate: float,
    seconds: float,
    headers: Mapping[str, str] | None = None,
) -> Latency | None:
    """Ask for single rows at random moments, `rate` a second on average, and return how long they waited.

    A request that could not be sent in time has waited since it was due, so that a slow server is not asked less.
    Returns None where no request was answered.
    """
    due_s = draw_arrivals(min(rate, RATE_MAX), seconds)
    loop = _OpenLoop(address, _encode_requests(address, contract, sample, headers))
    answered_ms = sorted(loop.send_requests(due_s))
    if not answered_ms:
        return None
    p50, p99 = np.percentile(answered_ms, (50, 99))
    return Latency(
        rate=len(due_s) / seconds,
        requests=len(due_s),
        errors=len(due_s) - len(answered_ms),
        p50_ms=float(p50),
        p99_ms=float(p99),
        samples_ms=tuple(answered_ms),
    )


def draw_arrivals(rate: float, seconds: float) -> Sequence[float]:
    """Return when requests are due: a seeded Poisson process of this rate, in seconds from the start; at least one."""
    random = np.random.default_rng(_SEED)
    gaps_s = random.exponential(1 / rate, size=max(1, round(rate * seconds)))
    due_s = np.cumsum(gaps_s)
    # Scaled, so that the last one is due exactly at the end.
    return [float(each) for each in due_s * (seconds / due_s[-1])]


class _OpenLoop:
    """Requests that are sent when they are due, each by a caller that waits for nothing else."""

    def __init__(self, address: Address, requests: Sequence[bytes]) -> None:
        self._address, self._requests = address, itertools.cycle(requests)
        self._idle: list[_Caller] = []
        self._asking: dict[_Caller, float] = {}

    def send_requests(self, due_s: Sequence[float]) -> list[float]:
        """Send all requests, and return the milliseconds from when each was due until its answer.

        Those that fail, or are silent for half a minute, have none.
        """
        # Unlike poll and epoll, select waits for less than a millisecond.
        with selectors.SelectSelector() as selector:
            try:
                return self._follow_schedule(selector, deque(due_s))
            finally:
                for caller in (*self._idle, *self._asking):
                    caller.connection.close()

    def _follow_schedule(self, selector: selectors.BaseSelector, due_s: deque[float]) -> list[float]:
        start, waited_ms = time.perf_counter(), list[float]()
        while due_s or self._asking:
            now_s = time.perf_counter() - start
            while due_s and due_s[0] <= now_s and (self._idle or len(self._asking) < _CONNECTIONS_MAX):
                self._send_request(selector, due_s.popleft())
            if not due_s and not self._asking:
                break
            timeout = due_s[0] - now_s if due_s and due_s[0] > now_s else _TIMEOUT_SECONDS
            found = selector.select(timeout)
            if not found and timeout == _TIMEOUT_SECONDS:
                return waited_ms
            for key, _ in found:
                waited_ms += self._receive_answer(selector, key.data, start)
        return waited_ms

    def _send_request(self, selector: selectors.BaseSelector, due_s: float) -> None:
        try:
            caller = self._idle.pop() if self._idle else self._connect(selector)
        except OSError:
            return
        self._asking[caller] = due_s
        try:
            caller.send(next(self._requests))
        except OSError:
            self._drop(selector, caller)

    def _connect(self, selector: selectors.BaseSelector) -> _Caller:
        caller = _Caller.connect(self._address)
        selector.register(caller.connection, selectors.EVENT_READ, caller)
        return caller

    def _receive_answer(self, selector: selectors.BaseSelector, caller: _Caller, start: float) -> list[float]:
        """Return the milliseconds of a complete answer, or nothing."""
        try:
            if not caller.receive():
                return []
        except (EndpointFailed, OSError):
            self._drop(selector, caller)
            return []
        due_s = self._asking.pop(caller)
        self._idle.append(caller)
        return [1000 * (time.perf_counter() - start - due_s)]

    def _drop(self, selector: selectors.BaseSelector, caller: _Caller) -> None:
        self._asking.pop(caller, None)
        if caller in self._idle:
            self._idle.remove(caller)
        selector.unregister(caller.connection)
        caller.connection.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopStats:
    """What a closed loop measured: answers a second, and the milliseconds within which 50 and 99 of 100 came."""

    callers: int
    answers: int
    per_second: float
    p50_ms: float
    p99_ms: float


def run_closed_loop(address: Address, contract: Contract, sample: Sample, *, callers: int, seconds: float) -> LoopStats:
    """Ask for single rows by so many callers at a time, and measure after the first quarter of the seconds.

    Goes on beyond the seconds until every caller has had two answers. Raises EndpointFailed with the first answer that
    is an error, or where the server is silent for a minute.
    """
    requests = itertools.cycle(_encode_requests(address, contract, sample))
    connected: list[_Caller] = []
    with selectors.DefaultSelector() as selector:
        try:
            for _ in range(callers):
                each = _Caller.connect(address)
                connected.append(each)
                selector.register(each.connection, selectors.EVENT_READ, each)
                each.send(next(requests))
            return _measure_loop(selector, requests, callers, seconds)
        except OSError as error:
            message = f"The model server must answer at {address.url}, got: {error!r}. Look at its log."
            raise EndpointFailed(message) from error
        finally:
            for each in connected:
                each.connection.close()


def _measure_loop(
    selector: selectors.BaseSelector, requests: Iterator[bytes], callers: int, seconds: float
) -> LoopStats:
    start = time.perf_counter()
    measured_from: float | None = None
    answers, waited_ms = 0, list[float]()
    while True:
        found = selector.select(_SILENCE_SECONDS_MAX)
        if not found:
            message = f"The model server must answer within {_SILENCE_SECONDS_MAX:g} s, got nothing. Look at its log."
            raise EndpointFailed(message)
        for key, _ in found:
            caller: _Caller = key.data
            if not caller.receive():
                continue
            now = time.perf_counter()
            answers += 1
            if measured_from is not None:
                waited_ms.append(1000 * (now - caller.sent))
            elif answers >= callers and now - start >= _WARM_SHARE * seconds:
                measured_from = now
            caller.send(next(requests))
        if measured_from is not None and answers >= 2 * callers and waited_ms and now - start >= seconds:
            p50, p99 = np.percentile(waited_ms, (50, 99))
            return LoopStats(
                callers=callers,
                answers=len(waited_ms),
                per_second=len(waited_ms) / (now - measured_from),
                p50_ms=float(p50),
                p99_ms=float(p99),
            )


@dataclass(slots=True, eq=False)
class _Caller:
    """One connection, and when its request was sent."""

    connection: socket.socket
    sent: float = 0.0
    _received: bytearray = field(default_factory=bytearray)

    @classmethod
    def connect(cls, address: Address) -> _Caller:
        parts = urlsplit(address.url)
        is_secure = parts.scheme == "https"
        connection = socket.create_connection(
            (parts.hostname or "", parts.port or (443 if is_secure else 80)), _SILENCE_SECONDS_MAX
        )
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if is_secure:
            connection = ssl.create_default_context().wrap_socket(connection, server_hostname=parts.hostname)
        return cls(connection)

    def send(self, request: bytes) -> None:
        self._received.clear()
        self.sent = time.perf_counter()
        self.connection.sendall(request)

    def receive(self) -> bool:
        """Read what has arrived, and return whether the answer is complete. Raises EndpointFailed for an error."""
        while True:
            received = self.connection.recv(_READ_BYTES)
            if not received:
                message = "The model server must keep connections open from one request to the next, got one closed."
                raise EndpointFailed(message)
            self._received += received
            # A selector does not report bytes that are decrypted already.
            if not (isinstance(self.connection, ssl.SSLSocket) and self.connection.pending()):
                break
        head = self._received.find(_HEAD_END)
        if head < 0:
            return False
        length = _LENGTH.search(self._received, 0, head)
        is_complete = (
            len(self._received) >= head + len(_HEAD_END) + int(length[1])
            if length
            else self._received.endswith(_LAST_CHUNK)
        )
        if is_complete and b" 200 " not in self._received[: self._received.find(b"\r\n")]:
            message = (
                "The model server must answer every one of many requests at a time with 200, got: "
                f"{self._received[:_SHOWN].decode(errors='replace')}"
            )
            raise EndpointFailed(message)
        return is_complete


def _encode_requests(
    address: Address, contract: Contract, sample: Sample, more_headers: Mapping[str, str] | None = None
) -> list[bytes]:
    parts = urlsplit(address.url)
    path = parts.path.rstrip("/") + infer_path(address)
    found = []
    for row in itertools.islice(sample.split(1), _BODIES_MAX):
        body = encode_request(contract, row.inputs)
        headers = {
            "Host": parts.netloc,
            **body.headers,
            **(more_headers or {}),
            "Content-Length": str(len(body.content)),
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        found.append(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body.content)
    return found
