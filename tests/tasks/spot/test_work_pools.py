"""Which machines of a pool live, by their workers' heartbeats."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import Worker

from tasks.spot.work_pools import filter_live_workers

NOW = datetime(2030, 1, 31, 22, 0, tzinfo=UTC)


def a_worker(name: str, silent: float | None, every: int | None) -> Worker:
    last = None if silent is None else NOW - timedelta(seconds=silent)
    return Worker(
        name=name, work_pool_id=uuid4(), last_heartbeat_time=last, heartbeat_interval_seconds=every, status="ONLINE"
    )


@pytest.mark.parametrize(
    ("silent", "every", "lives"),
    [(0, 30, True), (89, 30, True), (90, 30, False), (5, 2, True), (6, 2, False), (89, None, True), (None, 30, False)],
)
def test_a_worker_is_alive_until_three_heartbeats_in_a_row_are_missing(
    silent: float | None, every: int | None, *, lives: bool
) -> None:
    assert lives == bool(filter_live_workers([a_worker("one", silent, every)], NOW))


def test_live_workers_are_named() -> None:
    workers = [a_worker("one", 10, 30), a_worker("two", 500, 30), a_worker("three", 0, 30)]

    assert {"one", "three"} == filter_live_workers(workers, NOW)


def test_a_worker_with_a_clock_that_is_ahead_is_alive() -> None:
    assert {"one"} == filter_live_workers([a_worker("one", -400, 30)], NOW)
