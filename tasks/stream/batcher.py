"""Micro-batches as they are taken from a source: of so many rows or bytes, or of what came within the wait."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tasks.stream.connections import Source
from tasks.stream.decode import count_rows
from tasks.stream.message import Message

Batch = tuple[Message, ...]

POLL_SECONDS = 0.2
_BATCHES_BESIDE = 4
_ROWS_GUESSED, _BYTES_GUESSED = 1.0, float(1 << 20)
# From here on a message is no longer beyond suspicion of being what ended the scorers before.
_DELIVERIES_SUSPECT = 3
_COMPANY_MOST, _COMPANY_SHARE = 64, 4.0
_LAST_DELIVERIES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Dial:
    """A micro-batch has at most so many rows, and waits at most so long for them."""

    rows: int
    wait_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """When a stream ends by itself, and what it takes at once."""

    in_flight: int
    in_flight_bytes: int
    slots: int
    max_deliver: int | None = None
    idle_seconds: float | None = None
    limit: int | None = None
    poison_in_a_row: int = 1000

    @property
    def messages_per_batch(self) -> int:
        """The messages of one micro-batch at most: those of every slot, and those between, are in flight."""
        return max(1, self.in_flight // (self.slots + 2))

    @property
    def bytes_per_batch(self) -> int:
        """The bytes at which a micro-batch is full: those that wait for a slot, or to be emitted, are as large."""
        return self.in_flight_bytes // (self.slots + _BATCHES_BESIDE)


@dataclass(slots=True, kw_only=True)
class Intake:
    """Takes messages together; `look` is asked before each wait, and raises where the stream is over."""

    source: Source
    terms: Terms
    dial: Callable[[], Dial]
    rests: Callable[[], bool]
    look: Callable[[], None]
    _rows_each: float = _ROWS_GUESSED
    _bytes_each: float = _BYTES_GUESSED
    _random: random.Random = field(default_factory=random.Random)

    def take(self, left: int | None) -> list[Message]:
        """Return a micro-batch of at most `left` messages: full, or its first has waited for long enough.

        Returns none where none comes within 0.2 s.
        """
        most = self.terms.messages_per_batch if left is None else min(self.terms.messages_per_batch, left)
        dial, rows, size = self.dial(), 0, 0
        messages: list[Message] = []
        while len(messages) < most:
            pause = seconds_to_wait(dial, rows, time.monotonic() - messages[0].arrived) if messages else POLL_SECONDS
            if messages and (not pause or size >= self.terms.bytes_per_batch or self.rests()):
                break
            room = min(most - len(messages), self._room(dial.rows - rows, self.terms.bytes_per_batch - size))
            self.look()
            more = self.source.fetch(room, room if messages else 1, min(pause, POLL_SECONDS))
            messages += more
            if not messages:
                break
            rows += sum(count_rows(message.payload) for message in more)
            size += sum(len(message.payload) for message in more)
            self._rows_each, self._bytes_each = rows / len(messages), size / len(messages)
        return messages

    def _room(self, rows: int, size: int) -> int:
        """Return how many messages have so many rows and bytes, going by those before: one at least."""
        return max(1, round(min(rows / max(self._rows_each, 1.0), size / max(self._bytes_each, 1.0))))

    def apart(self, messages: Sequence[Message]) -> list[Batch]:
        """Cut off the messages that come again and again, few together and in no order: one may end the process.

        In whatever order they come, those that are innocent then get their turn before it sooner or later. Those that
        are not scored any more come first: nothing ends the process before they are dead letters.
        """
        by_company: dict[int | None, list[Message]] = {}
        last: list[Message] = []
        for message in messages:
            if self.terms.max_deliver is not None and message.deliveries >= self.terms.max_deliver:
                last.append(message)
            else:
                by_company.setdefault(company(message.deliveries, self.terms.max_deliver), []).append(message)
        others = by_company.pop(None, [])
        batches: list[Batch] = [tuple(each) for each in (last, others) if each]
        for most, suspects in by_company.items():
            self._random.shuffle(suspects)
            step = most or len(suspects)
            batches += (tuple(suspects[at : at + step]) for at in range(0, len(suspects), step))
        return batches


def seconds_to_wait(dial: Dial, rows: int, waited: float) -> float:
    """Return how long a batch of so many rows, the first of which has waited so long, is still to wait; 0 is over."""
    return 0.0 if rows >= dial.rows else max(0.0, dial.wait_seconds - waited)


def company(deliveries: int, max_deliver: int | None) -> int | None:
    """Return how many messages one that has come so often is scored with at most; None: as many as there are.

    From the fourth time on it may be what ends the scorer. It is then among fewer each time, 64, 16, 4, and alone at
    last: after a scorer and its server have been killed thousands may have come so often, and each alone they would
    come again before their turn. Alone at once where its last deliveries are near, and on the last whatever it was.
    """
    if max_deliver is not None and deliveries >= max_deliver:
        return 1
    if deliveries <= _DELIVERIES_SUSPECT:
        return None
    if max_deliver is not None and max_deliver - deliveries < _LAST_DELIVERIES:
        return 1
    return max(1, int(_COMPANY_MOST * _COMPANY_SHARE ** (_DELIVERIES_SUSPECT + 1 - deliveries)))
