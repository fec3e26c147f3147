"""Topics of Kafka as a sink, and for dead letters: a score is produced before the offset of its input is committed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from confluent_kafka import KafkaError, KafkaException, Producer

from serving.errors import BrokerFault, StreamUnfit
from serving.model.contract import Contract
from tasks.stream.kafka.client import POLL_SECONDS, KafkaErrorHandler, build_settings, find_topic
from tasks.stream.message import HEADER_MODEL, HEADER_SOURCE, Message, Poison, build_poison_headers
from tasks.stream.options import FromKafka, ToKafka, ToNats, ToParts
from tasks.stream.score import ScoredBatch, build_answers


class MessageProducer:
    """Produces messages and waits until the brokers have them."""

    def __init__(self, servers: str, errors: KafkaErrorHandler) -> None:
        self._errors = errors
        self._producer = Producer(
            {
                **build_settings(servers, errors),
                "enable.idempotence": True,
                # A broker that is gone is waited for without end.
                "message.timeout.ms": 0,
                "linger.ms": 2,
            }
        )

    def check_topic(self, topic: str) -> None:
        """Raise StreamUnfit where a topic does not exist."""
        find_topic(self._producer, topic, self._errors)

    def produce(self, topic: str, outgoing: Sequence[tuple[bytes, dict[str, str]]]) -> list[int]:
        """Produce payloads with headers and wait for all of them; return the indices of those that are too large."""
        refused: list[int] = []
        left = len(outgoing)

        def on_delivery(index: int, error: KafkaError | None, _: object = None) -> None:
            nonlocal left
            left -= 1
            if error is not None:
                self._handle(error, index, refused)

        for index, (payload, headers) in enumerate(outgoing):
            pairs: list[tuple[str, str | bytes | None]] = [(name, value.encode()) for name, value in headers.items()]
            while True:
                try:
                    self._producer.produce(topic, payload, headers=pairs, on_delivery=partial(on_delivery, index))
                    break
                except BufferError:
                    self._producer.poll(POLL_SECONDS)
                    self._errors.check()
                except KafkaException as error:
                    on_delivery(index, error.args[0])
                    break
        while left:
            self._producer.poll(POLL_SECONDS)
            self._errors.check()
        return refused

    def _handle(self, error: KafkaError, index: int, refused: list[int]) -> None:
        if error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
            refused.append(index)
            return
        self._errors.handle(error)
        message = f"Kafka at {self._errors.servers} must take messages, got: {error.str()}. Call again: it resumes."
        raise BrokerFault(message)


def check_topics(source: FromKafka, sink: ToNats | ToKafka | ToParts) -> None:
    """Raise StreamUnfit where scores or dead letters would go into the topic that is read, which would never end."""
    written = {"dead letters": source.dead_letter_topic}
    if isinstance(sink, ToKafka) and sink.servers in (None, source.servers):
        written["scores"] = sink.topic
    for what, topic in written.items():
        if topic == source.topic:
            message = f"The {what} must not go into the topic that is read, got {topic!r} for both. Name another topic."
            raise StreamUnfit(message)


class KafkaSink:
    """Produces one score message for each input message; its headers name the model and the input's position."""

    def __init__(
        self,
        producer: MessageProducer,
        address: ToKafka,
        origin: str,
        *,
        contract: Contract,
        keys: tuple[str, ...],
        model: str,
    ) -> None:
        self._producer, self._topic, self._origin = producer, address.topic, origin
        self._contract, self._keys, self._model = contract, keys, model
        producer.check_topic(address.topic)

    def emit(self, scored: Sequence[ScoredBatch]) -> list[Poison]:
        """Produce the scores and wait until the brokers have them; return those that are too large for them."""
        answers = [answer for each in scored for answer in build_answers(each, self._contract, self._keys)]
        outgoing = [
            (answer.payload, {HEADER_MODEL: self._model, HEADER_SOURCE: format_source(self._origin, answer.message)})
            for answer in answers
        ]
        return [
            Poison(
                message=answers[index].message,
                column="",
                reason="a score that is too large",
                detail=f"{len(answers[index].payload):,} bytes must fit message.max.bytes",
            )
            for index in self._producer.produce(self._topic, outgoing)
        ]


class KafkaDeadLetters:
    """Produces poison unchanged, with the reason and its position as headers."""

    def __init__(self, producer: MessageProducer, address: FromKafka) -> None:
        self._producer, self._address = producer, address
        producer.check_topic(address.dead_letter_topic)

    def send(self, poison: Sequence[Poison]) -> None:
        """Produce poison and wait until the brokers have it; what is too large is sent without its payload.

        Raises:
            BrokerFault: The brokers do not take that either.
        """
        letters = [
            (
                each.message.payload,
                {**build_poison_headers(each), HEADER_SOURCE: format_source(self._address.topic, each.message)},
            )
            for each in poison
        ]
        topic = self._address.dead_letter_topic
        refused = self._producer.produce(topic, letters)
        if refused and self._producer.produce(topic, [(b"", letters[index][1]) for index in refused]):
            message = (
                f"The topic {topic!r} must take dead letters of some kilobytes, but refuses them for their size "
                "(message.max.bytes). Let it take larger ones, then call again: it resumes."
            )
            raise BrokerFault(message)


def format_source(log: str, message: Message) -> str:
    """Return the position of an input as a header, by which a reader knows a score that is produced twice."""
    return f"{log}/{message.position.partition}/{message.position.number}"
