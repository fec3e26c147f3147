"""The batcher: collects messages into micro-batches, and sets suspects apart.

A suspect is a message that came several times: it may be what ended the process that scored it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from serving.model.batching import BatchingConfig
from tasks.stream.connections import Source
from tasks.stream.decode import count_rows
from tasks.stream.message import Message

Batch = tuple[Message, ...]

POLL_SECONDS = 0.2
_BATCHES_QUEUED = 4
# Assumed of the first message.
_ROWS_PER_MESSAGE, _BYTES_PER_MESSAGE = 1.0, float(1 << 20)
# A message with more deliveries is a suspect.
_DELIVERIES_TRUSTED = 3
_QUARANTINE_MAX, _QUARANTINE_DIVISOR = 64, 4.0
# With fewer deliveries left a suspect is scored alone.
_DELIVERIES_ALONE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamLimits:
    """When a stream ends by itself, and how much it holds at a time."""

    in_flight: int
    in_flight_bytes: int
    slots: int
    max_deliver: int | None = None
    idle_seconds: float | None = None
    limit: int | None = None
    poison_in_a_row: int = 1000

    def is_suspect(self, message: Message) -> bool:
        """Return whether a message may be what ended the process that scored it, by its deliveries."""
        return quarantine_size(message.deliveries, self.max_deliver) is not None

    @property
    def messages_per_batch(self) -> int:
        """The most messages of one micro-batch, so that those of all slots and queues are within `in_flight`."""
        return max(1, self.in_flight // (self.slots + 2))

    @property
    def bytes_per_batch(self) -> int:
        """The bytes at which a micro-batch is full, so that all of them are within `in_flight_bytes`."""
        return self.in_flight_bytes // (self.slots + _BATCHES_QUEUED)


@dataclass(slots=True, kw_only=True)
class Batcher:
    """Collects messages of a source into micro-batches.

    `check_running` is called before each wait, and raises where the stream has ended.
    """

    source: Source
    limits: StreamLimits
    batching: Callable[[], BatchingConfig]
    is_stopping: Callable[[], bool]
    check_running: Callable[[], None]
    _rows_per_message: float = _ROWS_PER_MESSAGE
    _bytes_per_message: float = _BYTES_PER_MESSAGE
    _random: random.Random = field(default_factory=random.Random)

    def next_batch(self, messages_left: int | None) -> list[Message]:
        """Return a micro-batch that is full, or whose first message has waited for long enough.

        Args:
            messages_left: The most messages to take; None for no bound.

        Returns:
            The messages; none where none comes within 0.2 s. Where a suspect is among them, all that wait here.
        """
        bound = self.limits.messages_per_batch
        messages_max = bound if messages_left is None else min(bound, messages_left)
        config, rows, size = self.batching(), 0, 0
        messages: list[Message] = []
        while len(messages) < messages_max:
            pause = compute_wait(config, rows, time.monotonic() - messages[0].arrived) if messages else POLL_SECONDS
            if messages and (not pause or size >= self.limits.bytes_per_batch or self.is_stopping()):
                break
            missing = self._estimate_messages(config.batch_size_max - rows, self.limits.bytes_per_batch - size)
            missing = min(messages_max - len(messages), missing)
            self.check_running()
            fetched = self.source.fetch(missing, missing if messages else 1, min(pause, POLL_SECONDS))
            messages += fetched
            if not messages:
                break
            if any(map(self.limits.is_suspect, fetched)):
                return messages + self._fetch_waiting(messages_left, len(messages))
            rows += sum(count_rows(message.payload) for message in fetched)
            size += sum(len(message.payload) for message in fetched)
            self._rows_per_message, self._bytes_per_message = rows / len(messages), size / len(messages)
        return messages

    def _fetch_waiting(self, messages_left: int | None, taken: int) -> list[Message]:
        """Return what waits here, up to `in_flight` messages in all, and wait for no more.

        Nothing else is requested while suspects are in flight. What waits here was delivered with them: a suspect that
        ends the process uses up a delivery of each, so that all must have their turn before it in some process.
        """
        bound = self.limits.in_flight if messages_left is None else min(self.limits.in_flight, messages_left)
        return self.source.fetch(bound - taken, 0, 0.0) if bound > taken else []

    def _estimate_messages(self, rows: int, size: int) -> int:
        """Return how many messages have so many rows and bytes, judged by those before; at least one."""
        return max(1, round(min(rows / max(self._rows_per_message, 1.0), size / max(self._bytes_per_message, 1.0))))

    def split_suspects(self, messages: Sequence[Message]) -> list[Batch]:
        """Return messages as micro-batches, with suspects in small ones of their own, in random order.

        One suspect may end the process. In random order the innocent ones are scored before it sooner or later.
        Messages that are not scored any more come first, so that they are dead letters before the process may end.
        """
        by_size: dict[int | None, list[Message]] = {}
        on_last_delivery: list[Message] = []
        for message in messages:
            if self.limits.max_deliver is not None and message.deliveries >= self.limits.max_deliver:
                on_last_delivery.append(message)
            else:
                by_size.setdefault(quarantine_size(message.deliveries, self.limits.max_deliver), []).append(message)
        trusted = by_size.pop(None, [])
        batches: list[Batch] = [tuple(each) for each in (on_last_delivery, trusted) if each]
        for size, suspects in by_size.items():
            self._random.shuffle(suspects)
            step = size or len(suspects)
            batches += (tuple(suspects[start : start + step]) for start in range(0, len(suspects), step))
        return batches


def compute_wait(config: BatchingConfig, rows: int, waited_seconds: float) -> float:
    """Return how long a micro-batch of so many rows still waits for more; 0 where it is full or has waited enough."""
    return 0.0 if rows >= config.batch_size_max else max(0.0, config.wait_seconds_max - waited_seconds)


def quarantine_size(deliveries: int, max_deliver: int | None) -> int | None:
    """Return the size of the micro-batch that a message of so many deliveries is scored in; None for no bound.

    From its fourth delivery on it is a suspect. It is then in batches of 64, 16, 4 and 1: after a scorer and its
    server were killed thousands may be suspects, and would be delivered again before each was scored alone. A suspect
    is alone at once where few deliveries are left, and every message on its last one.
    """
    if max_deliver is not None and deliveries >= max_deliver:
        return 1
    if deliveries <= _DELIVERIES_TRUSTED:
        return None
    if max_deliver is not None and max_deliver - deliveries < _DELIVERIES_ALONE:
        return 1
    return max(1, int(_QUARANTINE_MAX * _QUARANTINE_DIVISOR ** (_DELIVERIES_TRUSTED + 1 - deliveries)))
