"""What a person sees of a stream: a log line a minute, a progress artifact, and the report at its end."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Literal
from uuid import UUID

from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from pydantic import Field

from serving.model.contract import Frozen
from tasks.batch.artifacts import Logger, server_may_fail
from tasks.stream.meter import Meter, Totals
from tasks.stream.microbatch import Dial

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
