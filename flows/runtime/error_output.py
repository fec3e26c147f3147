"""What Prefect logs of an error that ends a flow run: its message once, and its frames at DEBUG.

Prefect's engines log the frames of every exception, once for the task run, once for the flow run and once for the
process, and its message with the last state of each. A filter of their loggers moves those frames to DEBUG.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

from flows.runtime.steps import find_logger, flow_run
from serving.errors import OvernightError, describe_error

_LOGGERS = ("prefect.engine", "prefect.flow_runs", "prefect.flows", "prefect.task_engine", "prefect.task_runs")
_FINISHED = re.compile(r"(?P<finished>Finished in state \w+)\(.*\)", re.DOTALL)
_UNFINISHED = re.compile(r"Finished in state (?P<state>Running|Cancelling)\(.*\)", re.DOTALL)
_INVALID = "Parameter validation failed for flow"


def log_errors_shortly() -> logging.Filter:
    """Have Prefect log errors of Overnight without their frames from now on; return the filter that does it."""
    short = _FramesToDebug()
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(short)
    return short


@contextmanager
def log_errors_shortly_meanwhile() -> Generator[None]:
    """Have Prefect log errors of Overnight without their frames while the block runs. Blocks may overlap."""
    short = log_errors_shortly()
    try:
        yield
    finally:
        for name in _LOGGERS:
            logging.getLogger(name).removeFilter(short)


def shows_frames() -> bool:
    """Return whether frames are asked for, by PREFECT_LOGGING_LEVEL=DEBUG."""
    return logging.getLogger("prefect").isEnabledFor(logging.DEBUG)


class _FramesToDebug(logging.Filter):
    """Moves log records with the frames of an OvernightError to DEBUG, and keeps its message from being repeated.

    Prefect calls a run finished whose process a signal ends, in whatever state it then is.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is still to be logged."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, OvernightError) or str(record.msg).startswith(_INVALID):
            record.levelno, record.levelname = logging.DEBUG, "DEBUG"
            return logging.getLogger(record.name).isEnabledFor(logging.DEBUG)
        if isinstance(record.msg, str) and (found := _UNFINISHED.fullmatch(record.msg)):
            # What cancels a run sets its state once its process has ended.
            record.msg = f"The process ends while the run is {found['state']}: what ended it sets the run's last state."
        if isinstance(record.msg, str) and (found := _FINISHED.fullmatch(record.msg)) and _names_error(record.msg):
            record.msg = f"{found['finished']}()"
        return True


def _names_error(text: str) -> bool:
    return any(f"{kind}: " in text for kind in _iter_kinds(OvernightError))


def _iter_kinds(base: type[OvernightError]) -> Iterator[str]:
    for kind in base.__subclasses__():
        yield kind.__name__
        yield from _iter_kinds(kind)


def log_failure(error: OvernightError) -> None:
    """Log an error that ends the flow run that this is called in: its message, and its frames at DEBUG.

    The caller of a flow gets the error itself, so only the server gets the line: a terminal would show it twice.
    """
    logger, run = find_logger(), flow_run()
    logger.debug("The frames of the error:", exc_info=error)
    if run is not None and run.deployment_id is not None:
        logger.error("%s", describe_error(error))
    else:
        _log_to_server(logger, describe_error(error))


def _log_to_server(logger: Any, text: str) -> None:
    """Give a line to the handlers of a flow run's own logger, and not to those above it, which print."""
    inner: logging.Logger = logger.logger
    record = inner.makeRecord(inner.name, logging.ERROR, __file__, 0, text, (), None, extra=dict(logger.extra or {}))
    for handler in inner.handlers:
        handler.handle(record)
