"""What a stream forgets by itself: scores that went out, were not acknowledged, and may come again after its window.

A scorer that is killed, or whose server goes, leaves at most what was in flight so. Where the next one starts, or the
server is back, within the window of the output stream, that refuses what it has. Where it is later, the ids are read
back once, before anything more is published.
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

from tasks.stream.addresses import FromNats
from tasks.stream.message import Message, Place
from tasks.stream.nats_link import NatsLink, find_stream
from tasks.stream.nats_sink import message_id

_FETCH = 1000
_FETCH_SECONDS = 2.0


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

    def begin(self) -> None:
        """Read back what the scorer before has left behind, unless the output knows it still."""
        consumer = self.link.run(self._consumer())
        if consumer is not None and _idle_seconds(consumer) >= self.window_seconds / 2:
            self._read_back(consumer)

    def known(self) -> set[str]:
        """Return ids that the output has of messages that may come again, where it may not know them any more."""
        links = (self.link, self.sink_link)
        if max(link.away_seconds for link in links) >= self.window_seconds / 2:
            for link in links:
                link.away_seconds = 0.0
            self._read_back(self.link.run(self._consumer()))
        return self._known

    def already(self, messages: Sequence[Message]) -> set[Place]:
        """Return which of messages on their last delivery have gone out: only their acknowledgement was lost."""
        now = time.monotonic()
        if now - self._read_at > self.source.ack_wait_seconds:
            self._read_back(self.link.run(self._consumer()))
        return {each.place for each in messages if message_id(self.origin, each) in self._known}

    async def _consumer(self) -> ConsumerInfo | None:
        """Return what the server says of the consumer; None where it has nothing that may come again."""
        stream, name = self.source.stream, self.source.consumer
        try:
            consumer = await self.link.ask("its consumer", lambda: self.link.js.consumer_info(stream, name))
        except NotFoundError:
            return None
        return consumer if consumer.num_ack_pending else None

    def _read_back(self, consumer: ConsumerInfo | None) -> None:
        self._read_at = time.monotonic()
        if consumer is None:
            return
        words = f"Reading back which of {consumer.num_ack_pending:,} messages in flight have gone out already."
        self.link.say("recall", words)
        assert consumer.ack_floor is not None and consumer.delivered is not None, "the server tells both"  # noqa: S101, PT018
        low, high = consumer.ack_floor.stream_seq, consumer.delivered.stream_seq
        self._known = self.sink_link.run(self._out_lately(low, high))

    async def _out_lately(self, low: int, high: int) -> set[str]:
        """Return the ids of what went out of late: what went out before that has used up its deliveries."""
        link, state = self.sink_link, (await find_stream(self.sink_link, self.sink)).state
        if not state.messages:
            return set()
        newest = (await link.ask("the last score", lambda: link.js.get_msg(self.sink, state.last_seq))).time
        since = (newest or datetime.now(UTC)) - timedelta(seconds=self.source.worst_redelivery_seconds)

        def counts(each: str) -> bool:
            return each.startswith(f"{self.origin}.") and low < int(each.rpartition(".")[2]) <= high

        return await _ids(link, self.sink, since, counts)


def _idle_seconds(consumer: ConsumerInfo) -> float:
    """Return how long ago a message was last delivered."""
    last = consumer.delivered.last_active if consumer.delivered else None
    return float("inf") if last is None else (datetime.now(UTC) - last).total_seconds()


async def _ids(link: NatsLink, sink: str, since: datetime, counts: Callable[[str], bool]) -> set[str]:
    config = ConsumerConfig(
        ack_policy=AckPolicy.NONE,
        deliver_policy=DeliverPolicy.BY_START_TIME,
        opt_start_time=since,
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
