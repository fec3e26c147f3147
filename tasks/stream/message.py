"""A message: what came, where it stands in its log, and when. Nothing of a broker's library is in it."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import NamedTuple

# Answers and dead letters carry these, whatever the broker.
HEADER_MODEL = "Overnight-Model"
HEADER_SOURCE = "Overnight-Source"
HEADER_REASON = "Overnight-Reason"
HEADER_COLUMN = "Overnight-Column"
# A producer may say when the event was, in seconds since 1970; else it is when the log took it.
HEADER_EVENT_TIME = "Overnight-Event-Time"
_HEADER_MAX = 1000


class Place(NamedTuple):
    """Where an input stands: the partition of its log (0 where there is one alone), and its number there."""

    partition: int
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One input, which holds one row as JSON or many as Arrow IPC.

    `event_time` is in seconds since 1970 by the clock of whoever made the event, `arrived` by this process's
    monotonic clock. `receipt` is what the source acknowledges it by.
    """

    place: Place
    payload: bytes
    event_time: float
    arrived: float
    deliveries: int = 1
    receipt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Poison:
    """A message that can't be scored, and why; `column` is empty where no column is at fault.

    Reasons are few, since tables count them; what is said of this message alone is its detail.
    """

    message: Message
    column: str
    reason: str
    detail: str = ""

    @property
    def words(self) -> str:
        """The reason with its detail."""
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def poison_headers(poison: Poison) -> dict[str, str]:
    """Return what a dead letter says of why it is one, as headers that any broker takes."""
    headers = {HEADER_REASON: one_line(poison.words), HEADER_COLUMN: one_line(poison.column)}
    return {name: value for name, value in headers.items() if value}


def one_line(text: str) -> str:
    """Return text as the value of a header: in one line, at most 1,000 characters, each of which UTF-8 has."""
    return " ".join(text.split())[:_HEADER_MAX].encode(errors="replace").decode()


def event_time(told: str | bytes | None, stamp: float) -> float:
    """Return when an event was: as its producer says, where that is a time, and else when the log took it."""
    with contextlib.suppress(ValueError, OverflowError):
        if told is not None and math.isfinite(said := float(told)):
            return said
    return stamp
