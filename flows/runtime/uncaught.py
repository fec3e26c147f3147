"""What a program shows of an error that ends it: the message of an OvernightError alone, without frames.

PREFECT_LOGGING_LEVEL=DEBUG shows Python's own traceback. So does a program that has an excepthook of its own.
"""

from __future__ import annotations

import logging
import sys
from types import TracebackType

from serving.errors import OvernightError, describe_error


def show_uncaught_shortly() -> None:
    """Have errors of Overnight that end this process shown by their message from now on. Idempotent."""
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _show_uncaught


def shows_frames() -> bool:
    """Return whether frames are asked for."""
    return logging.getLogger("prefect").isEnabledFor(logging.DEBUG)


def describe_uncaught(error: BaseException) -> str | None:
    """Return what is shown of an error that ends a program: None where that is Python's own traceback."""
    if isinstance(error, OvernightError):
        return describe_error(error)
    from pydantic import ValidationError  # noqa: PLC0415 - `import flows` alone imports nothing heavy

    if not isinstance(error, ValidationError):
        return None
    from flows.runtime.parameters import describe_invalid_model, find_option_type  # noqa: PLC0415 - the same

    return describe_invalid_model(error) if find_option_type(error.title) else None


def _show_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    shown = None if shows_frames() else describe_uncaught(error)
    if shown is None:
        sys.__excepthook__(kind, error, trace)
    else:
        print(shown, file=sys.stderr)  # noqa: T201 - what an excepthook is for
