"""Topics of Kafka as a sink, and for dead letters: each produced before the input's offset is committed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from confluent_kafka import KafkaError, KafkaException, Producer

from serving.errors import BrokerFault
from serving.model.contract import Contract
from tasks.stream.kafka.client import LOOK_SECONDS, KafkaVoice, find_topic, kafka_settings
from tasks.stream.message import HEADER_MODEL, HEADER_SOURCE, Message, Poison, poison_headers
from tasks.stream.options import FromKafka, ToKafka
from tasks.stream.score import Scored, answers


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
                    self._producer.poll(LOOK_SECONDS)
                    self._voice.look()
                except KafkaException as error:
                    delivered(at, error.args[0])
                    break
        while left:
            self._producer.poll(LOOK_SECONDS)
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
        """Produce poison and wait until the brokers have it; one that is too large goes without its original.

        Raises BrokerFault where the brokers do not take that either.
        """
        letters = [
            (
                each.message.payload,
                {**poison_headers(each), HEADER_SOURCE: source_of(self._address.topic, each.message)},
            )
            for each in poison
        ]
        topic = self._address.dead_topic
        refused = self._writer.write(topic, letters)
        if refused and self._writer.write(topic, [(b"", letters[at][1]) for at in refused]):
            message = (
                f"The topic {topic!r} must take dead letters of some kilobytes, but refuses them for their size "
                "(message.max.bytes). Let it take larger ones, then call again: it resumes."
            )
            raise BrokerFault(message)


def source_of(log: str, message: Message) -> str:
    """Return the place of an input in words: whoever reads a score twice knows it by that."""
    return f"{log}/{message.place.partition}/{message.place.number}"
