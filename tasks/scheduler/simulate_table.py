"""A table that is needed by a time, over and over: by a batch run, or through servers that wait for it all day."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from tasks.common.formatting import in_words
from tasks.scheduler.fit import BATCH_MAX
from tasks.scheduler.problem import Candidate, Kind, Problem, rank
from tasks.scheduler.simulate_sleep import TEN_MINUTES
from tasks.scheduler.simulate_spot import spot_run

if TYPE_CHECKING:
    from tasks.scheduler.decision import Mode, Policy

_SPOT_STEPS = (1.0, 1.15, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0)


def table(problem: Problem, kind: Kind) -> list[Candidate]:
    """Return a table's runs on on-demand machines, and the servers that could score it."""
    online, stream = _endpoint_rate(problem, kind), _stream_rate(problem, kind)
    return [
        batch_on_demand(problem, kind),
        _waiting(problem, "online", "always-on", online),
        _sleeping(problem, "keep-warm", online, problem.profile.cold_start_seconds),
        _sleeping(problem, "keep-warm-10-minutes", online, TEN_MINUTES),
        _waiting(problem, "streaming", "micro-batches", stream),
    ]


def batch_on_demand(problem: Problem, kind: Kind) -> Candidate:
    """Return the fewest on-demand machines with which a run is done in time."""
    rate, start = problem.profile.batch_rows_per_second * kind.speed, problem.profile.start_seconds
    machines = fewest(problem, rate, start)
    run = start + problem.rows_per_table / rate / machines
    return _once(problem, "batch", "on-demand", machines, run, run * machines, start * machines)


def batch_on_spot(problem: Problem, kind: Kind, machine_counts: Iterable[int] | None = None) -> Candidate | None:
    """Return the machines with which a run on spot is cheapest; None where spot or its price is not known."""
    if problem.rows_per_table <= 0:
        return None
    least = fewest(problem, problem.profile.batch_rows_per_second * kind.speed, problem.profile.start_seconds)
    steps = _SPOT_STEPS[::3] if problem.quick else _SPOT_STEPS
    counts = machine_counts or {min(math.ceil(least * step), problem.machines_max) for step in steps}
    allowed = {*counts, least + 1} & set(range(1, problem.machines_max + 1))
    found = [_spot_runs(problem, kind, machines) for machines in sorted(allowed)]
    return min((candidate for candidate in found if candidate is not None), key=rank, default=None)


def _spot_runs(problem: Problem, kind: Kind, machines: int) -> Candidate | None:
    ratio, availability = kind.price_ratio, problem.availability
    if ratio is None or availability is None:
        return None
    work = problem.rows_per_table / (problem.profile.batch_rows_per_second * kind.speed)
    start = problem.profile.start_seconds
    run = spot_run(
        work / machines * problem.time_margin, problem.within, start, ratio, availability, quick=problem.quick
    )
    if run is None:
        return None
    paid = run.paid_seconds / problem.time_margin * machines
    return Candidate(
        mode="batch",
        policy="spot",
        machines=machines,
        every=problem.every,
        paid_seconds=paid * _times(problem),
        busy_seconds=min(work, paid) * _times(problem),
        age_p50=run.seconds_p50,
        age_p99=run.seconds_p99,
        late=run.late,
        flaw=None if run.late == 0 else f"{run.late:.1%} of the runs came late",
    )


def fewest(problem: Problem, rate: float, start: float) -> int:
    """Return the fewest machines of a rate that score the table in time, else as many as are allowed."""
    left = problem.within / problem.time_margin - start
    needed = math.ceil(problem.rows_per_table / rate / left - 1e-9) if left > 0 else problem.machines_max
    return min(max(needed, 1), problem.machines_max)


def _waiting(problem: Problem, mode: Mode, policy: Policy, rate: float) -> Candidate:
    """Return machines that wait for the table all day."""
    machines = fewest(problem, rate, 0.0)
    took = problem.rows_per_table / rate / machines
    paid = machines * problem.every
    return _once(problem, mode, policy, machines, took, paid, paid - took * machines)


def _sleeping(problem: Problem, policy: Policy, rate: float, keep: float) -> Candidate:
    start = problem.profile.cold_start_seconds
    machines = fewest(problem, rate, start)
    took = start + problem.rows_per_table / rate / machines
    awake = min(took + keep, problem.every) if problem.rows_per_table else 0.0
    idle = (awake - problem.rows_per_table / rate / machines) * machines
    return _once(problem, "online", policy, machines, took, awake * machines, idle, keep=keep)


def _once(
    problem: Problem,
    mode: Mode,
    policy: Policy,
    machines: int,
    took: float,
    paid: float,
    idle: float,
    keep: float | None = None,
) -> Candidate:
    late = took * problem.time_margin > problem.within + 1e-9
    nothing = paid == 0
    return Candidate(
        mode=mode,
        policy=policy,
        machines=0 if nothing else machines,
        batch_size_max=1 if mode == "batch" else BATCH_MAX,
        keep_warm=keep,
        every=problem.every if mode == "batch" else None,
        paid_seconds=paid * _times(problem),
        busy_seconds=max(paid - idle, 0.0) * _times(problem),
        age_p50=0.0 if nothing else took,
        age_p99=0.0 if nothing else took,
        late=1.0 if late else 0.0,
        cold_starts=0 if keep is None or nothing else math.ceil(_times(problem)),
        flaw=f"the table takes {in_words(took)} on {machines} machines, {in_words(problem.within)} are left for it"
        if late
        else None,
    )


def _times(problem: Problem) -> float:
    return problem.seconds / problem.every


def _endpoint_rate(problem: Problem, kind: Kind) -> float:
    """Rows a second of an endpoint that is asked for full passes; somebody must read and write them all the same."""
    profile = problem.profile
    rate = profile.slots * BATCH_MAX / (profile.pass_time.seconds(BATCH_MAX) + profile.busy_ms / 1000)
    return min(rate, profile.batch_rows_per_second) * kind.speed


def _stream_rate(problem: Problem, kind: Kind) -> float:
    profile = problem.profile
    measured = profile.stream_rows_per_second or profile.batch_rows_per_second
    return min(profile.slots * profile.pass_time.rows_per_second(BATCH_MAX), measured) * kind.speed
