"""How a model is run over a stream: its engine as in a batch run, and micro-batches tuned to the freshness.

A message may arrive just after a full micro-batch: it waits for that one, and for its own. It is scored within
w + 2 * S(b), the wait and twice the time of a micro-batch of b rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from serving.errors import ModelFailed
from serving.machine import describe_machine
from serving.model.batching import BatchingConfig, CostModel, fit_cost_model
from serving.model.contract import Contract
from serving.model.encoding import Encoded, encode
from serving.model.forward import Forward
from serving.model.interface import Tunable, TuningLimits
from serving.model.registry import Resolved
from serving.model.tuner import Tuning, measure_throughput, read_tuning
from tasks.batch.tuning import tune_and_keep
from tasks.stream.connections import Source
from tasks.stream.decode import Decoder
from tasks.stream.message import Message
from tasks.stream.options import StreamOptions
from tasks.stream.report import StreamMetrics

_POLL_SECONDS = 0.2
_SAMPLE_MESSAGES_MAX = 1024
# After the first message: poison waits for a readable message as long as these take, a second at most.
_SAMPLE_FETCHES_MAX = 5
_SAMPLE_BYTES_MAX = 32 << 20
# Passes of these fractions of a batch are measured. Larger micro-batches are several passes.
_SIZE_DIVISORS = (64, 8, 1)
_ROWS_MAX = 1 << 16
_REFIT_SECONDS = 5.0
_TIMINGS_MIN = 8
# A message waits for two micro-batches at most: the one before, and its own.
_BATCHES_DELAY = 2
_WAIT_SHARE = 0.25
# A larger batch must be faster per row by this factor.
_GAIN_MIN = 1.03
_BATCH_SECONDS_MIN = 0.05
# Measured batches tell how S(b) grows where the largest has so many times the rows of the smallest.
_SIZE_RATIO_MIN = 16


class SampledSource:
    """A source whose first messages are read as a sample, and fetched afterwards like any others."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._held: list[Message] = []

    def read_sample(
        self, decoder: Decoder, is_stopping: Callable[[], bool], idle_seconds: float | None
    ) -> pa.Table | None:
        """Wait for messages and return rows of the first that are readable.

        Returns None where the stream ends first, where the first messages are poison and a readable one does not come
        within a second, or where one was delivered before: it may be what ended the last scorer.
        """
        start = time.monotonic()
        fetches = 0
        while len(self._held) < _SAMPLE_MESSAGES_MAX and fetches < _SAMPLE_FETCHES_MAX and not is_stopping():
            fetched = self._source.fetch(_SAMPLE_MESSAGES_MAX - len(self._held), 1, _POLL_SECONDS)
            self._held += fetched
            fetches += bool(self._held)
            if any(message.deliveries > 1 for message in fetched):
                return None
            groups, _ = decoder.decode(fetched)
            if groups:
                return max((group.table for group in groups), key=lambda table: table.num_rows)
            if not self._held and idle_seconds is not None and time.monotonic() - start > idle_seconds:
                return None
        return None

    def release(self) -> list[Message]:
        """Return the messages of the sample that were not fetched since, and forget them."""
        released, self._held = self._held, []
        return released

    def fetch(self, messages_max: int, messages_min: int, timeout_seconds: float) -> list[Message]:
        """Return the messages of the sample first, then those of the source."""
        if self._held:
            taken, self._held = self._held[:messages_max], self._held[messages_max:]
            return taken
        return self._source.fetch(messages_max, messages_min, timeout_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """The model on its engine, the rows of a pass, the slots, and measured pairs of rows and seconds of passes."""

    model: Tunable
    batch_size: int
    slots: int
    pass_timings: tuple[tuple[int, float], ...]
    tuning: Tuning | None


def choose_settings(
    resolved: Resolved, model: Tunable, contract: Contract, options: StreamOptions, sample: pa.Table | None
) -> EngineSettings:
    """Return how the model is run: as it was tuned before on this kind of machine, or tuned now on the sample.

    Without a sample nothing is tuned, and the model's own defaults are taken. A new tuning takes some seconds, and may
    be kept with the model version.
    """
    limits = TuningLimits(
        batch_size=options.batch_size, slots=options.slots, bfloat16_tolerance=options.bfloat16_tolerance
    )
    tuning = read_tuning(resolved.tags, describe_machine(), limits)
    encoded = None if sample is None else model.prepare(encode(contract, sample))
    if encoded is not None and not _gets_prediction(model, contract, encoded, options.batch_size or model.batch_size):
        encoded = None
    if tuning is None and encoded is not None:
        larger = _repeat_sample(encoded, model.batch_sizes[-1])
        tuning = tune_and_keep(resolved, model, contract, larger, limits)
    if tuning is not None:
        model = model.with_engine(tuning.engine)
    batch_size = tuning.batch_size if tuning else options.batch_size or model.batch_size
    slots = tuning.slots if tuning else options.slots or model.slots
    timings = () if encoded is None else _measure_passes(model, contract, encoded, batch_size, slots)
    return EngineSettings(model=model, batch_size=batch_size, slots=slots, pass_timings=timings, tuning=tuning)


def _gets_prediction(model: Tunable, contract: Contract, sample: Encoded, batch_size: int) -> bool:
    """Return whether any row of the sample gets a prediction: a stream may begin with poison."""
    if (sample.flags.code_N != 0).all():
        return False
    try:
        with model.slot():
            Forward(model, contract, batch_size).score(sample)
    except ModelFailed:
        return False
    return True


def _measure_passes(
    model: Tunable, contract: Contract, sample: Encoded, batch_size: int, slots: int
) -> tuple[tuple[int, float], ...]:
    """Return rows and seconds of passes of several sizes, with all slots running."""
    if sample.length_N is not None:
        # The batch size counts tokens, so the rows of a pass are not chosen: only the time per row is measured.
        rate = measure_throughput(model, contract, sample, batch_size, slots, time.perf_counter)
        return ((sample.rows, sample.rows * slots / rate),)
    sizes = sorted({max(1, batch_size // divisor) for divisor in _SIZE_DIVISORS})
    larger = _repeat_sample(sample, batch_size)
    rates = [measure_throughput(model, contract, larger, size, slots, time.perf_counter) for size in sizes]
    return tuple((size, size * slots / rate) for size, rate in zip(sizes, rates, strict=True))


def _repeat_sample(sample: Encoded, rows: int) -> Encoded:
    """Return the sample, repeated to hold so many rows, within 32 MiB."""
    row_bytes = sum(value.nbytes for value in sample.inputs.values()) / sample.rows
    times = math.ceil(min(rows, _SAMPLE_BYTES_MAX / max(row_bytes, 1)) / sample.rows)
    return sample if sample.length_N is not None or times <= 1 else sample.repeat(times)


@dataclass(slots=True)
class LiveBatching:
    """The current batching: from measured passes at first, then from the stream's own micro-batches."""

    options: StreamOptions
    pass_timings: Sequence[tuple[int, float]]
    metrics: StreamMetrics
    _config: BatchingConfig | None = None
    _fitted_at: float = field(default=-math.inf)

    def __call__(self) -> BatchingConfig:
        """Return the batching, which is fitted again every 5 s."""
        now = time.monotonic()
        if self._config is None or now - self._fitted_at > _REFIT_SECONDS:
            self._fitted_at = now
            self._config = choose_stream_batching(
                self.fit_cost(),
                self.options.freshness_seconds,
                _ROWS_MAX,
                rows=self.options.rows_per_batch,
                wait_seconds=self.options.wait_seconds,
            )
        return self._config

    def fit_cost(self) -> CostModel:
        """Return S(b) of a micro-batch: from recent ones where there are enough, otherwise from measured passes too."""
        recent = list(self.metrics.batch_timings)
        if len(recent) >= _TIMINGS_MIN:
            return fit_recent_cost(recent, self.pass_timings)
        timings = [*self.pass_timings, *recent]
        return _fit(timings) if timings else CostModel(fixed_seconds=0.0, row_seconds=1e-5)


def fit_recent_cost(recent: Sequence[tuple[int, float]], passes: Sequence[tuple[int, float]]) -> CostModel:
    """Fit S(b) to recent micro-batches, with the help of measured passes where their sizes are too alike.

    Batches of about one size do not tell what a much larger one would take: a line through them would be noise, and
    batches that are small because rows seemed to gain nothing together would stay so. There the passes tell how S(b)
    grows, and the micro-batches how much more they take than their passes. Without passes, a batch of 16 times the
    rows is assumed to take twice as long, until one has been seen.

    Args:
        recent: Pairs of rows and seconds of micro-batches, at least one.
        passes: Pairs of rows and seconds of forward passes; may be empty.
    """
    sizes = [rows for rows, _ in recent]
    if max(sizes) >= _SIZE_RATIO_MIN * min(sizes):
        return _fit(recent)
    seconds_mean = sum(seconds for _, seconds in recent) / len(recent)
    assumed = CostModel(fixed_seconds=0.0, row_seconds=seconds_mean / (_SIZE_RATIO_MIN * max(sizes)))
    cost = _fit(passes) if passes else assumed
    overhead = sum(seconds - cost.seconds(rows) for rows, seconds in recent) / len(recent)
    return CostModel(fixed_seconds=max(0.0, cost.fixed_seconds + overhead), row_seconds=cost.row_seconds)


def _fit(timings: Sequence[tuple[int, float]]) -> CostModel:
    return fit_cost_model(timings, errors="absolute", if_flat="per_row")


def choose_stream_batching(
    cost: CostModel, freshness_seconds: float, rows_max: int, *, rows: int | None, wait_seconds: float | None
) -> BatchingConfig:
    """Return the largest worthwhile micro-batch with w + 2 * S(b) within the freshness, and its wait.

    Where not even one row meets the freshness, the fastest batch per row is returned: smaller ones would let a backlog
    grow.

    Args:
        cost: S(b) of a micro-batch.
        freshness_seconds: How old a message may be when its score is emitted.
        rows_max: Upper bound of the rows.
        rows: The rows, where the caller sets them.
        wait_seconds: The wait, where the caller sets it; otherwise a quarter of the freshness.
    """
    wait = freshness_seconds * _WAIT_SHARE if wait_seconds is None else wait_seconds
    if rows is None:
        fitting = int(((freshness_seconds - wait) / _BATCHES_DELAY - cost.fixed_seconds) / max(cost.row_seconds, 1e-12))
        rows = _shrink_rows(cost, min(fitting, rows_max) if fitting >= 1 else rows_max)
    return BatchingConfig(batch_size_max=rows, wait_ms_max=1000 * wait)


def _shrink_rows(cost: CostModel, rows_max: int) -> int:
    """Return the smallest of `rows_max`, its half, its quarter ... that is as fast per row, within 3 %.

    It takes 50 ms at least: nobody notices less, a line through noise says little of smaller batches, and a batch that
    is too small delays all that come after it.
    """
    rows = rows_max
    while rows > 1 and _is_as_fast(cost, rows // 2, rows_max):
        rows //= 2
    return rows


def _is_as_fast(cost: CostModel, rows: int, rows_max: int) -> bool:
    seconds = cost.seconds(rows)
    return seconds >= _BATCH_SECONDS_MIN and rows / seconds * _GAIN_MIN >= rows_max / cost.seconds(rows_max)
