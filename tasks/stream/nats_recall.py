"""What a stream forgets by itself: scores that went out, were not acknowledged, and may come again after its window.

A scorer that is killed leaves at most what was in flight so. Where the next one starts within the window of the output
stream, that refuses what it has. Where it starts later, the ids are read back once, before anything is scored.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
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
    """Reads back which scores of one consumer's messages the output holds; `origin` begins their ids."""

    link: NatsLink
    source: FromNats
    sink_link: NatsLink
    sink: str
    origin: str
    _ids: set[str] = field(default_factory=set)
    _read_at: float = -math.inf

    def forgotten(self) -> set[str]:
        """Return the ids that the output has of messages that may come again; none where its window has them."""
        return self.link.run(self._forgotten())

    def already(self, messages: Sequence[Message]) -> set[Place]:
        """Return which of messages on their last delivery have gone out: only their acknowledgement was lost."""
        now = time.monotonic()
        if now - self._read_at > self.source.ack_wait_seconds:
            self._ids, self._read_at = self.sink_link.run(self._out_lately()), now
        return {each.place for each in messages if message_id(self.origin, each) in self._ids}

    async def _forgotten(self) -> set[str]:
        stream, name = self.source.stream, self.source.consumer
        try:
            consumer = await self.link.ask("its consumer", lambda: self.link.js.consumer_info(stream, name))
        except NotFoundError:
            return set()
        window = (await find_stream(self.sink_link, self.sink)).config.duplicate_window or 0.0
        if not consumer.num_ack_pending or _idle_seconds(consumer) < window / 2:
            return set()
        words = f"Reading back what the scorer before has put out of {consumer.num_ack_pending:,} messages."
        self.link.say("recall", words)
        assert consumer.ack_floor is not None and consumer.delivered is not None, "the server tells both"  # noqa: S101, PT018
        low, high = consumer.ack_floor.stream_seq, consumer.delivered.stream_seq
        return {each for each in await self._out_lately() if low < int(each.rpartition(".")[2]) <= high}

    async def _out_lately(self) -> set[str]:
        """Return the ids of what went out of late: what went out before that has used up its deliveries."""
        link, state = self.sink_link, (await find_stream(self.sink_link, self.sink)).state
        if not state.messages:
            return set()
        newest = (await link.ask("the last score", lambda: link.js.get_msg(self.sink, state.last_seq))).time
        since = (newest or datetime.now(UTC)) - timedelta(seconds=self.source.worst_redelivery_seconds)
        return {each for each in await _ids(link, self.sink, since) if each.startswith(f"{self.origin}.")}


def _idle_seconds(consumer: ConsumerInfo) -> float:
    """Return how long ago a message was last delivered."""
    last = consumer.delivered.last_active if consumer.delivered else None
    return float("inf") if last is None else (datetime.now(UTC) - last).total_seconds()


async def _ids(link: NatsLink, sink: str, since: datetime) -> set[str]:
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
            await link.sleep(_FETCH_SECONDS)
            continue
        left -= len(got)
        found |= {(msg.headers or {}).get("Nats-Msg-Id", "") for msg in got}
    await subscription.unsubscribe()
    return found
