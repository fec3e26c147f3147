"""Arrivals out of a file: timestamps, or counts of each second or minute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from serving.errors import BadWorkload
from tasks.common.formatting import in_words
from tasks.scheduler.workload import Trace

SPAN_DAYS_MAX = 366
ROWS_MAX = 50_000_000
PER_SECOND_MAX = 10_000_000
_SEED = 11
_MINUTE = 60
_NAMES_SHOWN = 12
_GAP_TOLD_SECONDS = 3600
_READERS: dict[str, Callable[[Path], pl.LazyFrame]] = {".csv": pl.scan_csv, ".parquet": pl.scan_parquet}


def read_trace(trace: Trace) -> tuple[NDArray[np.int64], list[str]]:
    """Return the arrivals of each second of a file, from its first on, and what was made of it, in sentences.

    Raises BadWorkload where there is no such file or column, and where a value is missing, negative or absurd.
    """
    frame = _scan(trace)
    name = _column(trace, frame.collect_schema())
    try:
        values = frame.select(name).collect().get_column(name)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _unreadable(trace, error) from error
    where = f"Column {name!r} of {trace.path}"
    if not len(values):
        message = f"{where} must hold arrivals, got no rows; leave the trace out and give a rate."
        raise BadWorkload(message)
    if trace.holds == "timestamps":
        return per_second(_seconds(values, where), where)
    return _counts(values, where, _MINUTE if trace.holds == "per-minute" else 1)


def _scan(trace: Trace) -> pl.LazyFrame:
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
        raise _unreadable(trace, error) from error
    if rows > ROWS_MAX:
        message = f"A trace must have at most {ROWS_MAX:,} rows, got {rows:,} in {trace.path}; give counts per second."
        raise BadWorkload(message)
    return frame


def _unreadable(trace: Trace, error: Exception) -> BadWorkload:
    return BadWorkload(f"{trace.path} must be readable as {Path(trace.path).suffix[1:]}, got: {error}")


def _column(trace: Trace, schema: pl.Schema) -> str:
    names = list(schema)
    if trace.column is not None:
        if trace.column not in names:
            message = f"{trace.path} must have the column {trace.column!r}, got {_listed(names)}."
            raise BadWorkload(message)
        return trace.column
    numbers = [name for name in names if schema[name].is_numeric()]
    times = [name for name in names if schema[name].is_temporal() or schema[name] == pl.String]
    found = (times or numbers) if trace.holds == "timestamps" else numbers
    if len(found) != 1:
        message = (
            f"{trace.path} must have one column that can be read as {trace.holds}, got {len(found)} of "
            f"{_listed(names)}; name it as the trace's column."
        )
        raise BadWorkload(message)
    return found[0]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {len(names) - _NAMES_SHOWN} more" * (len(names) > _NAMES_SHOWN))


def _seconds(values: pl.Series, where: str) -> NDArray[np.float64]:
    kind = values.dtype
    times = values
    if kind == pl.String:
        times = _parsed(values.str.strip_chars())
    elif kind == pl.Date:
        times = values.cast(pl.Datetime("us"))
    if not (times.dtype.is_numeric() or isinstance(times.dtype, pl.Datetime)):
        message = f"{where} must hold timestamps, got {kind}."
        raise BadWorkload(message)
    _none_missing(values, times, where, "timestamp")
    if isinstance(times.dtype, pl.Datetime):
        return times.dt.epoch("us").to_numpy() / 1e6
    return times.cast(pl.Float64).to_numpy()


def _parsed(texts: pl.Series) -> pl.Series:
    try:
        return texts.str.to_datetime(time_unit="us", strict=False, ambiguous="null")
    except pl.exceptions.ComputeError:
        # There is no date and time that is written so.
        return texts.cast(pl.Float64, strict=False)


def _none_missing(values: pl.Series, numbers: pl.Series, where: str, what: str) -> None:
    bad = numbers.is_null()
    if numbers.dtype.is_float():
        bad |= ~numbers.is_finite().fill_null(value=False)
    if bad.any():
        at = bad.arg_true()[0]
        message = f"{where} must hold a {what} in each row, got {values[at]!r} in row {at + 1} and {bad.sum()} such."
        raise BadWorkload(message)


def per_second(times: NDArray[np.float64], where: str) -> tuple[NDArray[np.int64], list[str]]:
    """Return the arrivals of each second from the first on, for at least one moment in seconds, and what is notable.

    The end of the last gap is not known: one of average length is added. A single moment is one second.
    """
    first, last = float(times.min()), float(times.max())
    if last - first > SPAN_DAYS_MAX * 86_400:
        message = (
            f"{where} must be in seconds and span at most {SPAN_DAYS_MAX} days, got {(last - first) / 86_400:,.0f} "
            "days; are they milliseconds?"
        )
        raise BadWorkload(message)
    notes = []
    if (times[1:] < times[:-1]).any():
        notes.append(f"{where} is not in order; it was sorted.")
    times = np.sort(times)
    same = int((np.diff(times) == 0).sum())
    if same:
        notes.append(f"{where} has {same:,} arrivals at the very moment of another; each counts.")
    at = (times - first).astype(np.int64)
    moments = len(times) - same
    span = last - first
    length = max(int(at[-1]) + 1, int(np.ceil(span * moments / max(moments - 1, 1))))
    notes += _gap_note(float(np.diff(times).max(initial=0.0)), where)
    counts = np.bincount(at, minlength=length)
    _not_absurd(int(counts.max()), 1, where)
    return counts, notes


def _gap_note(seconds: float, where: str) -> list[str]:
    if seconds < _GAP_TOLD_SECONDS:
        return []
    return [f"{where} has a gap of {in_words(seconds)}; it counts as time without traffic."]


def _counts(values: pl.Series, where: str, seconds: int) -> tuple[NDArray[np.int64], list[str]]:
    numbers: Any = values if values.dtype.is_numeric() else values.cast(pl.Float64, strict=False)
    _none_missing(values, numbers, where, "count")
    counts = numbers.cast(pl.Float64).to_numpy()
    bad = (counts < 0) | (counts != np.floor(counts))
    if bad.any():
        at = int(np.argmax(bad))
        message = f"{where} must hold whole numbers from 0, got {counts[at]:g} in row {at + 1} and {bad.sum()} such."
        raise BadWorkload(message)
    _not_absurd(float(counts.max()), seconds, where)
    if len(counts) * seconds > SPAN_DAYS_MAX * 86_400:
        message = f"{where} must span at most {SPAN_DAYS_MAX} days, got {len(counts) * seconds / 86_400:,.0f}."
        raise BadWorkload(message)
    return spread(counts.astype(np.int64), seconds), []


def _not_absurd(count: float, seconds: int, where: str) -> None:
    if count > PER_SECOND_MAX * seconds:
        message = f"{where} must have at most {PER_SECOND_MAX:,} arrivals a second, got {count:,.0f} in {seconds} s."
        raise BadWorkload(message)


def spread(counts: NDArray[np.int64], seconds: int) -> NDArray[np.int64]:
    """Return the arrivals of each second from those of every so many seconds: each at a random moment within them."""
    if seconds == 1:
        return counts
    random = np.random.default_rng(_SEED)
    return random.multinomial(counts, np.full(seconds, 1 / seconds)).reshape(-1)
