"""The metrics of runs for Prometheus: those of batch runs and of nights, and how any process exposes its metrics.

A run is a short-lived process, so there are two ways. OVERNIGHT_METRICS_PORT opens a port on loopback while it runs.
OVERNIGHT_METRICS_FOLDER names the folder of node_exporter's textfile collector: as a run begins and as it ends, what it
counted is added to the file there. A stream has a port by its option `metrics_port`, a gateway has the page /metrics.

Labels are names of models, versions and destinations, never the key of a run.
"""

from __future__ import annotations

import fcntl
import functools
import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Metric, start_http_server
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from serving.errors import BadInput
from serving.redaction import hide_secrets
from tasks.common.artifacts import Logger

PORT_VARIABLE, FOLDER_VARIABLE = "OVERNIGHT_METRICS_PORT", "OVERNIGHT_METRICS_FOLDER"
TEXTFILE = "overnight_runs.prom"
_LOCK = ".overnight_runs.lock"
_PORT_MAX = 65_535

RunEnd = Literal["complete", "already complete", "interrupted", "paused", "failed", "refused"]
_RUN = ("model", "version", "destination")

Labels = tuple[tuple[str, str], ...]


class RunMetrics:
    """The metrics of the batch runs and nights of one process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        # What of each counter is in a textfile already.
        self.written: dict[tuple[str, Labels], float] = {}

        def counter(name: str, words: str, *labels: str) -> Counter:
            return Counter(f"overnight_{name}", words, (*_RUN, *labels), registry=registry)

        def gauge(name: str, words: str, *labels: str) -> Gauge:
            return Gauge(f"overnight_{name}", words, (*_RUN, *labels), registry=registry)

        self.rows = gauge("run_rows", "Rows of the run that is scored, or was last.")
        self.rows_done = gauge("run_rows_done", "Rows of that run that have their part, whichever worker wrote it.")
        self.chunks = gauge("run_chunks", "Chunks of that run.")
        self.chunks_left = gauge("run_chunks_left", "Chunks of that run that have no part yet.")
        self.start = gauge("run_start_timestamp_seconds", "When the last call of a run began.")
        self.rows_scored = counter("run_rows_scored", "Rows that this process scored.")
        self.rejects = counter("run_rows_rejected", "Rows of those that have no prediction.")
        self.chunks_scored = counter("run_chunks_scored", "Chunks that this process scored.")
        self.chunks_dropped = counter("run_chunks_dropped", "Chunks that were begun, and dropped for lack of time.")
        self.parts = counter("run_parts_put", "Parts that this process created.")
        self.bytes_read = counter("run_read_bytes", "Bytes of the rows that were read, decoded, in memory.")
        self.bytes_written = counter("run_written_bytes", "Bytes of the parts that were created.")
        self.step_seconds = counter("run_step_seconds", "Seconds by step.", "step")
        self.stage_seconds = counter("run_stage_seconds", "Seconds of scoring by stage, over all threads.", "stage")
        self.interruptions = counter("run_interruptions", "Notices that ended scoring, by their sender.", "sender")
        self.drain_seconds = counter("run_drain_seconds", "Seconds from such a notice to the end of the call.")
        self.finished = counter("run_finished", "Calls by how they ended.", "state")
        self.last_finished = gauge("run_finished_timestamp_seconds", "When a call last ended so.", "state")
        self.cost = counter(
            "run_cost_dollars", "Price of this machine for the seconds of calls, where OVERNIGHT_DOLLARS_PER_HOUR is."
        )
        self.night_finished = counter("night_finished", "Nights that ended with published predictions.")
        self.night_deadline = gauge("night_deadline_timestamp_seconds", "The deadline of the last night.")
        self.night_margin = gauge(
            "night_deadline_margin_seconds", "Seconds that the last night had left; negative where it was late."
        )
        self.night_machine_seconds = counter("night_machine_seconds", "Seconds of machines of nights.", "machine")
        self.night_cost = counter(
            "night_cost_dollars", "Price of those seconds, in the currency of the prices that nights are given."
        )
        self.night_cost_on_demand = counter(
            "night_on_demand_cost_dollars", "Price of the same work on on-demand machines alone."
        )
        self.night_moves = counter("night_moves", "Decisions that sent a night's work elsewhere.", "to")


@functools.cache
def get_run_metrics() -> RunMetrics:
    """Return the metrics of this process: its runs add to them one after another."""
    return RunMetrics()


class RunRecorder:
    """Adds what one call does to the metrics of its process, under the labels of its run once they are known."""

    def __init__(self, model: str, destination: str, metrics: RunMetrics | None = None, *, version: str = "") -> None:
        self.metrics = metrics or get_run_metrics()
        self._labels = model, version, hide_secrets(destination)
        self._began = time.time()
        self._steps: dict[str, float] = {}

    def begin(self, *, model: str, version: str, destination: str, rows: int, chunks: int) -> None:
        """Set the labels of the planned run, and its size."""
        self._labels = model, version, hide_secrets(destination)
        metrics, labels = self.metrics, self._labels
        metrics.rows.labels(*labels).set(rows)
        metrics.chunks.labels(*labels).set(chunks)
        metrics.start.labels(*labels).set(self._began)
        for each in (metrics.rows_scored, metrics.rejects, metrics.chunks_scored, metrics.parts):
            each.labels(*labels)
        for step, seconds in self._steps.items():
            metrics.step_seconds.labels(*labels, step).inc(seconds)
        self._steps = {}

    def note_step(self, step: str, seconds: float) -> None:
        """Add the seconds of a step."""
        if self._labels[1]:
            self.metrics.step_seconds.labels(*self._labels, step).inc(seconds)
        else:
            self._steps[step] = self._steps.get(step, 0.0) + seconds

    def note_progress(self, rows_done: int, chunks_left: int) -> None:
        """Set what the run has come to, whichever worker did it."""
        self.metrics.rows_done.labels(*self._labels).set(rows_done)
        self.metrics.chunks_left.labels(*self._labels).set(chunks_left)

    def note_scored(
        self,
        *,
        rows: int,
        rejects: int,
        chunks: int,
        chunks_dropped: int,
        parts: int,
        bytes_read: int,
        bytes_written: int,
        seconds: Mapping[str, float],
    ) -> None:
        """Add what was scored since the last time."""
        metrics, labels = self.metrics, self._labels
        figures = (
            (metrics.rows_scored, rows),
            (metrics.rejects, rejects),
            (metrics.chunks_scored, chunks),
            (metrics.chunks_dropped, chunks_dropped),
            (metrics.parts, parts),
            (metrics.bytes_read, bytes_read),
            (metrics.bytes_written, bytes_written),
        )
        for counter, amount in figures:
            if amount:
                counter.labels(*labels).inc(amount)
        for stage, taken in seconds.items():
            if taken:
                metrics.stage_seconds.labels(*labels, stage).inc(taken)

    def note_interruption(self, sender: str, drain_seconds: float) -> None:
        """Count a notice that ended scoring, and the seconds that the drain took."""
        self.metrics.interruptions.labels(*self._labels, sender).inc()
        self.metrics.drain_seconds.labels(*self._labels).inc(drain_seconds)

    def note_deadline(self, timestamp: float) -> None:
        """Set when the night that has begun must be done."""
        self.metrics.night_deadline.labels(*self._labels).set(timestamp)

    def note_night(
        self,
        *,
        margin_seconds: float,
        machine_seconds: Mapping[str, float],
        cost: float,
        cost_on_demand: float,
        moves: Iterable[str],
    ) -> None:
        """Add a night whose predictions are published: what was left to its deadline, its machines, and their price."""
        metrics, labels = self.metrics, self._labels
        metrics.night_finished.labels(*labels).inc()
        metrics.night_margin.labels(*labels).set(margin_seconds)
        metrics.night_cost.labels(*labels).inc(cost)
        metrics.night_cost_on_demand.labels(*labels).inc(cost_on_demand)
        for machine, seconds in machine_seconds.items():
            metrics.night_machine_seconds.labels(*labels, machine).inc(seconds)
        for to in moves:
            metrics.night_moves.labels(*labels, to).inc()

    def finish(self, state: RunEnd, dollars_per_hour: float | None) -> None:
        """Count how the call has ended, and what its machine cost where that is known."""
        now = time.time()
        self.metrics.finished.labels(*self._labels, state).inc()
        self.metrics.last_finished.labels(*self._labels, state).set(now)
        if dollars_per_hour is not None:
            self.metrics.cost.labels(*self._labels).inc((now - self._began) * dollars_per_hour / 3600)


@contextmanager
def expose_run_metrics(logger: Logger, metrics: RunMetrics | None = None) -> Generator[Callable[[], None]]:
    """Serve the metrics while the block runs, and write them to a file when it ends, as the environment asks for.

    Yields what writes the file meanwhile. A port that is taken, as by another run of this machine, and a file that
    can't be written are warnings.

    Args:
        logger: Gets the warnings, and the address of the port.
        metrics: Those of this process, where no others are given.

    Raises:
        BadInput: A variable is no port, or the folder does not exist.
    """
    metrics = metrics or get_run_metrics()
    port, folder = read_exposure(os.environ)
    with ExitStack() as stack:
        try:
            if port is not None:
                served = stack.enter_context(serve_registry(metrics.registry, port, PORT_VARIABLE))
                logger.info("Metrics at http://127.0.0.1:%s/metrics", served)
        except BadInput as error:
            logger.warning("%s The run goes on without.", error)
        try:
            yield lambda: _write_textfile(metrics, folder, logger)
        finally:
            _write_textfile(metrics, folder, logger)


def _write_textfile(metrics: RunMetrics, folder: Path | None, logger: Logger) -> None:
    if folder is None:
        return
    try:
        add_to_textfile(metrics, folder)
    except (OSError, ValueError) as error:
        logger.warning("The metrics must be written to %s, got: %s", folder / TEXTFILE, error)


def read_exposure(environment: Mapping[str, str]) -> tuple[int | None, Path | None]:
    """Return the port and the folder that the environment asks for. Raises BadInput."""
    text = environment.get(PORT_VARIABLE, "").strip()
    if text and not (text.isdecimal() and int(text) <= _PORT_MAX):
        message = f"{PORT_VARIABLE} must be a port from 0, which is any free one, to {_PORT_MAX}, got {text!r}."
        raise BadInput(message)
    folder = Path(environment[FOLDER_VARIABLE]) if environment.get(FOLDER_VARIABLE, "").strip() else None
    if folder is not None and not folder.is_dir():
        message = (
            f"{FOLDER_VARIABLE} must be the folder of node_exporter's textfile collector, got {folder}, which is none. "
            "Create it, or correct the variable."
        )
        raise BadInput(message)
    return int(text) if text else None, folder


@contextmanager
def serve_registry(registry: CollectorRegistry, port: int, option: str) -> Generator[int]:
    """Serve a registry for Prometheus on loopback while the block runs; yields the port.

    Raises:
        BadInput: The port is taken; the message names `option`.
    """
    try:
        server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as error:
        message = f"{option} must be free on loopback, got {port}: {error.strerror}. Choose another one, or 0."
        raise BadInput(message) from error
    try:
        yield int(server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def add_to_textfile(metrics: RunMetrics, folder: Path) -> Path:
    """Add the metrics to the file of a folder that node_exporter collects; return the file.

    The file is replaced at once, and several processes of a machine may write it. Counters go on from what the file
    has, gauges replace it. Series of other versions of a model for the same destination are left out.
    """
    path = folder / TEXTFILE
    with (folder / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = path.read_text() if path.exists() else ""
        before = {family.name: family for family in text_string_to_metric_families(text)}
        ours = list(metrics.registry.collect())
        versions = {_split_version(sample.labels) for family in ours for sample in family.samples}
        page = generate_latest(_Families(_merge(family, before.get(family.name), versions, metrics) for family in ours))
        temporary = folder / f".{TEXTFILE}.{os.getpid()}"
        temporary.write_bytes(page)
        temporary.replace(path)
    return path


class _Families:
    """Families of metrics, as a registry gives them to what renders them."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def _split_version(labels: Mapping[str, str]) -> tuple[str, str, str]:
    return labels["model"], labels["destination"], labels["version"]


def _merge(ours: Metric, before: Metric | None, versions: set[tuple[str, str, str]], metrics: RunMetrics) -> Metric:
    """Return a family with what the file had: counters added up by what is new, gauges as they are now."""
    counts = ours.type == "counter"
    name = f"{ours.name}_total" if counts else ours.name
    known = {_freeze(sample.labels): sample.value for sample in before.samples if sample.name == name} if before else {}
    # A call that was refused knows no version.
    current = {(model, destination) for model, destination, version in versions if version}
    values: dict[Labels, float] = {}
    for labels, value in known.items():
        series = _split_version(dict(labels))
        if series in versions or series[:2] not in current or not series[2]:
            values[labels] = value
    for sample in ours.samples:
        if sample.name == name:
            labels = _freeze(sample.labels)
            new = sample.value - metrics.written.get((name, labels), 0.0) if counts else sample.value
            values[labels] = new + (known.get(labels, 0.0) if counts else 0.0)
            metrics.written[name, labels] = sample.value
    merged = Metric(ours.name, ours.documentation, ours.type)
    for labels, value in sorted(values.items()):
        merged.add_sample(name, dict(labels), value)
    return merged


def _freeze(labels: Mapping[str, str]) -> Labels:
    return tuple(sorted(labels.items()))
