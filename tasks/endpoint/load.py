"""Requests at a steady rate, as strangers send them, and how long each waits for its answer."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from urllib.parse import urlsplit

import numpy as np
from pydantic import Field

from serving.model.contract import Contract, Frozen
from serving.protocol.oip import encode_request
from serving.targets import Address
from tasks.endpoint.client import infer_path
from tasks.endpoint.samples import Sample

# One process of Python sends no more; a rate above is measured at this one, and the report says so.
RATE_MAX = 400.0
_THREADS = 16
_TIMEOUT_SECONDS = 30.0
_BODIES_MAX = 64
_SEED = 7

_Body = tuple[bytes, dict[str, str]]


class Latency(Frozen):
    """What requests of one row waited, from when each was due until its answer was there."""

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
    """Ask for single rows at random moments, `rate` a second on average, and return what they waited.

    A request that could not be sent in time has waited since it was due, so that a slow server is not asked less. None
    where not one was answered.
    """
    rate = min(rate, RATE_MAX)
    due_s = arrivals(rate, seconds)
    bodies = [encode_request(contract, piece.inputs) for piece in itertools.islice(sample.pieces(1), _BODIES_MAX)]
    course = _Course(address, [(b.content, {**b.headers, **(headers or {})}) for b in bodies], due_s)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="load") as pool:
        waited_ms = [each for run in [pool.submit(course.run) for _ in range(_THREADS)] for each in run.result()]
    answered_ms = sorted(each for each in waited_ms if each is not None)
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


def arrivals(rate: float, seconds: float) -> Sequence[float]:
    """Return when requests are due: a seeded Poisson process of this rate, in seconds from the begin, at least one."""
    random = np.random.default_rng(_SEED)
    gaps_s = random.exponential(1 / rate, size=max(1, round(rate * seconds)))
    due_s = np.cumsum(gaps_s)
    # As many as the rate says, in just these seconds.
    return [float(each) for each in due_s * (seconds / due_s[-1])]


class _Course:
    """What several threads send in turn."""

    def __init__(self, address: Address, bodies: Sequence[_Body], due_s: Sequence[float]) -> None:
        self._address, self._bodies = address, bodies
        self._due, self._lock, self._start = iter(enumerate(due_s)), threading.Lock(), time.perf_counter()

    def run(self) -> list[float | None]:
        """Send what is due next until nothing is left; return the milliseconds of each, None where it has no answer."""
        parts, path = urlsplit(self._address.url), infer_path(self._address)
        made = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        connection = made(parts.hostname or "", parts.port, timeout=_TIMEOUT_SECONDS)
        waited: list[float | None] = []
        while (at := self._take()) is not None:
            number, due_s = at
            time.sleep(max(0.0, self._start + due_s - time.perf_counter()))
            content, headers = self._bodies[number % len(self._bodies)]
            try:
                connection.request("POST", parts.path.rstrip("/") + path, content, headers)
                response = connection.getresponse()
                response.read()
                ok = response.status == HTTPStatus.OK
            except (OSError, HTTPException):
                connection.close()
                ok = False
            waited.append(1000 * (time.perf_counter() - self._start - due_s) if ok else None)
        connection.close()
        return waited

    def _take(self) -> tuple[int, float] | None:
        with self._lock:
            return next(self._due, None)
