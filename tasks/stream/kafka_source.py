"""A topic of Kafka as a source: offsets are committed once the scores are produced, so at least once."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka import Message as KafkaMessage

from tasks.stream.addresses import FromKafka
from tasks.stream.kafka_link import LOOK_SECONDS, KafkaVoice, find_topic, kafka_settings
from tasks.stream.message import HEADER_EVENT_TIME, Message, Place, event_time

# The group has moved on: whoever has the partitions now takes what is not committed.
_MOVED = {
    KafkaError.REBALANCE_IN_PROGRESS,
    KafkaError.ILLEGAL_GENERATION,
    KafkaError.UNKNOWN_MEMBER_ID,
    KafkaError._STATE,  # noqa: SLF001
    KafkaError._NO_OFFSET,  # noqa: SLF001
    KafkaError._ASSIGNMENT_LOST,  # noqa: SLF001
}


class KafkaSource:
    """Messages of one topic, as a member of a group; `start` reads every partition from an offset on instead.

    Raises StreamUnfit where there is no such topic.
    """

    def __init__(self, address: FromKafka, voice: KafkaVoice, *, bytes_max: int) -> None:
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
                "queued.max.messages.kbytes": max(1, bytes_max >> 10),
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
            self._early += self._consumer.consume(1, LOOK_SECONDS)

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
        """Return how many messages wait in the partitions of this member, as the last fetch told; None before that."""
        if self._closed:
            return None
        lag, known = 0, False
        try:
            for each in self._consumer.position(self._consumer.assignment()):
                # To ask the brokers takes half a second a partition, behind the fetch that waits there.
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
    return event_time(dict(each.headers() or []).get(HEADER_EVENT_TIME), each.timestamp()[1] / 1000)
