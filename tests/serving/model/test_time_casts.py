"""Times in texts, held against plain Python's own."""

from __future__ import annotations

import datetime as dt
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.model.time_casts import parse_times

EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
zones = st.none() | st.timedeltas(dt.timedelta(hours=-23), dt.timedelta(hours=23)).map(
    lambda offset: dt.timezone(dt.timedelta(minutes=offset // dt.timedelta(minutes=1)))
)
# A zone may move a time by a day.
times = st.datetimes(dt.datetime(1678, 1, 1), dt.datetime(2262, 4, 10), timezones=zones)  # noqa: DTZ001 - hypothesis adds the zone


def parse(*texts: str | None, kind: pa.DataType | None = None) -> list[np.datetime64 | str]:
    """What each text is; "lost" for those that do not parse."""
    times_n, lost_n = parse_times(pa.array(texts, kind or pa.string()))
    return ["lost" if lost else time for time, lost in zip(times_n, lost_n, strict=True)]


@given(st.lists(st.tuples(times, st.sampled_from("T "), st.sampled_from(["auto", "minutes", "milliseconds"]))))
def test_what_python_writes_of_a_time_is_that_time_in_utc(drawn: list[tuple[dt.datetime, str, str]]) -> None:
    texts = [time.isoformat(separator, precision) for time, separator, precision in drawn]
    read = [dt.datetime.fromisoformat(text) for text in texts]
    since = [(time.replace(tzinfo=time.tzinfo or dt.UTC) - EPOCH) // dt.timedelta(microseconds=1) for time in read]

    assert [np.datetime64(microseconds, "us") for microseconds in since] == parse(*texts)


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("2024-02-29", "2024-02-29"),
        (" 2024-02-29\t", "2024-02-29"),
        ("2024-02-29T12:34:56Z", "2024-02-29T12:34:56"),
        ("2024-02-29T12:34:56.123456789", "2024-02-29T12:34:56.123456789"),
        ("1969-12-31 23:59:59.5", "1969-12-31T23:59:59.5"),
        ("2024-03-01T00:30-00:45", "2024-03-01T01:15"),
        ("2262-04-11T23:47:15.999999999", "2262-04-11T23:47:15.999999999"),
    ],
)
def test_times_of_iso_8601_are_nanoseconds_in_utc(text: str, seen: str) -> None:
    assert [np.datetime64(seen, "ns")] == parse(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "now", "NaT", "1709164800", "1709164800.5", "12:30", "20240229", "29/02/2024", "2024-2-9", "24-02-29"),
        *("2023-02-29", "2024-04-31", "2024-13-01", "2024-00-10", "2024-01-00", "02024-01-01", "-2024-01-01"),
        *("2024-01-01T24:00:00", "2024-01-01T12:60", "2024-01-01T12:30:60", "2024-01-01T12", "2024-01-01T"),
        *("2024-01-01Z", "2024-01-01T12:30+0200", "2024-01-01T12:30+02", "2024-01-01T12:30+24:00", "2024-01-01T12:30z"),
        *("2024-01-01T12:30 UTC", "2024-01-01T12:30:15,5", "2024-01-01T12:30:15.1234567890", "2024-01-01T12:30\n01"),
        *("9999-12-31", "0001-01-01", "1677-01-01", "2262-04-12", "٢٠٢٤-٠٢-٢٩"),
    ],
)
def test_a_text_that_is_no_time_or_too_far_away_is_lost_alone(text: str) -> None:
    day = np.datetime64("2024-02-29", "ns")

    assert [day, "lost", day] == parse("2024-02-29", text, "2024-02-29")


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_a_null_is_no_time_and_not_lost(kind: Any) -> None:
    missing, day = parse(None, "2024-02-29", kind=kind)

    assert np.isnat(missing)
    assert np.datetime64("2024-02-29", "ns") == day
    assert [] == parse(kind=kind)
