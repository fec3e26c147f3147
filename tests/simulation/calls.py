"""A batch call in a process of its own, as worlds of several destinations make it: the steps of flows/batch.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from serving.errors import OvernightError
from tasks.batch.destination_source import claim_source
from tasks.batch.manifest import Manifest
from tasks.batch.options import BatchOptions
from tasks.batch.publish import publish
from tasks.batch.resolve import CompleteRun, ResumedRun, find_run, restage_plan
from tasks.batch.run_records import RunStart, confirm_plan
from tasks.batch.run_request import RunRequest
from tasks.storage import Storage, check_create_only
from tests.simulation.data import load_toy
from tests.simulation.scheduler import Actor, Killed, Process, Scheduler, Stuck
from tests.simulation.scoring import score_plan

_PAUSE_SECONDS = 4.0


def attempt_apart(
    scheduler: Scheduler,
    process: Process,
    attempt: Callable[[], Any],
    ends: Counter[str],
    violations: list[str],
) -> Actor:
    """Make an attempt in a process of its own, and count how it ends; an error of another kind is a violation."""
    actor = scheduler.join(scheduler.spawn(process, process.name, attempt))
    # Whatever it had running besides ends with it.
    process.alive = False
    if isinstance(actor.error, Stuck):
        raise actor.error
    if isinstance(actor.error, OvernightError):
        ends[type(actor.error).__name__] += 1
        scheduler.tell(f"{process.name} is refused: {type(actor.error).__name__}: {actor.error}")
    elif isinstance(actor.error, Killed):
        ends["killed"] += 1
    elif actor.error is not None:
        violations.append(f"a call ended in {type(actor.error).__name__}: {actor.error}")
    else:
        ends["none"] += 1
    return actor


def publish_run(
    scheduler: Scheduler, request: RunRequest | RunStart, storage: Storage, flow_run: str, options: BatchOptions
) -> Manifest:
    """Find or plan the run of a request, score what is missing of it and publish it."""
    load: Any = load_toy
    run = find_run(request, storage, flow_run, load=load, clock=scheduler.wall_clock)
    if isinstance(run, CompleteRun):
        return run.manifest
    check_create_only(storage)
    plan = restage_plan(run.plan, storage) if isinstance(run, ResumedRun) and run.damaged else run.plan
    audit, _ = score_plan(scheduler, scheduler.process, plan, storage, options, [])
    # Others plan and publish meanwhile.
    scheduler.sleep(scheduler.chance.choice([0.0, _PAUSE_SECONDS]))
    claim_source(storage, plan, options)
    return publish(storage, confirm_plan(storage, plan), audit)
