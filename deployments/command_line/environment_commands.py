"""Commands about the environments that were made for models on this machine: which are kept, and which may go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deployments.command_line.console import AsJson, print_json, print_table, print_text

if TYPE_CHECKING:
    from serving.model.environment_use import KeptEnvironment

_DAYS_UNUSED = 30.0
_MODELS_SHOWN = 3

Folder = Annotated[
    Path | None,
    typer.Option(help="Where they are kept. Without: OVERNIGHT_ENVIRONMENTS, else the cache of this user."),
]


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this module."""
    environments = typer.Typer(
        help="Show the Python environments that were made for models here, and remove old ones.", no_args_is_help=True
    )
    environments.command("list", epilog="Example:\n\n  overnight environments list")(list_kept)
    environments.command("remove", epilog="Example:\n\n  overnight environments remove --unused-for 30 --delete")(
        remove
    )
    app.add_typer(environments, name="environments")


def list_kept(*, folder: Folder = None, as_json: AsJson = False) -> None:
    """List the environments that are kept: their size, the models that they were used for, and when they last were."""
    from serving.model.environment_use import list_environments  # noqa: PLC0415 - help needs none

    place = _find_folder(folder)
    kept = list_environments(place)
    if as_json:
        print_json({"folder": str(place), "environments": [each.model_dump(mode="json") for each in kept]})
        return
    _print_environments(kept, place)
    print_text(f"{_count(kept)} in {place}.")


def remove(
    *,
    unused_for: Annotated[
        float,
        typer.Option(min=0, help="Remove those that nothing has used for so many days.", metavar="DAYS"),
    ] = _DAYS_UNUSED,
    delete: Annotated[bool, typer.Option("--delete", help="Delete. Without: only show what would go.")] = False,
    folder: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Show the environments that nothing has used for some time, and delete them with --delete.

    One that a process uses stays. A model whose environment is gone has it made again.
    """
    from datetime import UTC, datetime, timedelta  # noqa: PLC0415 - help needs none

    from serving.model.environment_use import remove_environments  # noqa: PLC0415 - the same

    place = _find_folder(folder)
    since = datetime.now(UTC) - timedelta(days=unused_for)
    gone = remove_environments(place, unused_since=since, delete=delete)
    if as_json:
        listed = [each.model_dump(mode="json") for each in gone]
        print_json({"folder": str(place), "is_deleted": delete, "environments": listed})
        return
    _print_environments(gone, place)
    if not gone:
        print_text(f"Nothing in {place} is to be deleted.")
        return
    print_text(f"{_count(gone)} {'deleted.' if delete else 'would go. Nothing was deleted: --delete does it.'}")


def _find_folder(folder: Path | None) -> Path:
    from serving.model.environment import find_environments  # noqa: PLC0415 - help needs none

    return (folder or find_environments()).expanduser().absolute()


def _count(kept: list[KeptEnvironment]) -> str:
    return f"{len(kept):,} environment{'s' * (len(kept) != 1)} of {sum(each.bytes for each in kept):,} bytes"


def _print_environments(kept: list[KeptEnvironment], folder: Path) -> None:
    if kept:
        print_table([_tabulate(each) for each in kept], str(folder))


def _tabulate(kept: KeptEnvironment) -> dict[str, str]:
    """Return the row of an environment in a table."""
    models = list(kept.models[-_MODELS_SHOWN:])
    if len(kept.models) > _MODELS_SHOWN:
        models.insert(0, f"{len(kept.models) - _MODELS_SHOWN:,} more")
    return {
        "environment": kept.name,
        "Python": kept.python or "unfinished",
        "packages": f"{kept.packages:,}",
        "bytes": f"{kept.bytes:,}",
        "models": ", ".join(models),
        "last use (UTC)": "in use" if kept.is_in_use else f"{kept.last_used:%Y-%m-%d %H:%M}",
    }
