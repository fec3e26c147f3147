"""Deduplication beyond the window of the output stream, for messages that are delivered again later.

A scorer that is killed, or whose server fails, leaves messages whose scores are emitted but which are not acknowledged:
at most those in flight. Within the window of the output stream the server refuses their scores itself. After it, this
module reads the ids of emitted scores back, once, before anything more is published. For messages on their last
delivery ids are read back in any case.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import nats.errors
from nats.js.api import AckPolicy, ConsumerConfig, ConsumerInfo, DeliverPolicy
from nats.js.errors import NotFoundError

from tasks.stream.message import Message, Position
from tasks.stream.nats.connection import NatsConnection, find_stream
from tasks.stream.nats.sink import format_message_id
from tasks.stream.options import FromNats

_FETCH_MESSAGES = 1000
_FETCH_SECONDS = 2.0
# The clocks of two servers differ by less.
_CLOCK_SKEW_SECONDS = 60.0
_LONG_AGO = datetime.fromtimestamp(0, UTC)


@dataclass(slots=True, kw_only=True)
class EmittedIds:
    """The ids of emitted scores that an output stream holds of one consumer's unacknowledged messages.

    Every id begins with `origin`. The output refuses an id by itself for `window_seconds`.
    """

    connection: NatsConnection
    source: FromNats
    sink_connection: NatsConnection
    sink_stream: str
    origin: str
    window_seconds: float
    _known: set[str] = field(default_factory=set)
    _read_at: float = -math.inf
    _read_to: int = 0
    _read_until: datetime = _LONG_AGO
    _outages: int = 0

    def read_after_pause(self) -> None:
        """Read the ids that an earlier scorer has left, unless the output still refuses them."""
        consumer = self.connection.run(self._find_consumer())
        if consumer is None or not consumer.num_ack_pending:
            return
        last = consumer.delivered.last_active if consumer.delivered else None
        if last is None or (datetime.now(UTC) - last).total_seconds() >= self.window_seconds / 2:
            self._read_back()

    def find_known(self) -> set[str]:
        """Return emitted ids of messages that may be delivered again, where the output may not refuse them any more."""
        outages = list(self.connection.outages)
        if self.sink_connection is not self.connection:
            outages += self.sink_connection.outages
        before, self._outages = self._outages, len(outages)
        if before != self._outages and max(outages) >= self.window_seconds / 2:
            self._read_back()
        return self._known

    def find_emitted(self, messages: Sequence[Message]) -> set[Position]:
        """Return which of some messages are emitted, however long ago: only their acknowledgement was lost."""
        if messages and (not self._read_to or time.monotonic() - self._read_at > self.source.ack_wait_seconds):
            self._read_back(all_in_flight=True)
        return {each.position for each in messages if format_message_id(self.origin, each) in self._known}

    async def _find_consumer(self) -> ConsumerInfo | None:
        """Return the server's description of the consumer; None where there is none yet."""
        stream, name = self.source.stream, self.source.consumer
        try:
            return await self.connection.request("its consumer", lambda: self.connection.js.consumer_info(stream, name))
        except NotFoundError:
            return None

    def _read_back(self, *, all_in_flight: bool = False) -> None:
        """Read ids back: recent ones, or those of all messages in flight that were not read yet."""
        self._read_at = time.monotonic()
        state = self.sink_connection.run(find_stream(self.sink_connection, self.sink_stream)).state
        consumer = self.connection.run(self._find_consumer())
        if consumer is None or not state.messages:
            return
        words = f"Reading back which of {consumer.num_ack_pending or 0:,} messages in flight have gone out already."
        self.connection.warn_once("read back", words)
        assert consumer.ack_floor is not None, "the server sends it"  # noqa: S101
        low = consumer.ack_floor.stream_seq

        def is_in_flight(each: str) -> bool:
            # A server that was killed may have forgotten its last deliveries, so that no number is too high.
            return each.startswith(f"{self.origin}.") and low < int(each.rpartition(".")[2])

        newest = self.sink_connection.run(_find_stored_time(self.sink_connection, self.sink_stream, state.last_seq))
        since = newest - timedelta(seconds=self.source.redelivery_seconds_max)
        if all_in_flight:
            first = self.connection.run(_find_stored_time(self.connection, self.source.stream, low + 1))
            since = min(since, first - timedelta(seconds=_CLOCK_SKEW_SECONDS))
        start = self._read_to + 1 if all_in_flight and since < self._read_until else since
        found = self.sink_connection.run(_read_ids(self.sink_connection, self.sink_stream, start, is_in_flight))
        self._known = {each for each in self._known if is_in_flight(each)} | found
        if all_in_flight:
            # Later scores may be of messages that were delivered after `consumer` was read: they are read next time.
            self._read_to, self._read_until = state.last_seq, newest


async def _find_stored_time(connection: NatsConnection, stream: str, number: int) -> datetime:
    """Return when the first message from a number on was stored. Its score can't be older."""
    try:
        message = await connection.request(
            "a message", lambda: connection.js.get_msg(stream, seq=number, subject=">", next=True)
        )
    except NotFoundError:
        # All messages from that number on are gone.
        return datetime.now(UTC)
    return message.time or _LONG_AGO


async def _read_ids(
    connection: NatsConnection, stream: str, start: int | datetime, is_in_flight: Callable[[str], bool]
) -> set[str]:
    """Return the message ids in a stream, from a number or a time on, that are in flight."""
    config = ConsumerConfig(
        ack_policy=AckPolicy.NONE,
        deliver_policy=DeliverPolicy.BY_START_SEQUENCE if isinstance(start, int) else DeliverPolicy.BY_START_TIME,
        opt_start_seq=start if isinstance(start, int) else None,
        opt_start_time=None if isinstance(start, int) else start,
        headers_only=True,
        mem_storage=True,
        inactive_threshold=60.0,
    )
    subscription = await connection.request(
        "its scores", lambda: connection.js.pull_subscribe(">", stream=stream, config=config)
    )
    found: set[str] = set()
    left = (await subscription.consumer_info()).num_pending or 0
    while left > 0:
        try:
            fetched = await subscription.fetch(min(left, _FETCH_MESSAGES), timeout=_FETCH_SECONDS)
        except nats.errors.TimeoutError:
            # Retention may have deleted some of them meanwhile.
            left = (await connection.request("its scores", subscription.consumer_info)).num_pending or 0
            continue
        left -= len(fetched)
        found |= {each for msg in fetched if is_in_flight(each := (msg.headers or {}).get("Nats-Msg-Id", ""))}
    await subscription.unsubscribe()
    return found
