"""When rows come: as a file says, as the gateway has metered, or at a rate that goes up and down over the day."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from serving.errors import BadWorkload
from serving.gateway.metering import read_metering
from tasks.common.formatting import in_words
from tasks.scheduler.trace import per_second, read_trace
from tasks.scheduler.workload import Metered, Rate, Trace, Workload

DAY = 86_400
# A longer horizon is replayed for this long, and its costs are scaled: memory and time stay bounded.
SECONDS_MAX = 30 * DAY
_MINUTES = 1440
_SHARPNESS_MAX = 1e5
_TOO_MANY_REQUESTS = 429


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """Arrivals of each second. counts_T: T seconds. notes: what was made of the source, in sentences for a person."""

    counts_T: NDArray[np.int64]
    rows_per_arrival: float = 1.0
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> float:
        """Rows that come in all."""
        return float(self.counts_T.sum()) * self.rows_per_arrival


def read_arrivals(workload: Workload, *, seed: int = 0) -> Arrivals:
    """Return the arrivals of a workload of requests or events over its horizon, 30 days of it at most.

    A source that is shorter is repeated, and the notes say so. `seed` is that of the chance in a rate's arrivals.
    Raises BadWorkload where there are none to be had.
    """
    seconds = max(1, min(round(workload.horizon_days * DAY), SECONDS_MAX))
    match workload.arrivals:
        case None:
            message = "A table has no arrivals; its rows are known by its consumer."
            raise BadWorkload(message)
        case Rate() as rate:
            counts_T = rate_counts(rate, seconds, seed)
            return Arrivals(counts_T=counts_T, rows_per_arrival=rate.rows_per_arrival)
        case Trace() as trace:
            counts, notes = read_trace(trace)
            rows_per_arrival = trace.rows_per_arrival
        case Metered() as metered:
            counts, notes, rows_per_arrival = _read_metered(metered)
    counts_T, note = _fill(counts, seconds)
    return Arrivals(counts_T=counts_T, rows_per_arrival=rows_per_arrival, notes=(*notes, *note))


def _fill(counts: NDArray[np.int64], seconds: int) -> tuple[NDArray[np.int64], list[str]]:
    """Return so many seconds of the counts, repeated or cut where that is needed, and say so."""
    span = in_words(len(counts))
    if len(counts) >= seconds:
        note = [f"Of the trace's {span}, the first {in_words(seconds)} are replayed."] if len(counts) > seconds else []
        return counts[:seconds], note
    if len(counts) == 1:
        alone = np.zeros(seconds, dtype=np.int64)
        alone[0] = counts[0]
        return alone, ["The trace is a single moment: nothing else is taken to come within the horizon."]
    times = math.ceil(seconds / len(counts))
    note = [f"The trace lasts {span}; it is repeated {seconds / len(counts):.4g} times to fill {in_words(seconds)}."]
    return np.tile(counts, times)[:seconds], note


def rate_counts(rate: Rate, seconds: int, seed: int) -> NDArray[np.int64]:
    """Return Poisson arrivals at a rate that is shaped like a bell around the day's peak; midnight is second 0."""
    random = np.random.default_rng(seed)
    shape_M = rate.per_second * day_shape(rate.peak, rate.peak_at)
    counts_T = np.empty(seconds, dtype=np.int64)
    for start in range(0, seconds, DAY):
        stop = min(start + DAY, seconds)
        counts_T[start:stop] = random.poisson(np.repeat(shape_M, 60)[: stop - start])
    return counts_T


def day_shape(peak: float, peak_at: str) -> NDArray[np.float64]:
    """Return the rate of each minute of a day over the average: exp(k cos) with the k by which it peaks so high."""
    hours, minutes = map(int, peak_at.split(":"))
    angle_M = 2 * np.pi * (np.arange(_MINUTES) - 60 * hours - minutes) / _MINUTES
    low, high = 0.0, _SHARPNESS_MAX
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if 1 / np.exp(middle * (np.cos(angle_M) - 1)).mean() > peak else (middle, high)
    bell_M = np.exp(low * (np.cos(angle_M) - 1))
    return np.asarray(bell_M / bell_M.mean())


def _read_metered(metered: Metered) -> tuple[NDArray[np.int64], list[str], float]:
    log = read_metering(Path(metered.folder))
    # What an endpoint turns away as wrong is no traffic of its own; what it had no room for is.
    good = (pl.col("status") < 400) | (pl.col("status") >= 500) | (pl.col("status") == _TOO_MANY_REQUESTS)  # noqa: PLR2004
    found = log.filter(good & (pl.col("endpoint") == metered.endpoint)).select("at", "rows").collect()
    if not len(found):
        known = log.select(pl.col("endpoint").unique().sort()).collect().get_column("endpoint").to_list()
        message = (
            f"The metering log in {metered.folder} must hold requests of {metered.endpoint!r}, got those of "
            f"{', '.join(map(repr, known[:12])) or 'none'}."
        )
        raise BadWorkload(message)
    times = found.get_column("at").dt.epoch("us").to_numpy() / 1e6
    counts, notes = per_second(times, f"The metering log of {metered.endpoint!r}")
    mean = found.get_column("rows").mean()
    return counts, notes, max(float(mean) if isinstance(mean, int | float) else 1.0, 1e-9)
