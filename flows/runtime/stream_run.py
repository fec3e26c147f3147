"""One call's run over open connections: tuned, scored by pipelines, and ended by notices and Ctrl-C."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

from prefect.exceptions import TerminationSignal

from flows.runtime.interruption import ignore_repeated_sigint, take_sigterm_as_notice
from flows.runtime.steps import keep_torch_threads
from serving.extras import import_extra
from serving.machine import freeze_objects
from serving.model.interface import Halted, Tunable
from serving.model.registry import Resolved
from tasks.common.artifacts import Logger
from tasks.spot.drain import Drain
from tasks.stream.batcher import StreamLimits
from tasks.stream.connections import Connections, StreamAbandoned
from tasks.stream.decode import Decoder
from tasks.stream.options import StreamOptions
from tasks.stream.pipeline import Pipeline
from tasks.stream.report import ProgressReporter, StreamMetrics
from tasks.stream.score import MicroScorer
from tasks.stream.tuning import EngineSettings, LiveBatching, SampledSource, choose_settings

# Ctrl-C does not end a wait without a time-out: Polars' signal handler restarts system calls.
_POLL_SECONDS = 0.2


@dataclass(slots=True, kw_only=True)
class StreamRun:
    """One call's run over a stream.

    `drain` takes notices of an interruption. `give_up` ends every wait where no time is left. Afterwards
    `ended_by_notice` says that a notice ended the run, and `interrupted` that Ctrl-C did.
    """

    resolved: Resolved
    model: Tunable
    decoder: Decoder
    options: StreamOptions
    drain: Drain = field(default_factory=Drain)
    give_up: threading.Event = field(default_factory=threading.Event)
    ended_by_notice: bool = False
    interrupted: bool = False
    ended: Literal["limit", "idle", "stopped"] = "stopped"
    seconds: float = 0.0
    lag: int | None = None
    metrics: StreamMetrics = field(default_factory=lambda: StreamMetrics(lag=lambda: None))
    settings: EngineSettings = field(init=False)
    batching: LiveBatching = field(init=False)
    _stop: threading.Event = field(default_factory=threading.Event)
    _deadline: float = float("inf")

    def __post_init__(self) -> None:
        model, options = self.model, self.options
        self._use_settings(
            EngineSettings(
                model=model,
                batch_size=options.batch_size or model.batch_size,
                slots=options.slots or model.slots,
                pass_timings=(),
                tuning=None,
            )
        )

    def _use_settings(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.batching = LiveBatching(self.options, settings.pass_timings, self.metrics)

    def run(self, connections: Connections, logger: Logger) -> None:
        """Run until the stream ends: at its limit, idle, by a notice, or by Ctrl-C.

        Raises:
            Exception: What any thread of the pipeline raised.
        """
        start = time.monotonic()
        source = SampledSource(connections.source)
        self.metrics.lag = connections.lag
        try:
            with self._serve_metrics(logger), keep_torch_threads():
                sample = source.read_sample(self.decoder, self._is_stopping, self.options.idle_seconds)
                self._use_settings(
                    choose_settings(self.resolved, self.model, self.decoder.contract, self.options, sample)
                )
                self._log_settings(logger)
                progress = ProgressReporter(self.metrics, self.batching, logger)
                with progress.report_progress(), freeze_objects(again=True):
                    self._run_pipelines(replace(connections, source=source))
        finally:
            if not self.give_up.is_set():
                connections.give_back(source.release())
            self.seconds, self.lag = time.monotonic() - start, connections.lag()

    @contextmanager
    def _serve_metrics(self, logger: Logger) -> Generator[None]:
        """Serve the metrics while the block runs, where a port is given for them."""
        port = self.options.metrics_port
        if port is None:
            yield
            return
        with import_extra("tasks.stream.prometheus", "stream").serve_metrics(self.metrics, port) as port:
            logger.info("Metrics at http://127.0.0.1:%s/metrics", port)
            yield

    def _log_settings(self, logger: Logger) -> None:
        config, cost = self.batching(), self.batching.fit_cost()
        logger.info(
            "Scoring with %s in micro-batches of at most %s rows that wait at most %.3g s (a batch takes %.3g ms + "
            "%.3g us a row), passes of %s, %s slots.",
            *(self.resolved.pin.uri, f"{config.batch_size_max:,}", config.wait_seconds_max),
            *(cost.fixed_seconds * 1e3, cost.row_seconds * 1e6, self.settings.batch_size, self.settings.slots),
        )

    def _run_pipelines(self, connections: Connections) -> None:
        """Run one pipeline after another: a notice ends one, and where it is withdrawn the next one starts."""
        taken = 0
        while True:
            pipeline = self._build_pipeline(connections, taken)
            pipeline.start()
            self._wait_for(pipeline)
            taken = pipeline.taken
            if pipeline.error is not None and not isinstance(pipeline.error, StreamAbandoned | Halted):
                raise pipeline.error
            if self.give_up.is_set() or self.drain.notice is not None or self.interrupted:
                self.ended_by_notice = not self.interrupted
                return
            if pipeline.ended in ("limit", "idle"):
                self.ended = pipeline.ended  # type: ignore[assignment]  # one of the two
                return

    def _build_pipeline(self, connections: Connections, taken: int) -> Pipeline:
        options, settings = self.options, self.settings

        def build_scorer() -> MicroScorer:
            scorer = MicroScorer(
                settings.model, self.decoder.contract, self.decoder, settings.batch_size, time.monotonic
            )
            scorer.forward.may_continue = lambda: not self.give_up.is_set()
            return scorer

        return Pipeline(
            connections=connections,
            model=settings.model,
            scorer=build_scorer,
            batching=self.batching,
            limits=StreamLimits(
                in_flight=options.in_flight,
                in_flight_bytes=options.in_flight_bytes // 2,
                slots=settings.slots,
                max_deliver=connections.max_deliver,
                idle_seconds=options.idle_seconds,
                limit=options.limit,
                poison_in_a_row=options.poison_in_a_row,
            ),
            metrics=self.metrics,
            is_stopping=self._is_stopping,
            give_up=self.give_up,
            taken=taken,
        )

    def _is_stopping(self) -> bool:
        return self._stop.is_set() or self.drain.notice is not None

    def _wait_for(self, pipeline: Pipeline) -> None:
        """Wait until a pipeline has ended. Where SIGTERM or Ctrl-C leave no time for that, give up."""
        while True:
            try:
                if pipeline.wait(_POLL_SECONDS):
                    return
                if self.drain.is_over or time.monotonic() > self._deadline:
                    self.give_up.set()
                    pipeline.wait(_POLL_SECONDS)
                    return
            except TerminationSignal:
                if self.drain.notice is not None:
                    self.give_up.set()
                    raise
                take_sigterm_as_notice(self.drain, self.options.notice_seconds)
            except KeyboardInterrupt as error:
                ignore_repeated_sigint(error)
                self.interrupted = True
                self._stop.set()
                self._deadline = time.monotonic() + self.options.notice_seconds


@contextmanager
def handle_early_sigterm(run: StreamRun, logger: Logger) -> Generator[None]:
    """Take SIGTERM as a notice before the pipeline runs, when no message is taken, and end waits that it abandons."""
    try:
        yield
    except TerminationSignal:
        if run.drain.notice is not None:
            raise
        take_sigterm_as_notice(run.drain, run.options.notice_seconds)
        run.give_up.set()
        run.ended_by_notice = True
    except StreamAbandoned:
        logger.warning("The wait for the broker was given up.")
        run.ended_by_notice = not run.interrupted
