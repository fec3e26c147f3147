"""What a command that runs a flow shows on the terminal: the lines of Overnight, and not those of Prefect's engine.

PREFECT_LOGGING_LEVEL=DEBUG shows all of them. The server gets every line all the same.
"""

from __future__ import annotations

import logging
from pathlib import Path

from prefect.client.base import ServerType, determine_server_type

from deployments.command_line.console import say
from flows.runtime.uncaught import shows_frames

_PREFECT = "prefect"
_ROOT = Path(__file__).parents[2]
_PACKAGES = tuple(f"{_ROOT / name}/" for name in ("deployments", "flows", "serving", "tasks"))


def show_own_lines() -> None:
    """Keep lines that Prefect itself logs from the terminal from now on, in this process. Idempotent.

    That a temporary server is to be started, which takes its time, is said in their place.
    """
    if shows_frames():
        return
    if determine_server_type() is ServerType.EPHEMERAL:
        say("Starting a temporary Prefect server, which takes some 10 s. PREFECT_API_URL names one that runs already.")
    # Prefect writes "Error logging to API" to stderr by itself where this is set, for as long as its server is away.
    logging.raiseExceptions = False
    for name in ("", _PREFECT, f"{_PREFECT}._internal"):
        for handler in logging.getLogger(name).handlers:
            if not any(isinstance(each, _OwnLines) for each in handler.filters):
                handler.addFilter(_OwnLines())


class _OwnLines(logging.Filter):
    """Passes on what modules of Overnight log through Prefect's loggers, and all that others log."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is shown."""
        return record.name.split(".")[0] != _PREFECT or record.pathname.startswith(_PACKAGES)
