"""How a model is run over a stream: the engine as a batch run has it, and the dial measured for the freshness."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from serving.errors import ModelFailed
from serving.machine import describe_machine
from serving.model.contract import Contract
from serving.model.encoding import Encoded, encode
from serving.model.forward import Forward
from serving.model.interface import Tunable, TuningLimits
from serving.model.registry import Resolved
from serving.model.tuner import Tuning, measure_throughput, read_tuning
from tasks.batch.tuning import tune_and_keep
from tasks.stream.batcher import Dial
from tasks.stream.connections import Source
from tasks.stream.decode import Decoder
from tasks.stream.message import Message
from tasks.stream.options import StreamOptions
from tasks.stream.report import Meter

_POLL_SECONDS = 0.2
_MESSAGES_MAX = 1024


class Peeked:
    """A source whose first messages can be looked at, and are fetched as ever afterwards."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._held: list[Message] = []

    def peek(self, decoder: Decoder, rests: Callable[[], bool], idle_seconds: float | None) -> pa.Table | None:
        """Wait for messages and return the rows of the first that can be read.

        None where the stream ends first, where the first thousand messages are poison, or where some come again.
        """
        start = time.monotonic()
        while len(self._held) < _MESSAGES_MAX and not rests():
            got = self._source.fetch(_MESSAGES_MAX - len(self._held), 1, _POLL_SECONDS)
            self._held += got
            if any(message.deliveries > 1 for message in got):
                # One of them may be what ended the scorer before: they are no sample to try things out on.
                return None
            groups, _ = decoder.decode(got)
            if groups:
                return max((group.table for group in groups), key=lambda table: table.num_rows)
            if not self._held and idle_seconds is not None and time.monotonic() - start > idle_seconds:
                return None
        return None

    def left(self) -> list[Message]:
        """Return the messages that were looked at and never fetched; they are forgotten here."""
        left, self._held = self._held, []
        return left

    def fetch(self, most: int, enough: int, seconds: float) -> list[Message]:
        """Return the messages that were looked at first, then those of the source."""
        if self._held:
            taken, self._held = self._held[:most], self._held[most:]
            return taken
        return self._source.fetch(most, enough, seconds)


# Of what the freshness leaves beside the waiting, a batch may queue behind one and be passed itself.
_BATCHES_BEHIND = 2
_WAIT_SHARE = 0.25
# A larger batch that is no faster than this only makes its rows wait.
_GAIN_MIN = 1.03
_SECONDS_MIN = 0.05
# The largest of some batches over the smallest, from which on they tell how S(b) grows.
_SPREAD_MIN = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What a micro-batch of b rows takes: S(b) = fixed + per_row * b seconds."""

    fixed: float
    per_row: float

    def seconds(self, rows: int) -> float:
        """Return S(rows)."""
        return self.fixed + self.per_row * rows


def fit_service(points: Sequence[tuple[int, float]]) -> Service:
    """Fit S(b) to measured pairs of rows and seconds by least squares, neither term below zero.

    Needs at least one pair of more than no rows and no seconds.
    """
    mean_rows = sum(rows for rows, _ in points) / len(points)
    mean_seconds = sum(seconds for _, seconds in points) / len(points)
    spread = sum((rows - mean_rows) ** 2 for rows, _ in points)
    slope = sum((rows - mean_rows) * (seconds - mean_seconds) for rows, seconds in points) / spread if spread else 0.0
    fixed = mean_seconds - slope * mean_rows
    if slope <= 0:
        return Service(fixed=0.0, per_row=mean_seconds / mean_rows)
    if fixed < 0:
        # Through the origin: what is left when no time is spent on nothing.
        through = sum(rows * seconds for rows, seconds in points) / sum(rows * rows for rows, _ in points)
        return Service(fixed=0.0, per_row=through)
    return Service(fixed=fixed, per_row=slope)


def fit_seen(seen: Sequence[tuple[int, float]], measured: Sequence[tuple[int, float]]) -> Service:
    """Fit S(b) to the micro-batches of late, at least one, with the help of measured passes where they can't tell it.

    Batches of about one size do not tell what a much larger one would take: a line through them would be noise, and
    batches that are small because rows seemed to gain nothing together would stay so. There the passes tell how S(b)
    grows, and the batches how much they take beside; without passes a batch 16 times as large is taken for twice as
    long, until one has been seen.
    """
    sizes = [rows for rows, _ in seen]
    if max(sizes) >= _SPREAD_MIN * min(sizes):
        return fit_service(seen)
    mean_seconds = sum(seconds for _, seconds in seen) / len(seen)
    growing = Service(fixed=0.0, per_row=mean_seconds / (_SPREAD_MIN * max(sizes)))
    passes = fit_service(measured) if measured else growing
    beside = sum(seconds - passes.seconds(rows) for rows, seconds in seen) / len(seen)
    return Service(fixed=max(0.0, passes.fixed + beside), per_row=passes.per_row)


def choose_dial(
    service: Service, freshness_seconds: float, rows_max: int, *, rows: int | None, wait_seconds: float | None
) -> Dial:
    """Return the largest batch with w + 2 * S(b) <= L that is worth it, and its wait; what is given is kept.

    A message may come just behind a full batch: it waits for that one and for its own. A quarter of the freshness is
    for waiting, unless a wait is given. Where not even one row fits, the freshness is out of reach, and the dial is the
    fastest there is: with batches of one row the messages that wait would grow more on top of it.
    """
    wait = freshness_seconds * _WAIT_SHARE if wait_seconds is None else wait_seconds
    if rows is not None:
        return Dial(rows=rows, wait_seconds=wait)
    most = int(((freshness_seconds - wait) / _BATCHES_BEHIND - service.fixed) / max(service.per_row, 1e-12))
    return Dial(rows=_worth_it(service, min(most, rows_max) if most >= 1 else rows_max), wait_seconds=wait)


def _worth_it(service: Service, most: int) -> int:
    """Return the smallest of `most`, its half, its quarter ... that is as fast a row as `most`, within 3 %.

    None that takes less than 50 ms: nobody feels that, what a line through noise says of smaller ones is not to be
    believed, and a batch that is too small holds up all that come behind it.
    """
    rows = most
    while rows > 1 and _no_slower(service, rows // 2, most):
        rows //= 2
    return rows


def _no_slower(service: Service, rows: int, most: int) -> bool:
    took = service.seconds(rows)
    return took >= _SECONDS_MIN and rows / took * _GAIN_MIN >= most / service.seconds(most)


_SAMPLE_BYTES_MAX = 32 << 20
# One pass has a batch's rows; what lies beyond is as many passes, which the line through these tells.
_SIZES_SHARE = (64, 8, 1)
_ROWS_MAX = 1 << 16
_REFIT_SECONDS = 5.0
_POINTS_MIN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The model on its engine, the rows of a pass, the slots, and what passes were measured to take."""

    model: Tunable
    batch_size: int
    slots: int
    points: tuple[tuple[int, float], ...]
    tuning: Tuning | None


def settle(
    resolved: Resolved, model: Tunable, contract: Contract, options: StreamOptions, sample: pa.Table | None
) -> Setting:
    """Return how the model is run: as it was tuned before on this kind of machine, or tuned now with rows of a stream.

    Without a sample it runs as it comes. May keep a tuning with the model version; takes some seconds then.
    """
    limits = TuningLimits(
        batch_size=options.batch_size, slots=options.slots, bfloat16_tolerance=options.bfloat16_tolerance
    )
    tuning = read_tuning(resolved.tags, describe_machine(), limits)
    encoded = None if sample is None else model.prepare(encode(contract, sample))
    if encoded is not None and not _scores(model, contract, encoded, options.batch_size or model.batch_size):
        encoded = None
    if tuning is None and encoded is not None:
        larger = _larger(encoded, model.batch_sizes[-1])
        tuning = tune_and_keep(resolved, model, contract, larger, limits)
    if tuning is not None:
        model = model.with_engine(tuning.engine)
    batch_size = tuning.batch_size if tuning else options.batch_size or model.batch_size
    slots = tuning.slots if tuning else options.slots or model.slots
    points = () if encoded is None else _points(model, contract, encoded, batch_size, slots)
    return Setting(model=model, batch_size=batch_size, slots=slots, points=points, tuning=tuning)


def _scores(model: Tunable, contract: Contract, sample: Encoded, batch_size: int) -> bool:
    """Return whether a row of the sample gets a prediction: a stream may well begin with poison."""
    if (sample.flags.code_N != 0).all():
        return False
    try:
        with model.slot():
            Forward(model, contract, batch_size).score(sample)
    except ModelFailed:
        return False
    return True


def _points(
    model: Tunable, contract: Contract, sample: Encoded, batch_size: int, slots: int
) -> tuple[tuple[int, float], ...]:
    """Return rows and seconds of passes of several sizes, with all slots running."""
    if sample.length_N is not None:
        # A batch counts tokens: what a row takes is what there is to tell.
        rate = measure_throughput(model, contract, sample, batch_size, slots, time.perf_counter)
        return ((sample.rows, sample.rows * slots / rate),)
    sizes = sorted({max(1, batch_size // share) for share in _SIZES_SHARE})
    larger = _larger(sample, batch_size)
    rates = [measure_throughput(model, contract, larger, size, slots, time.perf_counter) for size in sizes]
    return tuple((size, size * slots / rate) for size, rate in zip(sizes, rates, strict=True))


def _larger(sample: Encoded, rows: int) -> Encoded:
    """Return the sample, repeated to hold so many rows, within 32 MiB."""
    row_bytes = sum(value.nbytes for value in sample.inputs.values()) / sample.rows
    times = math.ceil(min(rows, _SAMPLE_BYTES_MAX / max(row_bytes, 1)) / sample.rows)
    return sample if sample.length_N is not None or times <= 1 else sample.repeat(times)


@dataclass(slots=True)
class LiveDial:
    """The dial as it is now: measured passes at first, then whole micro-batches as the stream has them."""

    options: StreamOptions
    measured: Sequence[tuple[int, float]]
    meter: Meter
    _dial: Dial | None = None
    _fitted: float = field(default=-math.inf)

    def __call__(self) -> Dial:
        """Return the dial; it is fitted anew every 5 s."""
        now = time.monotonic()
        if self._dial is None or now - self._fitted > _REFIT_SECONDS:
            self._fitted = now
            self._dial = choose_dial(
                self.service(),
                self.options.freshness_seconds,
                _ROWS_MAX,
                rows=self.options.rows_per_batch,
                wait_seconds=self.options.wait_seconds,
            )
        return self._dial

    def service(self) -> Service:
        """Return S(b): by the micro-batches of late where there are enough of them, else by the passes measured."""
        seen = list(self.meter.points)
        if len(seen) >= _POINTS_MIN:
            return fit_seen(seen, self.measured)
        points = [*self.measured, *seen]
        return fit_service(points) if points else Service(fixed=0.0, per_row=1e-5)
