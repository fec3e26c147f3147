"""What a stream is read from and written to: small Protocols that NATS, Kafka and the table of parts satisfy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tasks.stream.message import Message, Poison, Position
from tasks.stream.score import ScoredBatch


class StreamAbandoned(Exception):
    """A wait for a broker was abandoned, since this process must end."""


class Source(Protocol):
    """Where messages come from."""

    def fetch(self, messages_max: int, messages_min: int, timeout_seconds: float) -> list[Message]:
        """Return up to `messages_max` messages once `messages_min` are there, or fewer at the time-out."""
        ...


class Acknowledger(Protocol):
    """Where finished messages are acknowledged."""

    def acknowledge(self, done: Sequence[Message], dead_lettered: Sequence[Message]) -> None:
        """Tell the source that messages are durable in the sink, or among the dead letters."""
        ...


class Sink(Protocol):
    """Where scores go."""

    def emit(self, scored: Sequence[ScoredBatch]) -> list[Poison]:
        """Write the scores of micro-batches, wait until they are durable, and return messages that were refused."""
        ...


class DeadLetters(Protocol):
    """Where messages go that can't be scored."""

    def send(self, poison: Sequence[Poison]) -> None:
        """Write messages with their reasons, and wait until they are durable."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EmitPolicy:
    """When scored micro-batches are emitted together: at so many rows, or when the first is so many seconds old."""

    rows: int = 1
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Connections:
    """The open connections of one stream.

    Attributes:
        source: Where messages are fetched.
        acknowledger: Where they are acknowledged.
        sink: Where scores are emitted.
        dead_letters: Where messages go that can't be scored.
        lag: Returns how many messages wait in the source; None while that is not known.
        emit_policy: When scored micro-batches are emitted.
        compact: Drops what the sink does not need of a micro-batch that waits to be emitted.
        max_deliver: From which delivery on a message is not scored any more; None: never.
        give_back: Returns fetched messages to the source, unscored.
        find_emitted: Returns which of some messages on their last delivery the sink holds already.
    """

    source: Source
    acknowledger: Acknowledger
    sink: Sink
    dead_letters: DeadLetters
    lag: Callable[[], int | None]
    emit_policy: EmitPolicy = EmitPolicy()
    compact: Callable[[ScoredBatch], ScoredBatch] = lambda scored: scored
    max_deliver: int | None = None
    give_back: Callable[[Sequence[Message]], None] = lambda _: None
    find_emitted: Callable[[Sequence[Message]], set[Position]] = lambda _: set()
