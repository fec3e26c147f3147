"""One pass over a plan: a task for each shard that lacks parts, side by side in slots, in threads or on Ray."""

from __future__ import annotations

from concurrent.futures import wait
from typing import Any

from prefect.exceptions import CancelledRun
from prefect.task_runners import ThreadPoolTaskRunner

from flows import on_ray
from flows.interrupts import hush
from flows.shards import Errand, errand, score_shard
from tasks.batch.options import BatchOptions, Ray
from tasks.batch.score import Scored, Scorer

# A wait without an end is deaf to Ctrl-C: Polars' handler has the kernel take such waits up again.
_POLL_SECONDS = 0.2


def check_runner(options: BatchOptions) -> None:
    """Raise RunnerUnusable where the runner that the options ask for is not to be had."""
    if isinstance(options.runner, Ray):
        on_ray.check_usable(options.runner)


def score_shards(scorer: Scorer, slots: int, options: BatchOptions) -> Scored:
    """Score what the plan lacks, and return what that came to.

    Raises what the first failing shard raised, once every slot has come to rest. An interrupt stops each
    slot after the forward pass that it is in; the parts that were written stay.
    """
    shards = scorer.share.begin()
    with errand(scorer, allow_pickle=options.allow_pickle) as sent:
        if isinstance(options.runner, Ray):
            return on_ray.score_shards(options.runner, slots, sent, shards, scorer.count_rejects)
        return _score_in_threads(scorer, slots, sent, shards)


def _score_in_threads(scorer: Scorer, slots: int, sent: Errand, shards: list[int]) -> Scored:
    runner: ThreadPoolTaskRunner[Scored] = ThreadPoolTaskRunner(max_workers=slots)
    with runner:
        futures: list[Any] = [runner.submit(score_shard, {"errand": sent, "shard": at}) for at in shards]
        _wait(scorer, futures)
        return _added(futures)


def _wait(scorer: Scorer, futures: list[Any]) -> None:
    """Wait for every shard; when interrupted, until every slot has come to rest."""
    waiting = {future.wrapped_future for future in futures}
    try:
        while waiting:
            waiting = wait(waiting, timeout=_POLL_SECONDS).not_done
    except BaseException as error:
        hush(error)
        scorer.share.stop.set()
        for future in waiting:
            future.cancel()
        wait(waiting)
        raise


def _added(futures: list[Any]) -> Scored:
    results: list[Any] = [future.result(raise_on_failure=False) for future in futures]
    if errors := [result for result in results if isinstance(result, BaseException)]:
        # The shards that one error stopped are cancelled: the error is the one to tell.
        raise min(errors, key=lambda error: isinstance(error, CancelledRun))
    scored = Scored()
    for result in results:
        scored.add(result)
    return scored
