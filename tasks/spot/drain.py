"""Notices of an interruption, and the drain: what a process still finishes between a notice and the kill.

A chunk that is being scored is finished where it fits into the time left, and no other chunk is begun.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

SIGTERM = "SIGTERM"
_EXIT_SECONDS_MAX = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """An announcement that this process, or its machine, is going to end.

    Args:
        source: Who announced it: SIGTERM, or a cloud.
        action: What is going to happen.
        seconds_left: From when the notice was read until it happens.
        certain: False for a forecast: the machine may stay.
    """

    source: str
    action: str
    seconds_left: float
    certain: bool = True

    @property
    def is_sigterm(self) -> bool:
        """Whether only this process is to end, and its machine stays as far as is known."""
        return self.source == SIGTERM

    @property
    def cause(self) -> str:
        """The notice in a word or two."""
        return self.source if self.is_sigterm else f"{self.source} ({self.action})"

    @property
    def description(self) -> str:
        """The notice as the beginning of a sentence."""
        if self.is_sigterm:
            return f"SIGTERM: this process is to end within {self.seconds_left:.0f} s"
        if not self.certain:
            return f"{self.source} sees this machine at risk ({self.action})"
        return f"{self.source} is going to {self.action} this machine in {self.seconds_left:.0f} s"


class NoticeSource(Protocol):
    """A service that can be asked for notices about this machine."""

    name: str
    poll_seconds: float

    def read_notice(self) -> Notice | None:
        """Return the current notice, None where there is none or it was withdrawn.

        Raises httpx.HTTPError or ValueError where the service does not answer: the last answer still holds then.
        """
        ...


def sigterm_notice(seconds: float) -> Notice:
    """Return SIGTERM as a notice; the signal does not state how long it leaves, so the caller does."""
    return Notice(source=SIGTERM, action="end", seconds_left=seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class _TimedNotice:
    notice: Notice
    deadline: float
    exit_seconds: float


class Drain:
    """The notices that one process has received; used from any thread.

    A drain lasts from the first notice until every source has withdrawn its own.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        # Replaced, never changed: it is read without the lock, before each batch.
        self._notices: tuple[_TimedNotice, ...] = ()

    def add_notice(self, notice: Notice) -> None:
        """Record a notice, again each time that it is read: its deadline may come nearer, but never moves away."""
        deadline = self._clock() + notice.seconds_left
        with self._lock:
            others = tuple(timed for timed in self._notices if timed.notice.source != notice.source)
            known = next((timed for timed in self._notices if timed.notice.source == notice.source), None)
            if known is not None and known.notice.action == notice.action:
                notice, deadline = known.notice, min(deadline, known.deadline)
            timed = _TimedNotice(
                notice=notice, deadline=deadline, exit_seconds=reserve_exit_seconds(notice.seconds_left)
            )
            self._notices = (*others, timed)

    def withdraw_notice(self, source: str) -> None:
        """Record that a source has no notice any more; work goes on where no other source has one."""
        with self._lock:
            self._notices = tuple(timed for timed in self._notices if timed.notice.source != source)

    @property
    def notice(self) -> Notice | None:
        """The notice that leaves the least time, None where there is none."""
        nearest = self._nearest()
        return nearest.notice if nearest else None

    @property
    def seconds_left(self) -> float:
        """The seconds until the kill; 0 past it, infinite without a notice."""
        nearest = self._nearest()
        return max(0.0, nearest.deadline - self._clock()) if nearest else float("inf")

    @property
    def is_over(self) -> bool:
        """Whether unfinished work must be dropped now for the process to end by itself in time."""
        nearest = self._nearest()
        return nearest is not None and nearest.deadline - self._clock() < nearest.exit_seconds / 2

    def may_finish(self, chunk_seconds: float | None, taken: float) -> bool:
        """Return whether a chunk that has taken so many seconds is finished."""
        nearest = self._nearest()
        if nearest is None:
            return True
        left = nearest.deadline - self._clock()
        return is_chunk_finishable(
            seconds_left=left, exit_seconds=nearest.exit_seconds, chunk_seconds=chunk_seconds, taken=taken
        )

    def _nearest(self) -> _TimedNotice | None:
        return min(self._notices, key=lambda timed: timed.deadline, default=None)


def reserve_exit_seconds(notice_seconds: float) -> float:
    """Return how much of a notice is reserved to end in: to stop writing, notify Prefect and end the process."""
    return min(_EXIT_SECONDS_MAX, notice_seconds / 5)


def is_chunk_finishable(*, seconds_left: float, exit_seconds: float, chunk_seconds: float | None, taken: float) -> bool:
    """Return whether a chunk that has taken so many seconds is finished, rather than dropped.

    A chunk that takes longer than expected gets all the time there is; so does one of unknown length.
    """
    expected = max(0.0, (chunk_seconds or 0.0) - taken)
    return expected + exit_seconds <= seconds_left
