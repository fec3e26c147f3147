"""A message of a stream: its payload, its position in the log, and its times. Independent of any broker's library."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import NamedTuple

# Scores and dead letters carry these headers, whatever the broker.
HEADER_MODEL = "Overnight-Model"
HEADER_SOURCE = "Overnight-Source"
HEADER_REASON = "Overnight-Reason"
HEADER_COLUMN = "Overnight-Column"
# A producer may set it to the time of the event, in seconds since 1970. The default is the log's own timestamp.
HEADER_EVENT_TIME = "Overnight-Event-Time"
_HEADER_CHARACTERS_MAX = 1000


class Position(NamedTuple):
    """Where a message is in its log: the partition (0 where there is only one), and its number there."""

    partition: int
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One input message, which holds one row as JSON or many as Arrow IPC.

    `event_time` is in seconds since 1970 by the producer's clock, `arrived` by this process's monotonic clock. The
    source acknowledges the message by its `receipt`.
    """

    position: Position
    payload: bytes
    event_time: float
    arrived: float
    deliveries: int = 1
    receipt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Poison:
    """A message that can't be scored, and why; `column` is empty where no column is at fault.

    There are few reasons, since tables count them. The `detail` belongs to this message alone.
    """

    message: Message
    column: str
    reason: str
    detail: str = ""

    @property
    def description(self) -> str:
        """The reason with its detail."""
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def build_poison_headers(poison: Poison) -> dict[str, str]:
    """Return the headers of a dead letter that say why it is one."""
    headers = {HEADER_REASON: format_header(poison.description), HEADER_COLUMN: format_header(poison.column)}
    return {name: value for name, value in headers.items() if value}


def format_header(text: str) -> str:
    """Return text as the value of a header: one line, at most 1,000 characters, valid UTF-8."""
    return " ".join(text.split())[:_HEADER_CHARACTERS_MAX].encode(errors="replace").decode()


def choose_event_time(header: str | bytes | None, log_time: float) -> float:
    """Return the producer's time of an event where its header holds a finite number, otherwise the log's time."""
    with contextlib.suppress(ValueError, OverflowError):
        if header is not None and math.isfinite(seconds := float(header)):
            return seconds
    return log_time
