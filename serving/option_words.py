"""How messages name an option: as Python has it, or by the flag of the command that is running.

A message that says what to do about an option is put together far from where the call came from. A process is either a
command of the command line or not, in all of its threads, so that one place says which.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """The flags of a command: of each option, or field within one, that has a flag, and the one for all others."""

    by_option: Mapping[str, str] = field(default_factory=dict)
    document: str | None = None


class _Caller:
    """Where the calls of this process come from: a command with these flags, or Python."""

    flags: Flags | None = None


@contextmanager
def name_options_by_flags(flags: Flags) -> Generator[None]:
    """Have messages name options by the flags of a command while the block runs, in every thread."""
    before = _Caller.flags
    _Caller.flags = flags
    try:
        yield
    finally:
        _Caller.flags = before


def find_flags() -> Flags | None:
    """Return the flags of the command that runs, None where calls come from Python."""
    return _Caller.flags


def has_flags() -> bool:
    """Return whether options are those of a command that takes them by flags, not of a call from Python."""
    return _Caller.flags is not None and _Caller.flags.document is not None


def name_option(name: str) -> str:
    """Return how an option is called: `slots`, or `--slots`, or `rows_per_chunk of --options`.

    Fields within an option follow it after a dot.
    """
    flags = _Caller.flags
    if flags is None:
        return name
    if name in flags.by_option:
        return flags.by_option[name]
    option, _, inner = name.partition(".")
    if option in flags.by_option:
        return f"{flags.by_option[option]} {inner}".rstrip()
    return f"{name} of {flags.document}" if flags.document else name


def give_option(name: str, value: object) -> str:
    """Return how an option is given a value: `slots=4 in the options`, or `--slots 4`, or `--options '{...}'`.

    Args:
        name: The field.
        value: What JSON can hold, or a pydantic model, of which the fields that were set are shown.
    """
    flags = _Caller.flags
    if flags is not None and (flag := flags.by_option.get(name)):
        values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        return " ".join(flag if each is True else f"{flag} {shlex.quote(str(each))}" for each in values)
    if flags is not None and flags.document:
        return f"{flags.document} {shlex.quote(json.dumps({name: value}, default=_list_fields, ensure_ascii=False))}"
    return f"{name}={_write_python(value)} in the options"


def _list_fields(value: Any) -> Any:
    return value.model_dump(mode="json", exclude_unset=True) if hasattr(value, "model_dump") else list(value)


def _write_python(value: Any) -> str:
    # Asked for by its method: the help of the command line imports this module, and pydantic takes its time.
    if not hasattr(value, "model_dump"):
        return repr(value)
    given = value.model_dump(exclude_unset=True)
    return f"{type(value).__name__}({', '.join(f'{name}={each!r}' for name, each in given.items())})"
