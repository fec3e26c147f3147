"""A time that only waiting moves, for what takes a clock and waits."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Time:
    """A clock that counts the seconds that were waited for; `then` is called after each wait."""

    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        self.now, self.waits, self._then = 0.0, list[float](), then

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds
        self._then()

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Wait for an event that does not happen."""
        assert not event.is_set()
        self.sleep(seconds)
        return False
