"""What commands share: options as documents, output for a person or a program, help out of field descriptions."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

from serving.errors import BadInput
from serving.option_words import Flags

if TYPE_CHECKING:
    from pydantic import BaseModel

    M = TypeVar("M", bound=BaseModel)

Key = Annotated[
    list[str] | None,
    typer.Option("--key", "-k", help="A column that names a row in the output; again for each further one."),
]
Challengers = Annotated[
    list[str] | None,
    typer.Option("--challenger", help="Another model that scores the same rows, for a comparison; again for each."),
]
Options = Annotated[
    str | None,
    typer.Option(
        help="Any further options of BatchOptions, as JSON, or @FILE with JSON or YAML.", metavar="JSON|@FILE"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]

LINES_MAX = 12
_WIDTH_PIPED = 200
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_PREFECT = "prefect"
_ROOT = Path(__file__).parents[2]
_PACKAGES = tuple(f"{_ROOT / name}/" for name in ("deployments", "flows", "serving", "tasks"))


def build_model(kind: type[M], given: Mapping[str, object], document: str | None, option: str) -> M:
    """Return a model of a document and of what the command line says itself, which has the last word.

    Args:
        kind: The model, such as BatchOptions.
        given: Fields by name; those that are None or empty were not given.
        document: JSON, or @FILE with JSON or YAML; None for no more fields.
        option: How messages call the document.

    Raises:
        BadInput: The document does not read as an object, or names a field that the command line has too.
            Or a field is unknown, or has no value that fits; the message calls it as the command line does.
    """
    from pydantic import ValidationError  # noqa: PLC0415 - help needs none

    fields = {} if document is None else read_document(document, option)
    said = {name: value for name, value in given.items() if value not in (None, [], ())}
    if twice := sorted(fields.keys() & said.keys()):
        message = f"Each option must be given once, got {', '.join(twice)} in {option} and by name. Leave one out."
        raise BadInput(message)
    try:
        return kind.model_validate({**fields, **said})
    except ValidationError as error:
        from flows.runtime.parameters import describe_invalid_model  # noqa: PLC0415 - help needs none

        raise BadInput(describe_invalid_model(error)) from None


AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Load a pickled model, which runs any code in it."),
]


def make_flags(options: Iterable[str], document: str | None = None, **others: str) -> Flags:
    """Return the flags of a command, by which its messages name options.

    Args:
        options: The fields whose flags have their names.
        document: The flag that takes all other fields.
        others: The flags of further fields.
    """
    return Flags(by_option={**{name: f"--{name.replace('_', '-')}" for name in options}, **others}, document=document)


def read_document(document: str, option: str) -> dict[str, Any]:
    """Return the object that a text of JSON is, or the JSON or YAML of @FILE. Raises BadInput."""
    import yaml  # noqa: PLC0415 - few commands read one

    text, where = document, option
    if document.startswith("@"):
        path = Path(document[1:]).expanduser()
        where = f"{path}, which {option} names,"
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            message = f"{where} must be a file of JSON or YAML, got: {error}. Correct the path."
            raise BadInput(message) from None
    try:
        # JSON is YAML too.
        found = yaml.safe_load(text) if document.startswith("@") else json.loads(text)
    except (yaml.YAMLError, ValueError) as error:
        message = f"{where} must be JSON, or YAML in a file, got: {' '.join(str(error).split())[:300]}. Correct it."
        raise BadInput(message) from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        message = f'{where} must be an object, such as {{"slots": 4}}, got {text[:80]!r}. Use @FILE to name a file.'
        raise BadInput(message)
    return found


def is_local(address: str) -> bool:
    """Return whether an address is a path on this machine, rather than one with a scheme, such as s3:// and block:."""
    return _SCHEME.match(address) is None


def print_json(value: Mapping[str, object]) -> None:
    """Print one JSON object on stdout, as one line."""
    sys.stdout.write(json.dumps(value, default=str) + "\n")


@contextmanager
def keep_stdout(*, for_json: bool) -> Generator[None]:
    """Send to stderr what is printed in the block where stdout is for JSON alone: a model may print too."""
    if not for_json:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def print_table(rows: Sequence[Mapping[str, str]], title: str | None = None, *, header: bool = True) -> None:
    """Print rows of equal names as a table: as wide as the terminal, and never cut where there is none."""
    from rich.table import Table  # noqa: PLC0415 - JSON needs none
    from rich.text import Text  # noqa: PLC0415

    table = Table(title=title, title_justify="left", show_header=header)
    for name in rows[0] if rows else ():
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(value) for value in row.values()))
    print_text(table)


def print_text(value: object) -> None:
    """Print a text, or anything that rich renders, on stdout."""
    from rich.console import Console  # noqa: PLC0415 - JSON needs none

    console = Console(width=None if sys.stdout.isatty() else _WIDTH_PIPED)
    console.print(value, markup=False, highlight=False, soft_wrap=isinstance(value, str))


@contextmanager
def show_status(text: str) -> Generator[None]:
    """Show on a terminal what a command does while the block runs, and nothing of it afterwards."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console  # noqa: PLC0415 - few commands take seconds

    with Console(stderr=True).status(text):
        yield


def show_own_lines() -> None:
    """Keep lines that Prefect itself logs from the terminal from now on, in this process. Idempotent.

    Those of Overnight stay, and PREFECT_LOGGING_LEVEL=DEBUG shows all. The server gets every line all the same.
    """
    from flows.runtime.error_output import shows_frames  # noqa: PLC0415 - help needs none

    if shows_frames():
        return
    # Prefect writes "Error logging to API" to stderr by itself where this is set, for as long as its server is away.
    logging.raiseExceptions = False
    for name in ("", _PREFECT, f"{_PREFECT}._internal"):
        for handler in logging.getLogger(name).handlers:
            if not any(isinstance(each, _OwnLines) for each in handler.filters):
                handler.addFilter(_OwnLines())


class _OwnLines(logging.Filter):
    """Passes on what modules of Overnight log through Prefect's loggers, and all that others log.

    Some loggers of Prefect have names of their own: EventsWorker says at the end of a short call what it still sends.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is shown."""
        is_prefects = record.name.split(".")[0] == _PREFECT or f"-packages/{_PREFECT}/" in record.pathname
        return not is_prefects or record.pathname.startswith(_PACKAGES)


def say(text: str) -> None:
    """Say on stderr how far a command has come."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def shorten(text: str) -> str:
    """Return a message within the lines that a screen shows."""
    lines = text.rstrip().splitlines() or [""]
    if len(lines) <= LINES_MAX:
        return "\n".join(lines)
    left = len(lines) - LINES_MAX + 1
    return "\n".join([*lines[: LINES_MAX - 1], f"... and {left} more lines; `overnight --debug ...` shows all."])


def describe_by(model: str, **names: str) -> type[TyperCommand]:
    """Return a kind of command whose options without help are described by the fields of a pydantic model.

    Args:
        model: "MODULE:CLASS", imported only where help is shown.
        names: The field of an option whose name is another.
    """

    class DescribedCommand(TyperCommand):
        def format_help(self, ctx: Any, formatter: Any) -> None:
            from rich.markup import escape  # noqa: PLC0415 - for help alone

            module, _, kind = model.partition(":")
            fields = getattr(import_module(module), kind).model_fields
            for param in self.params:
                field = fields.get(names.get(str(param.name), str(param.name)))
                if isinstance(param, typer.core.TyperOption) and param.help is None and field is not None:
                    param.help = escape(str(field.description))
            super().format_help(ctx, formatter)

    return DescribedCommand
