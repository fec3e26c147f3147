"""A topic of Kafka as a source: offsets are committed after the scores are produced, so each is there at least once."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence

from confluent_kafka import OFFSET_INVALID, Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka import Message as KafkaMessage
from pydantic import ValidationError

from serving.errors import StreamReplaced
from serving.model.contract import Frozen
from tasks.stream.kafka.client import (
    ANSWER_SECONDS,
    POLL_SECONDS,
    REFRESH_MS,
    REFRESH_SETTING,
    KafkaErrorHandler,
    KafkaTopic,
    build_settings,
)
from tasks.stream.message import HEADER_EVENT_TIME, Message, Position, choose_event_time
from tasks.stream.options import FromKafka

# The group was rebalanced: the member that has the partitions now reads what is not committed.
_REBALANCED_CODES = {
    KafkaError.REBALANCE_IN_PROGRESS,
    KafkaError.ILLEGAL_GENERATION,
    KafkaError.UNKNOWN_MEMBER_ID,
    KafkaError._STATE,  # noqa: SLF001
    KafkaError._NO_OFFSET,  # noqa: SLF001
    KafkaError._ASSIGNMENT_LOST,  # noqa: SLF001
}


class KafkaSource:
    """Messages of one topic, read as a member of a group, or from given offsets.

    Raises:
        StreamUnfit: There is no such topic.
        StreamReplaced: The topic was made again.
        MessagesLost: Messages that were to be read are gone.
    """

    def __init__(self, address: FromKafka, errors: KafkaErrorHandler, *, bytes_max: int) -> None:
        self._address, self._errors = address, errors
        self.topic = KafkaTopic(address, errors)
        self._consumer = Consumer(
            {
                REFRESH_SETTING: REFRESH_MS,
                **build_settings(address.servers, errors),
                "group.id": address.group,
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                # This class decides where to begin: the library would skip messages that are gone in silence.
                "auto.offset.reset": "error",
                "allow.auto.create.topics": False,
                "partition.assignment.strategy": "cooperative-sticky",
                # The group notices a killed member by its heartbeats. A member with a slow sink must stay in it.
                "max.poll.interval.ms": 86_400_000,
                "queued.max.messages.kbytes": max(1, bytes_max >> 10),
            }
        )
        self._is_closed = False
        self._is_assigned_by_hand = False
        self._early: list[KafkaMessage] = []
        self._next: dict[int, int] = {}
        self._assign_error: BaseException | None = None

    @property
    def origin(self) -> str:
        """What tells the topic's messages from those of any other topic, even one of the same name."""
        return f"{self._address.topic}@{self.topic.id}"

    def start(self, offsets: Mapping[int, int] | None = None) -> None:
        """Join the group, or read every partition from its offset: 0 where it has none in `offsets`."""
        if offsets is None:
            self._join_group()
            return
        self._is_assigned_by_hand = True
        self._add_partitions({partition: offsets.get(partition, 0) for partition in self.topic.partitions})

    def _join_group(self) -> None:
        """Join the group and wait to be assigned partitions: no message can be fetched before that."""
        joined = threading.Event()

        def on_assign(_: Consumer, assigned: list[TopicPartition]) -> None:
            try:
                self._start_assigned([each.partition for each in assigned])
            except BaseException as error:  # noqa: BLE001 - raised to the caller of `fetch`, not to the library
                self._assign_error = error
            joined.set()

        self._consumer.subscribe([self._address.topic], on_assign=on_assign)
        while not joined.is_set():
            self._check()
            self._early += self._consumer.consume(1, POLL_SECONDS)
        self._check()

    def _check(self) -> None:
        self._errors.check()
        if self._assign_error is not None:
            raise self._assign_error

    def _start_assigned(self, partitions: Sequence[int]) -> None:
        """Read assigned partitions from their committed offsets, and commit a first offset where there is none."""
        committed = self._read_committed()
        wanted = {partition: committed[partition].offset for partition in partitions if partition in committed}
        new = [partition for partition in partitions if partition not in committed]
        # A partition that was added after the group began is read from 0, an older one from where it begins now.
        known = max((_CommitMetadata.parse(each.metadata).partitions for each in committed.values()), default=0)
        low = {partition: bounds[0] for partition, bounds in self.topic.read_bounds(new).items()}
        first = {partition: 0 if 0 < known <= partition else low[partition] for partition in new}
        self._add_partitions(wanted | first)
        self._commit(first)

    def _read_committed(self) -> dict[int, TopicPartition]:
        """Return the committed offsets of the group; raises StreamReplaced where they are of an earlier topic."""
        asked = [self._at_offset(partition) for partition in self.topic.partitions]
        while True:
            try:
                found = self._consumer.committed(asked, timeout=ANSWER_SECONDS)
                break
            except KafkaException as error:
                self._errors.handle(error.args[0])
        committed = {each.partition: each for each in found if each.offset >= 0}
        others = {_CommitMetadata.parse(each.metadata).topic_id for each in committed.values()} - {self.topic.id, ""}
        if others:
            message = (
                f"The {self.topic.reader} must go on in the topic {self._address.topic!r} that it has read (id "
                f"{others.pop()}), but that was deleted and made again (id {self.topic.id}). Read the new one with "
                f"{self.topic.alternative}, or delete the group."
            )
            raise StreamReplaced(message)
        return committed

    def _add_partitions(self, wanted: Mapping[int, int]) -> None:
        """Read more partitions, each from the wanted offset, or from its first where that is gone."""
        offsets = self.topic.check_offsets(wanted)
        self._next |= offsets
        self._consumer.incremental_assign([self._at_offset(partition, offset) for partition, offset in offsets.items()])

    def _at_offset(self, partition: int, offset: int = OFFSET_INVALID) -> TopicPartition:
        metadata = _CommitMetadata(topic_id=self.topic.id, partitions=len(self.topic.partitions))
        return TopicPartition(self._address.topic, partition, offset, metadata.model_dump_json())

    def fetch(self, messages_max: int, messages_min: int, timeout_seconds: float) -> list[Message]:
        """Return up to `messages_max` messages once `messages_min` are there, or fewer at the time-out."""
        self._check()
        self.topic.refresh()
        if self._is_assigned_by_hand and (new := [each for each in self.topic.partitions if each not in self._next]):
            self._add_partitions(dict.fromkeys(new, 0))
        fetched, self._early = self._early[:messages_max], self._early[messages_max:]
        if len(fetched) < messages_min:
            fetched += self._consumer.consume(min(messages_min, messages_max) - len(fetched), timeout_seconds)
        if fetched and len(fetched) < messages_max:
            fetched += self._consumer.consume(messages_max - len(fetched), 0.0)
        now = time.monotonic()
        return [message for each in fetched if (message := self._convert(each, now)) is not None]

    def acknowledge(self, done: Sequence[Message], dead_lettered: Sequence[Message]) -> None:
        """Commit the offsets after the messages. Where that fails they are delivered again."""
        offsets: dict[int, int] = {}
        for message in (*done, *dead_lettered):
            partition, number = message.position
            offsets[partition] = max(offsets.get(partition, 0), number + 1)
        self._commit(offsets)

    def _commit(self, offsets: Mapping[int, int]) -> None:
        if not offsets:
            return
        partitions = [self._at_offset(partition, offset) for partition, offset in offsets.items()]
        try:
            self._consumer.commit(offsets=partitions, asynchronous=False)
        except KafkaException as error:
            if error.args[0].code() not in _REBALANCED_CODES:
                self._errors.handle(error.args[0])
            self._errors.warn_once(
                "commit", f"Offsets of {self._address.topic!r} were not committed: {error.args[0].str()}."
            )

    def lag(self) -> int | None:
        """Return how many messages wait in this member's partitions, as last fetched; None before that."""
        if self._is_closed:
            return None
        lag, is_known = 0, False
        try:
            for each in self._consumer.position(self._consumer.assignment()):
                # Without `cached` this would wait half a second per partition behind the fetch in progress.
                _, high = self._consumer.get_watermark_offsets(each, cached=True)
                if each.offset >= 0 and high >= 0:
                    lag, is_known = lag + max(0, high - each.offset), True
        except (KafkaException, RuntimeError):
            return None
        return lag if is_known else None

    def close(self) -> None:
        """Leave the group."""
        if not self._is_closed:
            self._is_closed = True
            self._consumer.close()

    def _convert(self, each: KafkaMessage, now: float) -> Message | None:
        """Return a message of the library as ours; None where it reports an error."""
        error, partition = each.error(), each.partition()
        if error is not None:
            if error.code() == KafkaError._AUTO_OFFSET_RESET and partition in self._next:  # noqa: SLF001
                # The next offset is gone: where loss is accepted, the partition goes on from its first message.
                self._consumer.incremental_unassign([self._at_offset(partition)])
                self._add_partitions({partition: self._next[partition]})
            else:
                self._errors.handle(error)
            return None
        offset = each.offset()
        assert partition is not None and offset is not None, "a consumed message has both"  # noqa: S101, PT018
        self._next[partition] = offset + 1
        return Message(
            position=Position(partition, offset),
            payload=each.value() or b"",
            event_time=choose_event_time(dict(each.headers() or []).get(HEADER_EVENT_TIME), each.timestamp()[1] / 1000),
            arrived=now,
        )


class _CommitMetadata(Frozen):
    """The metadata of a committed offset: the id of the topic, and how many partitions it had."""

    topic_id: str = ""
    partitions: int = 0

    @classmethod
    def parse(cls, text: str | None) -> _CommitMetadata:
        """Return the metadata; empty where an earlier version or another client committed the offset."""
        try:
            return cls.model_validate_json(text or "{}")
        except ValidationError:
            return cls()
