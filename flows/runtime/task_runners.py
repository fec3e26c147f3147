"""Passes over a plan: a task for each shard that lacks parts, side by side in slots, in threads or on Ray."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from functools import partial
from typing import Any
from uuid import uuid4

from prefect import Task
from prefect.client.schemas.objects import State
from prefect.exceptions import CancelledRun, TerminationSignal
from prefect.futures import PrefectConcurrentFuture
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.runtime import ray_runner
from flows.runtime.interruption import ignore_repeated_sigint, take_sigterm_as_notice
from flows.runtime.shard_task import ShardTask, apply_limits, name_shard, open_shard_tasks
from flows.runtime.steps import find_logger, open_span
from serving.machine import SharedSetting
from tasks.batch.options import BatchOptions, Ray
from tasks.batch.score import Scorer
from tasks.batch.scoring_result import ScoringResult
from tasks.common.prefect_server import is_in_prefect_run

# Ctrl-C does not end a wait without a time limit: with Polars' signal handler the kernel restarts such waits.
_POLL_SECONDS = 0.2
# A thread that waits for the interpreter asks for it after so long. Python's own 5 ms is longer than many a forward
# pass; measured with two slots of the network 32-256-256-1: 5 % more rows a second.
_SWITCH_SECONDS = 0.0002
_SWITCH_INTERVAL = SharedSetting(sys.getswitchinterval, sys.setswitchinterval)


def check_runner(options: BatchOptions) -> None:
    """Raise RunnerUnusable where the runner that the options ask for can't be used."""
    if isinstance(options.runner, Ray):
        ray_runner.check_usable(options.runner)


def score_missing(scorer: Scorer, slots: int, options: BatchOptions) -> ScoringResult:
    """Score what the plan lacks, and return the results, added up. After a notice, parts may still be missing.

    Raises what the first failing shard raised, once every slot has stopped. Ctrl-C stops each slot after its current
    batch; the parts that were written stay. SIGTERM does so too, as Prefect's TerminationSignal, when its time has run
    out or it comes a second time.
    """
    scored, task = ScoringResult(), apply_limits(scorer.plan.model.name, find_logger())
    while True:
        shards = scorer.scheduler.begin()
        with open_shard_tasks(scorer, allow_pickle=options.allow_pickle) as shard_task:
            if isinstance(options.runner, Ray):
                result = ray_runner.score_shards(
                    *(options.runner, slots, task, shard_task, shards, scorer, options.notice_seconds)
                )
            else:
                result = _score_in_threads(scorer, slots, task, shard_task, options.notice_seconds)
            scored.add(result)
        # After a notice that was withdrawn, slots have stopped that have work again.
        if scorer.drain.notice is not None or not scorer.scheduler.cut_short:
            return scored


def _score_in_threads(
    scorer: Scorer,
    slots: int,
    task: Task[..., Any],
    shard_task: ShardTask,
    notice_seconds: float,
) -> ScoringResult:
    futures: list[Any] = []

    with ExitStack() as stack:
        stack.enter_context(_switch_threads_quickly())
        submit = _open_threads(stack, slots)
        run_shards = partial(
            _run_shards, scorer, slots, lambda shard: submit(task, {"shard_task": shard_task, "shard": shard})
        )
        try:
            try:
                stopped = run_shards(futures)
            except TerminationSignal:
                take_sigterm_as_notice(scorer.drain, notice_seconds)
                stopped = run_shards(futures)
                if not stopped:
                    raise
        except TerminationSignal:
            scorer.scheduler.stop.set()
            stack.pop_all()
            raise
        except BaseException as error:
            ignore_repeated_sigint(error)
            scorer.scheduler.stop.set()
            waiting = {future.wrapped_future for future in futures}
            for future in waiting:
                future.cancel()
            wait(waiting)
            raise
        if not stopped:
            # Leaving the runner waits for its threads, and there is no time for that.
            scorer.scheduler.stop.set()
            stack.pop_all()
    return _add_results(futures)


def _open_threads(stack: ExitStack, slots: int) -> Callable[[Task[..., Any], dict[str, Any]], Any]:
    """Return what starts the task of a shard in a thread: as a task run within a flow run, else as a function.

    The stack holds the threads themselves: where it lets go of them, nothing waits for their end.
    """
    if is_in_prefect_run():
        return stack.enter_context(ThreadPoolTaskRunner[ScoringResult](max_workers=slots)).submit
    pool = stack.enter_context(ThreadPoolExecutor(max_workers=slots, thread_name_prefix="shard"))

    def submit(task: Task[..., Any], parameters: dict[str, Any]) -> PrefectConcurrentFuture[Any]:
        return PrefectConcurrentFuture(uuid4(), pool.submit(copy_context().run, _call_task, task, parameters))

    return submit


def _call_task(task: Task[..., Any], parameters: dict[str, Any]) -> State[Any]:
    """Call a task as a function, and return the state that Prefect's engine would give its run."""
    try:
        with open_span(name_shard(parameters)):
            result = task.fn(**parameters)
    except Exception as error:  # noqa: BLE001 - its caller raises it, once every slot has stopped
        return Failed(data=error, message=str(error))
    return result if isinstance(result, State) else Completed(data=result)


@contextmanager
def _switch_threads_quickly() -> Generator[None]:
    with _SWITCH_INTERVAL.keep():
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_SECONDS))
        yield


def _run_shards(scorer: Scorer, slots: int, submit: Callable[[int], Any], futures: list[Any]) -> bool:
    """Begin shards as slots become free; return whether every slot has stopped, False where one takes too long.

    A shard gets its task once a slot is free for it: a thousand workers would else tell Prefect of two million.
    """
    waiting = {future.wrapped_future for future in futures if not future.wrapped_future.done()}
    while not scorer.drain.is_over:
        if scorer.scheduler.is_stopping():
            for each in waiting:
                each.cancel()
        elif not _has_failed(futures):
            while len(waiting) < slots and (shard := scorer.scheduler.next_shard()) is not None:
                futures.append(submit(shard))
                waiting.add(futures[-1].wrapped_future)
        if not waiting:
            return True
        waiting = wait(waiting, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED).not_done
    return not waiting


def _has_failed(futures: list[Any]) -> bool:
    """Return whether a shard has ended in another way than by being scored: no more are begun then."""
    done = [future.wrapped_future for future in futures if future.wrapped_future.done()]
    return any(each.cancelled() or each.exception() or not each.result().is_completed() for each in done)


def _add_results(futures: list[Any]) -> ScoringResult:
    done = [future for future in futures if future.wrapped_future.done() and not future.wrapped_future.cancelled()]
    results: list[Any] = [future.result(raise_on_failure=False) for future in done]
    if errors := [result for result in results if isinstance(result, BaseException)]:
        # The shards that one error stopped are cancelled: that error is raised.
        raise min(errors, key=lambda error: isinstance(error, CancelledRun))
    scored = ScoringResult()
    for result in results:
        scored.add(result)
    return scored
