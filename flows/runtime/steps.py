"""The steps of a flow, each a task run that Prefect shows; the run that they are part of, and its logger.

Without a Prefect server a flow is called as a function: its steps are functions too, and its lines go to the terminal.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast
from uuid import UUID, uuid4

from opentelemetry import trace
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import FlowRun, State, StateDetails
from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging import get_logger
from prefect.states import Completed
from prefect.transactions import CommitMode, transaction

from serving.machine import SharedSetting
from tasks.common.artifacts import Logger
from tasks.common.prefect_server import is_in_prefect_run

T = TypeVar("T")

_work: ContextVar[Callable[[], Any]] = ContextVar("work")
# What a call without a Prefect server has in place of the id of a flow run.
_call_id: ContextVar[str | None] = ContextVar("call_id", default=None)


@dataclass(slots=True)
class Steps:
    """Runs the steps of a flow, as task runs within a flow run, and adds up the seconds that each took.

    Prefect's graph links each step to the one before it. `observe` is told of each step that ends, with its seconds.
    A step does its work within a `guard`, so that Prefect sees the errors that come out of that.
    """

    observe: Callable[[str, float], None] = lambda *_: None
    guard: Callable[[], AbstractContextManager[None]] = nullcontext
    clock: Callable[[], float] = time.perf_counter
    seconds: dict[str, float] = field(default_factory=dict)
    _previous: UUID | None = field(default=None, init=False)
    _apart: float = field(default=0.0, init=False)

    @contextmanager
    def measure_apart(self, name: str) -> Generator[None]:
        """Count the seconds of a block, within a step, as those of a step of this name, and not of the step's own."""
        start = self.clock()
        try:
            yield
        finally:
            taken = self.clock() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + taken
            self._apart += taken

    def run(self, name: str, work: Callable[[], T]) -> T:
        """Return what a step returns, or raise what it raises.

        Args:
            name: What the task run is called.
            work: Takes no arguments: Prefect searches those of a task for futures, through all of a plan.
        """

        def do_guarded() -> T:
            with self.guard():
                return work()

        start, self._apart = self.clock(), 0.0
        self.seconds.setdefault(name, 0.0)
        try:
            with keep_torch_threads():
                run = self._run_as_task if is_in_prefect_run() else _run_in_span
                return run(name, do_guarded)
        finally:
            taken = self.clock() - start
            self.seconds[name] += taken - self._apart
            self.observe(name, taken)

    def _run_as_task(self, name: str, work: Callable[[], T]) -> T:
        # A task that may be retried, and then is not, leaves the traceback of its failure to the flow's own log line.
        step = task(
            name=name,
            task_run_name=name,
            cache_policy=NO_CACHE,
            persist_result=False,
            retries=1,
            retry_condition_fn=lambda *_: False,
        )(_do_work)
        # The end of the step before, as Prefect takes what a task depends on.
        details = StateDetails(task_run_id=self._previous)
        previous: list[State[bool]] = [Completed(data=True, state_details=details)] if self._previous else []
        token = _work.set(lambda: self._work_as_next(work))
        try:
            return cast("T", step(wait_for=previous))
        finally:
            _work.reset(token)

    def _work_as_next(self, work: Callable[[], T]) -> T:
        """Do the work of a step, and have the next step follow it in the graph."""
        context = TaskRunContext.get()
        self._previous = context.task_run.id if context else None
        return work()


def open_span(name: str) -> AbstractContextManager[Any]:
    """Have the block be a span, as Prefect's engine has one for each flow run and each task run."""
    return trace.get_tracer("overnight").start_as_current_span(name)


def _run_in_span(name: str, work: Callable[[], T]) -> T:
    with open_span(name):
        return work()


def _do_work() -> Any:
    """Do the work of the step that runs. Ray pickles the task that its own tasks run in, and work can't be pickled."""
    # Each task within a step commits for itself. In the step's own transaction, Prefect would roll them back where the
    # step fails or is interrupted, and show them as completed.
    with transaction(commit_mode=CommitMode.EAGER, write_on_commit=False):
        return _work.get()()


def _read_torch_threads() -> int | None:
    torch = sys.modules.get("torch")  # loaded with the model, if at all
    return torch.get_num_threads() if torch else None


def _write_torch_threads(count: int | None) -> None:
    if count is not None:
        sys.modules["torch"].set_num_threads(count)


_TORCH_THREADS = SharedSetting(_read_torch_threads, _write_torch_threads)


def keep_torch_threads() -> AbstractContextManager[None]:
    """Put torch's thread count back after the block: slots set it to one, also for threads that start later."""
    return _TORCH_THREADS.keep()


def flow_run() -> FlowRun | None:
    """Return the flow run that this is called in, None outside of one."""
    context = FlowRunContext.get()
    return None if context is None else context.flow_run


def flow_run_id() -> str:
    """Return the id of the flow run that this is called in; that of the call without a server, or a new one."""
    run = flow_run()
    return (_call_id.get() or str(uuid4())) if run is None else str(run.id)


def find_logger() -> Logger:
    """Return the logger of the run that this is called in; outside of one, Prefect's for Overnight, which prints."""
    return get_run_logger() if is_in_prefect_run() else get_logger("overnight")


@contextmanager
def name_call(name: str) -> Generator[bool]:
    """Have the block be a call without a Prefect server: with an id of its own, and a span of this name.

    Yields whether it is the outermost: a backfill calls the flow of each run.
    """
    is_outermost, token = _call_id.get() is None, _call_id.set(str(uuid4()))
    try:
        with open_span(name):
            yield is_outermost
    finally:
        _call_id.reset(token)
