"""The consumer of NATS JetStream that a stream is read by: its settings, and whether one that is there has them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from nats.js.api import AckPolicy, ConsumerConfig, ConsumerInfo, DeliverPolicy, RetentionPolicy
from nats.js.errors import APIError, NotFoundError

from serving.errors import MessagesLost, StreamReplaced, StreamUnfit
from tasks.stream.nats.connection import NatsLink, find_stream
from tasks.stream.options import FromNats

# For the server; what max_deliver of a source says is counted by the scorers.
_WITHOUT_END = -1


async def check_stream(link: NatsLink, address: FromNats, *, in_order: bool) -> None:
    """Raise StreamUnfit where the stream is missing, has no such subject, or can't be read again for a table."""
    info = await find_stream(link, address.stream)
    _must_have(info.config.subjects or [], address)
    if in_order and info.config.retention == RetentionPolicy.WORK_QUEUE:
        message = (
            f"The stream {address.stream!r} must keep its messages for a table of parts, which resumes from its last "
            "part; it deletes what is acknowledged (retention workqueue). Use retention limits, or a sink of messages."
        )
        raise StreamUnfit(message)


def must_not_be_lost(link: NatsLink, address: FromNats, reader: str, wanted: int, first: int) -> None:
    """Raise MessagesLost where a stream has lost the message that is wanted next; say so where that is accepted."""
    if first <= max(wanted, 1):
        return
    # How many of them had the subject nobody knows any more.
    most = "at most " if address.subject is not None else ""
    words = (
        f"Every message of stream {address.stream!r} must be there until {reader} has read it, but {most}"
        f"{first - max(wanted, 1):,} messages are gone, by retention or by hand: from "
        f"{max(wanted, 1):,} to {first - 1:,}."
    )
    if not address.accept_loss:
        message = f"{words} Set accept_loss of the source to go on behind them, and keep messages for longer."
        raise MessagesLost(message)
    link.say("loss", f"{words} Going on behind them, since accept_loss is set.")


async def check_reach(link: NatsLink, address: FromNats, reader: str, wanted: int) -> None:
    """Raise MessagesLost where the message that is wanted next is gone, StreamReplaced where the stream ends before."""
    state = (await find_stream(link, address.stream)).state
    if wanted > state.last_seq + 1:
        message = (
            f"The stream {address.stream!r} must reach to {wanted - 1:,}, up to where {reader} has read it, but ends "
            f"at {state.last_seq:,}: it was put back to an earlier state. Read it with another name of the table."
        )
        raise StreamReplaced(message)
    must_not_be_lost(link, address, reader, wanted, state.first_seq)


async def check_identity(link: NatsLink, address: FromNats, identity: str) -> None:
    """Raise StreamReplaced where the stream is another one of its name."""
    try:
        found = await find_identity(link, address)
    except StreamUnfit:
        found = "not yet"
    if found != identity:
        message = (
            f"The stream {address.stream!r} must stay the one that was opened ({identity}), but was deleted and made "
            f"again ({found}). Read the new one with another name of the table."
        )
        raise StreamReplaced(message)


async def find_durable(link: NatsLink, address: FromNats, in_flight: int) -> str:
    """Return the name of the durable consumer, made where it is missing; raises StreamUnfit where it is another.

    The server never gives a message up: it counts what waits in a slow scorer too, and what it has given up is neither
    scored nor a dead letter. The scorer that a message comes to for the last time sees to it.
    """
    wanted = ConsumerConfig(
        durable_name=address.consumer,
        ack_policy=AckPolicy.EXPLICIT,
        deliver_policy=DeliverPolicy.ALL,
        ack_wait=address.ack_wait_seconds,
        max_deliver=_WITHOUT_END,
        max_ack_pending=in_flight,
        filter_subject=address.subject,
    )
    stream, name = address.stream, address.consumer
    try:
        found = await link.ask(f"consumer {name}", lambda: link.js.consumer_info(stream, name))
        earlier = wanted.evolve(max_deliver=address.max_deliver)
        alike = earlier if (found.config.max_deliver or 0) > 0 else wanted
        _must_be_alike(found.config, alike, stream, name)
        if alike is earlier:
            await _give_nothing_up(link, address, found)
        if found.ack_floor is not None:
            first = (await find_stream(link, stream)).state.first_seq
            must_not_be_lost(link, address, f"consumer {name!r}", found.ack_floor.stream_seq + 1, first)
    except NotFoundError:
        await _add(link, address, wanted)
    return name


async def _give_nothing_up(link: NatsLink, address: FromNats, found: ConsumerInfo) -> None:
    """Have the server deliver without end what a consumer of an earlier version may hold; say what it has given up."""
    await _add(link, address, found.config.evolve(max_deliver=_WITHOUT_END))
    given_up = (found.num_redelivered or 0) - (found.num_ack_pending or 0)
    if given_up > 0:
        last = found.delivered.stream_seq if found.delivered is not None else 0
        link.say(
            "given up",
            f"Every message must be scored or a dead letter, but at least {given_up:,} messages between 1 and {last:,} "
            f"were given up by the server, since an earlier version of Overnight made consumer {address.consumer!r} of "
            f"{address.stream!r} with max_deliver. Look for the numbers that no message id of the scores and the dead "
            "letters ends with. From now on none is given up.",
        )


async def make_in_order(link: NatsLink, address: FromNats, start: int) -> str:
    """Make a consumer of this process alone, which begins at a number of the stream; return its name."""
    wanted = ConsumerConfig(
        ack_policy=AckPolicy.NONE,
        deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
        opt_start_seq=max(1, start),
        filter_subject=address.subject,
        inactive_threshold=300.0,
        mem_storage=True,
        num_replicas=1,
    )
    return (await _add(link, address, wanted)).name


async def _add(link: NatsLink, address: FromNats, wanted: ConsumerConfig) -> ConsumerInfo:
    try:
        return await link.ask("a consumer", lambda: link.js.add_consumer(address.stream, config=wanted))
    except APIError as error:
        message = (
            f"The stream {address.stream!r} must take a consumer of subject {address.subject or 'any'!r}, got: "
            f"{error.description}. Name a subject of the stream, or none."
        )
        raise StreamUnfit(message) from error


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
