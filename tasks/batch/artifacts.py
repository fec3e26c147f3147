"""What a person sees of a run while it goes on and when it is done: terminal, Prefect artifacts."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.exceptions import PrefectHTTPStatusError
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from tasks.batch.report import BatchReport, Sample, data_uri

_ARTIFACT_SECONDS = 5.0
_LOG_SECONDS = 30.0

Logger = logging.Logger | logging.LoggerAdapter[logging.Logger]


class Watch:
    """Rows done so far, shown in the terminal or the log, and in the run's progress artifact."""

    def __init__(self, rows: int, rows_before: int, logger: Logger) -> None:
        self._rows, self._before, self._logger = rows, rows_before, logger
        self._start = time.perf_counter()
        self._shown = self._logged = self._start
        self.samples: list[Sample] = [(0.0, rows_before)]
        self._bar: Progress | None = None
        self._artifact: UUID | None = None
        with server_may_fail(logger):
            made = create_progress_artifact(progress=self._percent(rows_before), key="batch-progress")
            self._artifact = made if isinstance(made, UUID) else None

    @contextmanager
    def shown(self) -> Generator[None]:
        """Show a bar while the block runs, where there is a terminal."""
        console = Console(stderr=True)
        if not sys.stderr.isatty():
            yield
            return
        columns = (
            TextColumn("[bold]scoring"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.completed:,} of {task.total:,} rows"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as self._bar:
            self._bar.add_task("scoring", total=self._rows, completed=self._before, rate="")
            yield
            self.update(self._rows)

    def update(self, rows_done: int) -> None:
        """Take note of the rows that have their part by now."""
        now = time.perf_counter()
        elapsed = now - self._start
        if rows_done != self.samples[-1][1]:
            self.samples.append((elapsed, rows_done))
        rate = f"{(rows_done - self._before) / max(elapsed, 1e-9):,.0f} rows/s"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=rows_done, rate=rate)
        elif now - self._logged > _LOG_SECONDS:
            self._logged = now
            self._logger.info("%s of %s rows done, %s", f"{rows_done:,}", f"{self._rows:,}", rate)
        if self._artifact is not None and now - self._shown > _ARTIFACT_SECONDS:
            self._shown = now
            with server_may_fail(self._logger):
                update_progress_artifact(self._artifact, progress=self._percent(rows_done))

    def finish(self) -> None:
        """Set the artifact to what is done."""
        if self._artifact is not None:
            with server_may_fail(self._logger):
                update_progress_artifact(self._artifact, progress=self._percent(self.samples[-1][1]))

    def _percent(self, rows_done: int) -> float:
        return min(100.0, 100.0 * rows_done / self._rows)


def publish_artifacts(report: BatchReport, png: bytes, logger: Logger) -> None:
    """Put the report among the flow run's artifacts: table, markdown and plot."""
    with server_may_fail(logger):
        create_table_artifact(report.table(), key="batch-table", description=f"Run {report.run}")
        create_markdown_artifact(report.markdown(), key="batch-report", description=f"Run {report.run}")
        create_image_artifact(data_uri(png), key="batch-plot", description="Rows done over time")


@contextmanager
def server_may_fail(logger: Logger) -> Generator[None]:
    """Let a Prefect server that does not answer cost an artifact, never the run."""
    try:
        yield
    except (PrefectHTTPStatusError, httpx.HTTPError) as error:
        logger.warning("The Prefect server must take the run's artifacts, got: %s. The run goes on without.", error)
