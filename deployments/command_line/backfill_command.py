"""The command that scores a range of partitions, or of versions of a table."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from deployments.command_line.batch_commands import Model
from deployments.command_line.console import (
    AsJson,
    Key,
    Options,
    build_model,
    keep_stdout,
    make_flags,
    print_json,
    print_table,
    print_text,
    show_own_lines,
)
from serving.errors import BadInput
from serving.option_words import name_options_by_flags

if TYPE_CHECKING:
    from tasks.batch.backfill import BackfillReport, Pieces, TableTimes, TableVersions

_RANGE = re.compile(r"(.*?)\.\.(.*)")
_STEP = re.compile(r"(\d+)([dhm])")
_UNITS = {"d": "days", "h": "hours", "m": "minutes"}


def add_commands(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(
        epilog="Examples:\n\n"
        "  overnight backfill models:/churn/3 s3://lake/in/ s3://lake/out/ --partitions date=2026-11-01..2026-11-30\n"
        "  overnight backfill models:/churn/3 s3://lake/table/ s3://lake/out/ --versions 3..9"
    )(backfill)


def backfill(  # noqa: PLR0913 - each is an option of the command
    model: Model,
    source: Annotated[
        str, typer.Argument(help="A folder of hive partitions, or a Delta or Iceberg table.", metavar="SOURCE")
    ],
    destination: Annotated[
        str, typer.Argument(help="Below it each piece has a destination of its own.", metavar="DESTINATION")
    ],
    *,
    partitions: Annotated[
        str | None,
        typer.Option(
            help="The partitions, such as date=2026-11-01..2026-11-30; one end or both may be left out.",
            metavar="COLUMN=FIRST..LAST",
        ),
    ] = None,
    versions: Annotated[
        str | None,
        typer.Option(help="The versions of a Delta table, or snapshot ids by commas.", metavar="FIRST..LAST|N,N"),
    ] = None,
    times: Annotated[
        str | None,
        typer.Option(
            help="The versions that a table had at these times, in UTC without a zone.", metavar="FIRST..LAST"
        ),
    ] = None,
    every: Annotated[str, typer.Option(help="From one time to the next: 1d, 6h or 30m.")] = "1d",
    oldest_first: Annotated[
        bool, typer.Option("--oldest-first", help="Score the oldest piece first. Without: the newest.")
    ] = False,
    at_a_time: Annotated[int, typer.Option(min=1, help="Runs side by side, of a deployment.")] = 1,
    deployment: Annotated[
        str | None,
        typer.Option(help="Send the runs to this deployment. Without: score here.", metavar="FLOW/NAME"),
    ] = None,
    key: Key = None,
    options: Options = None,
    as_json: AsJson = False,
) -> None:
    """Score a range of partitions or of versions of a table, each as a run of its own at its own destination.

    What is complete is passed over. The same command again goes on. A piece that fails does not stop the others.
    """
    flags = make_flags(("deployment",), "--options", key_columns="--key", runs_at_a_time="--at-a-time")
    with keep_stdout(for_json=as_json), name_options_by_flags(flags):
        from tasks.batch.backfill import BackfillOptions  # noqa: PLC0415 - help needs none
        from tasks.batch.options import BatchOptions  # noqa: PLC0415 - the same

        chosen = build_model(BatchOptions, {"key_columns": key}, options, "--options")
        pieces = parse_pieces(partitions, versions, times, every)
        given = {"order": "oldest" if oldest_first else "newest", "runs_at_a_time": at_a_time, "deployment": deployment}
        how = build_model(BackfillOptions, given, None, "--options")
        from flows.backfill import backfill_inference  # noqa: PLC0415 - seconds of imports

        show_own_lines()
        report = backfill_inference(model, source, destination, pieces, how, chosen)
    _print_report(report, as_json=as_json)


def parse_pieces(partitions: str | None, versions: str | None, times: str | None, every: str) -> Pieces:
    """Return the pieces that a command line asks for. Raises BadInput."""
    given = [each for each in (partitions, versions, times) if each is not None]
    if len(given) != 1:
        message = f"One of --partitions, --versions and --times must say what is scored, got {len(given)} of them."
        raise BadInput(message)
    if partitions is not None:
        from tasks.batch.backfill import Partitions  # noqa: PLC0415 - help needs none

        column, _, values = partitions.partition("=")
        match = _RANGE.fullmatch(values)
        first, last = match.groups() if match else (values, values)
        if not column or not values:
            message = f"--partitions must be such as date=2026-11-01..2026-11-30, got {partitions!r}."
            raise BadInput(message)
        return Partitions(column=column, first=first or None, last=last or None)
    return _parse_times(times, every) if times is not None else _parse_versions(versions or "")


def _parse_versions(versions: str) -> TableVersions:
    from tasks.batch.backfill import TableVersions  # noqa: PLC0415 - help needs none

    match = _RANGE.fullmatch(versions)
    texts = [each.strip() for each in (match.groups() if match else versions.split(","))]
    if not all(text.isdecimal() for text in texts):
        message = f"--versions must be such as 3..9 or 3,7,9, got {versions!r}."
        raise BadInput(message)
    numbers = tuple(map(int, texts))
    return TableVersions(first=numbers[0], last=numbers[1]) if match else TableVersions(numbers=numbers)


def _parse_times(times: str, every: str) -> TableTimes:
    from tasks.batch.backfill import TableTimes  # noqa: PLC0415 - help needs none

    match, step = _RANGE.fullmatch(times), _STEP.fullmatch(every)
    if step is None or not int(step[1]):
        message = f"--every must be such as 1d, 6h or 30m, got {every!r}."
        raise BadInput(message)
    try:
        first, last = (_parse_time(each) for each in (match.groups() if match else (times, times)))
    except ValueError as error:
        message = (
            f"--times must be such as 2026-11-01..2026-11-30 or 2026-11-01T06:00:00+01:00..., got {times!r} ({error})."
        )
        raise BadInput(message) from None
    return TableTimes(first=first, last=last, every=timedelta(**{_UNITS[step[2]]: int(step[1])}))


def _parse_time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _print_report(report: BackfillReport, *, as_json: bool) -> None:
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    rows = [
        {
            "piece": piece.piece,
            "state": piece.state,
            "rows": "" if piece.rows is None else f"{piece.rows:,}",
            "run": piece.run or "",
        }
        for piece in report.pieces
    ]
    print_table(rows, report.destination)
    print_text(report.summary)
