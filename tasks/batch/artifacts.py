"""What a person sees of a batch run while it goes on and when it is done: the terminal, Prefect artifacts."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from serving.errors import OvernightError, StorageFault
from tasks.batch.comparison_plot import tabulate_comparison
from tasks.batch.drift import compare_tables, tabulate_drift
from tasks.batch.drift_plot import draw_drift
from tasks.batch.gate_records import FoundBaseline, JudgedRun
from tasks.batch.manifest import Manifest
from tasks.batch.plan import Plan
from tasks.batch.prediction_sample import PredictionSample, read_sample
from tasks.batch.report import BatchReport, Sample
from tasks.common.artifacts import (
    Logger,
    ProgressArtifact,
    make_image,
    make_markdown,
    make_table,
    put_artifacts,
    read_artifact,
    start_thread,
)
from tasks.storage import Storage

SUMMARY_KEY = "batch-summary"
# In the summary of a flow run that has scored what is published.
_PUBLISHED = "| status | scored |"
_FINDING_SHOWN = {"severity", "outcome", "subject", "text", "rule"}
_ARTIFACT_SECONDS = 5.0
_LOG_SECONDS = 30.0
_JOIN_SECONDS = 1.0
_POLL_SECONDS_MIN, _POLL_SECONDS_MAX = 0.05, 2.0
# A count lists all parts. Of a large run that takes seconds, and a thousand workers may count.
_COUNT_SECONDS_SHORT, _COUNTING_SHARE_MAX = 0.25, 1 / 60


class ProgressWatch:
    """Shows the rows done so far, by the parts that exist: in the terminal or the log, and in an artifact.

    `count_rows_done` counts the rows that have their part, whichever worker wrote it.
    """

    def __init__(self, rows: int, count_rows_done: Callable[[], int], logger: Logger) -> None:
        self._rows, self._count_rows_done, self._logger = rows, count_rows_done, logger
        self._rows_before = count_rows_done()
        self._start = self._shown = self._logged = time.perf_counter()
        self.samples: list[Sample] = [(0.0, self._rows_before)]
        self._count_seconds = 0.0
        self._bar: Progress | None = None
        self._artifact = ProgressArtifact("batch-progress", "Rows with a part", logger)
        self.show()

    @contextmanager
    def watching(self) -> Generator[None]:
        """Watch from a thread of its own while the block runs; a bar is shown where there is a terminal."""
        done = threading.Event()
        with self._show_bar():
            thread = start_thread("watch", lambda: self._watch(done))
            try:
                yield
            finally:
                done.set()
                # A server that does not answer may hold the thread for a minute; nothing waits for its artifact.
                thread.join(_JOIN_SECONDS)
                self._update()

    def _watch(self, done: threading.Event) -> None:
        while not done.wait(self._pause()):
            self._update()
            if time.perf_counter() - self._shown > _ARTIFACT_SECONDS:
                self._shown = time.perf_counter()
                self.show()

    def _pause(self) -> float:
        elapsed = time.perf_counter() - self._start
        pause = min(max(elapsed / 50, _POLL_SECONDS_MIN), _POLL_SECONDS_MAX)
        is_short = self._count_seconds < _COUNT_SECONDS_SHORT
        return pause if is_short else max(pause, self._count_seconds / _COUNTING_SHARE_MAX)

    @contextmanager
    def _show_bar(self) -> Generator[None]:
        if not sys.stderr.isatty():
            yield
            return
        columns = (
            TextColumn("[bold]scoring"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.completed:,} of {task.total:,} rows, {task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as self._bar:
            self._bar.add_task("scoring", total=self._rows, completed=self._rows_before, rate="")
            yield
        self._bar = None

    def _update(self) -> None:
        began = time.perf_counter()
        try:
            rows_done = self._count_rows_done()
        except StorageFault as error:
            self._logger.warning("Progress is not known for now: %s", error)
            return
        now = time.perf_counter()
        self._count_seconds = now - began
        if rows_done != self.rows_done:
            self.samples.append((now - self._start, rows_done))
        rate = f"{(rows_done - self._rows_before) / max(now - self._start, 1e-9):,.0f} rows/s"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=rows_done, rate=rate)
        elif now - self._logged > _LOG_SECONDS:
            self._logged = now
            self._logger.info("%s of %s rows done, %s", f"{rows_done:,}", f"{self._rows:,}", rate)

    @property
    def rows_done(self) -> int:
        """The rows that had their part when they were last counted."""
        return self.samples[-1][1]

    def show(self) -> None:
        """Set the progress artifact to the rows last counted."""
        self._artifact.show(min(100.0, 100.0 * self.rows_done / max(self._rows, 1)))


def publish_artifacts(
    report: BatchReport, rows: Sequence[dict[str, Any]], distributions: bytes | None, logger: Logger
) -> None:
    """Put a published run among the flow run's artifacts, each fact once.

    Args:
        report: What the run came to: the summary, and the rejects by reason where there are any.
        rows: Some rows with their predictions.
        distributions: The picture of how the predictions are distributed, if there is one.
        logger: That of the flow run.
    """
    artifacts = [make_markdown(SUMMARY_KEY, report.summary(), f"Run {report.run}")]
    if rows:
        artifacts.append(make_table("batch-sample", rows, f"{len(rows)} of {report.rows:,} rows"))
    if distributions is not None:
        artifacts.append(make_image("batch-distributions", distributions, "How the predictions are distributed"))
    if report.rejects:
        rejects = [
            {"column": count.column or "(the model)", "reason": count.reason, "rows": count.rows}
            for count in report.rejects
        ]
        artifacts.append(make_table("batch-rejects", rejects, f"{report.rows_rejected:,} rows without a prediction"))
    put_artifacts(artifacts, logger)


def publish_drift(judged: JudgedRun, run: str, logger: Logger, *, is_drawn: bool = True) -> None:
    """Put what a gate says among the flow run's artifacts, and the columns beside the baseline's as table and plot.

    A plot names frequent values of columns.
    """
    artifacts, title = [], judged.title
    if judged.findings:
        rows = [each.model_dump(mode="json", include=_FINDING_SHOWN) for each in judged.findings]
        artifacts.append(make_table("batch-gate", rows, f"What the gate says of run {run}, beside {title}"))
    if isinstance(judged.baseline, FoundBaseline):
        drifts = compare_tables(judged.statistics, judged.baseline.statistics)
        artifacts.append(make_table("batch-drift", tabulate_drift(drifts), f"Columns of run {run} beside {title}"))
        if is_drawn and (png := draw_drift(drifts, run, title)) is not None:
            artifacts.append(make_image("batch-drift-plot", png, f"The columns that moved most since {title}"))
    put_artifacts(artifacts, logger)


def publish_comparison(report: BatchReport, png: bytes | None, logger: Logger) -> None:
    """Put the challengers of a run among the flow run's artifacts, beside its model: a table and a picture."""
    title = f"{report.model} and its challengers"
    artifacts = [make_table("batch-challengers", tabulate_comparison(report.challengers), title)]
    if png is not None:
        artifacts.append(make_image("batch-challengers-plot", png, title))
    put_artifacts(artifacts, logger)


def publish_complete(report: BatchReport, logger: Logger) -> None:
    """Put a run that was found complete among the flow run's artifacts.

    A retry may find the run that an earlier attempt of the same flow run has published: the summary of that stays.
    """
    if (shown := read_artifact(SUMMARY_KEY, logger)) is None or _PUBLISHED not in shown:
        publish_artifacts(report, [], None, logger)


def find_sample(storage: Storage, manifest: Manifest, plan: Plan, logger: Logger) -> PredictionSample | None:
    """Read the sample of a published run; None, with a warning, where its parts can't be read now."""
    try:
        return read_sample(storage, manifest, plan.contract)
    except OvernightError as error:
        logger.warning("The parts of run %s must be readable for a sample, got: %s", plan.run, error)
        return None


def publish_interrupted(run: str, rows_done: int, rows: int, message: str, logger: Logger) -> None:
    """Publish what ended the flow run early, and what is left, where the summary takes its place later."""
    table = f"| | |\n| --- | --- |\n| rows done | {rows_done:,} |\n| rows left | {rows - rows_done:,} |"
    put_artifacts([make_markdown(SUMMARY_KEY, f"# Run {run}\n\n{message}\n\n{table}\n", f"Run {run}")], logger)
