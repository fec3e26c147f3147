"""A topic of Kafka as a source: offsets are committed once the scores are produced, so at least once."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence

from confluent_kafka import OFFSET_INVALID, Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka import Message as KafkaMessage
from pydantic import ValidationError

from serving.errors import StreamReplaced
from serving.model.contract import Frozen
from tasks.stream.kafka.client import LOOK_SECONDS, REFRESH, REFRESH_MS, KafkaVoice, TopicLog, kafka_settings
from tasks.stream.message import HEADER_EVENT_TIME, Message, Place, event_time
from tasks.stream.options import FromKafka

_ASK_SECONDS = 5.0
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

    Raises StreamUnfit where there is no such topic, StreamReplaced where it was made again, MessagesLost where messages
    are gone that were to be read.
    """

    def __init__(self, address: FromKafka, voice: KafkaVoice, *, bytes_max: int) -> None:
        self._address, self._voice = address, voice
        self.log = TopicLog(address, voice)
        self._consumer = Consumer(
            {
                REFRESH: REFRESH_MS,
                **kafka_settings(address.servers, voice),
                "group.id": address.group,
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                # Where to begin is decided here: the library passes over what is gone without a word.
                "auto.offset.reset": "error",
                "allow.auto.create.topics": False,
                "partition.assignment.strategy": "cooperative-sticky",
                # One that is killed is missed by its heartbeats; one whose sink is slow has not left.
                "max.poll.interval.ms": 86_400_000,
                "queued.max.messages.kbytes": max(1, bytes_max >> 10),
            }
        )
        self._closed = False
        self._by_hand = False
        self._early: list[KafkaMessage] = []
        self._next: dict[int, int] = {}
        self._failed: BaseException | None = None

    @property
    def origin(self) -> str:
        """What tells the topic's messages from those of any other, one of the same name among them."""
        return f"{self._address.topic}@{self.log.id}"

    def begin(self, start: Mapping[int, int] | None = None) -> None:
        """Join the group, or read every partition from where `start` says, those that are not in it from 0."""
        if start is None:
            self._join()
            return
        self._by_hand = True
        self._add({partition: start.get(partition, 0) for partition in self.log.partitions})

    def _add(self, wanted: Mapping[int, int]) -> None:
        """Read partitions too, each from the offset that is wanted unless that is gone."""
        held = self.log.hold(wanted)
        self._next |= held
        self._consumer.incremental_assign([self._place(partition, offset) for partition, offset in held.items()])

    def _join(self) -> None:
        """Join the group and wait to be given partitions: until then nothing that is there can come."""
        joined = threading.Event()

        def assigned(_: Consumer, given: list[TopicPartition]) -> None:
            try:
                self._take_up([each.partition for each in given])
            except BaseException as error:  # noqa: BLE001 - raised to the caller of `fetch`, not to the library
                self._failed = error
            joined.set()

        self._consumer.subscribe([self._address.topic], on_assign=assigned)
        while not joined.is_set():
            self._check()
            self._early += self._consumer.consume(1, LOOK_SECONDS)
        self._check()

    def _check(self) -> None:
        self._voice.look()
        if self._failed is not None:
            raise self._failed

    def _take_up(self, partitions: Sequence[int]) -> None:
        """Read the partitions that the group gave from where it stands; where it never stood is committed at once."""
        committed = self._committed()
        wanted = {partition: committed[partition].offset for partition in partitions if partition in committed}
        new = [partition for partition in partitions if partition not in committed]
        # A partition that was there when the group began, and was not read, has begun where it begins.
        known = max((_Note.read(each.metadata).partitions for each in committed.values()), default=0)
        low = {partition: reach[0] for partition, reach in self.log.reach(new).items()}
        begun = {partition: 0 if 0 < known <= partition else low[partition] for partition in new}
        self._add(wanted | begun)
        self._commit(begun)

    def _committed(self) -> dict[int, TopicPartition]:
        """Return where the group stands; raises StreamReplaced where that is another topic of this name."""
        asked = [self._place(partition) for partition in self.log.partitions]
        while True:
            try:
                found = self._consumer.committed(asked, timeout=_ASK_SECONDS)
                break
            except KafkaException as error:
                self._voice.faulty(error.args[0])
        committed = {each.partition: each for each in found if each.offset >= 0}
        others = {_Note.read(each.metadata).topic_id for each in committed.values()} - {self.log.id, ""}
        if others:
            message = (
                f"The {self.log.reader} must go on in the topic {self._address.topic!r} that it has read (id "
                f"{others.pop()}), but that was deleted and made again (id {self.log.id}). Read the new one with "
                f"{self.log.instead}, or delete the group."
            )
            raise StreamReplaced(message)
        return committed

    def _place(self, partition: int, offset: int = OFFSET_INVALID) -> TopicPartition:
        note = _Note(topic_id=self.log.id, partitions=len(self.log.partitions))
        return TopicPartition(self._address.topic, partition, offset, note.model_dump_json())

    def fetch(self, most: int, enough: int, seconds: float) -> list[Message]:
        """Return up to `most` messages as soon as `enough` are there, or what there is after `seconds`."""
        self._check()
        self.log.look()
        if self._by_hand and (new := [each for each in self.log.partitions if each not in self._next]):
            self._add(dict.fromkeys(new, 0))
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
        self._commit(behind)

    def _commit(self, behind: Mapping[int, int]) -> None:
        if not behind:
            return
        offsets = [self._place(partition, offset) for partition, offset in behind.items()]
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
        error, partition = each.error(), each.partition()
        if error is not None:
            if error.code() == KafkaError._AUTO_OFFSET_RESET and partition in self._next:  # noqa: SLF001
                self._go_behind(partition)
            else:
                self._voice.faulty(error)
            return None
        offset = each.offset()
        assert partition is not None and offset is not None, "what was consumed has a place"  # noqa: S101, PT018
        self._next[partition] = offset + 1
        return Message(
            place=Place(partition, offset), payload=each.value() or b"", event_time=_event_time(each), arrived=now
        )

    def _go_behind(self, partition: int) -> None:
        """Read a partition on, whose next offset the broker does not have: behind what is gone, if that is accepted."""
        self._consumer.incremental_unassign([self._place(partition)])
        self._add({partition: self._next[partition]})


class _Note(Frozen):
    """What is committed beside an offset: the id of the topic, and how many partitions it had."""

    topic_id: str = ""
    partitions: int = 0

    @classmethod
    def read(cls, text: str | None) -> _Note:
        """Return what was committed; empty where that was by an earlier version, or by somebody else."""
        try:
            return cls.model_validate_json(text or "{}")
        except ValidationError:
            return cls()


def _event_time(each: KafkaMessage) -> float:
    """Return when the event was, by its header, or by Kafka's own timestamp."""
    return event_time(dict(each.headers() or []).get(HEADER_EVENT_TIME), each.timestamp()[1] / 1000)
