"""The end of a flow run that was given notice: said, shown, and told to Prefect so that the run is resumed."""

from __future__ import annotations

import contextlib
import contextvars
import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import FrameType
from typing import NoReturn

import httpx
from prefect import get_run_logger
from prefect.client.base import ServerType, determine_server_type
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import Pause, PrefectHTTPStatusError, TerminationSignal
from prefect.states import AwaitingRetry, Crashed

from flows.runtime.context import flow_run
from serving.errors import Interrupted
from tasks.batch.artifacts import publish_interrupted
from tasks.batch.options import BatchOptions
from tasks.batch.plan import Plan
from tasks.batch.score import ScoringResult
from tasks.common.artifacts import Logger, server_may_fail
from tasks.spot.drain import Drain, Notice, sigterm_notice
from tasks.spot.notice_poller import describe_notice, poll_notices

# Prefect's workers take up a run ten seconds before its time.
_RESUME_SECONDS = 15.0
_SIGTERM_BEHAVIOR = "PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"


class InterruptedExit(Pause):
    """Takes an interrupted flow run out through Prefect's engine, which leaves the run in the state that it was set to.

    Prefect takes leave this way of a run that is suspended, too.
    """

    def __init__(self, interrupted: Interrupted, notice: Notice, state: State | None) -> None:
        super().__init__(str(interrupted), state=state)
        self.interrupted, self.notice = interrupted, notice


@contextmanager
def watch_for_interruption(drain: Drain, options: BatchOptions, logger: Logger) -> Generator[None]:
    """Watch for notices while the block runs, and say what comes."""
    with poll_notices(drain, options.notices, logger.warning):
        yield


def take_sigterm_as_notice(drain: Drain, seconds: float) -> None:
    """Take SIGTERM, which Prefect's handler raises as TerminationSignal, as the notice that it is.

    That handler stays in its place: by it the engine tells a run that is cancelled from a machine that goes.
    """
    drain.add_notice(sigterm_notice(seconds))
    get_run_logger().warning(describe_notice(sigterm_notice(seconds)))


def exit_interrupted(plan: Plan, rows_done: int, scored: ScoringResult, drain: Drain, logger: Logger) -> NoReturn:
    """End the flow run as interrupted.

    A run of a deployment is scheduled anew: at once after SIGTERM, else for when its machine is gone, so that
    no worker takes it up there meanwhile. One without is Crashed, and its caller gets Interrupted. Where whoever sent
    SIGTERM has settled the run's state, as Prefect does for a run that is cancelled, that stands.
    Raises Left, or TerminationSignal for the sender's sake.
    """
    dropped = f"; chunks in hand that were dropped: {scored.chunks_dropped}" if scored.chunks_dropped else ""
    exit_with_notice(
        drain,
        f"{rows_done:,} of {plan.rows:,} rows of run {plan.run} are done and stay, {plan.rows - rows_done:,} are left"
        f"{dropped}",
        lambda words: publish_interrupted(plan.run, rows_done, plan.rows, words, logger),
        logger,
    )


def exit_with_notice(drain: Drain, done: str, publish: Callable[[str], None], logger: Logger) -> NoReturn:
    """End the flow run as interrupted, as `leave` does; `done` says what stays, `publish` shows all of it."""
    notice = drain.notice
    assert notice is not None, "a run leaves only after a notice"  # noqa: S101 - its caller has looked
    end = _choose_end(notice, drain.seconds_left)
    interrupted = Interrupted(f"Interrupted by {notice.cause}: {done}; {end.then}.")
    logger.warning("%s", interrupted)
    publish(str(interrupted))
    if end.state is None:
        raise TerminationSignal(signal.SIGTERM)
    state = end.state.model_copy(update={"message": str(interrupted)})
    with server_may_fail(logger, "state"), get_client(sync_client=True) as client:
        if end.run is not None:
            state = client.set_flow_run_state(end.run.id, state).state or state
    raise InterruptedExit(interrupted, notice, state)


def is_resumed_by_prefect() -> bool:
    """Return whether Prefect resumes this flow run after a notice: whether it is one of a deployment."""
    run = flow_run()
    return run is not None and run.deployment_id is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class _End:
    """How a flow run ends, in words, and in the state that is proposed; None where another settles that."""

    run: FlowRun | None
    state: State | None
    then: str


def _choose_end(notice: Notice, seconds_left: float) -> _End:
    run = flow_run()
    if run is None or run.deployment_id is None:
        return _End(run=run, state=Crashed(), then="the same call resumes")
    if notice.is_sigterm and _settled_by_sender(run):
        return _End(run=run, state=None, then="who sent the signal says what becomes of the run")
    resume = datetime.now(UTC) + timedelta(seconds=0 if notice.is_sigterm else seconds_left + _RESUME_SECONDS)
    then = f"it resumes by itself after {resume:%H:%M:%S} UTC"
    return _End(run=run, state=AwaitingRetry(scheduled_time=resume), then=then)


def _settled_by_sender(run: FlowRun) -> bool:
    """Return whether the run has another state than Running by now, or is left to whoever runs its process."""
    if os.environ.get(_SIGTERM_BEHAVIOR, "").lower() == "relinquish":
        return True
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(run.id).state
    except (PrefectHTTPStatusError, httpx.HTTPError):
        # Who does not answer gets no proposal either: the engine's own way to end is the one that is left.
        return True
    return state is None or not state.is_running()


_IGNORE_SECONDS = 10.0
_POLL_SECONDS = 0.2


def ignore_repeated_sigint(error: BaseException) -> None:
    """Let Ctrl-C pass unheard for some seconds where one is being obeyed: a second would break into that.

    Does nothing for other errors, outside the main thread, where signals are not heard, and where the
    program ignores them.
    """
    before = signal.getsignal(signal.SIGINT)
    obeyed = isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread()
    if not obeyed or not callable(before):
        return
    until = time.monotonic() + _IGNORE_SECONDS

    def passed(number: int, frame: FrameType | None) -> None:
        # It outlives the call on purpose: what Prefect has left to say is said as the interpreter ends.
        if time.monotonic() > until:
            signal.signal(signal.SIGINT, before)
            before(number, frame)

    signal.signal(signal.SIGINT, passed)


def start_server_shielded() -> None:
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
