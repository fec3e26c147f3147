"""NATS JetStream as a source: messages are pulled before they are needed, within bounds."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import nats.errors
from nats.aio.msg import Msg
from nats.js.api import ConsumerInfo
from nats.js.errors import NotFoundError

from serving.errors import BrokerFault, MessagesLost, OvernightError, StreamFault
from tasks.stream.batcher import quarantine_size
from tasks.stream.message import HEADER_EVENT_TIME, Message, Position, choose_event_time
from tasks.stream.nats.connection import NatsConnection, find_stream
from tasks.stream.nats.consumer import (
    check_identity,
    check_loss,
    check_stream,
    create_ordered_consumer,
    ensure_consumer,
)
from tasks.stream.options import FromNats

_REQUEST_SECONDS = 2.0
_TICK_SECONDS = 0.2
_FLUSH_SECONDS = 5
_NANOSECONDS = 1e9
_HEADER_BYTES = 1 << 16
_CONSUMER_DELETED = "Consumer Deleted"
_STATUS_IDLE, _STATUS_NO_RESPONDERS, _STATUS_EXPIRED = "100", "503", ("404", "408")
# Old servers leave out two tokens of a reply subject.
_REPLY_TOKENS_OLD = 9


class AckTracker:
    """The messages that are delivered and not yet acknowledged or given back, by number.

    The server must hear of each within `ack_wait_seconds`; otherwise it would deliver messages again while they wait
    to be scored. This class reads no clock.
    """

    def __init__(self, ack_wait_seconds: float) -> None:
        self._interval = ack_wait_seconds / 2
        # The receipt of each message, and when the server last heard of it: the oldest first.
        self._extended: OrderedDict[int, tuple[str, float]] = OrderedDict()

    def track(self, number: int, receipt: str, now: float) -> bool:
        """Add a delivery; return False where it is a copy of a message that is tracked already."""
        is_new = number not in self._extended
        self._extended[number] = receipt, now
        self._extended.move_to_end(number)
        return is_new

    def forget(self, messages: Iterable[Message]) -> None:
        """Remove messages."""
        for message in messages:
            self._extended.pop(message.position.number, None)

    def extend_due(self, now: float) -> list[str]:
        """Return the receipts for which half of the server's time has passed, and count them as extended now."""
        due = []
        while self._extended:
            number, (receipt, extended_at) = next(iter(self._extended.items()))
            if now - extended_at < self._interval:
                break
            self.track(number, receipt, now)
            due.append(receipt)
        return due


@dataclass(slots=True)
class _PullRequest:
    """How many messages the server was asked for, and how many of them are still to come."""

    messages: int
    left: int


class NatsSource:
    """The messages of one stream.

    Every message that is delivered to a process that ends uses up a delivery, whether it was scored or not. While
    suspects are in flight, no more are requested, and few at a time after them: what ends the process takes no others
    along to the dead letters. The first request is of one message, which says whether suspects wait.

    Args:
        connection: The connection to the server.
        address: Stream, subject and consumer.
        in_flight: The most messages that are delivered and not acknowledged.
        bytes_max: The most bytes of messages that wait to be fetched.
        start: For a table: the number to read from, exactly in order, without acknowledgements. Otherwise None.
        limit: The most messages to take; None for no bound.
        identity: The identity that the stream must keep; None: not checked.
        lag_seconds: How often the server is asked how many messages wait.
        clock: Counts the seconds after which the server hears of messages that wait here.

    Raises:
        StreamUnfit: Stream, subject or consumer are not as the address says.
    """

    def __init__(
        self,
        connection: NatsConnection,
        address: FromNats,
        *,
        in_flight: int,
        bytes_max: int,
        start: int | None,
        limit: int | None = None,
        identity: str | None = None,
        lag_seconds: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connection, self._address = connection, address
        self._messages_max, self._limit = in_flight, limit
        self._request_messages_max = max(1, in_flight // 2)
        # There may be two requests at a time. The largest possible message must fit one, or it would never come.
        self._bytes_quarter = bytes_max // 4
        self._request_bytes = max(self._bytes_quarter, connection.client.max_payload + _HEADER_BYTES)
        self._buffer: deque[Message] = deque()
        self._buffer_bytes = 0
        self._messages_min = 1
        self._available = threading.Condition()
        self._requests: dict[int, _PullRequest] = {}
        self._requested_at = 0.0
        # None for no bound of its own.
        self._next_request_max: int | None = 1 if start is None else None
        self._suspects: set[int] = set()
        self._numbers = itertools.count()
        self._error: OvernightError | None = None
        self._identity = identity
        self._lag_seconds = lag_seconds
        self._clock = clock
        self._last_info: ConsumerInfo | None = None
        self._pending: int | None = None
        self._position, self._is_ordered = start or 0, start is not None
        self._tracker = AckTracker(address.ack_wait_seconds)
        self._consumer = ""
        self._is_closed = False
        self._next_delivery = 1
        self._inbox = connection.client.new_inbox()
        connection.run(self._open())

    async def _open(self) -> None:
        await check_stream(self._connection, self._address, for_table=self._is_ordered)
        if self._is_ordered:
            await self._start_ordered()
        else:
            self._consumer = await ensure_consumer(self._connection, self._address, self._messages_max)
            consumer_info = self._connection.js.consumer_info
            self._last_info = await self._connection.request(
                "its consumer", lambda: consumer_info(self._address.stream, self._consumer)
            )
        # Nothing is delivered before it is requested.
        self._subscription = await self._connection.client.subscribe(
            f"{self._inbox}.*", cb=self._on_message, pending_msgs_limit=-1, pending_bytes_limit=-1
        )
        self._tasks = [asyncio.create_task(self._keep_requesting()), asyncio.create_task(self._keep_watching())]
        for task in self._tasks:
            task.add_done_callback(self._fail_with)

    async def _start_ordered(self) -> None:
        if self._identity is not None:
            await check_identity(self._connection, self._address, self._identity)
        self._consumer = await create_ordered_consumer(self._connection, self._address, self._position)
        self._next_delivery = 1
        self._requests.clear()

    def fetch(self, messages_max: int, messages_min: int, timeout_seconds: float) -> list[Message]:
        """Return up to `messages_max` messages once `messages_min` are there, or fewer at the time-out."""
        with self._available:
            self._messages_min = messages_min
            self._available.wait_for(
                lambda: len(self._buffer) >= messages_min or self._error is not None, timeout=timeout_seconds
            )
            self._connection.check()
            if self._error is not None:
                raise self._error
            taken = [self._buffer.popleft() for _ in range(min(messages_max, len(self._buffer)))]
            self._buffer_bytes -= sum(len(message.payload) for message in taken)
        return taken

    def acknowledge(self, done: Sequence[Message], dead_lettered: Sequence[Message]) -> None:
        """Acknowledge messages that are done, and terminate dead letters. Does nothing for the source of a table."""
        if not self._is_ordered:
            self._connection.run(self._acknowledge(done, dead_lettered))

    def give_back(self, messages: Sequence[Message]) -> None:
        """Put fetched messages back in front; `close` returns them to the server."""
        with self._available:
            self._buffer.extendleft(reversed(messages))
            self._buffer_bytes += sum(len(message.payload) for message in messages)

    def lag(self) -> int | None:
        """Return how many messages wait: in the stream, as the server last said, and here."""
        return None if self._pending is None else self._pending + len(self._buffer)

    def close(self) -> None:
        """Request no more, and return unfetched messages to the server, so that other scorers get them at once."""
        self._connection.run(self._close())

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._is_closed = True
        if self._is_ordered or not self._connection.client.is_connected:
            return
        # A request that is still open would get the returned messages again.
        await self._subscription.unsubscribe()
        with contextlib.suppress(nats.errors.Error, TimeoutError):
            await self._connection.client.flush(_FLUSH_SECONDS)
        with self._available:
            left, self._buffer = list(self._buffer), deque()
        for message in left:
            await self._connection.client.publish(message.receipt, b"-NAK")

    async def _acknowledge(self, done: Sequence[Message], dead_lettered: Sequence[Message]) -> None:
        for messages, word in ((done, b"+ACK"), (dead_lettered, b"+TERM")):
            self._tracker.forget(messages)
            self._suspects.difference_update(message.position.number for message in messages)
            for message in messages:
                while True:
                    try:
                        await self._connection.client.publish(message.receipt, word)
                        break
                    except nats.errors.OutboundBufferLimitError:
                        # Messages that are not acknowledged come again; their scores are there once all the same.
                        await self._connection.wait_until_connected()
        # The last of the suspects may be done, for which requests have waited.
        if self._next_request_max is not None:
            with contextlib.suppress(nats.errors.Error):
                await self._request_more()

    async def _keep_requesting(self) -> None:
        """Request messages as soon as there is space, and extend the time of those that wait here."""
        while True:
            # An error of the connection is reported by other waits; here the next tick tries again.
            with contextlib.suppress(nats.errors.Error):
                await self._request_more()
                await self._extend_waiting()
            await asyncio.sleep(_TICK_SECONDS)

    async def _extend_waiting(self) -> None:
        if not self._is_ordered and self._connection.client.is_connected:
            for receipt in self._tracker.extend_due(self._clock()):
                await self._connection.client.publish(receipt, b"+WPI")

    async def _keep_watching(self) -> None:
        """Ask how many messages wait, since no delivery says it while a slow sink blocks them; look for lost ones."""
        while True:
            await asyncio.sleep(self._lag_seconds)
            with contextlib.suppress(nats.errors.Error, TimeoutError):
                info = await self._connection.js.consumer_info(self._address.stream, self._consumer)
                self._pending = info.num_pending
                await self._look_for_loss(info)

    async def _look_for_loss(self, info: ConsumerInfo) -> None:
        """Fail where the consumer, which several scorers may share, has skipped messages that retention deleted."""
        last, self._last_info = self._last_info, info
        if self._is_ordered or self._address.subject is not None or last is None:
            return
        assert last.delivered is not None and info.delivered is not None, "the server sends both"  # noqa: S101, PT018
        first = (await find_stream(self._connection, self._address.stream)).state.first_seq
        before, now = last.delivered, info.delivered
        # Redelivered messages count as deliveries too, so fewer may seem to be skipped than were.
        skipped = (now.stream_seq - before.stream_seq) - (now.consumer_seq - before.consumer_seq)
        reader = f"consumer {self._address.consumer!r}"
        if skipped > 0 and first > before.stream_seq + 1:
            self._check_loss(reader, first - skipped, first)
        else:
            self._check_loss(reader, now.stream_seq + 1, first)

    def _check_loss(self, reader: str, wanted: int, first: int) -> bool:
        """Return whether reading may go on. Where messages are gone and that is not accepted, `fetch` raises it."""
        try:
            check_loss(self._connection, self._address, reader, wanted, first)
        except MessagesLost as error:
            self._fail(error)
        return self._error is None

    def _fail_with(self, task: asyncio.Task[None]) -> None:
        """Have `fetch` raise what has ended a task that goes on until the source is closed."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        message = (
            f"Messages of {self._address.stream!r} must be requested until the stream is left, but that ended with "
            f"{error!r}. Call again: it resumes."
        )
        self._fail(error if isinstance(error, OvernightError) else BrokerFault(message))

    def _fail(self, error: OvernightError) -> None:
        self._error = error
        with self._available:
            self._available.notify()

    async def _request_more(self) -> None:
        if self._is_closed or not self._connection.client.is_connected:
            return
        now = time.monotonic()
        if self._requests and now - self._requested_at > _REQUEST_SECONDS + 1:
            # All requests have expired. The server's answers were lost with the connection.
            self._requests.clear()
        requested = self._count_requested()
        limit = self._limit
        count = min(self._next_request_max or self._request_messages_max, self._request_messages_max)
        count = count if limit is None else min(count, limit - requested)
        free = self._messages_max - len(self._buffer) - requested
        has_space = free >= self._request_messages_max and self._buffer_bytes <= self._bytes_quarter
        is_waiting = bool(self._suspects) or (self._next_request_max is not None and bool(self._requests))
        if is_waiting or len(self._requests) > 1 or count < 1 or not has_space:
            return
        number = next(self._numbers)
        self._requests[number], self._requested_at = _PullRequest(count, count), now
        request = {"batch": count, "expires": int(_REQUEST_SECONDS * _NANOSECONDS), "max_bytes": self._request_bytes}
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._address.stream}.{self._consumer}"
        await self._connection.client.publish(subject, json.dumps(request).encode(), reply=f"{self._inbox}.{number}")

    def _count_requested(self) -> int:
        return sum(request.left for request in self._requests.values())

    async def _on_message(self, msg: Msg) -> None:
        if msg.reply.startswith("$JS.ACK."):
            await self._take_message(msg)
        else:
            await self._take_status(msg)

    async def _take_message(self, msg: Msg) -> None:
        # Old servers begin with the consumer, new ones with the domain and the account.
        tokens = msg.reply.split(".")
        at = 3 if len(tokens) == _REPLY_TOKENS_OLD else 5
        deliveries, sequence, delivery, timestamp, pending = map(int, tokens[at + 1 : at + 6])
        oldest = next(iter(self._requests), None)
        if oldest is not None:
            self._requests[oldest].left -= 1
            if not self._requests[oldest].left:
                del self._requests[oldest]
        now = time.monotonic()
        if self._is_ordered:
            is_wanted = tokens[at] == self._consumer and await self._is_next(sequence, delivery)
        else:
            is_wanted = self._tracker.track(sequence, msg.reply, self._clock())
        if not is_wanted:
            return
        message = Message(
            position=Position(0, sequence),
            payload=msg.data,
            event_time=choose_event_time((msg.headers or {}).get(HEADER_EVENT_TIME), timestamp / _NANOSECONDS),
            arrived=now,
            deliveries=deliveries,
            receipt=msg.reply,
        )
        if not self._is_ordered:
            self._next_request_max = quarantine_size(deliveries, self._address.max_deliver)
            if self._next_request_max is not None:
                self._suspects.add(sequence)
        if self._limit is not None:
            self._limit -= 1
        with self._available:
            self._buffer.append(message)
            self._buffer_bytes += len(message.payload)
            self._pending = pending
            if len(self._buffer) >= self._messages_min:
                self._available.notify()
        if self._count_requested() <= self._messages_max // 4:
            await self._request_more()

    async def _is_next(self, sequence: int, delivery: int) -> bool:
        """Return whether a message follows the last one. Where a delivery was lost, start again after the last one."""
        if delivery == self._next_delivery:
            has_gap = sequence > self._position and self._address.subject is None
            if has_gap and not await self._is_gap_allowed(sequence):
                return False
            self._next_delivery, self._position = delivery + 1, sequence + 1
            return True
        if delivery > self._next_delivery:
            await self._start_ordered()
        return False

    async def _is_gap_allowed(self, sequence: int) -> bool:
        """Return whether the numbers missing before a message were deleted one by one, and not by retention."""
        if self._error is not None:
            return False
        first = (await find_stream(self._connection, self._address.stream)).state.first_seq
        return self._check_loss("the table", self._position, min(first, sequence))

    async def _take_status(self, msg: Msg) -> None:
        number = int(msg.subject.rpartition(".")[2])
        headers = msg.headers or {}
        status = headers.get("Status", "")
        description = f"{status} {headers.get('Description', '')}"
        if status == _STATUS_IDLE:
            return
        request = self._requests.pop(number, None)
        if _CONSUMER_DELETED in description or status == _STATUS_NO_RESPONDERS:
            await self._recover_consumer(description)
        if request is None or request.left < request.messages or status in _STATUS_EXPIRED:
            # A request that the server refuses is made again at the next tick.
            await self._request_more()

    async def _recover_consumer(self, description: str) -> None:
        if self._is_ordered:
            try:
                await self._start_ordered()
            except StreamFault as error:
                self._fail(error)
            return
        try:
            await self._connection.js.consumer_info(self._address.stream, self._address.consumer)
        except NotFoundError:
            message = (
                f"The consumer {self._address.consumer!r} of {self._address.stream!r} must stay, but was deleted "
                f"({description.strip()}). Call again: a new one begins with the stream's first message."
            )
            self._fail(BrokerFault(message))
        except nats.errors.Error:
            return
