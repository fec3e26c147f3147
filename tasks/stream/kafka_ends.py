"""Kafka as source, sink and for dead letters: offsets are committed once the scores are produced, so at least once."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka import Message as KafkaMessage

from serving.contract import Contract
from serving.errors import BadInput, BrokerDenied, BrokerFault, StreamUnfit
from tasks.stream.addresses import FromKafka, ToKafka
from tasks.stream.ends import Abandoned
from tasks.stream.message import (
    HEADER_COLUMN,
    HEADER_EVENT_TIME,
    HEADER_MODEL,
    HEADER_REASON,
    HEADER_SOURCE,
    Message,
    Place,
    Poison,
)
from tasks.stream.score import Scored, answers

CONFIG = "OVERNIGHT_KAFKA_CONFIG"

_LOOK_SECONDS = 0.2
_ASK_SECONDS = 5.0
_SAY_SECONDS = 30.0
_BACKOFF_SECONDS_MAX = 15.0
_TOPICS_SHOWN = 20
_DENIED = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.SASL_AUTHENTICATION_FAILED,
    KafkaError._AUTHENTICATION,  # noqa: SLF001 - the library's name for what it found itself
}
# The group has moved on: whoever has the partitions now takes what is not committed.
_MOVED = {
    KafkaError.REBALANCE_IN_PROGRESS,
    KafkaError.ILLEGAL_GENERATION,
    KafkaError.UNKNOWN_MEMBER_ID,
    KafkaError._STATE,  # noqa: SLF001
    KafkaError._NO_OFFSET,  # noqa: SLF001
    KafkaError._ASSIGNMENT_LOST,  # noqa: SLF001
}


@dataclass(slots=True)
class KafkaVoice:
    """Says once in half a minute what may go on for long, and keeps what ends the stream."""

    servers: str
    say: Callable[[str], None]
    give_up: threading.Event
    _said: dict[str, float] = field(default_factory=dict)
    _denied: str | None = None

    def on_error(self, error: KafkaError) -> None:
        """Take note of what the library says by itself."""
        if error.code() in _DENIED:
            self._denied = error.str()
        else:
            self.once(error.name(), f"Kafka at {self.servers} must answer, got: {error.str()}. Waiting for it.")

    def once(self, what: str, words: str) -> None:
        """Say something, unless it was said in the last half minute."""
        now = time.monotonic()
        if now - self._said.get(what, -_SAY_SECONDS) >= _SAY_SECONDS:
            self._said[what] = now
            self.say(words)

    def look(self) -> None:
        """Raise BrokerDenied where the broker does not let this user in, Abandoned where waiting is given up."""
        if self._denied is not None:
            message = (
                f"Kafka at {self.servers} must allow this user what the stream needs, got: {self._denied}. Mend the "
                f"permissions, or the credentials in the file that {CONFIG} names, then call again: it resumes."
            )
            raise BrokerDenied(message)
        if self.give_up.is_set():
            raise Abandoned

    def faulty(self, error: KafkaError) -> None:
        """Take an error of a message or a request: raise where it is for good, say it where it may pass."""
        self.on_error(error)
        self.look()
        if error.fatal():
            message = f"Kafka at {self.servers} refuses for good: {error.str()}. Call again: it resumes."
            raise BrokerFault(message)


def kafka_settings(servers: str, voice: KafkaVoice) -> dict[str, Any]:
    """Return the client's settings, those of the file that the environment names among them; raises BadInput."""
    path = os.environ.get(CONFIG)
    settings: dict[str, Any] = {}
    if path:
        try:
            lines = Path(path).read_text().splitlines()
        except OSError as error:
            message = f"{CONFIG} must name a file of NAME=VALUE lines that can be read, got {path}: {error.strerror}."
            raise BadInput(message) from error
        pairs = [line.split("=", 1) for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if any(len(pair) < 2 for pair in pairs):  # noqa: PLR2004 - a name and a value
            message = f"Each line of {path} must be NAME=VALUE, got one without =. Mend it."
            raise BadInput(message)
        settings = {name.strip(): value.strip() for name, value in pairs}
    # The library writes to stderr by itself otherwise.
    return {**settings, "bootstrap.servers": servers, "error_cb": voice.on_error, "log_level": 0}


def find_topic(client: Consumer | Producer, topic: str, voice: KafkaVoice) -> Any:
    """Return what the broker says of a topic, waiting for the broker; raises StreamUnfit and names those there are."""
    pause = _LOOK_SECONDS
    while True:
        try:
            found = client.list_topics(timeout=_ASK_SECONDS)
            break
        except KafkaException as error:
            voice.faulty(error.args[0])
        for _ in range(round(pause / _LOOK_SECONDS)):
            voice.look()
            time.sleep(_LOOK_SECONDS)
        pause = min(2 * pause, _BACKOFF_SECONDS_MAX)
    if topic not in found.topics:
        known = ", ".join(sorted(found.topics)[:_TOPICS_SHOWN]) or "none"
        message = (
            f"The topic {topic!r} must exist at {voice.servers}, which has {known}. Name one of them, or make it first."
        )
        raise StreamUnfit(message)
    return found


class KafkaSource:
    """Messages of one topic, as a member of a group; `start` reads every partition from an offset on instead.

    Raises StreamUnfit where there is no such topic.
    """

    def __init__(self, address: FromKafka, voice: KafkaVoice, *, in_flight_mb: int) -> None:
        self._address, self._voice = address, voice
        self._consumer = Consumer(
            {
                **kafka_settings(address.servers, voice),
                "group.id": address.group,
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "earliest",
                "allow.auto.create.topics": False,
                "partition.assignment.strategy": "cooperative-sticky",
                # One that is killed is missed by its heartbeats; one whose sink is slow has not left.
                "max.poll.interval.ms": 86_400_000,
                "queued.max.messages.kbytes": in_flight_mb << 10,
            }
        )
        self._closed = False
        self._early: list[KafkaMessage] = []
        found = find_topic(self._consumer, address.topic, voice)
        self._partitions = sorted(found.topics[address.topic].partitions)
        self.identity = f"kafka {found.cluster_id or address.servers} {address.topic}"

    def begin(self, start: Mapping[int, int] | None = None) -> None:
        """Join the group, or read every partition from where `start` says."""
        if start is None:
            self._join()
            return
        self._consumer.assign(
            [TopicPartition(self._address.topic, each, start.get(each, 0)) for each in self._partitions]
        )

    def _join(self) -> None:
        """Join the group and wait to be given partitions: until then nothing that is there can come."""
        joined = threading.Event()
        self._consumer.subscribe([self._address.topic], on_assign=lambda *_: joined.set())
        while not joined.is_set():
            self._voice.look()
            self._early += self._consumer.consume(1, _LOOK_SECONDS)

    def fetch(self, most: int, enough: int, seconds: float) -> list[Message]:
        """Return up to `most` messages as soon as `enough` are there, or what there is after `seconds`."""
        self._voice.look()
        got, self._early = self._early[:most], self._early[most:]
        if len(got) < enough:
            got += self._consumer.consume(min(enough, most) - len(got), seconds)
        if got and len(got) < most:
            got += self._consumer.consume(most - len(got), 0.0)
        now = time.monotonic()
        return [found for each in got if (found := self._message(each, now)) is not None]

    def acknowledge(self, done: Sequence[Message], buried: Sequence[Message]) -> None:
        """Commit the offsets behind the messages; what can't be committed comes again."""
        behind: dict[int, int] = {}
        for message in (*done, *buried):
            partition, number = message.place
            behind[partition] = max(behind.get(partition, 0), number + 1)
        offsets = [TopicPartition(self._address.topic, partition, offset) for partition, offset in behind.items()]
        try:
            self._consumer.commit(offsets=offsets, asynchronous=False)
        except KafkaException as error:
            if error.args[0].code() not in _MOVED:
                self._voice.faulty(error.args[0])
            self._voice.once("commit", f"Offsets of {self._address.topic!r} were not committed: {error.args[0].str()}.")

    def lag(self) -> int | None:
        """Return how many messages wait in the partitions of this member, as far as it knows; None before that."""
        if self._closed:
            return None
        lag, known = 0, False
        try:
            for each in self._consumer.position(self._consumer.assignment()):
                _, high = self._consumer.get_watermark_offsets(each, cached=True)
                if each.offset >= 0 and high >= 0:
                    lag, known = lag + max(0, high - each.offset), True
        except (KafkaException, RuntimeError):
            return None
        return lag if known else None

    def close(self) -> None:
        """Leave the group."""
        if not self._closed:
            self._closed = True
            self._consumer.close()

    def _message(self, each: KafkaMessage, now: float) -> Message | None:
        error = each.error()
        if error is not None:
            self._voice.faulty(error)
            return None
        partition, offset = each.partition(), each.offset()
        assert partition is not None and offset is not None, "what was consumed has a place"  # noqa: S101, PT018
        return Message(
            place=Place(partition, offset), payload=each.value() or b"", event_time=_event_time(each), arrived=now
        )


def _event_time(each: KafkaMessage) -> float:
    """Return when the event was, by its header, or by Kafka's own timestamp."""
    told = dict(each.headers() or []).get(HEADER_EVENT_TIME)
    if told is not None:
        with contextlib.suppress(ValueError):
            return float(told)
    return float(each.timestamp()[1]) / 1000


class KafkaWriter:
    """Produces messages and waits until the brokers have them."""

    def __init__(self, servers: str, voice: KafkaVoice) -> None:
        self._voice = voice
        self._producer = Producer(
            {
                **kafka_settings(servers, voice),
                "enable.idempotence": True,
                # A broker that is gone is waited for, however long.
                "message.timeout.ms": 0,
                "linger.ms": 2,
            }
        )

    def find(self, topic: str) -> None:
        """See to it that a topic exists; raises StreamUnfit."""
        find_topic(self._producer, topic, self._voice)

    def write(self, topic: str, letters: Sequence[tuple[bytes, dict[str, str]]]) -> list[int]:
        """Produce payloads with headers, and wait for each; return those that are refused for their size, by index."""
        refused: list[int] = []
        left = len(letters)

        def delivered(at: int, error: KafkaError | None, _: object = None) -> None:
            nonlocal left
            left -= 1
            if error is not None:
                self._refuse(error, at, refused)

        for at, (payload, headers) in enumerate(letters):
            pairs: list[tuple[str, str | bytes | None]] = [(name, value.encode()) for name, value in headers.items()]
            while True:
                try:
                    self._producer.produce(topic, payload, headers=pairs, on_delivery=partial(delivered, at))
                    break
                except BufferError:
                    self._producer.poll(_LOOK_SECONDS)
                    self._voice.look()
                except KafkaException as error:
                    delivered(at, error.args[0])
                    break
        while left:
            self._producer.poll(_LOOK_SECONDS)
            self._voice.look()
        return refused

    def _refuse(self, error: KafkaError, at: int, refused: list[int]) -> None:
        if error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
            refused.append(at)
            return
        self._voice.faulty(error)
        message = f"Kafka at {self._voice.servers} must take messages, got: {error.str()}. Call again: it resumes."
        raise BrokerFault(message)


class KafkaSink:
    """Produces one score message for each message; its headers name the model and the input's place."""

    def __init__(
        self,
        writer: KafkaWriter,
        address: ToKafka,
        origin: str,
        *,
        contract: Contract,
        keys: tuple[str, ...],
        model: str,
    ) -> None:
        self._writer, self._topic, self._origin = writer, address.topic, origin
        self._contract, self._keys, self._model = contract, keys, model
        writer.find(address.topic)

    def emit(self, scored: Sequence[Scored]) -> list[Poison]:
        """Produce the scores and wait until the brokers have them; return those that are too large for them."""
        found = [answer for each in scored for answer in answers(each, self._contract, self._keys)]
        letters = [
            (answer.payload, {HEADER_MODEL: self._model, HEADER_SOURCE: source_of(self._origin, answer.message)})
            for answer in found
        ]
        return [
            Poison(
                message=found[at].message,
                column="",
                reason="a score that is too large",
                detail=f"{len(found[at].payload):,} bytes must fit message.max.bytes",
            )
            for at in self._writer.write(self._topic, letters)
        ]


class KafkaDeadLetters:
    """Produces poison as it came, with its reason and where it stood as headers."""

    def __init__(self, writer: KafkaWriter, address: FromKafka) -> None:
        self._writer, self._address = writer, address
        writer.find(address.dead_topic)

    def bury(self, poison: Sequence[Poison]) -> None:
        """Produce poison and wait until the brokers have it; one that is too large goes without its original."""
        letters = [
            (
                each.message.payload,
                {
                    HEADER_REASON: each.words,
                    HEADER_COLUMN: each.column,
                    HEADER_SOURCE: source_of(self._address.topic, each.message),
                },
            )
            for each in poison
        ]
        if refused := self._writer.write(self._address.dead_topic, letters):
            self._writer.write(self._address.dead_topic, [(b"", letters[at][1]) for at in refused])


def source_of(log: str, message: Message) -> str:
    """Return the place of an input in words: whoever reads a score twice knows it by that."""
    return f"{log}/{message.place.partition}/{message.place.number}"
