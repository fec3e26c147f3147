"""Times of another type, and times in texts, as nanoseconds since 1970 in UTC. Shapes: n rows of one Arrow chunk."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from serving.model.number_casts import Mask

Times = npt.NDArray[np.datetime64]

# Seconds since 1970 that fit 64 bits as nanoseconds.
_SECONDS_MAX = 2**63 // 10**9
_FRACTION_DIGITS = 9
_HOUR, _MINUTE = r"(?:[01][0-9]|2[0-3])", "[0-5][0-9]"
_ISO_8601 = (
    r"^(?P<date>[0-9]{4}-[0-9]{2}-[0-9]{2})"
    rf"(?:[T ](?P<hour>{_HOUR}):(?P<minute>{_MINUTE})(?::(?P<second>{_MINUTE})(?:\.(?P<fraction>[0-9]{{1,9}}))?)?"
    rf"(?:Z|(?P<sign>[+-])(?P<zone_hour>{_HOUR}):(?P<zone_minute>{_MINUTE}))?)?$"
)


def cast_times(chunk: pa.Array) -> tuple[Times, Mask]:
    """Return n times or dates as nanoseconds, in UTC where they have a zone, and which of them do not fit."""
    try:
        cast, lost_n = pc.cast(chunk, pa.timestamp("ns")), np.zeros(len(chunk), dtype=np.bool_)
    except pa.ArrowInvalid:
        seconds = pc.cast(pc.cast(chunk, pa.timestamp("s"), safe=False), pa.int64())
        lost = pc.greater_equal(pc.abs(seconds), _SECONDS_MAX).fill_null(False)  # noqa: FBT003 - Arrow's signature
        cast = pc.cast(pc.if_else(lost, pa.scalar(None, chunk.type), chunk), pa.timestamp("ns"))
        lost_n = np.asarray(lost.to_numpy(zero_copy_only=False))
    return cast.to_numpy(zero_copy_only=False), lost_n


def parse_times(chunk: pa.Array) -> tuple[Times, Mask]:
    """Return n texts as nanoseconds, and which of them are no time of ISO 8601 or do not fit; a null is no time.

    A text is a date, `2024-02-29`, or one with a time of day, `2024-02-29T12:30` or `2024-02-29 12:30:15.25`, and then
    may have a zone, `2024-02-29T12:30Z` or `2024-02-29T12:30:15+02:00`. Without one it is in UTC. Numbers are refused:
    nobody knows their unit, nor from when they count.
    """
    text = pl.Series(chunk, dtype=pl.String).str.strip_chars()
    parts = text.str.extract_groups(_ISO_8601).struct.unnest()
    number = {name: parts[name].cast(pl.Int64).fill_null(0) for name in ("hour", "minute", "second")}
    zone = parts["zone_hour"].cast(pl.Int64) * 3600 + parts["zone_minute"].cast(pl.Int64) * 60
    days = parts["date"].str.to_date("%Y-%m-%d", strict=False).cast(pl.Int64)
    seconds = days * 86400 + number["hour"] * 3600 + number["minute"] * 60 + number["second"]
    seconds -= pl.select(pl.when(parts["sign"] == "-").then(-zone).otherwise(zone)).to_series().fill_null(0)
    fraction = parts["fraction"].str.pad_end(_FRACTION_DIGITS, "0").cast(pl.Int64).fill_null(0)
    held = (seconds.abs() < _SECONDS_MAX).fill_null(value=False)
    times_n = (seconds.fill_null(0) * 10**_FRACTION_DIGITS + fraction).to_numpy().astype("datetime64[ns]")
    held_n = held.to_numpy()
    times_n[~held_n] = np.datetime64("NaT")
    return times_n, np.asarray(~held_n & text.is_not_null().to_numpy())
