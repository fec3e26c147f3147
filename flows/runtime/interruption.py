"""How a flow run ends early: by the notice of an interruption, so that Prefect resumes it, or by Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import FrameType
from typing import Literal, NoReturn

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import Pause, PrefectHTTPStatusError, TerminationSignal
from prefect.states import AwaitingRetry, Crashed

from flows.runtime.steps import find_logger, flow_run
from flows.runtime.tracing import end_span_interrupted
from serving.errors import Interrupted
from tasks.common.artifacts import Logger, server_may_fail
from tasks.spot.drain import Drain, Notice, sigterm_notice
from tasks.spot.notice_poller import describe_notice

# Prefect's workers take up a run ten seconds before its time.
_RESUME_SECONDS = 15.0
_SIGTERM_BEHAVIOR = "PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"


class InterruptedExit(Pause):
    """Takes an interrupted flow run out through Prefect's engine, which keeps the state that the run was set to.

    Prefect ends a suspended run in the same way.
    """

    def __init__(self, interrupted: Interrupted, notice: Notice, state: State | None) -> None:
        super().__init__(str(interrupted), state=state)
        self.interrupted, self.notice = interrupted, notice


def take_sigterm_as_notice(drain: Drain, seconds: float) -> None:
    """Take SIGTERM, which Prefect's handler raises as TerminationSignal, as a notice of so many seconds.

    Prefect's handler stays installed: by it the engine tells a cancelled run from a machine that goes.
    """
    drain.add_notice(sigterm_notice(seconds))
    find_logger().warning(describe_notice(sigterm_notice(seconds)))


def exit_interrupted(drain: Drain, done: str, publish: Callable[[str], None], logger: Logger) -> NoReturn:
    """End the flow run as interrupted.

    A run of a deployment is scheduled again: at once after SIGTERM, else for when its machine is gone, so that no
    worker takes it up there meanwhile. A run without one is Crashed, and its caller gets Interrupted. Where the sender
    of SIGTERM has set the run's state, as Prefect does for a run that is cancelled, that state stays.

    Args:
        drain: The drain that has the notice.
        done: What is done and stays, in words.
        publish: Shows the whole message in Prefect.
        logger: That of the flow run.

    Raises:
        InterruptedExit: Takes the flow run out through Prefect's engine.
        TerminationSignal: The sender of SIGTERM has set the run's state, or Prefect does not answer.
    """
    notice = drain.notice
    assert notice is not None, "a run is interrupted by a notice"  # noqa: S101 - its caller has looked
    end = _choose_end(notice, drain.seconds_left)
    interrupted = Interrupted(f"Interrupted by {notice.cause}: {done}; {end.then}.")
    logger.warning("%s", interrupted)
    publish(str(interrupted))
    if end.state is None:
        raise TerminationSignal(signal.SIGTERM)
    state = end.state.model_copy(update={"message": str(interrupted)})
    if end.run is not None:
        with server_may_fail(logger, "state"), get_client(sync_client=True) as client:
            state = client.set_flow_run_state(end.run.id, state).state or state
    end_span_interrupted(str(interrupted))
    raise InterruptedExit(interrupted, notice, state)


@contextmanager
def report_failure(report: Callable[[Literal["FAILED", "KILLED"], str], None]) -> Generator[None]:
    """Report how the block ends where it fails: FAILED, or KILLED where it was interrupted, and why.

    A run of a deployment that is interrupted by a notice has not ended: Prefect resumes it.
    """
    try:
        yield
    except (KeyboardInterrupt, TerminationSignal) as error:
        report("KILLED", str(error) or type(error).__name__)
        raise
    except InterruptedExit as error:
        run = flow_run()
        if run is None or run.deployment_id is None:
            report("KILLED", str(error))
        raise
    except Exception as error:
        report("FAILED", str(error) or type(error).__name__)
        raise


@dataclass(frozen=True, slots=True, kw_only=True)
class _End:
    """How a flow run ends: in words, and the state to propose, None where the sender of the signal sets it."""

    run: FlowRun | None
    state: State | None
    then: str


def _choose_end(notice: Notice, seconds_left: float) -> _End:
    run = flow_run()
    if run is None or run.deployment_id is None:
        return _End(run=run, state=Crashed(), then="the same call resumes")
    if notice.is_sigterm and _is_decided_by_sender(run):
        return _End(run=run, state=None, then="the sender of the signal decides what becomes of the run")
    resume = datetime.now(UTC) + timedelta(seconds=0 if notice.is_sigterm else seconds_left + _RESUME_SECONDS)
    then = f"it resumes by itself after {resume:%H:%M:%S} UTC"
    return _End(run=run, state=AwaitingRetry(scheduled_time=resume), then=then)


def _is_decided_by_sender(run: FlowRun) -> bool:
    """Return whether the run is no longer Running, or its state is left to the runner of its process."""
    if os.environ.get(_SIGTERM_BEHAVIOR, "").lower() == "relinquish":
        return True
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(run.id).state
    except (PrefectHTTPStatusError, httpx.HTTPError):
        # A server that does not answer takes no state either: Prefect's engine ends the run in its own way.
        return True
    return state is None or not state.is_running()


_IGNORE_SECONDS = 10.0


def ignore_repeated_sigint(error: BaseException) -> None:
    """Ignore Ctrl-C for some seconds while a first one is being handled: a second would break into that.

    Does nothing for other errors, outside the main thread, which gets no signals, and where the program ignores
    SIGINT.
    """
    before = signal.getsignal(signal.SIGINT)
    is_interrupt = isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread()
    if not is_interrupt or not callable(before):
        return
    until = time.monotonic() + _IGNORE_SECONDS

    def ignore(number: int, frame: FrameType | None) -> None:
        # It outlives the call on purpose: Prefect sends its last states as the interpreter ends.
        if time.monotonic() > until:
            signal.signal(signal.SIGINT, before)
            before(number, frame)

    signal.signal(signal.SIGINT, ignore)
