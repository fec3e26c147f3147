"""What a stream forgets by itself: scores that went out, were not acknowledged, and may come again after its window.

A scorer that is killed leaves at most what was in flight so. Where the next one starts within the window of the output
stream, that refuses what it has. Where it starts later, the ids are read back once, before anything is scored.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import nats.errors
from nats.js.api import AckPolicy, ConsumerConfig, ConsumerInfo, DeliverPolicy, StreamInfo
from nats.js.errors import NotFoundError

from tasks.stream.addresses import FromNats
from tasks.stream.nats_link import NatsLink

_FETCH = 1000
_FETCH_SECONDS = 2.0


async def recall(link: NatsLink, source: FromNats, sink_link: NatsLink, sink: StreamInfo, origin: str) -> set[str]:
    """Return the ids of scores that the output has of messages that may come again; none where its window has them."""
    try:
        consumer = await link.ask("its consumer", lambda: link.js.consumer_info(source.stream, source.consumer))
    except NotFoundError:
        return set()
    window = sink.config.duplicate_window or 0.0
    if not consumer.num_ack_pending or not sink.state.messages or _idle_seconds(consumer) < window / 2:
        return set()
    link.say("recall", f"Reading back what the scorer before has put out of {consumer.num_ack_pending:,} messages.")
    assert consumer.ack_floor is not None and consumer.delivered is not None, "an old server tells both"  # noqa: S101, PT018
    low, high = consumer.ack_floor.stream_seq, consumer.delivered.stream_seq
    name, last = sink.config.name or "", sink.state.last_seq
    newest = (await sink_link.ask("the last score", lambda: sink_link.js.get_msg(name, last))).time
    # What went out before that has used up its deliveries.
    since = (newest or datetime.now(UTC)) - timedelta(seconds=source.worst_redelivery_seconds)
    return {
        each
        for each in await _ids(sink_link, sink, since)
        if each.startswith(f"{origin}.") and low < int(each.rpartition(".")[2]) <= high
    }


def _idle_seconds(consumer: ConsumerInfo) -> float:
    """Return how long ago a message was last delivered."""
    last = consumer.delivered.last_active if consumer.delivered else None
    return float("inf") if last is None else (datetime.now(UTC) - last).total_seconds()


async def _ids(link: NatsLink, sink: StreamInfo, since: datetime) -> set[str]:
    config = ConsumerConfig(
        ack_policy=AckPolicy.NONE,
        deliver_policy=DeliverPolicy.BY_START_TIME,
        opt_start_time=since,
        headers_only=True,
        mem_storage=True,
        inactive_threshold=60.0,
    )
    name = sink.config.name or ""
    subscription = await link.ask("its scores", lambda: link.js.pull_subscribe(">", stream=name, config=config))
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
