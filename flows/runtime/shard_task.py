"""The task that scores one shard, in a thread of the flow's process or in a process of Ray's."""

from __future__ import annotations

import functools
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import mlflow
from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.states import Cancelled

from flows.runtime.own_process import prepare_process
from flows.runtime.tracing import describe_span, is_ray_worker
from serving.errors import OvernightError
from serving.model.interface import Model
from tasks.batch.feature_lookup import FeatureLookup
from tasks.batch.options import Disclose
from tasks.batch.parts import list_parts_from
from tasks.batch.plan import Plan
from tasks.batch.planned_models import load_planned_challengers, load_planned_model
from tasks.batch.run_records import load_plan
from tasks.batch.score import Scorer
from tasks.batch.scoring_result import ScoringResult
from tasks.common.artifacts import Logger, server_may_fail
from tasks.common.prefect_server import has_prefect_server
from tasks.storage import Storage, open_storage

# `prefect concurrency-limit create overnight-shard 4` bounds the shards of all runs that are scored at once, and
# `overnight-shard-churn` those of one model.
SHARD_TAG = "overnight-shard"
_LIMITS_PER_PAGE = 200

if is_ray_worker():
    # A process of Ray's imports this module before it makes the span of a shard.
    prepare_process()

_scorers: dict[str, Scorer] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    """What the task of a shard needs in any process: addresses and settings, which can be pickled."""

    attempt: str
    destination: str
    run: str
    shards: int
    registry: str
    allow_pickle: bool
    max_reject_fraction: float
    disclose: Disclose


@contextmanager
def open_shard_tasks(scorer: Scorer, *, allow_pickle: bool) -> Generator[ShardTask]:
    """Yield what the tasks of one pass are sent; those in this process use the scorer itself while the block runs."""
    attempt = str(uuid4())
    _scorers[attempt] = scorer
    try:
        yield ShardTask(
            attempt=attempt,
            destination=scorer.destination.url,
            run=scorer.plan.run,
            shards=len(scorer.plan.shards),
            registry=mlflow.get_tracking_uri(),
            allow_pickle=allow_pickle,
            max_reject_fraction=scorer.max_reject_fraction,
            disclose=scorer.disclose,
        )
    finally:
        del _scorers[attempt]


def name_shard(parameters: dict[str, Any]) -> str:
    """Return what the task run of a shard is called, by the parameters of the task: shard 1 of 4."""
    return f"shard {parameters['shard'] + 1} of {parameters['shard_task'].shards}"


@task(
    name="score-shard",
    task_run_name=name_shard,  # type: ignore[arg-type]  # Prefect's protocol has a method that no function has
    cache_policy=NO_CACHE,
    persist_result=False,
)
def score_shard(shard_task: ShardTask, shard: int) -> Any:
    """Score one shard in this thread, then help with what is left. Return a ScoringResult, or Cancelled if stopped."""
    scorer = _find_scorer(shard_task)
    try:
        result = scorer.score_shard(shard)
    except KeyboardInterrupt:
        # Ray cancels a task in this way. The parts that it has written count.
        result = ScoringResult()
    describe_span(
        {
            "overnight.run": scorer.plan.run,
            "overnight.model": scorer.plan.model.uri,
            "overnight.shard": shard,
            "overnight.rows_scored": result.rows,
            "overnight.rows_rejected": result.rejects.total(),
            "overnight.chunks_scored": result.chunks,
            **{f"overnight.seconds.{stage}": seconds for stage, seconds in result.seconds.items()},
        }
    )
    if scorer.scheduler.is_stopping():
        chunks = len(scorer.plan.shards[shard])
        there = {chunk for chunk in list_parts_from(scorer.destination, scorer.plan, shard)[1] if chunk[0] == shard}
        done = len(there | {chunk for chunk in scorer.plan.reused_parts if chunk[0] == shard})
        if done < chunks:
            # The result goes with it: after a notice that is withdrawn, the run goes on and counts it.
            return Cancelled(message=f"Stopped after {done} of {chunks} chunks; their parts stay.", data=result)
    return result


def apply_limits(model_name: str, logger: Logger) -> Task[..., Any]:
    """Return the task of a shard with those of its two tags that have a concurrency limit in Prefect now.

    Prefect asks its server about the tags of each task that begins, and a task whose server does not answer fails.
    Without a limit a shard has no tags, and depends on no server.
    """
    if not has_prefect_server():
        return score_shard
    tags: set[str] = set()
    with server_may_fail(logger, "question for concurrency limits"), get_client(sync_client=True) as client:
        offset = 0
        while found := client.read_global_concurrency_limits(_LIMITS_PER_PAGE, offset):
            offset += len(found)
            tags |= {each.name.removeprefix("tag:") for each in found if each.active and each.name.startswith("tag:")}
    tags &= {SHARD_TAG, f"{SHARD_TAG}-{model_name}"}
    if not tags:
        return score_shard
    logger.info("Shards of this run wait for the concurrency limits of Prefect on %s.", " and ".join(sorted(tags)))
    return score_shard.with_options(tags=tags)


def _find_scorer(shard_task: ShardTask) -> Scorer:
    """Return the scorer of a pass. Ray pickles the globals that the task itself uses, and a scorer can't be pickled."""
    return _scorers.get(shard_task.attempt) or _open_scorer(shard_task)


def _open_scorer(shard_task: ShardTask) -> Scorer:
    """Make a scorer for one task in another process than the flow's. It lists the parts again."""
    storage, plan, model, challengers, features = _load_run(
        shard_task.destination, shard_task.run, shard_task.registry, shard_task.allow_pickle
    )
    scorer = Scorer(
        plan=plan,
        destination=storage,
        model=model,
        challengers=challengers,
        max_reject_fraction=shard_task.max_reject_fraction,
        disclose=shard_task.disclose,
        features=features,
    )
    scorer.scheduler.begin()
    return scorer


@functools.lru_cache(maxsize=1)
def _load_run(
    destination: str,
    run: str,
    registry: str,
    allow_pickle: bool,  # noqa: FBT001 - a key of the cache
) -> tuple[Storage, Plan, Model, list[Model | None], FeatureLookup]:
    """Load plan, model and challengers, once in each process, and what keeps the feature tables."""
    mlflow.set_tracking_uri(registry)
    storage = open_storage(destination)
    plan = load_plan(storage, run)
    if plan is None:
        message = f"The plan of run {run} must be readable by every worker, but {storage.url} has none here."
        raise OvernightError(message)
    options = plan.options.model_copy(update={"allow_pickle": allow_pickle})
    model, challengers = load_planned_model(plan, None, options), load_planned_challengers(plan, options, storage)
    return storage, plan, model, challengers, FeatureLookup(plan.features)
