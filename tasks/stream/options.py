"""What a person may say about a stream beside its ends; each has a default."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from serving.model.contract import ColumnPolicy, Frozen


class StreamOptions(Frozen):
    """Everything about a stream that has a default."""

    key_columns: tuple[str, ...] = Field(
        default=(), description="Columns of the input that are copied beside the scores, as they are."
    )
    input_columns: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="Which columns feed a tensor input of the model, by input name, where the model does not say it.",
    )
    policies: dict[str, ColumnPolicy] = Field(
        default_factory=dict,
        description="How columns are cast and what becomes of nulls, by column name; '*' stands for every other.",
    )
    freshness_seconds: float = Field(
        default=1.0,
        gt=0,
        le=3600,
        description="How old a message may be when its score is emitted. Rows and wait of batches are tuned to it.",
    )
    rows_per_batch: int | None = Field(
        default=None, ge=1, le=1 << 20, description="Rows of a micro-batch at most. Without: tuned to the freshness."
    )
    wait_seconds: float | None = Field(
        default=None,
        ge=0,
        le=3600,
        description="How long a micro-batch waits to be full. Without: tuned to the freshness.",
    )
    batch_size: int | None = Field(
        default=None, ge=1, le=1 << 24, description="Rows of one forward pass; for text models tokens. Without: tuned."
    )
    slots: int | None = Field(default=None, ge=1, le=1024, description="Streams of forward passes side by side.")
    bfloat16_tolerance: float | None = Field(
        default=None,
        gt=0,
        description="Let passes run in bfloat16 where that is faster and no prediction of a sample differs from "
        "float32's by more than this.",
    )
    in_flight: int = Field(
        default=8192, ge=1, le=1 << 20, description="Messages that may be taken and not yet acknowledged, at most."
    )
    in_flight_mb: int = Field(
        default=64,
        ge=1,
        le=1 << 16,
        description="MiB of messages in hand, at most. A table holds keys and scores of its next part beside.",
    )
    idle_seconds: float | None = Field(
        default=None, gt=0, description="End after so many seconds without a message. Without: never."
    )
    limit: int | None = Field(default=None, ge=1, description="End after so many messages. Without: never.")
    poison_in_a_row: int = Field(
        default=1000,
        ge=1,
        description="End when so many messages in a row could not be scored: that is the model or the topic, not they.",
    )
    allow_pickle: bool = Field(
        default=False, description="Load a pickled model. Unpickling runs any code in it: only for models you trust."
    )
    metrics_port: int | None = Field(
        default=None,
        ge=0,
        le=65_535,
        description="Port on loopback where Prometheus reads the metrics; 0 for any free one. Without: none.",
    )
    notices: Literal["none", "interruption", "rebalance"] = Field(
        default="interruption",
        description="Which notices of the machine's cloud (AWS, GCP, Azure) end the stream early, to be resumed.",
    )
    notice_seconds: float = Field(
        default=30.0,
        ge=1,
        le=86_400,
        description="Seconds from SIGTERM until the process is killed, by the rule of who sends it.",
    )

    @property
    def in_flight_bytes(self) -> int:
        """`in_flight_mb` in bytes: half of them wait to be taken into batches, the other half are in batches."""
        return self.in_flight_mb << 20
