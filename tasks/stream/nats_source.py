"""NATS JetStream as a source: a durable consumer that is pulled from ahead of need, within bounds."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import nats.errors
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, RetentionPolicy
from nats.js.errors import APIError, NotFoundError

from serving.errors import BrokerFault, StreamUnfit
from tasks.stream.addresses import FromNats
from tasks.stream.message import HEADER_EVENT_TIME, Message, Place
from tasks.stream.nats_link import NatsLink, find_stream

_EXPIRES_SECONDS = 2.0
_TICK_SECONDS = 0.2
_GONE = "Consumer Deleted"
_RAN_OUT = ("404", "408")
_SECONDS = 1e9
_TOKENS_OLD = 9
_HEAD_BYTES = 1 << 16
_FLUSH_SECONDS = 5


class NatsSource:
    """Messages of one stream. `start` reads from a sequence on, exactly in order, and acknowledges nothing.

    Raises StreamUnfit where stream, subject or consumer are not what the address says.
    """

    def __init__(self, link: NatsLink, address: FromNats, *, in_flight: int, bytes_max: int, start: int | None) -> None:
        self._link, self._address = link, address
        self._messages_max, self._bytes_max = in_flight, bytes_max
        self._half = max(1, in_flight // 2)
        # The largest message that there can be must fit, or it would never come.
        self._bytes_asked = max(bytes_max // 2, link.client.max_payload + _HEAD_BYTES)
        self._buffer: deque[Message] = deque()
        self._bytes = 0
        self._enough = 1
        self._there = threading.Condition()
        self._asked: dict[int, int] = {}
        self._asked_at = 0.0
        self._numbers = itertools.count()
        self._failed: BrokerFault | None = None
        self._pending: int | None = None
        self._position = start
        self._in_order = start is not None
        self._consumer = ""
        self._closed = False
        self._next_delivery = 1
        self._inbox = link.client.new_inbox()
        link.run(self._open())

    async def _open(self) -> None:
        info = await find_stream(self._link, self._address.stream)
        _must_have(info.config.subjects or [], self._address)
        if self._in_order and info.config.retention == RetentionPolicy.WORK_QUEUE:
            message = (
                f"The stream {self._address.stream!r} must keep its messages for a table of parts, which resumes from "
                "its last part; it deletes what is acknowledged (retention workqueue). Use retention limits, or a "
                "sink of messages."
            )
            raise StreamUnfit(message)
        self._subscription = await self._link.client.subscribe(
            f"{self._inbox}.*", cb=self._take, pending_msgs_limit=-1, pending_bytes_limit=-1
        )
        await self._find_consumer()
        self._ticker = asyncio.create_task(self._tick())

    async def _find_consumer(self) -> None:
        wanted = self._wanted()
        if self._in_order:
            await self._begin_in_order(wanted)
            return
        stream, name = self._address.stream, self._address.consumer
        try:
            found = await self._link.ask(f"consumer {name}", lambda: self._link.js.consumer_info(stream, name))
            _must_be_alike(found.config, wanted, stream, name)
        except NotFoundError:
            await self._add(wanted)
        self._consumer = name

    async def _begin_in_order(self, wanted: ConsumerConfig) -> None:
        wanted.opt_start_seq = max(1, self._position or 1)
        self._consumer = (await self._add(wanted)).name
        self._next_delivery = 1
        self._asked.clear()

    async def _add(self, wanted: ConsumerConfig) -> Any:
        try:
            return await self._link.ask(
                "a consumer", lambda: self._link.js.add_consumer(self._address.stream, config=wanted)
            )
        except APIError as error:
            message = (
                f"The stream {self._address.stream!r} must take a consumer of subject "
                f"{self._address.subject or 'any'!r}, got: {error.description}. Name a subject of the stream, or none."
            )
            raise StreamUnfit(message) from error

    def _wanted(self) -> ConsumerConfig:
        if self._in_order:
            return ConsumerConfig(
                ack_policy=AckPolicy.NONE,
                deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
                filter_subject=self._address.subject,
                inactive_threshold=300.0,
                mem_storage=True,
                num_replicas=1,
            )
        return ConsumerConfig(
            durable_name=self._address.consumer,
            ack_policy=AckPolicy.EXPLICIT,
            deliver_policy=DeliverPolicy.ALL,
            ack_wait=self._address.ack_wait_seconds,
            max_deliver=self._address.max_deliver,
            max_ack_pending=self._messages_max,
            filter_subject=self._address.subject,
        )

    def fetch(self, most: int, enough: int, seconds: float) -> list[Message]:
        """Return up to `most` messages as soon as `enough` are there, or what there is after `seconds`."""
        with self._there:
            self._enough = enough
            self._there.wait_for(lambda: len(self._buffer) >= enough or self._failed is not None, timeout=seconds)
            self._link.check()
            if self._failed is not None:
                raise self._failed
            taken = [self._buffer.popleft() for _ in range(min(most, len(self._buffer)))]
            self._bytes -= sum(len(message.payload) for message in taken)
        return taken

    def acknowledge(self, done: Sequence[Message], buried: Sequence[Message]) -> None:
        """Acknowledge what is done, terminate what is buried; a table's source has nothing to acknowledge."""
        if not self._in_order:
            self._link.run(self._acknowledge(done, buried))

    def close(self) -> None:
        """Ask for no more, and give back what was taken and not fetched: others need not wait for it."""
        self._link.run(self._close())

    def give_back(self, messages: Sequence[Message]) -> None:
        """Take messages back that were fetched and are left to others."""
        with self._there:
            self._buffer.extendleft(reversed(messages))

    async def _close(self) -> None:
        self._ticker.cancel()
        self._closed = True
        if self._in_order or not self._link.client.is_connected:
            return
        # Before anything is given back nothing may be left that asks for it here.
        await self._subscription.unsubscribe()
        with contextlib.suppress(nats.errors.Error, TimeoutError):
            await self._link.client.flush(_FLUSH_SECONDS)
        with self._there:
            left, self._buffer = list(self._buffer), deque()
        for message in left:
            await self._link.client.publish(message.receipt, b"-NAK")

    def lag(self) -> int | None:
        """Return how many messages wait in the stream for this consumer, as it last said."""
        return self._pending

    async def _acknowledge(self, done: Sequence[Message], buried: Sequence[Message]) -> None:
        publish = self._link.client.publish
        for messages, word in ((done, b"+ACK"), (buried, b"+TERM")):
            for message in messages:
                while True:
                    try:
                        await publish(message.receipt, word)
                        break
                    except nats.errors.OutboundBufferLimitError:
                        # What is not acknowledged comes again, and its score is there once all the same.
                        await self._link.connected()

    async def _tick(self) -> None:
        """Ask for more, time and again: as long as there is room, the server never waits to be asked."""
        while True:
            # A connection that is going says so to whoever waits for it; here it is tried again.
            with contextlib.suppress(nats.errors.Error):
                await self._ask_for_more()
            await asyncio.sleep(_TICK_SECONDS)

    async def _ask_for_more(self) -> None:
        if self._closed or not self._link.client.is_connected:
            return
        now = time.monotonic()
        if self._asked and now - self._asked_at > _EXPIRES_SECONDS + 1:
            # All of them have run out by now; what the server said of it was lost with the connection.
            self._asked.clear()
        half = self._half
        room = self._messages_max - len(self._buffer) - sum(self._asked.values())
        if len(self._asked) > 1 or room < half or self._bytes > self._bytes_max // 2:
            return
        number = next(self._numbers)
        self._asked[number], self._asked_at = half, now
        request = {"batch": half, "expires": int(_EXPIRES_SECONDS * _SECONDS), "max_bytes": self._bytes_asked}
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._address.stream}.{self._consumer}"
        await self._link.client.publish(subject, json.dumps(request).encode(), reply=f"{self._inbox}.{number}")

    async def _take(self, msg: Msg) -> None:
        if msg.reply.startswith("$JS.ACK."):
            await self._take_message(msg)
        else:
            await self._take_status(msg)

    async def _take_message(self, msg: Msg) -> None:
        # Old servers name the consumer first, new ones the domain and the account before it.
        tokens = msg.reply.split(".")
        at = 3 if len(tokens) == _TOKENS_OLD else 5
        delivered, sequence, delivery, stamp, pending = map(int, tokens[at + 1 : at + 6])
        first = next(iter(self._asked), None)
        if first is not None:
            self._asked[first] -= 1
            if not self._asked[first]:
                del self._asked[first]
        if self._in_order and not (tokens[at] == self._consumer and await self._follows(sequence, delivery)):
            return
        message = Message(
            place=Place(0, sequence),
            payload=msg.data,
            event_time=_event_time(msg, stamp),
            arrived=time.monotonic(),
            deliveries=delivered,
            receipt=msg.reply,
        )
        with self._there:
            self._buffer.append(message)
            self._bytes += len(message.payload)
            self._pending = pending
            if len(self._buffer) >= self._enough:
                self._there.notify()
        if sum(self._asked.values()) <= self._messages_max // 4:
            await self._ask_for_more()

    async def _follows(self, sequence: int, delivery: int) -> bool:
        """Whether a message is the one after the last; where one was lost on its way, begin again behind the last."""
        if delivery == self._next_delivery:
            self._next_delivery, self._position = delivery + 1, sequence + 1
            return True
        if delivery > self._next_delivery:
            await self._begin_in_order(self._wanted())
        return False

    async def _take_status(self, msg: Msg) -> None:
        number = int(msg.subject.rpartition(".")[2])
        told = msg.headers or {}
        words = f"{told.get('Status', '')} {told.get('Description', '')}"
        if told.get("Status") == "100":
            return
        fruitless = self._asked.pop(number, 0) == self._half
        if _GONE in words or told.get("Status") == "503":
            await self._lost(words)
        if not fruitless or told.get("Status") in _RAN_OUT:
            # One that the server refuses is asked again at the next tick.
            await self._ask_for_more()

    async def _lost(self, words: str) -> None:
        if self._in_order:
            await self._begin_in_order(self._wanted())
            return
        try:
            await self._link.js.consumer_info(self._address.stream, self._address.consumer)
        except NotFoundError:
            self._failed = BrokerFault(
                f"The consumer {self._address.consumer!r} of {self._address.stream!r} must stay, but was deleted "
                f"({words.strip()}). Call again: it is made anew, and begins with the stream's first message."
            )
            with self._there:
                self._there.notify()
        except nats.errors.Error:
            return


def _must_have(subjects: Sequence[str], address: FromNats) -> None:
    """Raise StreamUnfit where no message of the stream can have the subject: the server would wait in silence."""
    if address.subject is not None and subjects and not any(overlap(address.subject, each) for each in subjects):
        message = (
            f"The subject {address.subject!r} must be one of stream {address.stream!r}, which takes "
            f"{', '.join(map(repr, subjects))}. Name one of them, or none."
        )
        raise StreamUnfit(message)


def overlap(one: str, other: str) -> bool:
    """Whether a subject can fit both patterns, in which * is one token and > all that are left."""
    for left, right in itertools.zip_longest(one.split("."), other.split(".")):
        if left is None or right is None:
            return False
        if ">" in (left, right):
            return True
        if left != right and "*" not in (left, right):
            return False
    return True


async def find_identity(link: NatsLink, address: FromNats) -> str:
    """Return what tells the stream from one of the same name that is made later: there, numbers begin anew."""
    info = await find_stream(link, address.stream)
    return f"{address.stream}@{info.created:%Y%m%dT%H%M%S%f}" if info.created else address.stream


def _event_time(msg: Msg, stamp: int) -> float:
    """Return when the event was, by its producer, or by when the stream took it."""
    told = (msg.headers or {}).get(HEADER_EVENT_TIME)
    if told is not None:
        try:
            return float(told)
        except ValueError:
            pass
    return stamp / _SECONDS


_COMPARED = (
    *("ack_policy", "ack_wait", "max_deliver", "max_ack_pending", "filter_subject", "filter_subjects"),
    *("deliver_policy", "deliver_subject"),
)


def _must_be_alike(found: ConsumerConfig, wanted: ConsumerConfig, stream: str, name: str) -> None:
    """Raise StreamUnfit where a consumer that is there has other settings than it would be made with."""
    differences = [
        f"{field} is {_word(getattr(found, field))}, not {_word(getattr(wanted, field))}"
        for field in _COMPARED
        if (getattr(found, field) or None) != (getattr(wanted, field) or None)
    ]
    if differences:
        message = (
            f"The consumer {name!r} of stream {stream!r} must have the settings of this call, but "
            f"{'; '.join(differences)}. Use those settings, another consumer name, or delete it: the stream is then "
            "read from its beginning."
        )
        raise StreamUnfit(message)


def _word(value: Any) -> str:
    return str(getattr(value, "value", value))
