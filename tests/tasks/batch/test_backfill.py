"""The pieces of a backfill: which there are, in which order, and how they are read."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given
from pydantic import ValidationError

from serving.errors import BadInput, NoCompleteRun, SourceNotFound
from tasks.batch.backfill import (
    BackfillOptions,
    BackfillReport,
    Partitions,
    PieceReport,
    TableTimes,
    TableVersions,
    choose_values,
    describe_failures,
    list_pieces,
    open_backfill,
    order_pieces,
)
from tasks.batch.options import BatchOptions
from tasks.batch.source import pin_source
from tests.tasks.batch.small import numbers, put
from tests.tasks.batch.test_reuse import call, write

OPTIONS = BatchOptions(key_columns=("id",))
DAYS = ("2026-10-31", "2026-11-01", "2026-11-02", "2026-11-10")
# No catalog is asked for it before a piece of it is scored.
TABLE = "iceberg:shop.customers"
NOON = datetime(2026, 11, 1, 12, tzinfo=UTC)


@pytest.fixture
def source(tmp_path: Path) -> str:
    for at, day in enumerate(DAYS):
        write(tmp_path / f"in/date={day}/a.parquet", 100 * at, 24, group=12)
    write(tmp_path / "in/region=eu/a.parquet", 900, 24)
    return str(tmp_path / "in")


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        ("2026-11-01", "2026-11-30", DAYS[1:]),
        (None, "2026-11-01", DAYS[:2]),
        ("2026-11-02", None, DAYS[2:]),
        (None, None, DAYS),
        ("2026-11-02", "2026-11-02", DAYS[2:3]),
    ],
)
def test_a_range_has_the_partitions_that_are_there(
    source: str, tmp_path: Path, first: str | None, last: str | None, expected: tuple[str, ...]
) -> None:
    pieces = list_pieces(source, str(tmp_path / "out"), Partitions(column="date", first=first, last=last), OPTIONS)

    assert [f"date={day}" for day in expected] == [piece.name for piece in pieces]
    assert [f"{tmp_path}/out/date={day}" for day in expected] == [piece.destination for piece in pieces]
    assert list(reversed(pieces)) == order_pieces(pieces, BackfillOptions())
    assert pieces == order_pieces(pieces, BackfillOptions(order="oldest"))


def test_a_partition_is_read_alone_and_with_its_column_where_that_is_used(source: str, tmp_path: Path) -> None:
    out, asked = str(tmp_path / "out"), Partitions(column="date", first="2026-11-01", last="2026-11-01")
    (plain,) = list_pieces(source, out, asked, OPTIONS)
    (used,) = list_pieces(source, out, asked, OPTIONS, used={"date"})
    alone, with_column = (pin_source(each.source, each.destination) for each in (plain, used))

    assert [({}, "a.parquet")] == [(file.partition_values, file.path) for file in alone.files]
    assert [{"date": "2026-11-01"}] == [file.partition_values for file in with_column.files]


@pytest.mark.parametrize("value", ["a*b", "a[b]", "100%25", "a?b"])
def test_a_partition_of_any_value_is_read_alone(tmp_path: Path, value: str) -> None:
    for at, name in enumerate((value, "axb", "ab", "b")):
        write(tmp_path / f"in/kind={name}/a.parquet", 100 * at, 5 + at)
    pieces = list_pieces(str(tmp_path / "in"), str(tmp_path / "out"), Partitions(column="kind"), OPTIONS, {"kind"})
    (piece,) = (piece for piece in pieces if piece.name == f"kind={value}")
    snapshot = pin_source(piece.source, piece.destination)

    assert [f"kind={value}/a.parquet"] == [file.path for file in snapshot.files]


@given(st.lists(st.integers(-50, 50), unique=True), st.integers(-50, 50), st.integers(-50, 50))
def test_numbers_are_compared_as_numbers(values: list[int], first: int, last: int) -> None:
    chosen = choose_values([str(value) for value in values], str(first), str(last))

    assert [str(value) for value in sorted(values) if first <= value <= last] == chosen


def test_numbers_are_compared_as_numbers_beside_texts_and_with_zeros_before_them() -> None:
    hours = [*(f"{at:02}" for at in range(13)), "__HIVE_DEFAULT_PARTITION__"]

    assert hours[1:13] == choose_values(hours, "1", "12")
    assert hours[10:13] == choose_values(hours, "10", None)
    assert hours == choose_values(hours[::-1], None, None)


def test_texts_are_compared_as_texts() -> None:
    assert ["2026-11-01"] == choose_values(["2025-11-01", "2026-11-01", "2027-11-01"], "2026", "2027")
    assert ["9", "10", "b"] == choose_values(["b", "9", "10", "z"], "1", "c")


@pytest.mark.parametrize(
    ("pieces", "where", "message"),
    [
        (Partitions(column="date", first="2027-01-01"), "in", r"got 4 from 2026-10-31 to 2026-11-10"),
        (Partitions(column="day"), "in", r"must have a partition of day=\.\., got folders such as \['date=2026-10-31'"),
        (Partitions(column="date"), "nowhere", "must have a partition of date="),
    ],
)
def test_a_range_without_partitions_says_what_is_there(
    source: str, tmp_path: Path, pieces: Partitions, where: str, message: str
) -> None:
    with pytest.raises(SourceNotFound, match=message):
        list_pieces(str(tmp_path / where), str(tmp_path / "out"), pieces, OPTIONS)


@pytest.mark.parametrize("where", ["in/date=*", "in/date=2026-11-01/a.parquet"])
def test_partitions_of_a_file_or_glob_are_refused(source: str, tmp_path: Path, where: str) -> None:
    with pytest.raises(BadInput, match="Partitions must be folders right in a folder of loose files, got a file or a"):
        list_pieces(str(tmp_path / where), str(tmp_path / "out"), Partitions(column="date"), OPTIONS)


def test_partitions_of_a_table_are_refused(tmp_path: Path) -> None:
    put(f"{tmp_path}/in", {"a.parquet": numbers(0, 25)})
    (tmp_path / "in/_delta_log").mkdir()
    (tmp_path / "in/_delta_log/00000000000000000000.json").write_text("{}")
    with pytest.raises(BadInput, match=r"got the Delta table there at .* of a table give versions or times"):
        list_pieces(str(tmp_path / "in"), str(tmp_path / "out"), Partitions(column="date"), OPTIONS)


@pytest.mark.parametrize("where", ["in", "in/date=2026-11-01/a.parquet", "nowhere"])
@pytest.mark.parametrize("pieces", [TableVersions(first=0, last=1), TableTimes(first=NOON, last=NOON)])
def test_versions_of_what_is_no_table_are_refused_once(
    source: str, tmp_path: Path, where: str, pieces: TableVersions | TableTimes
) -> None:
    with pytest.raises(BadInput, match=rf"of a Delta or Iceberg table, got .*{where}, where there is none"):
        list_pieces(str(tmp_path / where), str(tmp_path / "out"), pieces, OPTIONS)


def test_versions_and_times_are_options_of_their_runs() -> None:
    versions = list_pieces(TABLE, "out", TableVersions(first=3, last=5), OPTIONS)
    chosen = list_pieces(TABLE, "out", TableVersions(numbers=(7, 9)), OPTIONS)
    times = list_pieces(
        TABLE, "out", TableTimes(first=NOON, last=NOON + timedelta(hours=13), every=timedelta(hours=6)), OPTIONS
    )

    assert ["version=3", "version=4", "version=5"] == [piece.name for piece in versions]
    assert [3, 4, 5] == [piece.options.source_version for piece in versions]
    assert [("version=7", "out/version=7"), ("version=9", "out/version=9")] == [(p.name, p.destination) for p in chosen]
    assert [NOON, NOON + timedelta(hours=6), NOON + timedelta(hours=12)] == [p.options.source_timestamp for p in times]
    assert "time=2026-11-01T180000Z" == times[1].name


def test_moments_that_are_yet_to_come_are_refused() -> None:
    times = TableTimes(first=NOON, last=NOON + timedelta(hours=13), every=timedelta(hours=6))

    assert 3 == len(list_pieces(TABLE, "out", times, OPTIONS, now=NOON + timedelta(hours=12)))
    with pytest.raises(BadInput, match=r"passed, got 2026-11-02T00:00:00\+00:00 where it is 2026-11-01T23:59:59Z now"):
        list_pieces(TABLE, "out", times, OPTIONS, now=NOON + timedelta(hours=11, seconds=3599))


@pytest.mark.parametrize(
    "given", [{}, {"first": 3}, {"first": 3, "last": 4, "numbers": (1,)}, {"last": 4, "numbers": (1,)}]
)
def test_versions_are_a_range_or_a_list(given: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="must have a first and a last one, or be listed as numbers"):
        TableVersions.model_validate(given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "mine"}, "Each piece must be a run of its own, got name"),
        ({"source_version": 3}, "Each piece must be a run of its own, got source_version"),
        ({"output": "delta"}, "must be parts and manifests, each at a destination of its own, got output='delta'"),
    ],
)
def test_options_of_a_single_run_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        list_pieces(TABLE, "out", TableVersions(first=0, last=1), OPTIONS.model_copy(update=options))


def test_a_range_that_is_empty_or_too_long_is_refused() -> None:
    with pytest.raises(BadInput, match="must have at least one piece, got from 5 to 3"):
        list_pieces(TABLE, "out", TableVersions(first=5, last=3), OPTIONS)
    with pytest.raises(BadInput, match="at most 10,000 pieces"):
        list_pieces(TABLE, "out", TableVersions(first=0, last=10_000), OPTIONS)


def test_several_runs_at_a_time_need_a_deployment() -> None:
    with pytest.raises(ValidationError, match="must name one where runs_at_a_time is more than 1, got 2 runs"):
        BackfillOptions(runs_at_a_time=2)


def test_all_complete_pieces_are_opened_as_one_with_their_values(source: str, tmp_path: Path) -> None:
    pieces = list_pieces(source, str(tmp_path / "out"), Partitions(column="date"), OPTIONS)
    with pytest.raises(NoCompleteRun):
        open_backfill(str(tmp_path / "out"))
    for piece in pieces[1:]:
        call(Path(piece.source), Path(piece.destination))
    table = open_backfill(str(tmp_path / "out")).collect()

    assert {(day, 24) for day in DAYS[1:]} == set(table.group_by("date").len().iter_rows())
    assert list(DAYS[1:]) == table["date"].unique(maintain_order=True).to_list()


def test_pieces_of_several_columns_are_not_mixed(tmp_path: Path) -> None:
    for name in ("version=3", "date=2026-11-01"):
        write(tmp_path / f"in-{name}/a.parquet", 0, 24)
        call(tmp_path / f"in-{name}", tmp_path / "out" / name)
    with pytest.raises(BadInput, match=r"must have pieces of one column, got \['date', 'version'\]"):
        open_backfill(str(tmp_path / "out"))

    assert {"3"} == set(open_backfill(str(tmp_path / "out"), "version").collect()["version"])


def test_the_message_of_a_failed_backfill_fits_a_screen() -> None:
    pieces = tuple(
        PieceReport(piece=f"date={at}", state="failed", destination="out", error="no such column") for at in range(30)
    )
    message = describe_failures(BackfillReport(model="models:/churn/3", destination="out", pieces=pieces))

    assert "30 of 30 failed" in message
    assert message.count("\n") < 12
    assert "and 24 more, in the table of the flow run" in message
