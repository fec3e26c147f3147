"""The command that shows what no run of a destination has any more, and deletes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from deployments.command_line.batch_commands import Destination
from deployments.command_line.console import AsJson, print_json, print_table, print_text

if TYPE_CHECKING:
    from tasks.batch.clean import CleanedRun


def add_commands(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(epilog="Example:\n\n  overnight clean s3://lake/scores/ --keep 7 --delete")(clean)


def clean(
    destination: Destination,
    *,
    keep: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Drop all but so many of the newest complete runs; parts that these have stay. Without: none is.",
            metavar="N",
        ),
    ] = None,
    unfinished_older_than: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Drop runs, too, that were planned more than so many days ago and never published. Without: none is.",
            metavar="DAYS",
        ),
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete. Without: only show what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what no run of a destination has any more, and delete it with --delete.

    Parts that no manifest names, files set aside, torn writes, and copies of text files of published runs go. What a
    remaining run has stays, also where it has it from an earlier run that is dropped.
    """
    from datetime import UTC, datetime, timedelta  # noqa: PLC0415 - help needs none

    from tasks.batch.clean import clean as clean_destination  # noqa: PLC0415 - the same
    from tasks.storage import open_storage  # noqa: PLC0415 - the same

    days = unfinished_older_than
    before = None if days is None else datetime.now(UTC) - timedelta(days=days)
    storage = open_storage(destination)
    report = clean_destination(storage, keep=keep, unfinished_before=before, delete=delete)
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    if report.runs:
        print_table([_tabulate_cleaned(each) for each in report.runs], report.destination)
    size = f"{report.objects:,} objects of {report.bytes:,} bytes"
    end = f"{size} were deleted." if delete else f"{size} would go. Nothing was deleted: --delete does it."
    lines = [end if report.objects else "Nothing is to be deleted.", *(f"  note: {note}" for note in report.notes)]
    print_text("\n".join(lines))


def _tabulate_cleaned(run: CleanedRun) -> dict[str, str]:
    """Return the row of a run in the table of what goes."""
    return {
        "run": run.run,
        "why": run.why,
        "what": ", ".join(f"{kind}: {count:,}" for kind, count in run.removed.items()),
        "objects": f"{run.objects:,}",
        "bytes": f"{run.bytes:,}",
    }
