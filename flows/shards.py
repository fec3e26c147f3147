"""One pass over a plan: a Prefect task for each shard that lacks parts, side by side in slots."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import wait
from typing import Any
from uuid import uuid4

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import CancelledRun
from prefect.futures import PrefectFuture
from prefect.states import Cancelled
from prefect.task_runners import ThreadPoolTaskRunner

from flows.interrupts import hush
from tasks.batch.parts import list_parts
from tasks.batch.score import Scored, Scorer

# A wait without an end is deaf to Ctrl-C: Polars' handler has the kernel take such waits up again.
_POLL_SECONDS = 0.2

# Shard tasks carry the attempt's name only: the scorer holds the model, which can't travel.
_scorers: dict[str, Scorer] = {}


def score_shards(scorer: Scorer, slots: int) -> Scored:
    """Score what the plan lacks, and return what that came to.

    Raises what the first failing shard raised, once every slot has come to rest. An interrupt stops each
    slot after the forward pass that it is in; the parts that were written stay.
    """
    attempt = str(uuid4())
    _scorers[attempt] = scorer
    shards = scorer.share.begin()
    runner: ThreadPoolTaskRunner[Scored] = ThreadPoolTaskRunner(max_workers=slots)
    try:
        with runner:
            futures: list[Any] = [runner.submit(score_shard, {"attempt": attempt, "shard": at}) for at in shards]
            _wait(scorer, futures)
            return _added(futures)
    finally:
        del _scorers[attempt]


@task(name="score-shard", task_run_name="score-shard-{shard}", cache_policy=NO_CACHE, persist_result=False)
def score_shard(attempt: str, shard: int) -> Any:
    """Score one shard in this thread, then help with what is left: Scored, or Cancelled where it was stopped."""
    scorer = _scorers[attempt]
    scored = scorer.score_shard(shard)
    if scorer.share.stop.is_set():
        chunks = len(scorer.plan.shards[shard])
        done = sum(at == shard for at, _ in list_parts(scorer.destination, scorer.plan.run))
        if done < chunks:
            return Cancelled(message=f"Stopped after {done} of {chunks} chunks; their parts stay.")
    return scored


def _wait(scorer: Scorer, futures: list[Any]) -> None:
    """Wait for every shard; when interrupted, until every slot has come to rest."""
    waiting = {future.wrapped_future for future in futures}
    try:
        while waiting:
            waiting = wait(waiting, timeout=_POLL_SECONDS).not_done
    except BaseException:
        hush()
        scorer.share.stop.set()
        for future in waiting:
            future.cancel()
        wait(waiting)
        raise


def _added(futures: Iterable[PrefectFuture[Scored]]) -> Scored:
    results: list[Any] = [future.result(raise_on_failure=False) for future in futures]
    if errors := [result for result in results if isinstance(result, BaseException)]:
        # The shards that one error stopped are cancelled: the error is the one to tell.
        raise min(errors, key=lambda error: isinstance(error, CancelledRun))
    scored = Scored()
    for result in results:
        scored.add(result)
    return scored
