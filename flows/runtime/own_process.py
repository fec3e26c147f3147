"""What Overnight changes in a process: for good in one that it has for itself, else while a call runs."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache

from flows.runtime.error_output import log_errors_shortly, log_errors_shortly_meanwhile
from flows.runtime.tracing import start_tracing
from serving.machine import end_without_collection
from serving.redaction import hide_secrets_in_logs, hide_secrets_in_logs_meanwhile

# Prefect sets it in a process that it starts for one flow run.
_FLOW_RUN = "PREFECT__FLOW_RUN_ID"


@contextmanager
def prepare_call() -> Generator[None]:
    """Hide secrets in log lines and log errors shortly while a call from Python runs; export spans from now on."""
    start_tracing()
    with hide_secrets_in_logs_meanwhile(), log_errors_shortly_meanwhile():
        yield


def prepare_tracing() -> None:
    """Export spans in a process that Prefect has started for a flow run: the first begins before the flow does."""
    if _FLOW_RUN in os.environ:
        start_tracing()


def prepare_flow_run() -> None:
    """Change a process that Prefect has started for a run of a flow of Overnight, for good.

    It also ends sooner: a worker's slot is taken until it has ended.
    """
    if _FLOW_RUN in os.environ:
        prepare_process()
        end_without_collection()


@cache
def prepare_process() -> None:
    """Hide secrets in log lines, log errors shortly and export spans for good."""
    start_tracing()
    hide_secrets_in_logs()
    log_errors_shortly()
