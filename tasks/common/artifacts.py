"""Prefect artifacts and log lines: what the flows share to show how they go. A server that fails never ends a run."""

from __future__ import annotations

import contextvars
import logging
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import PrefectHTTPStatusError

Logger = logging.Logger | logging.LoggerAdapter[logging.Logger]


@contextmanager
def server_may_fail(logger: Logger, what: str = "artifacts") -> Generator[None]:
    """Let the block pass over a Prefect server that does not answer: `what` it was to be sent is logged as lost."""
    try:
        yield
    except (PrefectHTTPStatusError, httpx.HTTPError) as error:
        logger.warning("The Prefect server must take the run's %s, got: %s. The run goes on without.", what, error)
    except RuntimeError as error:
        # httpx has no type of its own for a client that the flow's end has closed under a thread that is late.
        if "client has been closed" not in str(error):
            raise


class ProgressArtifact:
    """A progress bar among the flow run's artifacts: created by the first `show`, updated by later ones."""

    def __init__(self, key: str, description: str, logger: Logger) -> None:
        self._key, self._description, self._logger = key, description, logger
        self._id: UUID | None = None

    def show(self, percent: float) -> None:
        """Set the bar to a percentage."""
        with server_may_fail(self._logger):
            if self._id is None:
                made = create_progress_artifact(percent, key=self._key, description=self._description)
                self._id = made if isinstance(made, UUID) else None
            else:
                update_progress_artifact(self._id, progress=percent)


def start_thread(name: str, work: Callable[[], None]) -> threading.Thread:
    """Start a daemon thread that knows the flow run, which artifacts and log lines find in the context."""
    run = contextvars.copy_context().run
    thread = threading.Thread(target=run, args=(work,), name=name, daemon=True)
    thread.start()
    return thread
