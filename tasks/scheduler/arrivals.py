"""When rows come: read from a file, metered by the gateway, or drawn at a rate that rises and falls over the day.

Shapes: T seconds, M minutes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from serving.errors import BadWorkload
from serving.gateway.metering import read_metering
from tasks.common.formatting import in_words
from tasks.scheduler.workload import ArrivalRate, ArrivalTrace, MeteredArrivals, Workload

DAY_SECONDS = 86_400
# A longer horizon is replayed for this long, and its costs are scaled, so that memory and time stay bounded.
REPLAYED_SECONDS_MAX = 30 * DAY_SECONDS
_MINUTES = 1440
_SHARPNESS_MAX = 1e5
_TOO_MANY_REQUESTS = 429


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """Arrivals of each second. notes: what was made of the source, in sentences for a person."""

    counts_T: NDArray[np.int64]
    rows_per_arrival: float = 1.0
    notes: tuple[str, ...] = ()


def read_arrivals(workload: Workload, *, seed: int = 0) -> Arrivals:
    """Return the arrivals of a workload of requests or events over its horizon, 30 days of it at most.

    A shorter source is repeated, and the notes say so. `seed` is that of drawn arrivals. Raises BadWorkload where there
    are no arrivals.
    """
    seconds = max(1, min(round(workload.horizon_days * DAY_SECONDS), REPLAYED_SECONDS_MAX))
    match workload.arrivals:
        case None:
            message = "A table has no arrivals; its rows are known by its consumer."
            raise BadWorkload(message)
        case ArrivalRate() as rate:
            counts_T = draw_arrivals(rate, seconds, seed)
            return Arrivals(counts_T=counts_T, rows_per_arrival=rate.rows_per_arrival)
        case ArrivalTrace() as trace:
            counts, notes = read_trace(trace)
            rows_per_arrival = trace.rows_per_arrival
        case MeteredArrivals() as metered:
            counts, notes, rows_per_arrival = _read_metered(metered)
    counts_T, note = _repeat_to_horizon(counts, seconds)
    return Arrivals(counts_T=counts_T, rows_per_arrival=rows_per_arrival, notes=(*notes, *note))


def _repeat_to_horizon(counts: NDArray[np.int64], seconds: int) -> tuple[NDArray[np.int64], list[str]]:
    """Return so many seconds of the counts, repeated or cut where needed, and a note that says so."""
    span = in_words(len(counts))
    if len(counts) >= seconds:
        note = [f"Of the trace's {span}, the first {in_words(seconds)} are replayed."] if len(counts) > seconds else []
        return counts[:seconds], note
    if len(counts) == 1:
        counts_T = np.zeros(seconds, dtype=np.int64)
        counts_T[0] = counts[0]
        return counts_T, ["The trace is a single moment: nothing else is taken to come within the horizon."]
    times = math.ceil(seconds / len(counts))
    note = [f"The trace lasts {span}; it is repeated {seconds / len(counts):.4g} times to fill {in_words(seconds)}."]
    return np.tile(counts, times)[:seconds], note


def draw_arrivals(rate: ArrivalRate, seconds: int, seed: int) -> NDArray[np.int64]:
    """Return Poisson arrivals at a rate with the shape of a bell around the day's peak; midnight is second 0."""
    random = np.random.default_rng(seed)
    shape_M = rate.per_second * compute_day_shape(rate.peak, rate.peak_at)
    counts_T = np.empty(seconds, dtype=np.int64)
    for start in range(0, seconds, DAY_SECONDS):
        stop = min(start + DAY_SECONDS, seconds)
        counts_T[start:stop] = random.poisson(np.repeat(shape_M, 60)[: stop - start])
    return counts_T


def compute_day_shape(peak: float, peak_at: str) -> NDArray[np.float64]:
    """Return the rate of each minute of a day over the average: exp(k cos) with the k that gives this peak."""
    hours, minutes = map(int, peak_at.split(":"))
    angle_M = 2 * np.pi * (np.arange(_MINUTES) - 60 * hours - minutes) / _MINUTES
    low, high = 0.0, _SHARPNESS_MAX
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if 1 / np.exp(middle * (np.cos(angle_M) - 1)).mean() > peak else (middle, high)
    bell_M = np.exp(low * (np.cos(angle_M) - 1))
    return np.asarray(bell_M / bell_M.mean())


def _read_metered(metered: MeteredArrivals) -> tuple[NDArray[np.int64], list[str], float]:
    log = read_metering(Path(metered.folder))
    # Requests that an endpoint refused as wrong do not count; those that it refused for lack of capacity do.
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
    counts, notes = count_per_second(times, f"The metering log of {metered.endpoint!r}")
    mean = found.get_column("rows").mean()
    return counts, notes, max(float(mean) if isinstance(mean, int | float) else 1.0, 1e-9)


SPAN_DAYS_MAX = 366
ROWS_MAX = 50_000_000
PER_SECOND_MAX = 10_000_000
_SEED = 11
_MINUTE = 60
_NAMES_SHOWN = 12
_GAP_TOLD_SECONDS = 3600
_READERS: dict[str, Callable[[Path], pl.LazyFrame]] = {".csv": pl.scan_csv, ".parquet": pl.scan_parquet}


def read_trace(trace: ArrivalTrace) -> tuple[NDArray[np.int64], list[str]]:
    """Return the arrivals of each second of a file, from its first one on, and notes on what was made of it.

    Raises BadWorkload where the file or column is missing, and where a value is missing, negative or absurd.
    """
    frame = _scan_trace(trace)
    name = _find_column(trace, frame.collect_schema())
    try:
        values = frame.select(name).collect().get_column(name)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _unreadable_trace(trace, error) from error
    origin = f"Column {name!r} of {trace.path}"
    if not len(values):
        message = f"{origin} must hold arrivals, got no rows; leave the trace out and give a rate."
        raise BadWorkload(message)
    if trace.content == "timestamps":
        return count_per_second(_parse_timestamps(values, origin), origin)
    return _parse_counts(values, origin, _MINUTE if trace.content == "per-minute" else 1)


def _scan_trace(trace: ArrivalTrace) -> pl.LazyFrame:
    path = Path(trace.path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        message = f"A trace must be a .csv or .parquet file, got {trace.path}."
        raise BadWorkload(message)
    if not path.is_file():
        message = f"A trace must be a file that is there, got {trace.path}."
        raise BadWorkload(message)
    try:
        frame = reader(path)
        rows = frame.select(pl.len()).collect().item()
    except pl.exceptions.NoDataError as error:
        message = f"{trace.path} must hold arrivals, got an empty file; leave the trace out and give a rate."
        raise BadWorkload(message) from error
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _unreadable_trace(trace, error) from error
    if rows > ROWS_MAX:
        message = f"A trace must have at most {ROWS_MAX:,} rows, got {rows:,} in {trace.path}; give counts per second."
        raise BadWorkload(message)
    return frame


def _unreadable_trace(trace: ArrivalTrace, error: Exception) -> BadWorkload:
    return BadWorkload(f"{trace.path} must be readable as {Path(trace.path).suffix[1:]}, got: {error}")


def _find_column(trace: ArrivalTrace, schema: pl.Schema) -> str:
    names = list(schema)
    if trace.column is not None:
        if trace.column not in names:
            message = f"{trace.path} must have the column {trace.column!r}, got {_list_names(names)}."
            raise BadWorkload(message)
        return trace.column
    numbers = [name for name in names if schema[name].is_numeric()]
    times = [name for name in names if schema[name].is_temporal() or schema[name] == pl.String]
    found = (times or numbers) if trace.content == "timestamps" else numbers
    if len(found) != 1:
        message = (
            f"{trace.path} must have one column that can be read as {trace.content}, got {len(found)} of "
            f"{_list_names(names)}; name it as the trace's column."
        )
        raise BadWorkload(message)
    return found[0]


def _list_names(names: list[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {len(names) - _NAMES_SHOWN} more" * (len(names) > _NAMES_SHOWN))


def _parse_timestamps(values: pl.Series, origin: str) -> NDArray[np.float64]:
    kind = values.dtype
    times = values
    if kind == pl.String:
        texts = values.str.strip_chars()
        try:
            times = texts.str.to_datetime(time_unit="us", strict=False, ambiguous="null")
        except pl.exceptions.ComputeError:
            # No format of dates fits: these are numbers.
            times = texts.cast(pl.Float64, strict=False)
    elif kind == pl.Date:
        times = values.cast(pl.Datetime("us"))
    if not (times.dtype.is_numeric() or isinstance(times.dtype, pl.Datetime)):
        message = f"{origin} must hold timestamps, got {kind}."
        raise BadWorkload(message)
    _check_none_missing(values, times, origin, "timestamp")
    if isinstance(times.dtype, pl.Datetime):
        return times.dt.epoch("us").to_numpy() / 1e6
    return times.cast(pl.Float64).to_numpy()


def _check_none_missing(values: pl.Series, numbers: pl.Series, origin: str, what: str) -> None:
    bad = numbers.is_null()
    if numbers.dtype.is_float():
        bad |= ~numbers.is_finite().fill_null(value=False)
    if bad.any():
        at = bad.arg_true()[0]
        message = f"{origin} must hold a {what} in each row, got {values[at]!r} in row {at + 1} and {bad.sum()} such."
        raise BadWorkload(message)


def count_per_second(times: NDArray[np.float64], origin: str) -> tuple[NDArray[np.int64], list[str]]:
    """Return the arrivals of each second from the first one on, for at least one time in seconds, and notes.

    The end of the last gap is not known: one of average length is added. A single time is one second.
    """
    first, last = float(times.min()), float(times.max())
    if last - first > SPAN_DAYS_MAX * 86_400:
        message = (
            f"{origin} must be in seconds and span at most {SPAN_DAYS_MAX} days, got {(last - first) / 86_400:,.0f} "
            "days; are they milliseconds?"
        )
        raise BadWorkload(message)
    notes = []
    if (times[1:] < times[:-1]).any():
        notes.append(f"{origin} is not in order; it was sorted.")
    times = np.sort(times)
    same = int((np.diff(times) == 0).sum())
    if same:
        notes.append(f"{origin} has {same:,} arrivals at the very moment of another; each counts.")
    at = (times - first).astype(np.int64)
    moments = len(times) - same
    span = last - first
    length = max(int(at[-1]) + 1, int(np.ceil(span * moments / max(moments - 1, 1))))
    gap = float(np.diff(times).max(initial=0.0))
    if gap >= _GAP_TOLD_SECONDS:
        notes.append(f"{origin} has a gap of {in_words(gap)}; it counts as time without traffic.")
    counts = np.bincount(at, minlength=length)
    _check_rate(int(counts.max()), 1, origin)
    return counts, notes


def _parse_counts(values: pl.Series, origin: str, seconds: int) -> tuple[NDArray[np.int64], list[str]]:
    numbers: Any = values if values.dtype.is_numeric() else values.cast(pl.Float64, strict=False)
    _check_none_missing(values, numbers, origin, "count")
    counts = numbers.cast(pl.Float64).to_numpy()
    bad = (counts < 0) | (counts != np.floor(counts))
    if bad.any():
        at = int(np.argmax(bad))
        message = f"{origin} must hold whole numbers from 0, got {counts[at]:g} in row {at + 1} and {bad.sum()} such."
        raise BadWorkload(message)
    _check_rate(float(counts.max()), seconds, origin)
    if len(counts) * seconds > SPAN_DAYS_MAX * 86_400:
        message = f"{origin} must span at most {SPAN_DAYS_MAX} days, got {len(counts) * seconds / 86_400:,.0f}."
        raise BadWorkload(message)
    return spread_counts(counts.astype(np.int64), seconds), []


def _check_rate(count: float, seconds: int, origin: str) -> None:
    if count > PER_SECOND_MAX * seconds:
        message = f"{origin} must have at most {PER_SECOND_MAX:,} arrivals a second, got {count:,.0f} in {seconds} s."
        raise BadWorkload(message)


def spread_counts(counts: NDArray[np.int64], seconds: int) -> NDArray[np.int64]:
    """Return the arrivals of each second from those of longer intervals, each at a random moment of its interval."""
    if seconds == 1:
        return counts
    random = np.random.default_rng(_SEED)
    return random.multinomial(counts, np.full(seconds, 1 / seconds)).reshape(-1)
