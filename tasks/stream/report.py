"""The counts of a stream, its progress in the log and among the artifacts, and the report at its end.

Shapes: N messages, B micro-batches.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from serving.model.batching import BatchingConfig
from serving.model.contract import Frozen
from tasks.common.artifacts import Logger, ProgressArtifact, make_markdown, put_artifacts
from tasks.stream.score import ScoredBatch

# Twenty bins per decade, from a tenth of a millisecond to more than a day: a quantile is right within 6 %.
_BIN_EDGES = 10.0 ** (np.arange(-80, 100) / 20)
_LATENCY_BUCKETS = np.array([0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 3600])
_ROWS_BUCKETS = np.array([1, 4, 16, 64, 256, 1024, 4096, 16384, 65536])
_TIMINGS_KEPT = 256
# The clocks of one network differ by less.
_CLOCK_SKEW_SECONDS = 1.0
_ARTIFACT_SECONDS = 5.0
_LOG_SECONDS = 60.0
_JOIN_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Counts since the stream began."""

    messages: int = 0
    rows: int = 0
    rejects: int = 0
    dead_lettered: int = 0
    batches: int = 0
    events_ahead: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamCounts:
    """Counts since the stream began, of one moment. Buckets say of how many the value was at most their bound."""

    totals: Totals
    latency_sum: float
    latency_buckets: tuple[tuple[str, float], ...]
    rows_buckets: tuple[tuple[str, float], ...]


@dataclass(eq=False)
class StreamMetrics:
    """Counts what is emitted. Its methods may be called from any thread.

    `batch_timings` holds the rows and seconds of recent micro-batches.
    """

    lag: Callable[[], int | None]
    batch_timings: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_TIMINGS_KEPT))
    totals: Totals = field(default_factory=Totals)
    _latency_bins: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(_BIN_EDGES) + 1, dtype=np.int64))
    _latency_sum: float = 0.0
    _rows_bins: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(_ROWS_BUCKETS) + 1, dtype=np.int64))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count_emitted(self, scored: Sequence[ScoredBatch], dead_lettered: int, seconds: float, now: float) -> None:
        """Count micro-batches that the sink holds.

        An event that is ahead of this machine's clock is counted as such, and has a latency of 0.

        Args:
            scored: The micro-batches.
            dead_lettered: How many of their messages went to the dead letters.
            seconds: How long it took to emit and acknowledge them.
            now: The time at which they were durable, in seconds since 1970.
        """
        rows_B = np.array([each.rows for each in scored], dtype=np.int64)
        latency_N = now - np.array([message.event_time for each in scored for message in each.messages])
        with self._lock:
            before = self.totals
            self.totals = Totals(
                messages=before.messages + len(latency_N),
                rows=before.rows + int(rows_B.sum()),
                rejects=before.rejects + sum(each.rejects for each in scored),
                dead_lettered=before.dead_lettered + dead_lettered,
                batches=before.batches + len(scored),
                events_ahead=before.events_ahead + int((latency_N < -_CLOCK_SKEW_SECONDS).sum()),
            )
            latency_N = np.maximum(latency_N, 0.0)
            bins_N = np.searchsorted(_BIN_EDGES, latency_N)
            self._latency_bins += np.bincount(bins_N, minlength=len(self._latency_bins))
            self._latency_sum += float(latency_N.sum())
            bins_B = np.searchsorted(_ROWS_BUCKETS, rows_B)
            self._rows_bins += np.bincount(bins_B, minlength=len(self._rows_bins))
            share = seconds / max(len(scored), 1)
            self.batch_timings.extend((each.rows, each.seconds + share) for each in scored if each.rows)

    def latency(self, quantile: float) -> float:
        """Return the seconds from event to emit that this share of the messages was within; 0 before the first."""
        with self._lock:
            cumulated = np.cumsum(self._latency_bins)
        if not cumulated[-1]:
            return 0.0
        index = int(np.searchsorted(cumulated, quantile * cumulated[-1]))
        return float(_BIN_EDGES[min(index, len(_BIN_EDGES) - 1)])

    def read_counts(self) -> StreamCounts:
        """Return the counts of this moment."""
        with self._lock:
            totals, latency_sum = self.totals, self._latency_sum
            latency_bins, rows_bins = self._latency_bins.copy(), self._rows_bins.copy()
        # A bucket's bound may be a rounding error below the edge of a bin.
        ends = np.searchsorted(_BIN_EDGES, _LATENCY_BUCKETS * 1.0001)
        latency = [
            (f"{bound:g}", float(latency_bins[:end].sum())) for bound, end in zip(_LATENCY_BUCKETS, ends, strict=True)
        ]
        rows = [(f"{bound:g}", float(rows_bins[: index + 1].sum())) for index, bound in enumerate(_ROWS_BUCKETS)]
        return StreamCounts(
            totals=totals,
            latency_sum=latency_sum,
            latency_buckets=(*latency, ("+Inf", float(latency_bins.sum()))),
            rows_buckets=(*rows, ("+Inf", float(rows_bins.sum()))),
        )


class ProgressReporter:
    """Reports how a stream goes from a thread of its own, so that a slow Prefect server delays nothing."""

    def __init__(self, metrics: StreamMetrics, batching: Callable[[], BatchingConfig], logger: Logger) -> None:
        self._metrics, self._batching, self._logger = metrics, batching, logger
        self._artifact = ProgressArtifact("stream-progress", "Messages scored of those there", logger)

    @contextmanager
    def report_progress(self) -> Generator[None]:
        """Update the artifact every 5 s and log a line every minute while the block runs."""
        done = threading.Event()
        # Artifacts find their flow run in the context, which threads do not inherit.
        run = contextvars.copy_context().run
        thread = threading.Thread(target=run, args=(self._report, done), name="stream-progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(_JOIN_SECONDS)

    def _report(self, done: threading.Event) -> None:
        logged, before = time.monotonic(), self._metrics.totals
        self._update_artifact()
        while not done.wait(_ARTIFACT_SECONDS):
            self._update_artifact()
            now = time.monotonic()
            if now - logged >= _LOG_SECONDS:
                self._logger.info("%s", format_progress(before, self._metrics, now - logged, self._batching()))
                logged, before = now, self._metrics.totals
        self._update_artifact()

    def _update_artifact(self) -> None:
        done, lag = self._metrics.totals.messages, self._metrics.lag() or 0
        percent = 100.0 * done / (done + lag) if done + lag else 0.0
        self._artifact.show(percent)


def format_progress(before: Totals, metrics: StreamMetrics, seconds: float, config: BatchingConfig) -> str:
    """Return the log line of what a stream has done in so many seconds."""
    now, lag = metrics.totals, metrics.lag()
    messages, batches = now.messages - before.messages, now.batches - before.batches
    rows = now.rows - before.rows
    return (
        f"{messages:,} messages, {rows:,} rows ({rows / seconds:,.0f} a second), lag "
        f"{'not known' if lag is None else f'{lag:,}'}, {rows / max(batches, 1):,.0f} rows a batch of at most "
        f"{config.batch_size_max:,}, p99 {metrics.latency(0.99):.3g} s, "
        f"{now.dead_lettered - before.dead_lettered:,} dead letters, {now.rejects - before.rejects:,} rejects, "
        f"{now.events_ahead - before.events_ahead:,} events ahead of clock"
    )


class StreamReport(Frozen):
    """The result of one call of stream_inference."""

    ended: Literal["limit", "idle", "stopped"] = Field(description="Why it ended.")
    model: str = Field(description="The pinned model version.")
    source: str
    sink: str
    messages: int = Field(description="Messages that were scored and emitted, or went to the dead letters.")
    rows: int = Field(description="Rows that were read from them.")
    rejects: int = Field(description="Rows without a prediction.")
    dead_letters: int = Field(description="Messages that went to the dead letters.")
    events_ahead: int = Field(description="Messages whose event was ahead of this machine's clock.")
    seconds: float = Field(description="Wall-clock seconds since it began to fetch messages.")
    latency_seconds_p50: float = Field(description="From event to emit, the median.")
    latency_seconds_p99: float = Field(description="From event to emit, 99 in 100 messages are within it.")
    lag: int | None = Field(description="Messages that wait in the source, as last known.")
    rows_per_batch: int = Field(description="The most rows of a micro-batch, as last tuned.")
    wait_seconds: float = Field(description="How long a micro-batch waits to be full.")
    batch_seconds: float = Field(description="How long a micro-batch of so many rows takes, as last fitted.")
    batch_size: int = Field(description="Rows of a forward pass.")
    slots: int
    engine: str = Field(description="How the passes were made.")

    @property
    def rows_per_second(self) -> float:
        """Rows per wall-clock second."""
        return self.rows / max(self.seconds, 1e-9)

    def markdown(self) -> str:
        """Return the report as Markdown."""
        rows = "\n".join(f"| {name.replace('_', ' ')} | {_format_value(value)} |" for name, value in self)
        return (
            f"# Stream {self.source}\n\n| | |\n| --- | --- |\n{rows}\n| rows a second | {self.rows_per_second:,.0f} |\n"
        )


def _format_value(value: object) -> str:
    if value is None:
        return "not known"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def publish_report(source: str, markdown: str, logger: Logger) -> None:
    """Create the report among the flow run's artifacts."""
    put_artifacts([make_markdown("stream-report", markdown, f"Stream {source}")], logger)
