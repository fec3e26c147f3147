"""The consumer of NATS JetStream that a stream is read by, and checks of the stream before and while it is read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from nats.js.api import AckPolicy, ConsumerConfig, ConsumerInfo, DeliverPolicy, RetentionPolicy
from nats.js.errors import APIError, NotFoundError

from serving.errors import MessagesLost, StreamReplaced, StreamUnfit
from tasks.stream.nats.connection import NatsConnection, find_stream
from tasks.stream.options import FromNats

# For the server. The scorers themselves count deliveries up to `max_deliver` of the source.
_UNLIMITED = -1
_COMPARED_SETTINGS = (
    *("ack_policy", "ack_wait", "max_deliver", "max_ack_pending", "filter_subject", "filter_subjects"),
    *("deliver_policy", "deliver_subject"),
)


async def ensure_consumer(connection: NatsConnection, address: FromNats, in_flight: int) -> str:
    """Return the name of the durable consumer, and create it where it is missing.

    The server delivers without limit: it counts deliveries to a slow scorer too, and a message that it gives up would
    neither be scored nor become a dead letter. The scorer that gets the last delivery makes it a dead letter.

    Raises:
        StreamUnfit: A consumer of this name has other settings.
        MessagesLost: Messages that it has not read are gone.
    """
    wanted = ConsumerConfig(
        durable_name=address.consumer,
        ack_policy=AckPolicy.EXPLICIT,
        deliver_policy=DeliverPolicy.ALL,
        ack_wait=address.ack_wait_seconds,
        max_deliver=_UNLIMITED,
        max_ack_pending=in_flight,
        filter_subject=address.subject,
    )
    stream, name = address.stream, address.consumer
    try:
        found = await connection.request(f"consumer {name}", lambda: connection.js.consumer_info(stream, name))
        is_limited = (found.config.max_deliver or 0) > 0
        expected = wanted.evolve(max_deliver=address.max_deliver) if is_limited else wanted
        _check_settings(found.config, expected, stream, name)
        if is_limited:
            await _remove_delivery_limit(connection, address, found)
        if found.ack_floor is not None:
            first = (await find_stream(connection, stream)).state.first_seq
            check_loss(connection, address, f"consumer {name!r}", found.ack_floor.stream_seq + 1, first)
    except NotFoundError:
        await _create_consumer(connection, address, wanted)
    return name


async def create_ordered_consumer(connection: NatsConnection, address: FromNats, start: int) -> str:
    """Create a consumer for this process alone, which begins at a number of the stream; return its name."""
    wanted = ConsumerConfig(
        ack_policy=AckPolicy.NONE,
        deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
        opt_start_seq=max(1, start),
        filter_subject=address.subject,
        inactive_threshold=300.0,
        mem_storage=True,
        num_replicas=1,
    )
    return (await _create_consumer(connection, address, wanted)).name


async def _create_consumer(connection: NatsConnection, address: FromNats, wanted: ConsumerConfig) -> ConsumerInfo:
    try:
        return await connection.request("a consumer", lambda: connection.js.add_consumer(address.stream, config=wanted))
    except APIError as error:
        message = (
            f"The stream {address.stream!r} must take a consumer of subject {address.subject or 'any'!r}, got: "
            f"{error.description}. Name a subject of the stream, or none."
        )
        raise StreamUnfit(message) from error


async def _remove_delivery_limit(connection: NatsConnection, address: FromNats, found: ConsumerInfo) -> None:
    """Lift the limit that a consumer of an earlier version has, and warn of messages that the server has given up."""
    await _create_consumer(connection, address, found.config.evolve(max_deliver=_UNLIMITED))
    given_up = (found.num_redelivered or 0) - (found.num_ack_pending or 0)
    if given_up > 0:
        last = found.delivered.stream_seq if found.delivered is not None else 0
        connection.warn_once(
            "given up",
            f"Every message must be scored or a dead letter, but at least {given_up:,} messages between 1 and {last:,} "
            f"were given up by the server, since an earlier version of Overnight made consumer {address.consumer!r} of "
            f"{address.stream!r} with max_deliver. Look for the numbers that no message id of the scores and the dead "
            "letters ends with. From now on none is given up.",
        )


def _check_settings(found: ConsumerConfig, wanted: ConsumerConfig, stream: str, name: str) -> None:
    """Raise StreamUnfit where an existing consumer has other settings than a new one would have."""
    differences = [
        f"{field} is {_format_setting(getattr(found, field))}, not {_format_setting(getattr(wanted, field))}"
        for field in _COMPARED_SETTINGS
        if (getattr(found, field) or None) != (getattr(wanted, field) or None)
    ]
    if differences:
        message = (
            f"The consumer {name!r} of stream {stream!r} must have the settings of this call, but "
            f"{'; '.join(differences)}. Use those settings, another consumer name, or delete it: the stream is then "
            "read from its beginning."
        )
        raise StreamUnfit(message)


def _format_setting(value: Any) -> str:
    return str(getattr(value, "value", value))


async def check_stream(connection: NatsConnection, address: FromNats, *, for_table: bool) -> None:
    """Raise StreamUnfit where the stream is missing, has no such subject, or can't be read again for a table."""
    info = await find_stream(connection, address.stream)
    _check_subject(info.config.subjects or [], address)
    if for_table and info.config.retention == RetentionPolicy.WORK_QUEUE:
        message = (
            f"The stream {address.stream!r} must keep its messages for a table of parts, which resumes from its last "
            "part; it deletes what is acknowledged (retention workqueue). Use retention limits, or a sink of messages."
        )
        raise StreamUnfit(message)


def _check_subject(subjects: Sequence[str], address: FromNats) -> None:
    """Raise StreamUnfit where no message of the stream can have the subject: the server would wait for one in vain."""
    if address.subject is None or not subjects:
        return
    if not any(subjects_overlap(address.subject, each) for each in subjects):
        message = (
            f"The subject {address.subject!r} must be one of stream {address.stream!r}, which takes "
            f"{', '.join(map(repr, subjects))}. Name one of them, or none."
        )
        raise StreamUnfit(message)


def subjects_overlap(first: str, second: str) -> bool:
    """Return whether a subject can match both patterns, where * is one token and > is all tokens that follow."""
    for left, right in itertools.zip_longest(first.split("."), second.split(".")):
        if left is None or right is None:
            return False
        if ">" in (left, right):
            return True
        if left != right and "*" not in (left, right):
            return False
    return True


def check_loss(connection: NatsConnection, address: FromNats, reader: str, wanted: int, first: int) -> None:
    """Raise MessagesLost where the next message is gone from the stream, or warn where the address accepts that.

    Args:
        connection: Used to warn.
        address: The stream, and whether loss is accepted.
        reader: Who reads the stream, for the message.
        wanted: The number of the next message.
        first: The first number that the stream has.
    """
    if first <= max(wanted, 1):
        return
    # Nobody knows how many of them had the subject.
    at_most = "at most " if address.subject is not None else ""
    words = (
        f"Every message of stream {address.stream!r} must be there until {reader} has read it, but {at_most}"
        f"{first - max(wanted, 1):,} messages are gone, by retention or by hand: from "
        f"{max(wanted, 1):,} to {first - 1:,}."
    )
    if not address.accept_loss:
        message = f"{words} Set accept_loss of the source to go on behind them, and keep messages for longer."
        raise MessagesLost(message)
    connection.warn_once("loss", f"{words} Going on behind them, since accept_loss is set.")


async def check_position(connection: NatsConnection, address: FromNats, reader: str, wanted: int) -> None:
    """Check that the stream has the next message of a reader, or ends just before it.

    Raises:
        MessagesLost: The next message is gone.
        StreamReplaced: The stream ends earlier.
    """
    state = (await find_stream(connection, address.stream)).state
    if wanted > state.last_seq + 1:
        message = (
            f"The stream {address.stream!r} must reach to {wanted - 1:,}, up to where {reader} has read it, but ends "
            f"at {state.last_seq:,}: it was put back to an earlier state. Read it with another name of the table."
        )
        raise StreamReplaced(message)
    check_loss(connection, address, reader, wanted, state.first_seq)


async def find_identity(connection: NatsConnection, address: FromNats) -> str:
    """Return the stream's name and creation time: a stream that is made again counts its messages from 1."""
    info = await find_stream(connection, address.stream)
    return f"{address.stream}@{info.created:%Y%m%dT%H%M%S%f}" if info.created else address.stream


async def check_identity(connection: NatsConnection, address: FromNats, identity: str) -> None:
    """Raise StreamReplaced where the stream was made again."""
    try:
        found = await find_identity(connection, address)
    except StreamUnfit:
        found = "not yet"
    if found != identity:
        message = (
            f"The stream {address.stream!r} must stay the one that was opened ({identity}), but was deleted and made "
            f"again ({found}). Read the new one with another name of the table."
        )
        raise StreamReplaced(message)
