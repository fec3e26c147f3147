"""A stream between its opening and its report: measured, run, and stopped by notices and Ctrl-C."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from prefect.exceptions import TerminationSignal

from flows.runtime.interruption import hear_sigterm
from flows.runtime.interrupts import hush
from serving.model.forward import Halted
from serving.model.interface import Tunable
from serving.model.registry import Resolved
from tasks.batch.artifacts import Logger
from tasks.spot.drain import Drain
from tasks.stream.batcher import StreamLimits
from tasks.stream.connections import Connections, StreamAbandoned
from tasks.stream.decode import Decoder
from tasks.stream.options import StreamOptions
from tasks.stream.pipeline import Pipeline
from tasks.stream.report import ProgressReporter, StreamMetrics, serve_metrics
from tasks.stream.score import MicroScorer
from tasks.stream.tuning import EngineSettings, LiveBatching, SampledSource, choose_settings

# A wait without an end is deaf to Ctrl-C: Polars' handler has the kernel take such waits up again.
_POLL_SECONDS = 0.2


@dataclass(slots=True, kw_only=True)
class StreamRun:
    """One call's run over a stream; `drain` is told of notices, `give_up` ends every wait where there is no time left.

    Afterwards `left` says that a notice ended it, `interrupted` that Ctrl-C did.
    """

    resolved: Resolved
    model: Tunable
    decoder: Decoder
    options: StreamOptions
    drain: Drain = field(default_factory=Drain)
    give_up: threading.Event = field(default_factory=threading.Event)
    left: bool = False
    interrupted: bool = False
    ended: Literal["limit", "idle", "stopped"] = "stopped"
    seconds: float = 0.0
    lag: int | None = None
    metrics: StreamMetrics = field(default_factory=lambda: StreamMetrics(lag=lambda: None))
    setting: EngineSettings = field(init=False)
    dial: LiveBatching = field(init=False)
    _asked: threading.Event = field(default_factory=threading.Event)
    _deadline: float = float("inf")

    def __post_init__(self) -> None:
        model, options = self.model, self.options
        self._set(
            EngineSettings(
                model=model,
                batch_size=options.batch_size or model.batch_size,
                slots=options.slots or model.slots,
                points=(),
                tuning=None,
            )
        )

    def _set(self, setting: EngineSettings) -> None:
        self.setting, self.dial = setting, LiveBatching(self.options, setting.points, self.metrics)

    def go(self, ends: Connections, logger: Logger) -> None:
        """Run until the stream ends: at its limit, idle, by a notice that stands, or by Ctrl-C.

        Raises what any of its threads raised.
        """
        start = time.monotonic()
        peeked = SampledSource(ends.source)
        self.metrics.lag, self.metrics.started = ends.lag, start
        try:
            with serve_metrics(self.metrics, self.options.metrics_port) as port, _caller_threads_kept():
                if port is not None:
                    logger.info("Metrics at http://127.0.0.1:%s/metrics", port)
                sample = peeked.peek(self.decoder, self._rests, self.options.idle_seconds)
                self._set(choose_settings(self.resolved, self.model, self.decoder.contract, self.options, sample))
                self._say(logger)
                with ProgressReporter(self.metrics, self.dial, logger).watching(), _collected_apart():
                    self._stretches(ends, peeked)
        finally:
            if not self.give_up.is_set():
                ends.give_back(peeked.left())
            self.seconds, self.lag = time.monotonic() - start, ends.lag()

    def _say(self, logger: Logger) -> None:
        dial, setting = self.dial(), self.setting
        service = self.dial.service()
        logger.info(
            "Scoring with %s in micro-batches of at most %s rows that wait at most %.3g s (a batch takes %.3g ms + "
            "%.3g us a row), passes of %s, %s slots.",
            *(self.resolved.pin.uri, f"{dial.rows:,}", dial.wait_seconds),
            *(service.fixed * 1e3, service.per_row * 1e6, setting.batch_size, setting.slots),
        )

    def _stretches(self, ends: Connections, peeked: SampledSource) -> None:
        """Run one stretch after another: a notice ends one, and where it is withdrawn the next begins."""
        taken = 0
        while True:
            pipeline = self._pipeline(ends, peeked, taken)
            pipeline.start()
            self._rest(pipeline)
            taken = pipeline.taken
            if pipeline.error is not None and not isinstance(pipeline.error, StreamAbandoned | Halted):
                raise pipeline.error
            if self.give_up.is_set() or self.drain.notice is not None or self.interrupted:
                self.left = not self.interrupted
                return
            if pipeline.ended in ("limit", "idle"):
                self.ended = pipeline.ended  # type: ignore[assignment]  # the two that are named
                return

    def _pipeline(self, ends: Connections, peeked: SampledSource, taken: int) -> Pipeline:
        options, setting = self.options, self.setting

        def scorer() -> MicroScorer:
            made = MicroScorer(setting.model, self.decoder.contract, self.decoder, setting.batch_size, time.monotonic)
            made.forward.goes_on = lambda: not self.give_up.is_set()
            return made

        return Pipeline(
            ends=ends.reading(peeked),
            model=setting.model,
            scorer=scorer,
            dial=self.dial,
            terms=StreamLimits(
                in_flight=options.in_flight,
                in_flight_bytes=options.in_flight_bytes // 2,
                slots=setting.slots,
                max_deliver=ends.max_deliver,
                idle_seconds=options.idle_seconds,
                limit=options.limit,
                poison_in_a_row=options.poison_in_a_row,
            ),
            metrics=self.metrics,
            is_stopping=self._rests,
            give_up=self.give_up,
            taken=taken,
        )

    def _rests(self) -> bool:
        return self._asked.is_set() or self.drain.notice is not None

    def _rest(self, pipeline: Pipeline) -> None:
        """Wait until a stretch is over; what SIGTERM or Ctrl-C leave no time for is given up."""
        while True:
            try:
                if pipeline.wait(_POLL_SECONDS):
                    return
                if self.drain.over or time.monotonic() > self._deadline:
                    self.give_up.set()
                    pipeline.wait(_POLL_SECONDS)
                    return
            except TerminationSignal:
                if self.drain.notice is not None:
                    self.give_up.set()
                    raise
                hear_sigterm(self.drain, self.options.notice_seconds)
            except KeyboardInterrupt as error:
                hush(error)
                self.interrupted = True
                self._asked.set()
                self._deadline = time.monotonic() + self.options.notice_seconds


@contextmanager
def hearing(run: StreamRun, logger: Logger) -> Generator[None]:
    """Take SIGTERM before anything is in hand as the notice that it is, and whatever gave up waiting by it."""
    try:
        yield
    except TerminationSignal:
        if run.drain.notice is not None:
            raise
        hear_sigterm(run.drain, run.options.notice_seconds)
        run.give_up.set()
        run.left = True
    except StreamAbandoned:
        logger.warning("The wait for the broker was given up.")
        run.left = not run.interrupted


@contextmanager
def _caller_threads_kept() -> Generator[None]:
    """Put torch's thread count back: slots set it to one, and that reaches threads started later."""
    torch = sys.modules.get("torch")  # loaded with the model, if at all
    before = torch.get_num_threads() if torch else None
    try:
        yield
    finally:
        if torch:
            torch.set_num_threads(before)


@contextmanager
def _collected_apart() -> Generator[None]:
    """Keep what is there by now out of the way of Python's collector: to go through it all takes it half a second."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
