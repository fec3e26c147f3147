"""What a person sees of a stream: a log line a minute, a progress artifact, and the report at its end."""

from __future__ import annotations

import contextvars
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal
from uuid import UUID

import numpy as np
import numpy.typing as npt
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import Field

from serving.errors import BadInput
from serving.model.contract import Frozen
from tasks.common.artifacts import Logger, server_may_fail
from tasks.stream.batcher import Dial
from tasks.stream.score import Scored

# Twenty to a decade, from a tenth of a millisecond to a day and more: what is told of them is right within 6 %.
_EDGES = 10.0 ** (np.arange(-80, 100) / 20)
_TOLD = np.array([0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 3600])
_TOLD_ROWS = np.array([1, 4, 16, 64, 256, 1024, 4096, 16384, 65536])
_POINTS_KEPT = 256
# Clocks of one network agree within this.
_SKEW_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Counts since the stream began."""

    messages: int = 0
    rows: int = 0
    rejects: int = 0
    buried: int = 0
    batches: int = 0
    events_ahead: int = 0


@dataclass(slots=True)
class Meter:
    """Counts what is emitted; its methods may be called from any thread.

    `points` are the last pairs of rows and seconds that micro-batches took.
    """

    lag: Callable[[], int | None]
    points: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_POINTS_KEPT))
    totals: Totals = field(default_factory=Totals)
    started: float = field(default_factory=time.monotonic)
    _latency: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(_EDGES) + 1, dtype=np.int64))
    _latency_sum: float = 0.0
    _sizes: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(_TOLD_ROWS) + 1, dtype=np.int64))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def emitted(self, scored: Sequence[Scored], buried: int, seconds: float, now: float) -> None:
        """Count micro-batches that are durable in the sink since `now`, in seconds since 1970.

        An event that is ahead of this clock has no latency, and is counted as such.
        """
        rows_B = np.array([each.rows for each in scored], dtype=np.int64)
        late_N = now - np.array([message.event_time for each in scored for message in each.messages])
        with self._lock:
            before = self.totals
            self.totals = Totals(
                messages=before.messages + len(late_N),
                rows=before.rows + int(rows_B.sum()),
                rejects=before.rejects + sum(each.rejects for each in scored),
                buried=before.buried + buried,
                batches=before.batches + len(scored),
                events_ahead=before.events_ahead + int((late_N < -_SKEW_SECONDS).sum()),
            )
            late_N = np.maximum(late_N, 0.0)
            self._latency += np.bincount(np.searchsorted(_EDGES, late_N), minlength=len(self._latency))
            self._latency_sum += float(late_N.sum())
            self._sizes += np.bincount(np.searchsorted(_TOLD_ROWS, rows_B), minlength=len(self._sizes))
            share = seconds / max(len(scored), 1)
            self.points.extend((each.rows, each.seconds + share) for each in scored if each.rows)

    def latency(self, quantile: float) -> float:
        """Return the seconds from event to emit that this share of the messages was within; 0 before the first."""
        with self._lock:
            up_to = np.cumsum(self._latency)
        if not up_to[-1]:
            return 0.0
        return float(_EDGES[min(int(np.searchsorted(up_to, quantile * up_to[-1])), len(_EDGES) - 1)])

    def families(self) -> list[Metric]:
        """Return everything as Prometheus has it."""
        with self._lock:
            totals, latency, latency_sum, sizes = (
                self.totals,
                self._latency.copy(),
                self._latency_sum,
                self._sizes.copy(),
            )
        counters = [
            ("messages", totals.messages, "Messages that were scored and emitted, or buried."),
            ("rows", totals.rows, "Rows that were read from them."),
            ("rejects", totals.rejects, "Rows without a prediction."),
            ("dead_letters", totals.buried, "Messages that went to the dead letters."),
            ("events_ahead", totals.events_ahead, "Messages whose event is ahead of this machine's clock."),
        ]
        told = np.searchsorted(_EDGES, _TOLD * 1.0001)
        edges = [(f"{edge:g}", float(latency[:at].sum())) for edge, at in zip(_TOLD, told, strict=True)]
        edges.append(("+Inf", float(latency.sum())))
        rows = [(f"{edge:g}", float(sizes[: at + 1].sum())) for at, edge in enumerate(_TOLD_ROWS)]
        rows.append(("+Inf", float(sizes.sum())))
        lag = self.lag()
        return [
            *(CounterMetricFamily(f"overnight_stream_{name}", words, value=value) for name, value, words in counters),
            HistogramMetricFamily(
                "overnight_stream_latency_seconds", "From event to emit.", buckets=edges, sum_value=latency_sum
            ),
            HistogramMetricFamily(
                "overnight_stream_batch_rows", "Rows of a micro-batch.", buckets=rows, sum_value=float(totals.rows)
            ),
            GaugeMetricFamily(
                "overnight_stream_lag_messages",
                "Messages that wait in the source; -1 while that is not known.",
                value=-1 if lag is None else lag,
            ),
        ]


class _Collector(Collector):
    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def collect(self) -> list[Metric]:
        return self._meter.families()


@contextmanager
def exposed(meter: Meter, port: int | None) -> Generator[int | None]:
    """Let Prometheus read the meter on loopback while the block runs; yields the port.

    Raises BadInput where the port is taken.
    """
    if port is None:
        yield None
        return
    registry = CollectorRegistry()
    registry.register(_Collector(meter))
    try:
        server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as error:
        message = f"metrics_port must be free on loopback, got {port}: {error.strerror}. Choose another one, or 0."
        raise BadInput(message) from error
    try:
        yield int(server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


_ARTIFACT_SECONDS = 5.0
_LOG_SECONDS = 60.0
_JOIN_SECONDS = 1.0


class StreamReport(Frozen):
    """What one call of stream_inference came to."""

    ended: Literal["limit", "idle", "stopped"] = Field(description="Why it ended.")
    model: str = Field(description="The pinned model version.")
    source: str
    sink: str
    messages: int = Field(description="Messages that were scored and emitted, or buried.")
    rows: int = Field(description="Rows that were read from them.")
    rejects: int = Field(description="Rows without a prediction.")
    dead_letters: int = Field(description="Messages that went to the dead letters.")
    events_ahead: int = Field(description="Messages whose event was ahead of this machine's clock.")
    seconds: float = Field(description="Wall-clock seconds from the first look for messages on.")
    latency_seconds_p50: float = Field(description="From event to emit, half of the messages.")
    latency_seconds_p99: float = Field(description="From event to emit, 99 in 100 messages.")
    lag: int | None = Field(description="Messages that wait in the source, as last known.")
    rows_per_batch: int = Field(description="Rows of a micro-batch at most, as last tuned.")
    wait_seconds: float = Field(description="How long a micro-batch waits to be full.")
    batch_seconds: float = Field(description="What a micro-batch of so many rows takes, as last fitted.")
    batch_size: int = Field(description="Rows of a forward pass.")
    slots: int
    engine: str = Field(description="How the passes were made.")

    @property
    def rows_per_second(self) -> float:
        """Rows by the wall-clock seconds."""
        return self.rows / max(self.seconds, 1e-9)

    def markdown(self) -> str:
        """Return the report as Markdown."""
        rows = "\n".join(f"| {name.replace('_', ' ')} | {_word(value)} |" for name, value in self)
        return (
            f"# Stream {self.source}\n\n| | |\n| --- | --- |\n{rows}\n| rows a second | {self.rows_per_second:,.0f} |\n"
        )


def _word(value: object) -> str:
    if value is None:
        return "not known"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


class StreamWatch:
    """Says how the stream goes from a thread of its own; a server that does not answer holds nothing up."""

    def __init__(self, meter: Meter, dial: Callable[[], Dial], logger: Logger) -> None:
        self._meter, self._dial, self._logger = meter, dial, logger
        self._artifact: UUID | None = None

    @contextmanager
    def watching(self) -> Generator[None]:
        """Refresh the artifact every 5 s and write a line a minute while the block runs."""
        done = threading.Event()
        # Artifacts find their flow run in the context, which threads do not inherit.
        run = contextvars.copy_context().run
        thread = threading.Thread(target=run, args=(self._watch, done), name="stream-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(_JOIN_SECONDS)

    def _watch(self, done: threading.Event) -> None:
        logged, before = time.monotonic(), self._meter.totals
        self._show()
        while not done.wait(_ARTIFACT_SECONDS):
            self._show()
            now = time.monotonic()
            if now - logged >= _LOG_SECONDS:
                self._logger.info("%s", line(before, self._meter, now - logged, self._dial()))
                logged, before = now, self._meter.totals
        self._show()

    def _show(self) -> None:
        with server_may_fail(self._logger):
            if self._artifact is None:
                made = create_progress_artifact(
                    self._percent(), key="stream-progress", description="Messages scored of those there"
                )
                self._artifact = made if isinstance(made, UUID) else None
            else:
                update_progress_artifact(self._artifact, progress=self._percent())

    def _percent(self) -> float:
        done, lag = self._meter.totals.messages, self._meter.lag() or 0
        return 100.0 * done / (done + lag) if done + lag else 0.0


def line(before: Totals, meter: Meter, seconds: float, dial: Dial) -> str:
    """Return the line that says what a stream has done for so many seconds."""
    now, lag = meter.totals, meter.lag()
    messages, batches = now.messages - before.messages, now.batches - before.batches
    rows = now.rows - before.rows
    return (
        f"{messages:,} messages, {rows:,} rows ({rows / seconds:,.0f} a second), lag "
        f"{'not known' if lag is None else f'{lag:,}'}, {rows / max(batches, 1):,.0f} rows a batch of at most "
        f"{dial.rows:,}, p99 {meter.latency(0.99):.3g} s, {now.buried - before.buried:,} dead letters, "
        f"{now.rejects - before.rejects:,} rejects, {now.events_ahead - before.events_ahead:,} events ahead of clock"
    )


def publish_report(report: StreamReport, logger: Logger) -> None:
    """Put the report among the flow run's artifacts."""
    with server_may_fail(logger):
        create_markdown_artifact(report.markdown(), key="stream-report", description=f"Stream {report.source}")


def publish_left(source: str, words: str, logger: Logger) -> None:
    """Say among the flow run's artifacts what ended it early."""
    with server_may_fail(logger):
        create_markdown_artifact(f"# Stream {source}\n\n{words}\n", key="stream-report", description=f"Stream {source}")
