from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import BadWorkload
from tasks.scheduler.arrivals import (
    DAY_SECONDS,
    compute_day_shape,
    count_per_second,
    read_arrivals,
    read_trace,
    spread_counts,
)
from tasks.scheduler.workload import ArrivalRate, ArrivalTrace, MeteredArrivals, Table
from tests.serving.gateway.support import write_access_line
from tests.tasks.scheduler.values import workload


def test_a_rate_comes_to_its_average_and_its_peak_at_its_hour() -> None:
    rate = ArrivalRate(per_second=5, peak=3, peak_at="06:00", rows_per_arrival=2)

    found = read_arrivals(workload(arrivals=rate, horizon_days=2))

    by_hour = found.counts_T.reshape(2, 24, 3600).mean(axis=(0, 2))
    assert 2 * DAY_SECONDS == len(found.counts_T)
    assert 5 == pytest.approx(by_hour.mean(), rel=0.02)
    assert 15 == pytest.approx(by_hour[5:7].mean(), rel=0.1)
    assert 2 == found.rows_per_arrival


def test_arrivals_are_the_same_for_the_same_seed() -> None:
    asked = workload(arrivals=ArrivalRate(per_second=1), horizon_days=0.1)

    one, same, other = (read_arrivals(asked, seed=seed).counts_T for seed in (1, 1, 2))

    assert one.tolist() == same.tolist()
    assert one.tolist() != other.tolist()


@pytest.mark.parametrize("peak", [1.0, 1.5, 7.0, 100.0])
def test_the_day_has_the_peak_of_the_rate(peak: float) -> None:
    shape = compute_day_shape(peak, "14:00")

    assert peak == pytest.approx(shape.max(), rel=1e-6)
    assert 1 == pytest.approx(shape.mean())


def test_a_shorter_trace_is_repeated_and_a_longer_one_cut_and_both_say_so(tmp_path: Path) -> None:
    path = tmp_path / "counts.csv"
    pl.DataFrame({"n": [1, 2, 3]}).write_csv(path)
    trace = ArrivalTrace(path=str(path), content="per-second", rows_per_arrival=4)

    longer = read_arrivals(workload(arrivals=trace, horizon_days=7 / DAY_SECONDS))
    shorter = read_arrivals(workload(arrivals=trace, horizon_days=2 / DAY_SECONDS))

    assert [1, 2, 3, 1, 2, 3, 1] == longer.counts_T.tolist()
    assert ("The trace lasts 3 s; it is repeated 2.333 times to fill 7 s.",) == longer.notes
    assert 4 == longer.rows_per_arrival
    assert [1, 2] == shorter.counts_T.tolist()
    assert ("Of the trace's 3 s, the first 2 s are replayed.",) == shorter.notes


def test_a_single_moment_is_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "one.csv"
    pl.DataFrame({"at": [17.5]}).write_csv(path)

    found = read_arrivals(workload(arrivals=ArrivalTrace(path=str(path)), horizon_days=1))

    assert 1 == found.counts_T.sum()
    assert DAY_SECONDS == len(found.counts_T)
    assert "single moment" in found.notes[0]


def test_a_year_is_replayed_for_thirty_days() -> None:
    found = read_arrivals(workload(arrivals=ArrivalRate(per_second=0.01), horizon_days=366))

    assert 30 * DAY_SECONDS == len(found.counts_T)


def meter(folder: Path, *lines: tuple[float, str, int, int]) -> None:
    for at, endpoint, rows, status in lines:
        write_access_line(folder, at_us=round(at * 1e6), endpoint=endpoint, rows=rows, status=status)


def test_metered_requests_are_arrivals_but_for_those_that_were_turned_away_as_wrong(tmp_path: Path) -> None:
    meter(
        tmp_path,
        *[(100.0, "toy", 2, 200), (101.2, "toy", 4, 429), (101.5, "other", 9, 200)],
        *[(102.5, "toy", 9, 400), (103.5, "toy", 3, 503)],
    )

    found = read_arrivals(
        workload(arrivals=MeteredArrivals(folder=str(tmp_path), endpoint="toy"), horizon_days=5 / DAY_SECONDS)
    )

    assert [1, 1, 0, 1, 0] == found.counts_T.tolist()
    assert 3 == found.rows_per_arrival


def test_an_endpoint_without_metered_requests_is_named_with_those_that_have_some(tmp_path: Path) -> None:
    meter(tmp_path, (100.0, "other", 1, 200))

    with pytest.raises(BadWorkload, match="must hold requests of 'toy', got those of 'other'"):
        read_arrivals(workload(arrivals=MeteredArrivals(folder=str(tmp_path), endpoint="toy")))
    with pytest.raises(BadWorkload, match="got those of none"):
        read_arrivals(workload(arrivals=MeteredArrivals(folder=str(tmp_path / "no"), endpoint="toy")))


def test_a_table_has_no_arrivals() -> None:
    with pytest.raises(BadWorkload, match="A table has no arrivals"):
        read_arrivals(workload(consumer=Table(rows=1)))


def test_no_traffic_is_arrivals_too() -> None:
    assert 0 == np.sum(read_arrivals(workload(arrivals=ArrivalRate(per_second=0))).counts_T)


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

    counts, notes = read_trace(ArrivalTrace(path=path))

    assert [2, 1, 0, 0, 1] == counts[:5].tolist()
    assert 4 == counts.sum()
    assert [] == notes


@pytest.mark.parametrize("zone", [None, "UTC"])
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_dates_and_times_are_timestamps(tmp_path: Path, suffix: str, zone: str | None) -> None:
    start = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC if zone else None)
    path = write(tmp_path, suffix, at=[start, start + timedelta(seconds=3)], size=[1, 2])

    counts, _ = read_trace(ArrivalTrace(path=path))

    assert [1, 0, 0, 1] == counts[:4].tolist()


def test_text_with_more_digits_than_a_microsecond_is_a_timestamp(tmp_path: Path) -> None:
    path = write(
        tmp_path, ".csv", TIMESTAMP=["2023-11-16 18:17:03.9799600", "2023-11-16 18:17:04.9899600"], tokens=[1, 2]
    )

    counts, _ = read_trace(ArrivalTrace(path=path))

    assert [1, 1] == counts[:2].tolist()


def test_the_end_of_the_last_gap_is_taken_to_be_an_average_one(tmp_path: Path) -> None:
    counts, _ = read_trace(ArrivalTrace(path=write(tmp_path, at=[0.0, 10.0, 20.0])))

    assert 30 == len(counts)


def test_unsorted_and_simultaneous_arrivals_all_count_and_have_a_note(tmp_path: Path) -> None:
    counts, notes = read_trace(ArrivalTrace(path=write(tmp_path, at=[5.0, 3.0, 3.0, 4.0])))

    assert [2, 1, 1] == counts[:3].tolist()
    assert any("not in order" in note for note in notes)
    assert any("1 arrivals at the very moment of another" in note for note in notes)


def test_a_long_gap_is_time_without_traffic_and_has_a_note(tmp_path: Path) -> None:
    counts, notes = read_trace(ArrivalTrace(path=write(tmp_path, at=[0.0, 7200.0])))

    assert 2 == counts.sum()
    assert ["a gap of 2 h"] == [part for note in notes for part in ["a gap of 2 h"] if part in note]


def test_counts_of_minutes_are_spread_over_their_seconds(tmp_path: Path) -> None:
    path = write(tmp_path, ".csv", n=[600, 0, 6])

    counts, _ = read_trace(ArrivalTrace(path=path, content="per-minute"))

    assert 180 == len(counts)
    assert [600, 0, 6] == counts.reshape(3, 60).sum(axis=1).tolist()
    assert counts[:60].max() < 60


def test_counts_of_seconds_are_taken_as_they_are(tmp_path: Path) -> None:
    counts, _ = read_trace(ArrivalTrace(path=write(tmp_path, n=[3.0, 0.0, 1.0]), content="per-second"))

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
def test_values_that_are_no_arrivals_are_refused_with_their_row(
    tmp_path: Path, column: list, holds: str, message: str
) -> None:
    path = write(tmp_path, n=column)

    with pytest.raises(BadWorkload, match=message):
        read_trace(ArrivalTrace(path=path, content=holds))


def test_a_missing_column_is_named_with_the_existing_ones(tmp_path: Path) -> None:
    path = write(tmp_path, a=[1], b=[2])

    with pytest.raises(BadWorkload, match=r"must have the column 'c', got a, b\."):
        read_trace(ArrivalTrace(path=path, column="c"))
    with pytest.raises(BadWorkload, match=r"one column .* got 2 of a, b; name it"):
        read_trace(ArrivalTrace(path=path, content="per-second"))


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
        read_trace(ArrivalTrace(path=str(tmp_path / name)))


@given(st.lists(st.floats(0, 1e5), min_size=1, max_size=50))
def test_every_arrival_counts_once_in_any_order(times: list[float]) -> None:
    counts, _ = count_per_second(np.array(times), "a list")
    again, _ = count_per_second(np.array(sorted(times)), "a list")

    assert len(times) == counts.sum()
    assert again.tolist() == counts.tolist()


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20))
def test_spreading_loses_nothing(counts: list[int]) -> None:
    found = spread_counts(np.array(counts), 60)

    assert counts == found.reshape(-1, 60).sum(axis=1).tolist()
