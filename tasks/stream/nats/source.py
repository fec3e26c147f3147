"""NATS JetStream as a source: a consumer that is pulled from ahead of need, within bounds."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import nats.errors
from nats.aio.msg import Msg
from nats.js.api import ConsumerInfo
from nats.js.errors import NotFoundError

from serving.errors import BrokerFault, MessagesLost, OvernightError, StreamFault
from tasks.stream.message import HEADER_EVENT_TIME, Message, Place, event_time
from tasks.stream.nats.connection import NatsLink, find_stream
from tasks.stream.nats.consumer import check_identity, check_stream, find_durable, make_in_order, must_not_be_lost
from tasks.stream.options import FromNats


class InHand:
    """Messages that are neither acknowledged nor given back, by number: the server is told that they are worked on.

    Else it would send them again where there is more in hand than is scored within `ack_wait_seconds`.
    """

    def __init__(self, ack_wait_seconds: float) -> None:
        self._half = ack_wait_seconds / 2
        # The one that the server was told of longest ago stands first.
        self._told: OrderedDict[int, tuple[str, float]] = OrderedDict()

    def take(self, number: int, receipt: str, now: float) -> bool:
        """Take note of a delivery; False where the message is in hand already, and this is a copy of it."""
        new = number not in self._told
        self._told[number] = receipt, now
        self._told.move_to_end(number)
        return new

    def drop(self, messages: Iterable[Message]) -> None:
        """Forget messages."""
        for message in messages:
            self._told.pop(message.place.number, None)

    def due(self, now: float) -> list[str]:
        """Return the receipts of those for whose acknowledgement the server has waited half of its time."""
        found = []
        while self._told:
            number, (receipt, told) = next(iter(self._told.items()))
            if now - told < self._half:
                break
            self.take(number, receipt, now)
            found.append(receipt)
        return found


_EXPIRES_SECONDS = 2.0
_TICK_SECONDS = 0.2
_LAG_SECONDS = 2.0
_GONE = "Consumer Deleted"
_RAN_OUT = ("404", "408")
_SECONDS = 1e9
_TOKENS_OLD = 9
_HEAD_BYTES = 1 << 16
_FLUSH_SECONDS = 5


@dataclass(slots=True)
class _Request:
    """So many messages that the server was asked for, and how many of them are still to come."""

    messages: int
    left: int


class NatsSource:
    """Messages of one stream. `start` reads from a sequence on, exactly in order, and acknowledges nothing.

    Takes `limit` messages at most. Raises StreamUnfit where stream, subject or consumer are not what the address says.
    """

    def __init__(
        self,
        link: NatsLink,
        address: FromNats,
        *,
        in_flight: int,
        bytes_max: int,
        start: int | None,
        limit: int | None = None,
        identity: str | None = None,
    ) -> None:
        self._link, self._address = link, address
        self._messages_max, self._limit = in_flight, limit
        self._half = max(1, in_flight // 2)
        # Two requests may be under way. The largest message that there can be must fit, or it would never come.
        self._bytes_quarter = bytes_max // 4
        self._bytes_asked = max(self._bytes_quarter, link.client.max_payload + _HEAD_BYTES)
        self._buffer: deque[Message] = deque()
        self._bytes = 0
        self._enough = 1
        self._there = threading.Condition()
        self._asked: dict[int, _Request] = {}
        self._asked_at = 0.0
        self._numbers = itertools.count()
        self._failed: OvernightError | None = None
        self._identity = identity
        self._looked: ConsumerInfo | None = None
        self._pending: int | None = None
        self._position, self._in_order = start or 0, start is not None
        self._hand = InHand(address.ack_wait_seconds)
        self._consumer = ""
        self._closed = False
        self._next_delivery = 1
        self._inbox = link.client.new_inbox()
        link.run(self._open())

    async def _open(self) -> None:
        await check_stream(self._link, self._address, in_order=self._in_order)
        if self._in_order:
            await self._begin_in_order()
        else:
            self._consumer = await find_durable(self._link, self._address, self._messages_max)
            asked = self._link.js.consumer_info
            self._looked = await self._link.ask("it", lambda: asked(self._address.stream, self._consumer))
        # Nothing comes before it is asked for.
        self._subscription = await self._link.client.subscribe(
            f"{self._inbox}.*", cb=self._take, pending_msgs_limit=-1, pending_bytes_limit=-1
        )
        self._tasks = [asyncio.create_task(self._keep_asking()), asyncio.create_task(self._keep_looking())]

    async def _begin_in_order(self) -> None:
        if self._identity is not None:
            await check_identity(self._link, self._address, self._identity)
        self._consumer = await make_in_order(self._link, self._address, self._position)
        self._next_delivery = 1
        self._asked.clear()

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
            self._bytes += sum(len(message.payload) for message in messages)

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
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
        """Return how many messages wait in the stream for this consumer, as it last said, and here to be fetched."""
        return None if self._pending is None else self._pending + len(self._buffer)

    async def _acknowledge(self, done: Sequence[Message], buried: Sequence[Message]) -> None:
        for messages, word in ((done, b"+ACK"), (buried, b"+TERM")):
            self._hand.drop(messages)
            for message in messages:
                while True:
                    try:
                        await self._link.client.publish(message.receipt, word)
                        break
                    except nats.errors.OutboundBufferLimitError:
                        # What is not acknowledged comes again, and its score is there once all the same.
                        await self._link.connected()

    async def _keep_asking(self) -> None:
        """Ask for more, time and again: as long as there is room, the server never waits to be asked."""
        while True:
            # A connection that is going says so to whoever waits for it; here it is tried again.
            with contextlib.suppress(nats.errors.Error):
                await self._ask_for_more()
                await self._say_what_is_in_hand()
            await asyncio.sleep(_TICK_SECONDS)

    async def _say_what_is_in_hand(self) -> None:
        if not self._in_order and self._link.client.is_connected:
            for receipt in self._hand.due(time.monotonic()):
                await self._link.client.publish(receipt, b"+WPI")

    async def _keep_looking(self) -> None:
        """Look how many messages wait: where none is taken, since the sink is slow, none tells of it."""
        while True:
            await asyncio.sleep(_LAG_SECONDS)
            with contextlib.suppress(nats.errors.Error, TimeoutError):
                info = await self._link.js.consumer_info(self._address.stream, self._consumer)
                self._pending = info.num_pending
                await self._look_for_loss(info)

    async def _look_for_loss(self, info: ConsumerInfo) -> None:
        """Fail where the consumer, which several scorers may share, has passed over messages that retention deleted."""
        before, self._looked = self._looked, info
        if self._in_order or self._address.subject is not None or before is None:
            return
        assert before.delivered is not None and info.delivered is not None, "the server tells both"  # noqa: S101, PT018
        first = (await find_stream(self._link, self._address.stream)).state.first_seq
        was, now = before.delivered, info.delivered
        # What comes again counts as a delivery too, so there may be more; there are never fewer.
        skipped = (now.stream_seq - was.stream_seq) - (now.consumer_seq - was.consumer_seq)
        reader = f"consumer {self._address.consumer!r}"
        if skipped > 0 and first > was.stream_seq + 1:
            self._try_on(reader, first - skipped, first)
        else:
            self._try_on(reader, now.stream_seq + 1, first)

    def _try_on(self, reader: str, wanted: int, first: int) -> bool:
        """Return whether reading may go on; where messages are gone and that is not accepted, `fetch` raises it."""
        try:
            must_not_be_lost(self._link, self._address, reader, wanted, first)
        except MessagesLost as error:
            self._fail(error)
        return self._failed is None

    def _fail(self, error: OvernightError) -> None:
        self._failed = error
        with self._there:
            self._there.notify()

    async def _ask_for_more(self) -> None:
        if self._closed or not self._link.client.is_connected:
            return
        now = time.monotonic()
        if self._asked and now - self._asked_at > _EXPIRES_SECONDS + 1:
            # All of them have run out by now; what the server said of it was lost with the connection.
            self._asked.clear()
        coming = self._coming
        most = self._half if self._limit is None else min(self._half, self._limit - coming)
        room = self._messages_max - len(self._buffer) - coming
        if len(self._asked) > 1 or most < 1 or room < self._half or self._bytes > self._bytes_quarter:
            return
        number = next(self._numbers)
        self._asked[number], self._asked_at = _Request(most, most), now
        request = {"batch": most, "expires": int(_EXPIRES_SECONDS * _SECONDS), "max_bytes": self._bytes_asked}
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._address.stream}.{self._consumer}"
        await self._link.client.publish(subject, json.dumps(request).encode(), reply=f"{self._inbox}.{number}")

    @property
    def _coming(self) -> int:
        return sum(request.left for request in self._asked.values())

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
            self._asked[first].left -= 1
            if not self._asked[first].left:
                del self._asked[first]
        now = time.monotonic()
        if self._in_order:
            wanted = tokens[at] == self._consumer and await self._follows(sequence, delivery)
        else:
            wanted = self._hand.take(sequence, msg.reply, now)
        if not wanted:
            return
        message = Message(
            place=Place(0, sequence),
            payload=msg.data,
            event_time=event_time((msg.headers or {}).get(HEADER_EVENT_TIME), stamp / _SECONDS),
            arrived=now,
            deliveries=delivered,
            receipt=msg.reply,
        )
        if self._limit is not None:
            self._limit -= 1
        with self._there:
            self._buffer.append(message)
            self._bytes += len(message.payload)
            self._pending = pending
            if len(self._buffer) >= self._enough:
                self._there.notify()
        if self._coming <= self._messages_max // 4:
            await self._ask_for_more()

    async def _follows(self, sequence: int, delivery: int) -> bool:
        """Whether a message is the one after the last; where one was lost on its way, begin again behind the last."""
        if delivery == self._next_delivery:
            if sequence > self._position and self._address.subject is None and not await self._is_whole(sequence):
                return False
            self._next_delivery, self._position = delivery + 1, sequence + 1
            return True
        if delivery > self._next_delivery:
            await self._begin_in_order()
        return False

    async def _is_whole(self, sequence: int) -> bool:
        """Whether what is missing before a message was deleted by itself, as anybody may, and not by retention."""
        if self._failed is not None:
            return False
        first = (await find_stream(self._link, self._address.stream)).state.first_seq
        return self._try_on("the table", self._position, min(first, sequence))

    async def _take_status(self, msg: Msg) -> None:
        number = int(msg.subject.rpartition(".")[2])
        told = msg.headers or {}
        words = f"{told.get('Status', '')} {told.get('Description', '')}"
        if told.get("Status") == "100":
            return
        request = self._asked.pop(number, None)
        if _GONE in words or told.get("Status") == "503":
            await self._lost(words)
        if request is None or request.left < request.messages or told.get("Status") in _RAN_OUT:
            # One that the server refuses is asked again at the next tick.
            await self._ask_for_more()

    async def _lost(self, words: str) -> None:
        if self._in_order:
            try:
                await self._begin_in_order()
            except StreamFault as error:
                self._fail(error)
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
