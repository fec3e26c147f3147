"""Scoring of a plan by the slots of a simulated process, as flows.batch and flows.runtime.task_runners do it."""

from __future__ import annotations

import random
from collections import Counter, deque

from serving.errors import Interrupted
from tasks.batch.chunk_scheduler import ScoringMachine
from tasks.batch.comparison_records import audit_challengers, list_missing_chunks
from tasks.batch.manifest import find_intact_manifest
from tasks.batch.memory import check_memory
from tasks.batch.options import BatchOptions
from tasks.batch.parts import count_rows_done
from tasks.batch.plan import Plan
from tasks.batch.planned_models import choose_slots, load_planned_challengers
from tasks.batch.publish import Audit, audit_parts, check_rows_add_up, count_rejects
from tasks.batch.score import Scorer
from tasks.batch.scoring_result import ScoringResult, check_rejects
from tasks.spot.drain import Drain
from tasks.storage import Storage
from tests.simulation.data import ToyModel
from tests.simulation.scheduler import ActorExecutor, ActorLock, Process, Scheduler

_PASSES_MAX = 3


def score_plan(
    scheduler: Scheduler, process: Process, plan: Plan, storage: Storage, options: BatchOptions, drains: list[Drain]
) -> tuple[Audit, dict[int, Audit]]:
    """Score what is missing, in a process whose drain is added to others.

    Returns the audit of the model's parts, and those of its challengers.
    """
    model = ToyModel(int(plan.model.version))
    challengers = load_planned_challengers(plan, options, storage)
    slots = choose_slots(options, model)
    check_memory(plan, slots, options, [model, *challengers])
    machine = ScoringMachine(
        clock=lambda: scheduler.now,
        wait=scheduler.wait,
        random=random.Random(scheduler.chance.random()),
        blocks_ahead=0,
        writer=lambda: ActorExecutor(scheduler),
        lock=lambda: ActorLock(scheduler),
    )
    fraction = options.max_reject_fraction
    scorer = Scorer(
        plan=plan,
        destination=storage,
        model=model,
        challengers=challengers,
        max_reject_fraction=fraction,
        machine=machine,
    )
    drains.append(scorer.drain)
    for _ in range(_PASSES_MAX):
        scored = _score_pass(scheduler, scorer, slots, process)
        if scorer.drain.notice is not None and count_rows_done(storage, plan) < plan.rows:
            message = "This process was told to go."
            raise Interrupted(message)
        if scored.faults and find_intact_manifest(storage, plan.run) is None:
            raise next(iter(scored.faults.values()))
        audit, others = audit_parts(storage, plan), audit_challengers(storage, plan)
        if not audit.missing and not list_missing_chunks(others):
            break
    check_rows_add_up(plan, audit)
    rejects = Counter({(count.column, count.reason): count.rows for count in count_rejects(audit)})
    check_rejects(rejects, plan, fraction)
    return audit, others


def _score_pass(scheduler: Scheduler, scorer: Scorer, slots: int, process: Process) -> ScoringResult:
    """Score shards side by side in slots."""
    scored, shards = ScoringResult(), deque(scorer.scheduler.begin())

    def work() -> None:
        while shards and not scorer.scheduler.is_stopping():
            scored.add(scorer.score_shard(shards.popleft()))

    actors = [scheduler.spawn(process, f"{process.name}/slot-{at}", work) for at in range(slots)]
    for actor in actors:
        scheduler.join(actor)
    for actor in actors:
        actor.value()
    return scored
