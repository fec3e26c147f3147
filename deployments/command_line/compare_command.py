"""The command that compares the challengers of a published run once more."""

from __future__ import annotations

from typing import Annotated

import typer

from deployments.command_line.batch_commands import Destination
from deployments.command_line.console import AsJson, build_model, make_flags, print_json, print_table
from serving.option_words import name_options_by_flags


def add_commands(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(epilog="Example:\n\n  overnight compare s3://lake/scores/ --labels s3://lake/churned/ --label churned")(
        compare
    )


def compare(
    destination: Destination,
    *,
    run: Annotated[str | None, typer.Option(help="The run. Without: the newest complete one.")] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="A table that holds the labels by the keys of the run. Without: a column of the run's."),
    ] = None,
    label: Annotated[str | None, typer.Option(help="The column of the labels.")] = None,
    kind: Annotated[str | None, typer.Option(help="What they are: regression or classification.")] = None,
    promote_if: Annotated[
        str | None,
        typer.Option(
            help="When a challenger takes the alias, as JSON or @FILE: metric, by, alias.", metavar="JSON|@FILE"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the challengers of a published run once more, such as when its labels have become known.

    Nothing is scored, and nothing of the run is changed.
    """
    from tasks.batch.challenger_rules import Labels, PromoteIf  # noqa: PLC0415 - help needs none
    from tasks.batch.comparison_plot import describe_challenger, describe_promotion  # noqa: PLC0415 - the same
    from tasks.batch.comparison_records import compare_challengers  # noqa: PLC0415 - the same

    with name_options_by_flags(make_flags((), "--promote-if", column="--label", source="--labels", kind="--kind")):
        given = {"column": label, "source": labels, "kind": kind}
        chosen = build_model(Labels, given, None, "--label") if any(given.values()) else None
        rule = build_model(PromoteIf, {}, promote_if, "--promote-if") if promote_if else None
    found = compare_challengers(destination, run, chosen, rule)
    if as_json:
        print_json({"destination": destination, **found.model_dump(mode="json")})
        return
    lines = [line for each in found.comparison.challengers for line in describe_challenger(each).items()]
    lines += describe_promotion(found.promotion).items() if found.promotion else []
    print_table([{"": name, "value": value} for name, value in lines], f"Run {found.comparison.run}", header=False)
