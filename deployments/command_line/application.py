"""The program `overnight`: its commands, and how each of them ends.

A command that fails for a reason that is known ends with the message alone, on stderr, and exit code 1; Ctrl-C ends it
with one line and 130; a command line that does not read ends with 2.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from deployments.command_line.aws import add_commands as add_aws_commands
from deployments.command_line.backfill_command import add_commands as add_backfill_command
from deployments.command_line.batch_commands import add_commands as add_batch_commands
from deployments.command_line.clean_command import add_commands as add_clean_command
from deployments.command_line.compare_command import add_commands as add_compare_command
from deployments.command_line.console import say, shorten
from deployments.command_line.deployment_commands import add_commands as add_deployment_commands
from deployments.command_line.environment_commands import add_commands as add_environment_commands
from deployments.command_line.kubernetes import add_commands as add_kubernetes_commands
from deployments.command_line.local_commands import add_commands as add_local_commands
from deployments.command_line.serving_commands import add_commands as add_serving_commands
from serving.machine import end_without_collection
from serving.redaction import hide_secrets, hide_secrets_in_logs

_INTERRUPTED = 130


class _Application(TyperGroup):
    """The commands, all of which end here."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, typer.TyperException, BrokenPipeError):
            # Typer shows these itself.
            raise
        except KeyboardInterrupt as interrupt:
            say(" ".join(str(interrupt).split()) or "Interrupted.")
            raise typer.Exit(_INTERRUPTED) from None
        except Exception as error:  # noqa: BLE001 - all of them end a command, those that nobody expected too
            if ctx.params.get("debug"):
                traceback.print_exc()
            say(shorten(describe_error(error)))
            raise typer.Exit(1) from None


def describe_error(error: Exception) -> str:
    """Return what a person reads where a command fails: what must hold, what arrived, and what to do next."""
    from pydantic import ValidationError  # noqa: PLC0415 - a command that does well needs none

    from serving.errors import OvernightError  # noqa: PLC0415 - the same

    if isinstance(error, OvernightError):
        return str(error)
    if isinstance(error, ValidationError):
        from flows.runtime.parameters import describe_invalid_model  # noqa: PLC0415 - the same

        return describe_invalid_model(error)
    message = " ".join(str(error).split())[:600]
    return hide_secrets(
        f"{type(error).__name__}: {message}\nThis error was not expected. `overnight --debug ...` shows where it is "
        "from; where that is in Overnight, please report it."
    )


app = typer.Typer(
    name="overnight",
    cls=_Application,
    help="Score a table, a stream or a request with a registered MLflow model: complete, exact, resumable.",
    epilog="Score a table with a registered model, and look at what came of it:\n\n"
    "  overnight score models:/churn@champion customers/ scores/ --key customer\n"
    "  overnight runs scores/",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:  # noqa: FBT001 - as Typer calls it
    if not asked:
        return
    try:
        sys.stdout.write(f"overnight {version('overnight')}\n")
    except PackageNotFoundError:
        sys.stdout.write("overnight, not installed\n")
    raise typer.Exit


@app.callback()
def _set_up(
    *,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error comes from, with all of its message.")
    ] = False,
    show_version: Annotated[
        bool,
        typer.Option("--version", help="Print the version of Overnight.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    """Take the options that stand before the command."""


for _add_commands in (
    add_batch_commands,
    add_backfill_command,
    add_clean_command,
    add_compare_command,
    add_deployment_commands,
    add_serving_commands,
    add_environment_commands,
    add_kubernetes_commands,
    add_aws_commands,
    add_local_commands,
):
    _add_commands(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the command line names, and exit with its code."""
    end_without_collection()
    hide_secrets_in_logs()
    app(arguments, prog_name="overnight")
