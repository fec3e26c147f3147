"""The first rows of a stream, looked at before they are scored: what the dial is measured with."""

from __future__ import annotations

import time
from collections.abc import Callable

import pyarrow as pa

from tasks.stream.decode import Decoder
from tasks.stream.ends import Source
from tasks.stream.message import Message

_POLL_SECONDS = 0.2
_MESSAGES_MAX = 1024


class Peeked:
    """A source whose first messages can be looked at, and are fetched as ever afterwards."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._held: list[Message] = []

    def peek(self, decoder: Decoder, rests: Callable[[], bool], idle_seconds: float | None) -> pa.Table | None:
        """Wait for messages and return the rows of the first that can be read.

        None where the stream ends first, where the first thousand messages are poison, or where some come again.
        """
        start = time.monotonic()
        while len(self._held) < _MESSAGES_MAX and not rests():
            got = self._source.fetch(_MESSAGES_MAX - len(self._held), 1, _POLL_SECONDS)
            self._held += got
            if any(message.deliveries > 1 for message in got):
                # One of them may be what ended the scorer before: they are no sample to try things out on.
                return None
            groups, _ = decoder.decode(got)
            if groups:
                return max((group.table for group in groups), key=lambda table: table.num_rows)
            if not self._held and idle_seconds is not None and time.monotonic() - start > idle_seconds:
                return None
        return None

    def left(self) -> list[Message]:
        """Return the messages that were looked at and never fetched; they are forgotten here."""
        left, self._held = self._held, []
        return left

    def fetch(self, most: int, enough: int, seconds: float) -> list[Message]:
        """Return the messages that were looked at first, then those of the source."""
        if self._held:
            taken, self._held = self._held[:most], self._held[most:]
            return taken
        return self._source.fetch(most, enough, seconds)
