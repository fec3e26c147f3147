"""How many requests of an endpoint are admitted: a limit on their rate, and on how many are served or wait at once."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from http import HTTPStatus

from serving.errors import Unanswered
from serving.gateway.route import Limits

_SMOOTHING = 0.1
_RETRY_S_MAX = 30


class AdmissionQueue:
    """The requests of one endpoint, served in the order in which they came. To be used in one event loop."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.admitted = 0
        self.running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._request_s = 0.0

    @property
    def waiting(self) -> int:
        """How many requests wait for a model server."""
        return len(self._waiting)

    def set_limits(self, limits: Limits) -> None:
        """Take other limits, and start the waiting requests that they allow."""
        self.limits = limits
        self._start_waiting()

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Count a request as admitted. To be entered before its body is read, so that bodies in memory are bounded.

        Raises:
            Unanswered: with 429 and Retry-After, where as many are admitted as may be.
        """
        if self.admitted >= self.limits.in_flight_max + self.limits.queue_max:
            seconds = estimate_retry_after_s(
                queued=self.admitted - self.running,
                in_flight_max=self.limits.in_flight_max,
                request_s=self._request_s,
            )
            message = f"The endpoint may have {self.admitted} requests at once, got one more. Retry after {seconds} s."
            raise Unanswered(message, status=HTTPStatus.TOO_MANY_REQUESTS, retry_after_s=seconds)
        self.admitted += 1
        try:
            yield
        finally:
            self.admitted -= 1

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Wait until fewer than in_flight_max requests run, and count as one of them."""
        await self._wait()
        began = asyncio.get_running_loop().time()
        try:
            yield
        finally:
            self.running -= 1
            self._request_s += _SMOOTHING * (asyncio.get_running_loop().time() - began - self._request_s)
            self._start_waiting()

    async def _wait(self) -> None:
        if self.running < self.limits.in_flight_max and not self._waiting:
            self.running += 1
            return
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(started)
        try:
            await started
        except asyncio.CancelledError:
            if started.done() and not started.cancelled():
                # The request was started and cancelled at the same moment: the next one runs instead.
                self.running -= 1
                self._start_waiting()
            elif started in self._waiting:
                self._waiting.remove(started)
            raise

    def _start_waiting(self) -> None:
        while self._waiting and self.running < self.limits.in_flight_max:
            started = self._waiting.popleft()
            if not started.done():
                self.running += 1
                started.set_result(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBucket:
    """How many requests may come at once, at a time."""

    tokens: float
    at_s: float


def take_token(bucket: TokenBucket, *, now_s: float, per_second: float, burst: int) -> tuple[TokenBucket, float]:
    """Return the bucket after one request, and 0.0; or the bucket, and the seconds until it has a token.

    Promises: any interval of T seconds admits at most burst + per_second * T requests.
    """
    gained = max(0.0, now_s - bucket.at_s) * per_second
    tokens, at_s = min(float(burst), bucket.tokens + gained), max(now_s, bucket.at_s)
    if tokens >= 1:
        return TokenBucket(tokens=tokens - 1, at_s=at_s), 0.0
    return TokenBucket(tokens=tokens, at_s=at_s), (1 - tokens) / per_second


def estimate_retry_after_s(*, queued: int, in_flight_max: int, request_s: float) -> int:
    """Return the seconds until the queued requests should be answered: a whole number from 1 to 30, as HTTP needs."""
    return min(_RETRY_S_MAX, max(1, math.ceil((queued + 1) / in_flight_max * request_s)))
