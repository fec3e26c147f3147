"""NATS JetStream as a sink, and for dead letters: each input is there once, by an id made of the input's own place."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import nats.errors
import orjson
from nats.aio.msg import Msg
from nats.js.api import StreamConfig, StreamInfo
from nats.js.errors import APIError, NotFoundError

from serving.errors import BrokerFault, StreamUnfit
from serving.model.contract import Contract
from tasks.stream.connections import Abandoned
from tasks.stream.message import HEADER_MODEL, HEADER_SOURCE, Message, Place, Poison, poison_headers
from tasks.stream.nats.connection import (
    ANSWER_SECONDS,
    BACKOFF_SECONDS_MAX,
    BACKOFF_SECONDS_MIN,
    LOOK_SECONDS,
    NatsLink,
)
from tasks.stream.nats.consumer import overlap
from tasks.stream.options import FromKafka, FromNats, ToNats
from tasks.stream.score import Scored, answers

_TOO_LARGE = 10054


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """A message to publish: whatever is published twice with one `id` is kept once."""

    subject: str
    payload: bytes
    id: str
    headers: Mapping[str, str]

    @property
    def all_headers(self) -> dict[str, str]:
        """The headers as they go out, with the id among them."""
        return {"Nats-Msg-Id": self.id, **self.headers}


class Publisher:
    """Publishes over one connection, except ids that are `known` to be in the stream when it is asked before a try."""

    def __init__(self, link: NatsLink, known: Callable[[], set[str]] = set) -> None:
        self._link, self._known = link, known
        self._inbox, self._numbers = link.client.new_inbox(), itertools.count()
        self._sent: dict[int, tuple[_Flight, Outgoing]] = {}
        link.run(self._listen())

    async def _listen(self) -> None:
        await self._link.client.subscribe(
            f"{self._inbox}.*", cb=self._answer, pending_msgs_limit=-1, pending_bytes_limit=-1
        )

    def publish(self, outgoing: Sequence[Outgoing]) -> list[Outgoing]:
        """Publish messages and wait until the server has acknowledged each, however often it goes meanwhile.

        Returns those that it refuses for their size. A stream that is full, or gone for now, is waited for.
        """
        refused: list[Outgoing] = []
        pause = BACKOFF_SECONDS_MIN
        left = list(outgoing)
        while left:
            # Whether the server was away for long is known once it is back.
            self._link.run(self._link.connected())
            if known := self._known():
                left = [each for each in left if each.id not in known]
            left = self._link.run(self._publish_once(left, refused))
            if left:
                self._link.run(self._link.sleep(pause))
                pause = min(2 * pause, BACKOFF_SECONDS_MAX)
        return refused

    async def _publish_once(self, outgoing: Sequence[Outgoing], refused: list[Outgoing]) -> list[Outgoing]:
        """Publish each once; return those that are to be published again."""
        if not outgoing:
            return []
        client, flight = self._link.client, _Flight(messages=len(outgoing), refused=refused)
        numbers = []
        for each in outgoing:
            headers = each.all_headers
            # The library looks at the payload alone, and the server hangs up on what is too large with its headers.
            if len(each.payload) + headers_size(headers) > client.max_payload:
                flight.settle(each, refused)
                continue
            number = next(self._numbers)
            self._sent[number] = flight, each
            numbers.append(number)
            try:
                await client.publish(each.subject, each.payload, reply=f"{self._inbox}.{number}", headers=headers)
            except (nats.errors.OutboundBufferLimitError, nats.errors.ConnectionClosedError):
                flight.settle(self._sent.pop(number)[1], flight.again)
        await self._answered(flight)
        return flight.again + [self._sent.pop(number)[1] for number in numbers if number in self._sent]

    async def _answered(self, flight: _Flight) -> None:
        until = time.monotonic() + ANSWER_SECONDS
        while not flight.over.is_set() and time.monotonic() < until:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(flight.over.wait(), LOOK_SECONDS)
            self._link.check()
            if self._link.given_up:
                raise Abandoned

    async def _answer(self, msg: Msg) -> None:
        """Take the answer to a publish. The library's own publish_async never tells of one that is an error."""
        number = int(msg.subject.rpartition(".")[2])
        # One that comes after its message was published again is no news.
        flight, each = self._sent.pop(number, (None, None))
        if flight is None or each is None:
            return
        error = {"description": "no stream takes it"} if msg.headers else orjson.loads(msg.data).get("error")
        if not error:
            flight.settle(each)
            return
        if error.get("err_code") == _TOO_LARGE:
            flight.settle(each, flight.refused)
            return
        words = f"A stream must take the subject {each.subject!r}, got: {error.get('description')}."
        self._link.say("refused", f"{words} Publishing again until it does.")
        flight.settle(each, flight.again)


@dataclass(slots=True)
class _Flight:
    """Messages that were published together and wait for their answers."""

    messages: int
    refused: list[Outgoing]
    again: list[Outgoing] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def settle(self, each: Outgoing, among: list[Outgoing] | None = None) -> None:
        """Take note of an answer."""
        self.messages -= 1
        if among is not None:
            among.append(each)
        if not self.messages:
            self.over.set()


def headers_size(headers: Mapping[str, str]) -> int:
    """Return the bytes that headers take of a message's size."""
    return 12 + sum(len(name) + len(value.encode()) + 4 for name, value in headers.items())


DEAD_STREAM = "OVERNIGHT_DEAD"
HEADER_LEFT_OUT = "Overnight-Original"
_WINDOW_SECONDS_MIN = 120.0


class NatsSink:
    """Publishes one score message for each message; `origin` names the log that message ids count in.

    `known` tells the ids that the stream holds, though it may not know them any more.
    """

    def __init__(
        self,
        link: NatsLink,
        address: ToNats,
        origin: str,
        *,
        contract: Contract,
        keys: tuple[str, ...],
        model: str,
        known: Callable[[], set[str]],
    ) -> None:
        self._link, self._address, self._origin = link, address, origin
        self._publisher = Publisher(link, known)
        self._contract, self._keys, self._headers = contract, keys, {HEADER_MODEL: model}

    def emit(self, scored: Sequence[Scored]) -> list[Poison]:
        """Publish the scores and wait until the stream has taken each; return those that are too large for it."""
        found = [answer for each in scored for answer in answers(each, self._contract, self._keys)]
        outgoing = [
            Outgoing(
                subject=self._address.subject,
                payload=answer.payload,
                id=message_id(self._origin, answer.message),
                headers=self._headers,
            )
            for answer in found
        ]
        refused = {each.id: each for each in self._publisher.publish(outgoing)}
        return [
            Poison(
                message=answer.message,
                column="",
                reason="a score that is too large",
                detail=f"{len(each.payload):,} bytes must fit the limits of the server "
                f"({self._link.client.max_payload:,} bytes) and of the stream",
            )
            for answer, each in zip(found, outgoing, strict=True)
            if each.id in refused
        ]


class NatsDeadLetters:
    """Publishes poison as it came, with its reason and where it stood as headers.

    `known` tells the ids that the stream holds, though it may not know them any more, and `already` which of messages
    that have come before are among them.
    """

    def __init__(
        self,
        link: NatsLink,
        address: FromNats,
        origin: str,
        *,
        known: Callable[[], set[str]] = set,
        already: Callable[[Sequence[Message]], set[Place]] = lambda _: set(),
    ) -> None:
        self._link, self._address, self._origin = link, address, origin
        self._publisher = Publisher(link, known)
        self._already = already

    def bury(self, poison: Sequence[Poison]) -> None:
        """Publish poison and wait until the stream has taken each; one that is too large goes without its original.

        Raises BrokerFault where the stream does not take that either.
        """
        there = self._already([each.message for each in poison if each.message.deliveries > 1])
        refused = self._publisher.publish([self._letter(each) for each in poison if each.message.place not in there])
        if refused and self._publisher.publish([_without_original(each) for each in refused]):
            message = (
                f"The stream of {self._address.dead_subject!r} at {self._link.url} must take dead letters of some "
                "kilobytes, but refuses them for their size. Let it take larger ones, then call again: it resumes."
            )
            raise BrokerFault(message)

    def _letter(self, poison: Poison) -> Outgoing:
        place = f"{self._address.stream}/{poison.message.place.number}"
        return Outgoing(
            subject=self._address.dead_subject,
            payload=poison.message.payload,
            id=f"dead.{message_id(self._origin, poison.message)}",
            headers={**poison_headers(poison), HEADER_SOURCE: place},
        )


def _without_original(letter: Outgoing) -> Outgoing:
    headers = {**letter.headers, HEADER_LEFT_OUT: "too large to go along; it is where it came from"}
    return Outgoing(subject=letter.subject, payload=b"", id=letter.id, headers=headers)


def message_id(origin: str, message: Message) -> str:
    """Return the id of what goes out for a message: of the input's place alone, since a redelivered batch regroups."""
    return f"{origin}.{message.place.partition}.{message.place.number}"


async def open_sink(link: NatsLink, address: ToNats, source: FromNats | FromKafka) -> StreamInfo:
    """Return the stream that takes the subject and remembers ids for long enough; raises StreamUnfit."""
    window = source.worst_redelivery_seconds if isinstance(source, FromNats) else _WINDOW_SECONDS_MIN
    info = await _stream_of(link, address.stream, address.subject, window, "sink")
    _must_remember(info, window, address.subject)
    if (
        isinstance(source, FromNats)
        and info.config.name == source.stream
        and overlap(source.subject or ">", address.subject)
    ):
        message = (
            f"The scores must not go into what the stream is read from, got {address.subject!r}, a subject of "
            f"{source.stream!r}, which is read whole. Name the subject to read, or another one to write to."
        )
        raise StreamUnfit(message)
    return info


async def open_dead_letters(link: NatsLink, address: FromNats) -> StreamInfo:
    """Return the stream that takes the dead letters and remembers ids for long enough; raises StreamUnfit."""
    made = DEAD_STREAM if address.dead_letters is None else None
    window = address.worst_redelivery_seconds
    info = await _stream_of(link, made, address.dead_subject, window, "dead letters", taking="overnight.dead.>")
    if made == info.config.name and (info.config.duplicate_window or 0.0) < window:
        # It is shared: whoever made it first may have needed less.
        wider = info.config.evolve(duplicate_window=window)
        # Where it may not, it is told below what must hold.
        with contextlib.suppress(APIError):
            info = await link.ask(f"stream {made}", lambda: link.js.update_stream(wider))
    _must_remember(info, window, address.dead_subject)
    return info


async def _stream_of(
    link: NatsLink, name: str | None, subject: str, window: float, what: str, *, taking: str | None = None
) -> StreamInfo:
    """Return the stream that takes a subject; make it where it has a name and none does."""
    try:
        found = await link.ask(f"the {what}", lambda: link.js.find_stream_name_by_subject(subject))
    except NotFoundError:
        if name is None:
            message = (
                f"A stream must take the subject {subject!r} of the {what}, but none at {link.url} does. Make one "
                f"(nats stream add --subjects={subject} --dupe-window={window:.0f}s), or name one in `stream`: it is "
                "then made."
            )
            raise StreamUnfit(message) from None
        return await _make(link, name, taking or subject, window)
    if name not in (None, found):
        message = f"The subject {subject!r} of the {what} must be one of stream {name!r}, but {found!r} takes it."
        raise StreamUnfit(message)
    return await link.ask(f"stream {found}", lambda: link.js.stream_info(found))


async def _make(link: NatsLink, name: str, subject: str, window: float) -> StreamInfo:
    config = StreamConfig(name=name, subjects=[subject], duplicate_window=max(window, _WINDOW_SECONDS_MIN))
    try:
        return await link.ask(f"stream {name}", lambda: link.js.add_stream(config))
    except APIError as error:
        message = f"The stream {name!r} must be made for the subject {subject!r}, got: {error.description}."
        raise StreamUnfit(message) from error


def _must_remember(info: StreamInfo, seconds: float, subject: str) -> None:
    window = info.config.duplicate_window or 0.0
    if window < seconds:
        message = (
            f"The stream {info.config.name!r} must remember the message ids of {subject!r} for at least {seconds:g} s, "
            f"as long as an input may come again (ack_wait_seconds x max_deliver), got {window:g} s. Set "
            f"--dupe-window={seconds:.0f}s (nats stream edit {info.config.name}), or lower one of the two."
        )
        raise StreamUnfit(message)
