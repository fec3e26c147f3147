"""What every client of Kafka here shares: its settings, what it says while it waits, and what ends it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicCollection, TopicPartition
from confluent_kafka.admin import (
    AdminClient,
    OffsetSpec,  # type: ignore[attr-defined]  # missing in its stubs
)

from serving.errors import BadInput, BrokerDenied, BrokerFault, MessagesLost, StreamReplaced, StreamUnfit
from tasks.stream.connections import Abandoned
from tasks.stream.options import FromKafka

CONFIG = "OVERNIGHT_KAFKA_CONFIG"

LOOK_SECONDS = 0.2
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


def find_topic(client: Consumer | Producer | AdminClient, topic: str, voice: KafkaVoice) -> Any:
    """Return what the broker says of a topic, waiting for the broker; raises StreamUnfit and names those there are."""
    pause = LOOK_SECONDS
    while True:
        try:
            found = client.list_topics(timeout=_ASK_SECONDS)
            break
        except KafkaException as error:
            voice.faulty(error.args[0])
        for _ in range(round(pause / LOOK_SECONDS)):
            voice.look()
            time.sleep(LOOK_SECONDS)
        pause = min(2 * pause, _BACKOFF_SECONDS_MAX)
    if topic not in found.topics:
        known = ", ".join(sorted(found.topics)[:_TOPICS_SHOWN]) or "none"
        message = (
            f"The topic {topic!r} must exist at {voice.servers}, which has {known}. Name one of them, or make it first."
        )
        raise StreamUnfit(message)
    return found


K = TypeVar("K")

REFRESH = "topic.metadata.refresh.interval.ms"
# Kafka's own default is five minutes, for which nothing of a new partition would be read.
REFRESH_MS = 30_000
_PARTITIONS_SHOWN = 10
# How brokers that know no ids answer.
_NO_ID = "AAAAAAAAAAAAAAAAAAAAAA"


class TopicLog:
    """One topic as its brokers have it now, held against what it was when it was opened.

    `reader` says in words who reads it, and `instead` what to do where it can't be read on.

    Raises StreamUnfit where there is no such topic or its id is not known, StreamReplaced where it has another id than
    the address says.
    """

    def __init__(self, address: FromKafka, voice: KafkaVoice) -> None:
        self._address, self._voice = address, voice
        settings = kafka_settings(address.servers, voice)
        self._refresh_seconds = int(settings.get(REFRESH, REFRESH_MS)) / 1000
        self._client = AdminClient(settings)
        self.reader = f"group {address.group!r}"
        self.instead = "another group"
        cluster = find_topic(self._client, address.topic, voice).cluster_id or address.servers
        self.id = ""
        self._take(self._describe())
        # Tables of earlier versions are tied to this name alone.
        self.name = f"kafka {cluster} {address.topic}"
        self.identity = f"{self.name} {self.id}"
        self._asked: Future[Any] | None = None
        self._ask_at = time.monotonic() + self._refresh_seconds

    def confirm(self) -> None:
        """Ask whether the topic is still the one that was opened; raises StreamReplaced."""
        self._take(self._describe())

    def look(self) -> None:
        """Ask the same now and then, without waiting for the answer; partitions that are new are known afterwards."""
        if self._asked is None:
            if time.monotonic() >= self._ask_at:
                self._asked = self._client.describe_topics(*self._question(), request_timeout=_ASK_SECONDS)[
                    self._address.topic
                ]
        elif self._asked.done():
            asked, self._asked = self._asked, None
            self._ask_at = time.monotonic() + self._refresh_seconds
            try:
                self._take(asked.result())
            except KafkaException as error:
                self._refuse_if_gone(error)

    def hold(self, wanted: Mapping[int, int]) -> dict[int, int]:
        """Return the offsets to read partitions from, each the one that is wanted unless messages are gone.

        Raises MessagesLost where they are and the address does not accept that, StreamReplaced where a partition ends
        before the offset.
        """
        reach = self.reach(wanted)
        for partition, (_, high) in reach.items():
            if wanted[partition] > high:
                message = (
                    f"Of topic {self._address.topic!r} partition {partition} must reach to {wanted[partition]:,}, up "
                    f"to where {self.reader} has read it, but ends at {high:,}: the topic was deleted and made again, "
                    f"or its brokers have lost messages. Read it with {self.instead}."
                )
                raise StreamReplaced(message)
        gone = {partition: low for partition, (low, _) in reach.items() if low > wanted[partition]}
        if gone:
            self._report_loss(wanted, gone)
        return {**wanted, **gone}

    def _report_loss(self, wanted: Mapping[int, int], gone: Mapping[int, int]) -> None:
        count = sum(low - wanted[partition] for partition, low in gone.items())
        shown = [
            f"partition {partition} from {wanted[partition]:,} to {low - 1:,}"
            for partition, low in sorted(gone.items())
        ]
        more = f" and {len(shown) - _PARTITIONS_SHOWN} more partitions" if len(shown) > _PARTITIONS_SHOWN else ""
        words = (
            f"Every message of topic {self._address.topic!r} must be there until {self.reader} has read it, but "
            f"{count:,} messages are gone, by retention or by hand: {', '.join(shown[:_PARTITIONS_SHOWN])}{more}."
        )
        if not self._address.accept_loss:
            message = f"{words} Set accept_loss of the source to go on behind them, and keep messages for longer."
            raise MessagesLost(message)
        self._voice.say(f"{words} Going on behind them, since accept_loss is set.")

    def reach(self, partitions: Iterable[int]) -> dict[int, tuple[int, int]]:
        """Return the first offset of each partition, and the one behind its last."""
        parts = [TopicPartition(self._address.topic, partition) for partition in partitions]
        if not parts:
            return {}
        specs: tuple[Any, Any] = (OffsetSpec.earliest(), OffsetSpec.latest())  # type: ignore[no-untyped-call]
        low, high = (self._ask(self._asking(dict.fromkeys(parts, spec))) for spec in specs)
        return {part.partition: (low[part].offset, high[part].offset) for part in parts}

    def _asking(self, specs: dict[TopicPartition, Any]) -> Callable[[], dict[TopicPartition, Future[Any]]]:
        return lambda: self._client.list_offsets(specs, request_timeout=_ASK_SECONDS)

    def _question(self) -> tuple[TopicCollection]:
        return (TopicCollection([self._address.topic]),)

    def _describe(self) -> Any:
        topic = self._address.topic
        return self._ask(lambda: self._client.describe_topics(*self._question(), request_timeout=_ASK_SECONDS))[topic]

    def _ask(self, question: Callable[[], Mapping[K, Future[Any]]]) -> dict[K, Any]:
        """Return every answer to a question, asking again where the brokers don't answer."""
        while True:
            asked = question()
            try:
                return {key: self._answer(future) for key, future in asked.items()}
            except KafkaException as error:
                self._refuse_if_gone(error)
            self._voice.look()
            time.sleep(LOOK_SECONDS)

    def _answer(self, future: Future[Any]) -> Any:
        while True:
            self._voice.look()
            try:
                return future.result(LOOK_SECONDS)
            except TimeoutError:
                if future.done():
                    raise

    def _refuse_if_gone(self, error: KafkaException) -> None:
        if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
            message = (
                f"The topic {self._address.topic!r} at {self._address.servers} must stay as it was when it was opened, "
                f"but it or a partition of it was deleted. Where it is made again, read it with {self.instead}."
            )
            raise StreamReplaced(message) from None
        self._voice.faulty(error.args[0])

    def _take(self, told: Any) -> None:
        """Keep what the brokers said; raises StreamReplaced where the id is another."""
        self.partitions = sorted(each.id for each in told.partitions)
        found = _plain_id(told.topic_id)
        if self.id:
            if found != self.id and (found or self._address.topic_id is None):
                message = (
                    f"The topic {self._address.topic!r} must stay the one that was opened (id {self.id}), but was "
                    f"deleted and made again (id {found or 'unknown'}). Read the new one with {self.instead}."
                )
                raise StreamReplaced(message)
            return
        named = self._address.topic_id
        if named is not None and found and found != named:
            message = (
                f"The topic {self._address.topic!r} must have the id {named!r} of topic_id, got {found!r}: it was "
                f"deleted and made again. Read the new one with that id and {self.instead}."
            )
            raise StreamReplaced(message)
        if named is None and not found:
            message = (
                f"Kafka at {self._address.servers} must tell the id of topic {self._address.topic!r}, which tells it "
                "from one of the same name that is made later (Kafka 2.8 and later do). Set topic_id of the source to "
                "a word of your own, and to another one whenever the topic is made again."
            )
            raise StreamUnfit(message)
        self.id = found or str(named)


def _plain_id(told: Any) -> str:
    """Return an id of a topic as Kafka's own tools show it, empty where there is none."""
    text = str(told or "").rstrip("=").replace("+", "-").replace("/", "_")
    return "" if text == _NO_ID else text
