"""How a model is run over a stream: the engine as a batch run has it, and the dial measured for the freshness."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from serving.errors import ModelFailed
from serving.machine import machine_kind
from serving.model.contract import Contract
from serving.model.encoding import Encoded, encode
from serving.model.forward import Forward
from serving.model.interface import Tunable, Wish
from serving.model.registry import Resolved
from serving.model.tuner import Tuning, measure, remembered
from tasks.batch.tuning import tune_and_keep
from tasks.stream.meter import Meter
from tasks.stream.microbatch import Dial, Service, choose_dial, fit_seen, fit_service
from tasks.stream.options import StreamOptions

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
    wish = Wish(batch_size=options.batch_size, slots=options.slots, bfloat16_tolerance=options.bfloat16_tolerance)
    tuning = remembered(resolved.tags, machine_kind(), wish)
    encoded = None if sample is None else model.prepare(encode(contract, sample))
    if encoded is not None and not _scores(model, contract, encoded, options.batch_size or model.batch_size):
        encoded = None
    if tuning is None and encoded is not None:
        larger = _larger(encoded, model.batch_sizes[-1])
        tuning = tune_and_keep(resolved, model, contract, larger, wish)
    if tuning is not None:
        model = model.using(tuning.engine)
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
        rate = measure(model, contract, sample, batch_size, slots, time.perf_counter)
        return ((sample.rows, sample.rows * slots / rate),)
    sizes = sorted({max(1, batch_size // share) for share in _SIZES_SHARE})
    larger = _larger(sample, batch_size)
    rates = [measure(model, contract, larger, size, slots, time.perf_counter) for size in sizes]
    return tuple((size, size * slots / rate) for size, rate in zip(sizes, rates, strict=True))


def _larger(sample: Encoded, rows: int) -> Encoded:
    """Return the sample, repeated to hold so many rows, within 32 MiB."""
    row_bytes = sum(value.nbytes for value in sample.inputs.values()) / sample.rows
    times = math.ceil(min(rows, _SAMPLE_BYTES_MAX / max(row_bytes, 1)) / sample.rows)
    return sample if sample.length_N is not None or times <= 1 else sample.repeated(times)


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
