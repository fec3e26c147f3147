"""What a user sets of a stream: its source and sink, without secrets, and options that have defaults."""

from __future__ import annotations

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, ConfigDict, Field, JsonValue

from serving.model.contract import ColumnPolicy, Frozen
from serving.redaction import holds_secret

# NATS forbids these characters in the names of streams and consumers, and splits a subject at its dots.
_NAME_PATTERN = r"^[^\s.*>/\\]{1,200}$"
_SUBJECT_PATTERN = r"^[^\s]{1,500}$"
_TOPIC_PATTERN = r"^[A-Za-z0-9._-]{1,249}$"


def _refuse_secrets(advice: str) -> AfterValidator:
    def check(address: str) -> str:
        hosts = urlsplit(address).netloc if "://" in address else address
        if holds_secret(address) or ("@" in hosts and "://" in address) or re.search(r"[^/\s]+:[^/\s]+@", address):
            message = (
                "must not hold a user or a password, since parameters are shown to everyone who sees the flow run. "
                f"{advice} instead"
            )
            raise ValueError(message)
        return address

    return AfterValidator(check)


NatsUrl = Annotated[
    str,
    Field(pattern=r"^(nats|tls)://[^\s]+$"),
    _refuse_secrets("Set NATS_USER and NATS_PASSWORD, NATS_TOKEN or NATS_CREDS in the environment"),
]
KafkaServers = Annotated[
    str, Field(min_length=1), _refuse_secrets("Write them into the file that OVERNIGHT_KAFKA_CONFIG names")
]
Destination = Annotated[str, Field(min_length=1), _refuse_secrets("Give them as boto3 takes them: a role or a profile")]
# A refused value may be a secret.
_HIDE_INPUT = ConfigDict(hide_input_in_errors=True)
_ACCEPT_LOSS = Field(
    default=False,
    description="Go on where messages were deleted, by retention or by hand, before they were read. By default that "
    "is an error, which says how many.",
)


class FromNats(Frozen):
    """A stream of NATS JetStream, read by a durable consumer, which several scorers may share."""

    model_config = _HIDE_INPUT
    kind: Literal["nats"] = Field(default="nats", description="Marks this kind of source.")
    url: NatsUrl = Field(
        default="nats://127.0.0.1:4222",
        description="Address of the server. User, password, token or credentials come from NATS_USER, NATS_PASSWORD, "
        "NATS_TOKEN or NATS_CREDS.",
    )
    stream: str = Field(pattern=_NAME_PATTERN, description="Name of the stream, which must exist.")
    subject: str | None = Field(
        default=None, pattern=_SUBJECT_PATTERN, description="Only messages of this subject. Default: all of the stream."
    )
    consumer: str = Field(
        default="overnight",
        pattern=_NAME_PATTERN,
        description="Name of the durable consumer, created where it is missing. The stream is resumed by it, and it is "
        "part of every score's message id.",
    )
    ack_wait_seconds: float = Field(
        default=30.0,
        ge=1,
        le=3600,
        description="Seconds after which the unacknowledged messages of a lost scorer are delivered again. A living "
        "scorer extends the time for as long as it needs.",
    )
    max_deliver: int = Field(
        default=20,
        ge=3,
        le=1000,
        description="From this delivery on a message goes to the dead letters unscored: it may be what ends the "
        "scorer.",
    )
    dead_letters: str | None = Field(
        default=None,
        pattern=_SUBJECT_PATTERN,
        description="Subject for messages that can't be scored. Default: overnight.dead.STREAM.CONSUMER, in the "
        "stream OVERNIGHT_DEAD, which is created where it is missing.",
    )
    accept_loss: bool = _ACCEPT_LOSS

    @property
    def redelivery_seconds_max(self) -> float:
        """The longest time from the first delivery of a message to the last."""
        return self.ack_wait_seconds * self.max_deliver

    @property
    def dead_letter_subject(self) -> str:
        """The subject of the dead letters."""
        return self.dead_letters or f"overnight.dead.{self.stream}.{self.consumer}"


class FromKafka(Frozen):
    """A topic of Kafka, read by a consumer group."""

    model_config = _HIDE_INPUT
    kind: Literal["kafka"] = Field(default="kafka", description="Marks this kind of source.")
    servers: KafkaServers = Field(
        default="127.0.0.1:9092",
        description="bootstrap.servers. All other settings of the client, with passwords, are in the file that "
        "OVERNIGHT_KAFKA_CONFIG names, as lines NAME=VALUE.",
    )
    topic: str = Field(pattern=_TOPIC_PATTERN, description="Name of the topic, which must exist.")
    group: str = Field(default="overnight", min_length=1, description="Consumer group, where the stream is resumed.")
    dead_letters: str | None = Field(
        default=None,
        pattern=_TOPIC_PATTERN,
        description="Topic for messages that can't be scored. Default: TOPIC.dead.",
    )
    topic_id: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_-]{1,64}$",
        description="The topic's id, which tells it from a later topic of the same name. Default: the brokers' own. "
        "Brokers without ids (before Kafka 2.8) need a word here, and another one whenever the topic is made again.",
    )
    accept_loss: bool = _ACCEPT_LOSS

    @property
    def dead_letter_topic(self) -> str:
        """The topic of the dead letters."""
        return self.dead_letters or f"{self.topic}.dead"


class ToNats(Frozen):
    """A subject of NATS JetStream: one score message for each input message, exactly once."""

    model_config = _HIDE_INPUT
    kind: Literal["nats"] = Field(default="nats", description="Marks this kind of sink.")
    url: NatsUrl | None = Field(default=None, description="Address of the server. Default: the source's.")
    subject: str = Field(pattern=r"^[^\s*>]{1,500}$", description="Subject that every score is published to.")
    stream: str | None = Field(
        default=None,
        pattern=_NAME_PATTERN,
        description="Stream that keeps the scores, created for the subject where it is missing. Default: the stream "
        "that takes the subject.",
    )


class ToKafka(Frozen):
    """A topic of Kafka: one score message for each input message, at least once."""

    model_config = _HIDE_INPUT
    kind: Literal["kafka"] = Field(default="kafka", description="Marks this kind of sink.")
    servers: KafkaServers | None = Field(default=None, description="bootstrap.servers. Default: the source's.")
    topic: str = Field(pattern=_TOPIC_PATTERN, description="Topic that every score is produced to.")


class ToParts(Frozen):
    """A table of Parquet parts, as of a batch run, which open_predictions reads; exact for every source."""

    model_config = _HIDE_INPUT
    kind: Literal["parts"] = Field(default="parts", description="Marks this kind of sink.")
    destination: Destination = Field(description="A folder, or an s3:// prefix.")
    name: str = Field(
        default="stream",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,47}$",
        description="Name of the table below the destination. It belongs to one stream.",
    )
    rows_per_part: int = Field(default=1_000_000, ge=1, le=1 << 28, description="A part is written at so many rows,")
    seconds_per_part: float = Field(
        default=60.0, gt=0, le=86_400, description="or when its first row is so many seconds old."
    )


AnySource = Annotated[FromNats | FromKafka, Field(discriminator="kind")]
AnySink = Annotated[ToNats | ToKafka | ToParts, Field(discriminator="kind")]


class StreamOptions(Frozen):
    """Options of a stream; all have defaults."""

    key_columns: tuple[str, ...] = Field(
        default=(), description="Columns of the input that are copied beside the scores, unchanged."
    )
    input_columns: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="Which columns feed a tensor input of the model, by input name, where the model does not say it.",
    )
    policies: dict[str, ColumnPolicy] = Field(
        default_factory=dict,
        description="How columns are cast, and what is done with nulls, by column name; '*' is every other column.",
    )
    params: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="Values of params in the model's signature, by name. One that is not given has its default there.",
    )
    freshness_seconds: float = Field(
        default=1.0,
        gt=0,
        le=3600,
        description="How old a message may be when its score is emitted. Micro-batches are tuned to it.",
    )
    rows_per_batch: int | None = Field(
        default=None, ge=1, le=1 << 20, description="The most rows of a micro-batch. Default: tuned to the freshness."
    )
    wait_seconds: float | None = Field(
        default=None,
        ge=0,
        le=3600,
        description="How long a micro-batch waits to be full. Default: tuned to the freshness.",
    )
    batch_size: int | None = Field(
        default=None, ge=1, le=1 << 24, description="Rows of one forward pass; for text models tokens. Default: tuned."
    )
    slots: int | None = Field(default=None, ge=1, le=1024, description="Forward passes at a time. Default: tuned.")
    bfloat16_tolerance: float | None = Field(
        default=None,
        gt=0,
        description="Run passes in bfloat16 where that is faster, and no prediction of a sample differs from float32 "
        "by more than this.",
    )
    in_flight: int = Field(
        default=8192, ge=1, le=1 << 20, description="The most messages that are taken and not yet acknowledged."
    )
    in_flight_mb: int = Field(
        default=64,
        ge=1,
        le=1 << 16,
        description="The most MiB of messages that are taken. A table also holds keys and scores of its next part.",
    )
    idle_seconds: float | None = Field(
        default=None, gt=0, description="End after so many seconds without a message. Default: never."
    )
    limit: int | None = Field(default=None, ge=1, description="End after so many messages. Default: never.")
    poison_in_a_row: int = Field(
        default=1000,
        ge=1,
        description="End when so many messages in a row can't be scored: then the model or the topic is at fault.",
    )
    allow_pickle: bool = Field(
        default=False, description="Load a pickled model. Unpickling runs any code in it: only for models you trust."
    )
    metrics_port: int | None = Field(
        default=None,
        ge=0,
        le=65_535,
        description="Port on loopback where Prometheus reads the metrics; 0 for any free port. Default: none.",
    )
    notices: Literal["none", "interruption", "rebalance"] = Field(
        default="interruption",
        description="Which notices of the cloud (AWS, GCP, Azure) end the stream early. It can be resumed.",
    )
    notice_seconds: float = Field(
        default=30.0,
        ge=1,
        le=86_400,
        description="Seconds from SIGTERM until the process is killed, as whatever sends it does.",
    )

    @property
    def in_flight_bytes(self) -> int:
        """`in_flight_mb` in bytes. Half of them is for messages that wait, and half for those in micro-batches."""
        return self.in_flight_mb << 20
