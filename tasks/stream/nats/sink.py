"""NATS JetStream as a sink, and for dead letters: each input is there once, by an id made of the input's own place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from nats.js.api import StreamConfig, StreamInfo
from nats.js.errors import APIError, NotFoundError

from serving.errors import BrokerFault, StreamUnfit
from serving.model.contract import Contract
from tasks.stream.addresses import FromKafka, FromNats, ToNats
from tasks.stream.message import HEADER_MODEL, HEADER_SOURCE, Message, Place, Poison, poison_headers
from tasks.stream.nats.consumer import overlap
from tasks.stream.nats.link import NatsLink
from tasks.stream.nats.publish import Outgoing, Publisher
from tasks.stream.score import Scored, answers

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
