"""How many requests of an endpoint are there at once: some with the servers, some waiting, and no more."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from serving.errors import Unanswered
from serving.gateway.rate import retry_after_s
from serving.gateway.route import Limits

_TOO_MANY = 429
_SMOOTHING = 0.1


class Admission:
    """The queue of one endpoint: first come, first served. To be used in one event loop."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.present = 0
        self.running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._request_s = 0.0

    @property
    def waiting(self) -> int:
        """How many wait for a turn."""
        return len(self._waiting)

    def resize(self, limits: Limits) -> None:
        """Take other limits; those who wait and now fit go on."""
        self.limits = limits
        self._call_next()

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place among all who are there. Raises Unanswered, with 429 and Retry-After, where there is none.

        It is taken before the body is read, so that the bodies in memory are bounded too.
        """
        if self.present >= self.limits.in_flight_max + self.limits.queue_max:
            queued = self.present - self.running
            again = retry_after_s(queued=queued, in_flight_max=self.limits.in_flight_max, request_s=self._request_s)
            message = f"The endpoint may have {self.present} requests at once, got one more. Retry after {again} s."
            raise Unanswered(message, status=_TOO_MANY, retry_after_s=again)
        self.present += 1
        try:
            yield
        finally:
            self.present -= 1

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a turn with the servers, and hold it."""
        await self._wait()
        began = asyncio.get_running_loop().time()
        try:
            yield
        finally:
            self.running -= 1
            self._request_s += _SMOOTHING * (asyncio.get_running_loop().time() - began - self._request_s)
            self._call_next()

    async def _wait(self) -> None:
        if self.running < self.limits.in_flight_max and not self._waiting:
            self.running += 1
            return
        called: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(called)
        try:
            await called
        except asyncio.CancelledError:
            if called.done() and not called.cancelled():
                # It was called and gave up at the same moment: its turn goes to the next.
                self.running -= 1
                self._call_next()
            elif called in self._waiting:
                self._waiting.remove(called)
            raise

    def _call_next(self) -> None:
        while self._waiting and self.running < self.limits.in_flight_max:
            called = self._waiting.popleft()
            if not called.done():
                self.running += 1
                called.set_result(None)
