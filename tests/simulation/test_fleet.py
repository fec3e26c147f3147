"""Many spot workers on one run: each chunk is scored, hardly one of them twice, and no listing is of all parts."""

from __future__ import annotations

import pytest

from tasks.batch.options import BatchOptions
from tasks.batch.plan import Plan
from tests.simulation.fleet import Fleet, FleetResult, plan_fleet, simulate_fleet

WORKERS = 20


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A run of 1,200 chunks: 60 for each of 20 workers, as a thousand workers have 80 of ten billion rows."""
    return plan_fleet(workers=WORKERS, files=150, options=BatchOptions(rows_per_chunk=125_000))


@pytest.fixture(scope="module")
def result(plan: Plan) -> FleetResult:
    return simulate_fleet(plan, Fleet(workers=WORKERS), seed=1)


@pytest.mark.parametrize("kills_per_hour", [0.0, 2.0])
def test_a_fleet_scores_hardly_a_chunk_twice(plan: Plan, kills_per_hour: float) -> None:
    result = simulate_fleet(plan, Fleet(workers=WORKERS, kills_per_hour=kills_per_hour), seed=0)

    assert len(plan.chunks) == result.parts
    assert result.doubled_work <= 0.02
    assert (result.kills > 10) == (kills_per_hour > 0)
    # Machines come over five minutes, and those that are killed are replaced after three.
    assert result.seconds <= 330 + 7 / 6 * plan.rows / WORKERS / Fleet().rows_per_second + 600 * (kills_per_hour > 0)


def test_a_shard_gets_a_task_once_a_worker_has_begun_it(plan: Plan, result: FleetResult) -> None:
    assert len(plan.shards) <= result.shard_tasks <= len(plan.shards) + 4 * WORKERS


def test_a_worker_alone_marks_nothing(result: FleetResult) -> None:
    of_one = plan_fleet(workers=1, files=10, options=BatchOptions(rows_per_chunk=125_000))
    alone = simulate_fleet(of_one, Fleet(workers=1, kills_per_hour=0), seed=1)

    assert 0 == alone.marks < result.marks
    assert len(of_one.chunks) == alone.parts == alone.calls["PUT"]
