from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import BadWorkload
from tasks.scheduler.trace import per_second, read_trace, spread
from tasks.scheduler.workload import Trace


def write(folder: Path, suffix: str = ".parquet", **columns: object) -> str:
    path = folder / f"trace{suffix}"
    frame = pl.DataFrame(columns)
    if suffix == ".csv":
        frame.write_csv(path)
    else:
        frame.write_parquet(path)
    return str(path)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_timestamps_in_seconds_are_counted_by_the_second_from_the_first_on(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path, suffix, at=[100.5, 100.9, 101.6, 104.5])

    counts, notes = read_trace(Trace(path=path))

    assert [2, 1, 0, 0, 1] == counts[:5].tolist()
    assert 4 == counts.sum()
    assert [] == notes


@pytest.mark.parametrize("zone", [None, "UTC"])
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_dates_and_times_are_timestamps(tmp_path: Path, suffix: str, zone: str | None) -> None:
    start = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC if zone else None)
    path = write(tmp_path, suffix, at=[start, start + timedelta(seconds=3)], size=[1, 2])

    counts, _ = read_trace(Trace(path=path))

    assert [1, 0, 0, 1] == counts[:4].tolist()


def test_text_with_more_digits_than_a_microsecond_is_a_timestamp(tmp_path: Path) -> None:
    path = write(
        tmp_path, ".csv", TIMESTAMP=["2023-11-16 18:17:03.9799600", "2023-11-16 18:17:04.9899600"], tokens=[1, 2]
    )

    counts, _ = read_trace(Trace(path=path))

    assert [1, 1] == counts[:2].tolist()


def test_the_end_of_the_last_gap_is_taken_to_be_an_average_one(tmp_path: Path) -> None:
    counts, _ = read_trace(Trace(path=write(tmp_path, at=[0.0, 10.0, 20.0])))

    assert 30 == len(counts)


def test_unsorted_and_simultaneous_arrivals_all_count_and_are_told_of(tmp_path: Path) -> None:
    counts, notes = read_trace(Trace(path=write(tmp_path, at=[5.0, 3.0, 3.0, 4.0])))

    assert [2, 1, 1] == counts[:3].tolist()
    assert any("not in order" in note for note in notes)
    assert any("1 arrivals at the very moment of another" in note for note in notes)


def test_a_long_gap_is_time_without_traffic_and_is_told_of(tmp_path: Path) -> None:
    counts, notes = read_trace(Trace(path=write(tmp_path, at=[0.0, 7200.0])))

    assert 2 == counts.sum()
    assert ["a gap of 2 h"] == [part for note in notes for part in ["a gap of 2 h"] if part in note]


def test_counts_of_minutes_are_spread_over_their_seconds(tmp_path: Path) -> None:
    path = write(tmp_path, ".csv", n=[600, 0, 6])

    counts, _ = read_trace(Trace(path=path, holds="per-minute"))

    assert 180 == len(counts)
    assert [600, 0, 6] == counts.reshape(3, 60).sum(axis=1).tolist()
    assert counts[:60].max() < 60


def test_counts_of_seconds_are_taken_as_they_are(tmp_path: Path) -> None:
    counts, _ = read_trace(Trace(path=write(tmp_path, n=[3.0, 0.0, 1.0]), holds="per-second"))

    assert [3, 0, 1] == counts.tolist()


@pytest.mark.parametrize(
    ("column", "holds", "message"),
    [
        ([1, -2, 3], "per-second", "whole numbers from 0, got -2 in row 2"),
        ([1.5, 2.0], "per-minute", "whole numbers from 0, got 1.5 in row 1"),
        ([1, None], "per-second", "a count in each row, got None in row 2"),
        ([1.0, float("nan")], "per-second", "a count in each row, got nan in row 2"),
        ([1.0, float("inf")], "timestamps", "a timestamp in each row, got inf in row 2"),
        ([10**12], "per-second", "at most 10,000,000 arrivals a second"),
        ([0, 1_700_000_000_000], "timestamps", "are they milliseconds"),
        (["monday", "tuesday"], "timestamps", "a timestamp in each row, got 'monday' in row 1"),
        ([[1], [2]], "timestamps", "must have one column that can be read as timestamps, got 0"),
        ([], "timestamps", "must have one column|got no rows"),
    ],
)
def test_what_is_no_trace_is_refused_with_the_row(tmp_path: Path, column: list, holds: str, message: str) -> None:
    path = write(tmp_path, n=column)

    with pytest.raises(BadWorkload, match=message):
        read_trace(Trace(path=path, holds=holds))


def test_a_column_that_is_not_there_is_named_beside_those_that_are(tmp_path: Path) -> None:
    path = write(tmp_path, a=[1], b=[2])

    with pytest.raises(BadWorkload, match=r"must have the column 'c', got a, b\."):
        read_trace(Trace(path=path, column="c"))
    with pytest.raises(BadWorkload, match=r"one column .* got 2 of a, b; name it"):
        read_trace(Trace(path=path, holds="per-second"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "must be a file that is there"),
        ("trace.json", b"{}", "must be a .csv or .parquet file"),
        ("trace.parquet", b"PAR?", "must be readable as parquet"),
        ("trace.csv", b"", "got an empty file"),
        ("trace.csv", b"at\n", "got no rows"),
    ],
)
def test_files_that_hold_no_trace_are_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)

    with pytest.raises(BadWorkload, match=message):
        read_trace(Trace(path=str(tmp_path / name)))


@given(st.lists(st.floats(0, 1e5), min_size=1, max_size=50))
def test_every_arrival_counts_once_in_any_order(times: list[float]) -> None:
    counts, _ = per_second(np.array(times), "a list")
    again, _ = per_second(np.array(sorted(times)), "a list")

    assert len(times) == counts.sum()
    assert again.tolist() == counts.tolist()


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20))
def test_spreading_loses_nothing(counts: list[int]) -> None:
    found = spread(np.array(counts), 60)

    assert counts == found.reshape(-1, 60).sum(axis=1).tolist()
