"""The ends of a stream: Protocols of one verb each, which NATS, Kafka and a folder of parts satisfy by shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from tasks.stream.message import Message, Place, Poison
from tasks.stream.score import Scored


class Abandoned(Exception):
    """The wait for a broker was given up, since this process must end."""


class Source(Protocol):
    """Where messages come from."""

    def fetch(self, most: int, enough: int, seconds: float) -> list[Message]:
        """Return up to `most` messages as soon as `enough` are there, or what there is after `seconds`."""
        ...


class Receipts(Protocol):
    """What the source is told when it is done with messages."""

    def acknowledge(self, done: Sequence[Message], buried: Sequence[Message]) -> None:
        """Tell the source that messages are in the sink, or among the dead letters, durably."""
        ...


class Sink(Protocol):
    """Where scores go."""

    def emit(self, scored: Sequence[Scored]) -> list[Poison]:
        """Put out the scores of micro-batches, and return once they are durable; return what is not taken."""
        ...


class DeadLetters(Protocol):
    """Where poison goes."""

    def bury(self, poison: Sequence[Poison]) -> None:
        """Keep messages with their reason, and return once that is durable."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Cadence:
    """When scored micro-batches are emitted together: at so many rows, or when the first is so many seconds old."""

    rows: int = 1
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """What one stream is read from and written to.

    `lag` tells the messages that wait in the source, where known; `max_deliver` how often one comes at most; `keep`
    what is kept of a micro-batch until it is emitted.
    `give_back` tells the source that messages were taken and are left to others; `already` tells which of messages on
    their last delivery the sink holds.
    """

    source: Source
    receipts: Receipts
    sink: Sink
    dead_letters: DeadLetters
    lag: Callable[[], int | None]
    cadence: Cadence = Cadence()
    keep: Callable[[Scored], Scored] = lambda scored: scored
    max_deliver: int | None = None
    give_back: Callable[[Sequence[Message]], None] = lambda _: None
    already: Callable[[Sequence[Message]], set[Place]] = lambda _: set()

    def reading(self, source: Source) -> Ends:
        """Return the same ends, read through another source."""
        return replace(self, source=source)
