"""What all clients of Kafka share: settings, errors and waiting; and the state of one topic: its id and its bounds."""

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
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]  # missing in its stubs

from serving.errors import BadInput, BrokerDenied, BrokerFault, MessagesLost, StreamReplaced, StreamUnfit
from tasks.stream.connections import StreamAbandoned
from tasks.stream.options import FromKafka

K = TypeVar("K")

CONFIG_VARIABLE = "OVERNIGHT_KAFKA_CONFIG"
REFRESH_SETTING = "topic.metadata.refresh.interval.ms"
# Kafka's own default is five minutes, for which nothing of a new partition would be read.
REFRESH_MS = 30_000
ANSWER_SECONDS = 5.0
POLL_SECONDS = 0.2
_WARN_SECONDS = 30.0
_BACKOFF_SECONDS_MAX = 15.0
_TOPICS_SHOWN = 20
_PARTITIONS_SHOWN = 10
# What brokers without topic ids answer.
_NO_ID = "AAAAAAAAAAAAAAAAAAAAAA"
_DENIED_CODES = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.SASL_AUTHENTICATION_FAILED,
    KafkaError._AUTHENTICATION,  # noqa: SLF001 - the library's name for what it found itself
}


@dataclass(slots=True)
class KafkaErrorHandler:
    """Warns of errors that may pass, once in 30 s each, and raises those that end the stream."""

    servers: str
    warn: Callable[[str], None]
    give_up: threading.Event
    _warned: dict[str, float] = field(default_factory=dict)
    _denied: str | None = None

    def on_error(self, error: KafkaError) -> None:
        """Take an error that the library reports by itself."""
        if error.code() in _DENIED_CODES:
            self._denied = error.str()
        else:
            self.warn_once(error.name(), f"Kafka at {self.servers} must answer, got: {error.str()}. Waiting for it.")

    def warn_once(self, topic: str, message: str) -> None:
        """Warn, unless there was a warning about this topic in the last 30 s."""
        now = time.monotonic()
        if now - self._warned.get(topic, -_WARN_SECONDS) >= _WARN_SECONDS:
            self._warned[topic] = now
            self.warn(message)

    def check(self) -> None:
        """Raise BrokerDenied where the brokers refuse this user, StreamAbandoned where waits are given up."""
        if self._denied is not None:
            message = (
                f"Kafka at {self.servers} must allow this user what the stream needs, got: {self._denied}. Correct the "
                f"permissions, or the credentials in the file that {CONFIG_VARIABLE} names, then call again: it "
                "resumes."
            )
            raise BrokerDenied(message)
        if self.give_up.is_set():
            raise StreamAbandoned

    def handle(self, error: KafkaError) -> None:
        """Take the error of a message or a request: warn where it may pass, raise BrokerFault where it is fatal."""
        self.on_error(error)
        self.check()
        if error.fatal():
            message = f"Kafka at {self.servers} refuses for good: {error.str()}. Call again: it resumes."
            raise BrokerFault(message)


def build_settings(servers: str, errors: KafkaErrorHandler) -> dict[str, Any]:
    """Return a client's settings, with those of the file that OVERNIGHT_KAFKA_CONFIG names.

    Raises:
        BadInput: The file can't be read, or a line of it is not NAME=VALUE.
    """
    path = os.environ.get(CONFIG_VARIABLE)
    settings: dict[str, Any] = {}
    if path:
        try:
            lines = Path(path).read_text().splitlines()
        except OSError as error:
            message = (
                f"{CONFIG_VARIABLE} must name a file of NAME=VALUE lines that can be read, got {path}: "
                f"{error.strerror}."
            )
            raise BadInput(message) from error
        pairs = [line.split("=", 1) for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if any(len(pair) < 2 for pair in pairs):  # noqa: PLR2004 - a name and a value
            message = f"Each line of {path} must be NAME=VALUE, got one without =. Correct it."
            raise BadInput(message)
        settings = {name.strip(): value.strip() for name, value in pairs}
    # By default the library writes its log to stderr.
    return {**settings, "bootstrap.servers": servers, "error_cb": errors.on_error, "log_level": 0}


def find_topic(
    client: Consumer | Producer | AdminClient,
    topic: str,
    errors: KafkaErrorHandler,
    answer_seconds: float = ANSWER_SECONDS,
) -> Any:
    """Return the brokers' metadata with the topic in it; waits for the brokers.

    Raises:
        StreamUnfit: There is no such topic; the message names those that there are.
    """
    pause = POLL_SECONDS
    while True:
        try:
            found = client.list_topics(timeout=answer_seconds)
            break
        except KafkaException as error:
            errors.handle(error.args[0])
        for _ in range(round(pause / POLL_SECONDS)):
            errors.check()
            time.sleep(POLL_SECONDS)
        pause = min(2 * pause, _BACKOFF_SECONDS_MAX)
    if topic not in found.topics:
        known = ", ".join(sorted(found.topics)[:_TOPICS_SHOWN]) or "none"
        message = (
            f"The topic {topic!r} must exist at {errors.servers}, which has {known}. Name one of them, or make it "
            "first."
        )
        raise StreamUnfit(message)
    return found


class KafkaTopic:
    """One topic as its brokers have it, compared with what it was when it was opened.

    Attributes:
        reader: Who reads the topic, for messages.
        alternative: What to read it with where it was made again, for messages.

    Raises:
        StreamUnfit: There is no such topic, or its id is not known.
        StreamReplaced: It has another id than the address.
    """

    def __init__(self, address: FromKafka, errors: KafkaErrorHandler) -> None:
        self._address, self._errors = address, errors
        settings = build_settings(address.servers, errors)
        self._refresh_seconds = int(settings.get(REFRESH_SETTING, REFRESH_MS)) / 1000
        self._client = AdminClient(settings)
        self.reader = f"group {address.group!r}"
        self.alternative = "another group"
        cluster = find_topic(self._client, address.topic, errors).cluster_id or address.servers
        self.id = ""
        self.check_identity()
        # The plans of earlier versions' tables have this name alone.
        self.name = f"kafka {cluster} {address.topic}"
        self.identity = f"{self.name} {self.id}"
        self._refresh: Future[Any] | None = None
        self._refresh_at = time.monotonic() + self._refresh_seconds

    def check_identity(self) -> None:
        """Ask whether the topic is still the one that was opened; raises StreamReplaced."""
        self._update(self._request(self._describe)[self._address.topic])

    def refresh(self) -> None:
        """Check the same now and then without waiting for the answer. New partitions are known afterwards."""
        if self._refresh is None:
            if time.monotonic() >= self._refresh_at:
                self._refresh = self._describe()[self._address.topic]
        elif self._refresh.done():
            done, self._refresh = self._refresh, None
            self._refresh_at = time.monotonic() + self._refresh_seconds
            try:
                self._update(done.result())
            except KafkaException as error:
                self._handle(error)

    def check_offsets(self, wanted: Mapping[int, int]) -> dict[int, int]:
        """Return the offset to read each partition from: the wanted one, or the first where that is gone.

        Raises:
            MessagesLost: Messages are gone, and the address does not accept that.
            StreamReplaced: A partition ends before the wanted offset.
        """
        bounds = self.read_bounds(wanted)
        for partition, (_, high) in bounds.items():
            if wanted[partition] > high:
                message = (
                    f"Of topic {self._address.topic!r} partition {partition} must reach to {wanted[partition]:,}, up "
                    f"to where {self.reader} has read it, but ends at {high:,}: the topic was deleted and made again, "
                    f"or its brokers have lost messages. Read it with {self.alternative}."
                )
                raise StreamReplaced(message)
        gone = {partition: low for partition, (low, _) in bounds.items() if low > wanted[partition]}
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
        self._errors.warn(f"{words} Going on behind them, since accept_loss is set.")

    def read_bounds(self, partitions: Iterable[int]) -> dict[int, tuple[int, int]]:
        """Return the first offset of each partition, and the one after its last message."""
        parts = [TopicPartition(self._address.topic, partition) for partition in partitions]
        if not parts:
            return {}
        low, high = (self._list_offsets(parts, spec) for spec in (OffsetSpec.earliest(), OffsetSpec.latest()))  # type: ignore[no-untyped-call]
        return {part.partition: (low[part].offset, high[part].offset) for part in parts}

    def _list_offsets(self, parts: Iterable[TopicPartition], spec: Any) -> dict[TopicPartition, Any]:
        specs = dict.fromkeys(parts, spec)
        return self._request(lambda: self._client.list_offsets(specs, request_timeout=ANSWER_SECONDS))

    def _describe(self) -> Mapping[str, Future[Any]]:
        topics = TopicCollection([self._address.topic])
        return self._client.describe_topics(topics, request_timeout=ANSWER_SECONDS)

    def _request(self, ask: Callable[[], Mapping[K, Future[Any]]]) -> dict[K, Any]:
        """Return all answers to a request, which is made until the brokers answer."""
        while True:
            futures = ask()
            try:
                return {key: self._wait_for_answer(future) for key, future in futures.items()}
            except KafkaException as error:
                self._handle(error)
            self._errors.check()
            time.sleep(POLL_SECONDS)

    def _wait_for_answer(self, future: Future[Any]) -> Any:
        while True:
            self._errors.check()
            try:
                return future.result(POLL_SECONDS)
            except TimeoutError:
                if future.done():
                    raise

    def _handle(self, error: KafkaException) -> None:
        if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
            message = (
                f"The topic {self._address.topic!r} at {self._address.servers} must stay as it was when it was opened, "
                f"but it or a partition of it was deleted. Where it is made again, read it with {self.alternative}."
            )
            raise StreamReplaced(message) from None
        self._errors.handle(error.args[0])

    def _update(self, description: Any) -> None:
        """Keep the brokers' description of the topic; raises StreamReplaced where its id has changed."""
        self.partitions = sorted(each.id for each in description.partitions)
        found = _format_id(description.topic_id)
        if not self.id:
            self.id = self._choose_id(found)
        elif found != self.id and (found or self._address.topic_id is None):
            message = (
                f"The topic {self._address.topic!r} must stay the one that was opened (id {self.id}), but was "
                f"deleted and made again (id {found or 'unknown'}). Read the new one with {self.alternative}."
            )
            raise StreamReplaced(message)

    def _choose_id(self, found: str) -> str:
        """Return the id that the topic is opened with: the brokers' own, otherwise that of the address."""
        named = self._address.topic_id
        if named is not None and found and found != named:
            message = (
                f"The topic {self._address.topic!r} must have the id {named!r} of topic_id, got {found!r}: it was "
                f"deleted and made again. Read the new one with that id and {self.alternative}."
            )
            raise StreamReplaced(message)
        if named is None and not found:
            message = (
                f"Kafka at {self._address.servers} must tell the id of topic {self._address.topic!r}, which tells it "
                "from one of the same name that is made later (Kafka 2.8 and later do). Set topic_id of the source to "
                "a word of your own, and to another one whenever the topic is made again."
            )
            raise StreamUnfit(message)
        return found or str(named)


def _format_id(topic_id: Any) -> str:
    """Return a topic's id as Kafka's own tools show it; empty where there is none."""
    text = str(topic_id or "").rstrip("=").replace("+", "-").replace("/", "_")
    return "" if text == _NO_ID else text
