"""A flow that returns at once when it is called from Python."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from prefect import Flow
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

from flows.interrupts import start_server_out_of_reach
from flows.notices import Left

_SAY = "Interrupted. The same call begins again, or resumes where it had begun to score."

P = ParamSpec("P")
R = TypeVar("R")


def adhoc_flow(name: str) -> Callable[[Callable[P, R]], Flow[P, R]]:
    """Make a function a Prefect flow that has no heartbeat where it is called as a function.

    Prefect ends a flow run by joining its heartbeat thread, which sleeps whole seconds: every call
    would take up to a second more. A heartbeat lets automations resume the runs of a deployment; those
    are not started by a call, and keep it. Ctrl-C comes out as a KeyboardInterrupt that says what to do next, a notice
    as Interrupted.
    """
    return lambda function: _AdHocFlow(function, name=name, persist_result=False)


class _AdHocFlow(Flow[P, R]):
    if not TYPE_CHECKING:

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
                try:
                    start_server_out_of_reach()
                    return super().__call__(*args, **kwargs)
                except KeyboardInterrupt as interrupt:
                    # Without its cause: the frames of Prefect's engine say nothing to a person who pressed Ctrl-C.
                    raise KeyboardInterrupt(*interrupt.args or [_SAY]) from None
                except Left as left:
                    if left.notice.of_process:
                        _pass_on_sigterm()
                    raise left.interrupted from None


def _pass_on_sigterm() -> None:
    """Let the caller's own handler of SIGTERM, in its place again, hear the signal that was meant for it too."""
    if threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGTERM)):
        signal.raise_signal(signal.SIGTERM)
