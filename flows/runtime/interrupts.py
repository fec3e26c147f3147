"""Ctrl-C: obeyed once and at once, with a sentence instead of a traceback through libraries."""

from __future__ import annotations

import contextlib
import contextvars
import signal
import threading
import time
from types import FrameType

from prefect.client.base import ServerType, determine_server_type
from prefect.client.orchestration import get_client

_HUSH_SECONDS = 10.0
_POLL_SECONDS = 0.2


def hush(error: BaseException) -> None:
    """Let Ctrl-C pass unheard for some seconds where one is being obeyed: a second would break into that.

    Does nothing for other errors, outside the main thread, where signals are not heard, and where the
    program ignores them.
    """
    before = signal.getsignal(signal.SIGINT)
    obeyed = isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread()
    if not obeyed or not callable(before):
        return
    until = time.monotonic() + _HUSH_SECONDS

    def passed(number: int, frame: FrameType | None) -> None:
        # It outlives the call on purpose: what Prefect has left to say is said as the interpreter ends.
        if time.monotonic() > until:
            signal.signal(signal.SIGINT, before)
            before(number, frame)

    signal.signal(signal.SIGINT, passed)


def start_server_out_of_reach() -> None:
    """Start Prefect's temporary server, where there is to be one, so that Ctrl-C does not reach it.

    A terminal sends Ctrl-C to every process at once; the state of an interrupted run could then not be
    told to anyone, and every word to the dead server costs seconds. A child inherits the signals that
    the thread which starts it has blocked; the thread is one of its own, so that this one stays interruptible.
    """
    if determine_server_type() is not ServerType.EPHEMERAL:
        return
    thread = threading.Thread(target=contextvars.copy_context().run, args=(_start_server,), daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_SECONDS)


def _start_server() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # Prefect itself starts it where this failed, and says what is wrong.
    with contextlib.suppress(Exception):
        get_client(sync_client=True)
