from __future__ import annotations

from tasks.endpoint.traffic import keep_warm_seconds
from tests.tasks.endpoint.values import spec

BUDGET = {"latency_ms": 5000, "rate": 5}


def test_the_seconds_that_are_said_are_kept() -> None:
    assert 90 == keep_warm_seconds(spec(keep_warm=90), 3)
    assert keep_warm_seconds(spec(), 3) is None


def test_auto_waits_as_long_as_a_cold_start_takes() -> None:
    assert 3 == keep_warm_seconds(spec(keep_warm="auto", budget=BUDGET), 3)
    assert 1 == keep_warm_seconds(spec(keep_warm="auto", budget=BUDGET), 0.2)


def test_auto_keeps_one_where_a_cold_start_breaks_the_budget() -> None:
    assert keep_warm_seconds(spec(keep_warm="auto", budget=BUDGET), 5.1) is None
