"""The drain: between a notice and the kill, a chunk in hand is finished where it fits, and nothing new is begun."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from tasks.spot.notice import Notice

_LEAVE_SECONDS_MAX = 5.0


def leave_seconds(notice_seconds: float) -> float:
    """Return what is kept of a notice to leave in: to write no more, to tell Prefect, to end the process."""
    return min(_LEAVE_SECONDS_MAX, notice_seconds / 5)


def may_finish(*, seconds_left: float, leave: float, chunk_seconds: float | None, taken: float) -> bool:
    """Return whether a chunk that has taken so many seconds is finished, or dropped.

    One that takes longer than expected is given what time there is; so is one of which nothing is known yet.
    """
    expected = max(0.0, (chunk_seconds or 0.0) - taken)
    return expected + leave <= seconds_left


@dataclass(frozen=True, slots=True, kw_only=True)
class _Heard:
    notice: Notice
    deadline: float
    leave: float


class Drain:
    """What one process has been told of its end; told and asked from any thread.

    It stands from the first notice until every source has withdrawn its own.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        # Replaced, never changed: it is read without the lock, before each batch.
        self._heard: tuple[_Heard, ...] = ()

    def hear(self, notice: Notice) -> None:
        """Take note of a notice, again each time that it is read: its end may come nearer, never move away."""
        deadline = self._clock() + notice.seconds_left
        with self._lock:
            others = tuple(heard for heard in self._heard if heard.notice.source != notice.source)
            known = next((heard for heard in self._heard if heard.notice.source == notice.source), None)
            if known is not None and known.notice.action == notice.action:
                notice, deadline = known.notice, min(deadline, known.deadline)
            heard = _Heard(notice=notice, deadline=deadline, leave=leave_seconds(notice.seconds_left))
            self._heard = (*others, heard)

    def withdraw(self, source: str) -> None:
        """Take note that a source has no notice any more; work goes on where no other has."""
        with self._lock:
            self._heard = tuple(heard for heard in self._heard if heard.notice.source != source)

    @property
    def notice(self) -> Notice | None:
        """The notice that leaves the least time, None where nothing new need be left undone."""
        nearest = self._nearest()
        return nearest.notice if nearest else None

    @property
    def seconds_left(self) -> float:
        """The seconds until the kill; 0 past it, infinite without a notice."""
        nearest = self._nearest()
        return max(0.0, nearest.deadline - self._clock()) if nearest else float("inf")

    @property
    def over(self) -> bool:
        """Whether what is still going on must be left as it is, or the process does not end by itself in time."""
        nearest = self._nearest()
        return nearest is not None and nearest.deadline - self._clock() < nearest.leave / 2

    def may_finish(self, chunk_seconds: float | None, taken: float) -> bool:
        """Return whether a chunk in hand is gone on with."""
        nearest = self._nearest()
        if nearest is None:
            return True
        left = nearest.deadline - self._clock()
        return may_finish(seconds_left=left, leave=nearest.leave, chunk_seconds=chunk_seconds, taken=taken)

    def _nearest(self) -> _Heard | None:
        return min(self._heard, key=lambda heard: heard.deadline, default=None)
