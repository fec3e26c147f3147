"""NATS JetStream as a sink, and for dead letters: each input is there once.

A message is published with an id made of the input's position, again and again until the server has acknowledged it.
The server keeps the first message of an id.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import nats.errors
import orjson
from nats.aio.msg import Msg
from nats.js.api import StreamConfig, StreamInfo
from nats.js.errors import APIError, NotFoundError

from serving.errors import BrokerFault, StreamUnfit
from serving.model.contract import Contract
from tasks.stream.connections import StreamAbandoned
from tasks.stream.message import HEADER_MODEL, HEADER_SOURCE, Message, Poison, Position, build_poison_headers
from tasks.stream.nats.connection import (
    ANSWER_SECONDS,
    BACKOFF_SECONDS_MAX,
    BACKOFF_SECONDS_MIN,
    POLL_SECONDS,
    NatsConnection,
)
from tasks.stream.nats.consumer import subjects_overlap
from tasks.stream.options import FromKafka, FromNats, ToNats
from tasks.stream.score import ScoredBatch, build_answers

DEAD_LETTER_STREAM = "OVERNIGHT_DEAD"
HEADER_LEFT_OUT = "Overnight-Original"
_WINDOW_SECONDS_MIN = 120.0
_ERROR_TOO_LARGE = 10054


class NatsSink:
    """Publishes one score message for each input message.

    `origin` names the log whose positions are in the message ids. `find_known` returns ids that the stream holds, but
    that the server may not refuse any more.
    """

    def __init__(
        self,
        connection: NatsConnection,
        address: ToNats,
        origin: str,
        *,
        contract: Contract,
        keys: tuple[str, ...],
        model: str,
        find_known: Callable[[], set[str]],
    ) -> None:
        self._connection, self._address, self._origin = connection, address, origin
        self._publisher = Publisher(connection, find_known)
        self._contract, self._keys, self._headers = contract, keys, {HEADER_MODEL: model}

    def emit(self, scored: Sequence[ScoredBatch]) -> list[Poison]:
        """Publish the scores and wait until the stream has all of them; return those that are too large for it."""
        answers = [answer for each in scored for answer in build_answers(each, self._contract, self._keys)]
        outgoing = [
            OutgoingMessage(
                subject=self._address.subject,
                payload=answer.payload,
                id=format_message_id(self._origin, answer.message),
                headers=self._headers,
            )
            for answer in answers
        ]
        refused = {each.id: each for each in self._publisher.publish(outgoing)}
        return [
            Poison(
                message=answer.message,
                column="",
                reason="a score that is too large",
                detail=f"{len(each.payload):,} bytes must fit the limits of the server "
                f"({self._connection.client.max_payload:,} bytes) and of the stream",
            )
            for answer, each in zip(answers, outgoing, strict=True)
            if each.id in refused
        ]


class NatsDeadLetters:
    """Publishes poison unchanged, with the reason and its position as headers.

    `find_known` returns ids that the stream holds, though the server may not refuse them any more, and `find_emitted`
    which of some messages that were delivered before are among them.
    """

    def __init__(
        self,
        connection: NatsConnection,
        address: FromNats,
        origin: str,
        *,
        find_known: Callable[[], set[str]] = set,
        find_emitted: Callable[[Sequence[Message]], set[Position]] = lambda _: set(),
    ) -> None:
        self._connection, self._address, self._origin = connection, address, origin
        self._publisher = Publisher(connection, find_known)
        self._find_emitted = find_emitted

    def send(self, poison: Sequence[Poison]) -> None:
        """Publish poison and wait until the stream has all of it; what is too large is sent without its payload.

        Raises:
            BrokerFault: The stream does not take that either.
        """
        emitted = self._find_emitted([each.message for each in poison if each.message.deliveries > 1])
        letters = [self._build_letter(each) for each in poison if each.message.position not in emitted]
        note = {HEADER_LEFT_OUT: "too large to go along; it is where it came from"}
        refused = self._publisher.publish(letters)
        smaller = [replace(each, payload=b"", headers={**each.headers, **note}) for each in refused]
        if smaller and self._publisher.publish(smaller):
            message = (
                f"The stream of {self._address.dead_letter_subject!r} at {self._connection.url} must take dead letters "
                "of some kilobytes, but refuses them for their size. Let it take larger ones, then call again: it "
                "resumes."
            )
            raise BrokerFault(message)

    def _build_letter(self, poison: Poison) -> OutgoingMessage:
        origin = f"{self._address.stream}/{poison.message.position.number}"
        return OutgoingMessage(
            subject=self._address.dead_letter_subject,
            payload=poison.message.payload,
            id=f"dead.{format_message_id(self._origin, poison.message)}",
            headers={**build_poison_headers(poison), HEADER_SOURCE: origin},
        )


def format_message_id(origin: str, message: Message) -> str:
    """Return the id of a message's score: of its position alone, since a message may be scored in another batch."""
    return f"{origin}.{message.position.partition}.{message.position.number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutgoingMessage:
    """A message to publish; the server keeps one message of each `id`."""

    subject: str
    payload: bytes
    id: str
    headers: Mapping[str, str]

    @property
    def all_headers(self) -> dict[str, str]:
        """The headers with the id among them."""
        return {"Nats-Msg-Id": self.id, **self.headers}


class Publisher:
    """Publishes over one connection, except ids that `find_known` returns before each attempt."""

    def __init__(self, connection: NatsConnection, find_known: Callable[[], set[str]] = set) -> None:
        self._connection, self._find_known = connection, find_known
        self._inbox, self._numbers = connection.client.new_inbox(), itertools.count()
        self._sent: dict[int, tuple[_Publication, OutgoingMessage]] = {}
        connection.run(
            connection.client.subscribe(
                f"{self._inbox}.*", cb=self._on_answer, pending_msgs_limit=-1, pending_bytes_limit=-1
            )
        )

    def publish(self, outgoing: Sequence[OutgoingMessage]) -> list[OutgoingMessage]:
        """Publish messages until the server has acknowledged each, or refused it for its size.

        A stream that is full, or gone for now, is waited for.

        Returns:
            The messages that are too large.
        """
        refused: list[OutgoingMessage] = []
        pause = BACKOFF_SECONDS_MIN
        left = list(outgoing)
        while left:
            # The length of an outage is known once the server is back.
            self._connection.run(self._connection.wait_until_connected())
            if known := self._find_known():
                left = [each for each in left if each.id not in known]
            left = self._connection.run(self._publish_once(left, refused))
            if left:
                self._connection.run(self._connection.sleep(pause))
                pause = min(2 * pause, BACKOFF_SECONDS_MAX)
        return refused

    async def _publish_once(
        self, outgoing: Sequence[OutgoingMessage], refused: list[OutgoingMessage]
    ) -> list[OutgoingMessage]:
        """Publish each message once; return those to publish again."""
        if not outgoing:
            return []
        client, publication = self._connection.client, _Publication(unanswered=len(outgoing), refused=refused)
        numbers = []
        for each in outgoing:
            headers = each.all_headers
            # The library checks the payload alone. The server closes the connection if it is too large with headers.
            if len(each.payload) + count_header_bytes(headers) > client.max_payload:
                publication.settle(each, refused)
                continue
            number = next(self._numbers)
            self._sent[number] = publication, each
            numbers.append(number)
            try:
                await client.publish(each.subject, each.payload, reply=f"{self._inbox}.{number}", headers=headers)
            except (nats.errors.OutboundBufferLimitError, nats.errors.ConnectionClosedError):
                publication.settle(self._sent.pop(number)[1], publication.retry)
        await self._wait_for_answers(publication)
        return publication.retry + [self._sent.pop(number)[1] for number in numbers if number in self._sent]

    async def _wait_for_answers(self, publication: _Publication) -> None:
        until = time.monotonic() + ANSWER_SECONDS
        while not publication.answered.is_set() and time.monotonic() < until:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(publication.answered.wait(), POLL_SECONDS)
            self._connection.check()
            if self._connection.is_given_up:
                raise StreamAbandoned

    async def _on_answer(self, msg: Msg) -> None:
        """Take the answer to a publication. The library's own publish_async does not report errors."""
        number = int(msg.subject.rpartition(".")[2])
        # An answer may be late: its message was published again since.
        publication, each = self._sent.pop(number, (None, None))
        if publication is None or each is None:
            return
        error = {"description": "no stream takes it"} if msg.headers else orjson.loads(msg.data).get("error")
        if not error:
            publication.settle(each)
            return
        if error.get("err_code") == _ERROR_TOO_LARGE:
            publication.settle(each, publication.refused)
            return
        words = f"A stream must take the subject {each.subject!r}, got: {error.get('description')}."
        self._connection.warn_once("refused", f"{words} Publishing again until it does.")
        publication.settle(each, publication.retry)


@dataclass(slots=True)
class _Publication:
    """Messages that were published together, and wait for their answers."""

    unanswered: int
    refused: list[OutgoingMessage]
    retry: list[OutgoingMessage] = field(default_factory=list)
    answered: asyncio.Event = field(default_factory=asyncio.Event)

    def settle(self, each: OutgoingMessage, failed: list[OutgoingMessage] | None = None) -> None:
        """Count an answer, and add the message to the failed ones where there are any."""
        self.unanswered -= 1
        if failed is not None:
            failed.append(each)
        if not self.unanswered:
            self.answered.set()


def count_header_bytes(headers: Mapping[str, str]) -> int:
    """Return the bytes that headers take of a message's size."""
    return 12 + sum(len(name) + len(value.encode()) + 4 for name, value in headers.items())


async def ensure_sink_stream(connection: NatsConnection, address: ToNats, source: FromNats | FromKafka) -> StreamInfo:
    """Return the stream that takes the scores, and create it where it is missing and named.

    Raises:
        StreamUnfit: No stream takes the subject, or it forgets message ids too early, or it is what is read.
    """
    window = source.redelivery_seconds_max if isinstance(source, FromNats) else _WINDOW_SECONDS_MIN
    info = await _ensure_stream(connection, address.stream, address.subject, window, "sink")
    if isinstance(source, FromNats):
        _check_not_read(info, source, address.subject, "scores")
    _check_window(info, window, address.subject)
    return info


def _check_not_read(info: StreamInfo, source: FromNats, subject: str, what: str) -> None:
    """Raise StreamUnfit where a subject that is written to is one of those that are read."""
    if info.config.name == source.stream and subjects_overlap(source.subject or ">", subject):
        read = f"of which {source.subject!r} is read" if source.subject else "which is read whole"
        message = (
            f"The {what} must not go into what the stream is read from, got {subject!r}, a subject of "
            f"{source.stream!r}, {read}. Name the subject to read, or another one to write to."
        )
        raise StreamUnfit(message)


async def ensure_dead_letter_stream(connection: NatsConnection, address: FromNats) -> StreamInfo:
    """Return the stream that takes the dead letters, and create it where it is missing.

    Raises:
        StreamUnfit: No stream takes the subject, or it forgets message ids too early, or it is what is read.
    """
    name = DEAD_LETTER_STREAM if address.dead_letters is None else None
    window = address.redelivery_seconds_max
    subjects = "overnight.dead.>" if name else address.dead_letter_subject
    info = await _ensure_stream(
        connection, name, address.dead_letter_subject, window, "dead letters", subjects=subjects
    )
    _check_not_read(info, address, address.dead_letter_subject, "dead letters")
    if name == info.config.name and (info.config.duplicate_window or 0.0) < window:
        # It is shared, and may have been created for a source that needs less.
        wider = info.config.evolve(duplicate_window=window)
        # Where it can't be changed, the check below says what must hold.
        with contextlib.suppress(APIError):
            info = await connection.request(f"stream {name}", lambda: connection.js.update_stream(wider))
    _check_window(info, window, address.dead_letter_subject)
    return info


async def _ensure_stream(
    connection: NatsConnection, name: str | None, subject: str, window: float, what: str, *, subjects: str | None = None
) -> StreamInfo:
    """Return the stream that takes a subject, or create one of that name, for `subjects` or the subject."""
    try:
        found = await connection.request(f"the {what}", lambda: connection.js.find_stream_name_by_subject(subject))
    except NotFoundError:
        if name is None:
            otherwise = "name one in `stream`: it is then made" if what == "sink" else "leave out dead_letters"
            message = (
                f"A stream must take the subject {subject!r} of the {what}, but none at {connection.url} does. Make "
                f"one (nats stream add --subjects={subject} --dupe-window={window:.0f}s), or {otherwise}."
            )
            raise StreamUnfit(message) from None
        return await _create_stream(connection, name, subjects or subject, window)
    if name not in (None, found):
        message = f"The subject {subject!r} of the {what} must be one of stream {name!r}, but {found!r} takes it."
        raise StreamUnfit(message)
    return await connection.request(f"stream {found}", lambda: connection.js.stream_info(found))


async def _create_stream(connection: NatsConnection, name: str, subject: str, window: float) -> StreamInfo:
    config = StreamConfig(name=name, subjects=[subject], duplicate_window=max(window, _WINDOW_SECONDS_MIN))
    try:
        return await connection.request(f"stream {name}", lambda: connection.js.add_stream(config))
    except APIError as error:
        message = f"The stream {name!r} must be made for the subject {subject!r}, got: {error.description}."
        raise StreamUnfit(message) from error


def _check_window(info: StreamInfo, seconds: float, subject: str) -> None:
    window = info.config.duplicate_window or 0.0
    if window < seconds:
        message = (
            f"The stream {info.config.name!r} must remember the message ids of {subject!r} for at least {seconds:g} s, "
            f"as long as an input may come again (ack_wait_seconds x max_deliver), got {window:g} s. Set "
            f"--dupe-window={seconds:.0f}s (nats stream edit {info.config.name}), or lower one of the two."
        )
        raise StreamUnfit(message)
