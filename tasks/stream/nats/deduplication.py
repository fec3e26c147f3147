"""What a stream forgets by itself: scores that went out, were not acknowledged, and may come again after its window.

A scorer that is killed, or whose server goes, leaves at most what was in flight so. Where the next one starts, or the
server is back, within the window of the output stream, that refuses what it has. Where it is later, the ids are read
back once, before anything more is published. Of what comes for the last time they are read back whenever they were.
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

from tasks.stream.message import Message, Place
from tasks.stream.nats.connection import NatsLink, find_stream
from tasks.stream.nats.sink import message_id
from tasks.stream.options import FromNats

_FETCH = 1000
_FETCH_SECONDS = 2.0
# The clocks of two servers differ by less.
_CLOCKS_SECONDS = 60.0
_LONG_AGO = datetime.fromtimestamp(0, UTC)


@dataclass(slots=True, kw_only=True)
class Recall:
    """Reads back which scores of one consumer's messages the output holds; `origin` begins their ids.

    `window_seconds` is how long the output knows an id by itself.
    """

    link: NatsLink
    source: FromNats
    sink_link: NatsLink
    sink: str
    origin: str
    window_seconds: float
    _known: set[str] = field(default_factory=set)
    _read_at: float = -math.inf
    _read_to: int = 0
    _read_until: datetime = _LONG_AGO
    _outages: int = 0

    def begin(self) -> None:
        """Read back what the scorer before has left behind, unless the output knows it still."""
        consumer = self.link.run(self._consumer())
        if consumer is not None and _idle_seconds(consumer) >= self.window_seconds / 2:
            self._read_back()

    def known(self) -> set[str]:
        """Return ids that the output has of messages that may come again, where it may not know them any more."""
        outages = [*self.link.outages, *(self.sink_link.outages if self.sink_link is not self.link else ())]
        before, self._outages = self._outages, len(outages)
        if before != self._outages and max(outages) >= self.window_seconds / 2:
            self._read_back()
        return self._known

    def already(self, messages: Sequence[Message]) -> set[Place]:
        """Return which of messages have gone out, however long ago: only their acknowledgement was lost."""
        if messages and (not self._read_to or time.monotonic() - self._read_at > self.source.ack_wait_seconds):
            self._read_back(all_of_it=True)
        return {each.place for each in messages if message_id(self.origin, each) in self._known}

    async def _consumer(self) -> ConsumerInfo | None:
        """Return what the server says of the consumer; None where it has nothing that may come again."""
        stream, name = self.source.stream, self.source.consumer
        try:
            consumer = await self.link.ask("its consumer", lambda: self.link.js.consumer_info(stream, name))
        except NotFoundError:
            return None
        return consumer if consumer.num_ack_pending else None

    def _read_back(self, *, all_of_it: bool = False) -> None:
        """Read back what went out of late, or all that may come again and was not read yet."""
        self._read_at = time.monotonic()
        state = self.sink_link.run(find_stream(self.sink_link, self.sink)).state
        consumer = self.link.run(self._consumer())
        if consumer is None or not state.messages:
            return
        words = f"Reading back which of {consumer.num_ack_pending:,} messages in flight have gone out already."
        self.link.say("recall", words)
        assert consumer.ack_floor is not None and consumer.delivered is not None, "the server tells both"  # noqa: S101, PT018
        low, high = consumer.ack_floor.stream_seq, consumer.delivered.stream_seq

        def counts(each: str) -> bool:
            return each.startswith(f"{self.origin}.") and low < int(each.rpartition(".")[2]) <= high

        newest = self.sink_link.run(_stored_at(self.sink_link, self.sink, state.last_seq))
        since = newest - timedelta(seconds=self.source.worst_redelivery_seconds)
        if all_of_it:
            first = self.link.run(_stored_at(self.link, self.source.stream, low + 1))
            since = min(since, first - timedelta(seconds=_CLOCKS_SECONDS))
        begin = self._read_to + 1 if all_of_it and since < self._read_until else since
        found = self.sink_link.run(_ids(self.sink_link, self.sink, begin, counts))
        self._known = {each for each in self._known if counts(each)} | found
        if all_of_it:
            # What has come in since may be of messages that were delivered since, which do not count yet.
            self._read_to, self._read_until = state.last_seq, newest


def _idle_seconds(consumer: ConsumerInfo) -> float:
    """Return how long ago a message was last delivered."""
    last = consumer.delivered.last_active if consumer.delivered else None
    return float("inf") if last is None else (datetime.now(UTC) - last).total_seconds()


async def _stored_at(link: NatsLink, stream: str, number: int) -> datetime:
    """Return when the first message from a number on was stored: no score of it went out before."""
    try:
        message = await link.ask("a message", lambda: link.js.get_msg(stream, seq=number, subject=">", next=True))
    except NotFoundError:
        # It is gone, and so are all behind it.
        return datetime.now(UTC)
    return message.time or _LONG_AGO


async def _ids(link: NatsLink, sink: str, begin: int | datetime, counts: Callable[[str], bool]) -> set[str]:
    """Return the ids that count of what a stream holds from a number or a time on."""
    config = ConsumerConfig(
        ack_policy=AckPolicy.NONE,
        deliver_policy=DeliverPolicy.BY_START_SEQUENCE if isinstance(begin, int) else DeliverPolicy.BY_START_TIME,
        opt_start_seq=begin if isinstance(begin, int) else None,
        opt_start_time=None if isinstance(begin, int) else begin,
        headers_only=True,
        mem_storage=True,
        inactive_threshold=60.0,
    )
    subscription = await link.ask("its scores", lambda: link.js.pull_subscribe(">", stream=sink, config=config))
    found: set[str] = set()
    left = (await subscription.consumer_info()).num_pending or 0
    while left > 0:
        try:
            got = await subscription.fetch(min(left, _FETCH), timeout=_FETCH_SECONDS)
        except nats.errors.TimeoutError:
            # The stream may have let go of some of them meanwhile.
            left = (await link.ask("its scores", subscription.consumer_info)).num_pending or 0
            continue
        left -= len(got)
        found |= {each for msg in got if counts(each := (msg.headers or {}).get("Nats-Msg-Id", ""))}
    await subscription.unsubscribe()
    return found
