"""The command that scores a range: what it asks for, and what it prints."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deployments.command_line import app
from deployments.command_line.backfill_command import parse_pieces
from infra.local.prefect_server import PrefectServer
from serving.errors import BadInput
from tasks.batch.backfill import Partitions, Pieces, TableTimes, TableVersions
from tests.support import write_customers

DAY, DAYS = datetime(2026, 11, 1, tzinfo=UTC), timedelta(days=1)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("date=2026-11-01..2026-11-30", None, None, "1d"), ("date", "2026-11-01", "2026-11-30")),
        (("date=..2026-11-30", None, None, "1d"), ("date", None, "2026-11-30")),
        (("date=2026-11-01..", None, None, "1d"), ("date", "2026-11-01", None)),
        (("date=2026-11-01", None, None, "1d"), ("date", "2026-11-01", "2026-11-01")),
        (("date=..", None, None, "1d"), ("date", None, None)),
    ],
)
def test_partitions_are_read(given: tuple[str, None, None, str], expected: tuple[str, str | None, str | None]) -> None:
    column, first, last = expected

    assert Partitions(column=column, first=first, last=last) == parse_pieces(*given)


@pytest.mark.parametrize(
    ("versions", "times", "every", "expected"),
    [
        ("3..9", None, "1d", TableVersions(first=3, last=9)),
        ("3, 7,9", None, "1d", TableVersions(numbers=(3, 7, 9))),
        (
            None,
            "2026-11-01..2026-11-03",
            "6h",
            TableTimes(first=DAY, last=DAY + timedelta(2), every=timedelta(hours=6)),
        ),
        (None, "2026-11-01T01:00+01:00", "30m", TableTimes(first=DAY, last=DAY, every=timedelta(minutes=30))),
    ],
)
def test_versions_and_times_are_read(versions: str | None, times: str | None, every: str, expected: Pieces) -> None:
    assert expected == parse_pieces(None, versions, times, every)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, None, None, "1d"), "One of --partitions, --versions and --times must say what is scored, got 0"),
        (("date=..", "1..2", None, "1d"), "got 2 of them"),
        (("2026-11-01..2026-11-30", None, None, "1d"), "--partitions must be such as date="),
        ((None, "a..b", None, "1d"), r"--versions must be such as 3\.\.9"),
        ((None, None, "yesterday..today", "1d"), r"--times must be such as"),
        ((None, None, "2026-11-01..2026-11-03", "0d"), "--every must be such as 1d, 6h or 30m, got '0d'"),
        ((None, None, "2026-11-01..2026-11-03", "weekly"), "--every must be such as"),
        ((None, None, "2026-11-31..2026-12-02", "1d"), r"'2026-11-31\.\.2026-12-02' \(day is out of range"),
    ],
)
def test_what_does_not_read_says_how_it_is_written(
    given: tuple[str | None, str | None, str | None, str], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        parse_pieces(*given)


def test_several_runs_at_a_time_without_a_deployment_are_refused_by_the_names_of_options() -> None:
    result = CliRunner().invoke(app, ["backfill", "models:/m/1", "in", "out", "--versions", "1..2", "--at-a-time", "2"])

    assert 1 == result.exit_code
    assert "--deployment must name one where --at-a-time is more than 1, got 2" in result.stderr


def test_a_range_is_scored_and_shown(server: PrefectServer, doubling: str, tmp_path: Path) -> None:
    for day in ("2026-11-01", "2026-11-02", "2026-11-03"):
        write_customers(tmp_path / f"in/date={day}", rows=100, files=1, rows_per_group=100)
    command = ["backfill", doubling, str(tmp_path / "in"), str(tmp_path / "out"), "-k", "customer"]
    scored = CliRunner().invoke(app, [*command, "--partitions", "date=2026-11-02..", "--json"])
    shown = CliRunner().invoke(app, [*command, "--partitions", "date=..", "--oldest-first"])

    assert [("date=2026-11-03", "scored"), ("date=2026-11-02", "scored")] == [
        (piece["piece"], piece["state"]) for piece in json.loads(scored.stdout)["pieces"]
    ]
    assert 0 == shown.exit_code, shown.output
    assert "1 scored now, 2 complete before, 0 failed, 0 left." in shown.stdout
