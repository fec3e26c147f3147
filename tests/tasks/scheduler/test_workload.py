from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from serving.errors import BadWorkload
from tasks.scheduler.workload import ArrivalRate, Events, Machine, Prices, Requests, Table, Workload
from tests.tasks.scheduler.values import workload

NOW = datetime(2026, 1, 30, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("ready", "due", "hours"),
    [("00:00", "06:00", 6), ("22:00", "06:30", 8.5), ("5:00", "05:00", 24), ("01:00", "00:59", 23 + 59 / 60)],
)
def test_a_table_has_the_time_from_its_input_to_its_deadline(ready: str, due: str, hours: float) -> None:
    assert 3600 * hours == Table(rows=1, ready=ready, due=due).slack_seconds(NOW)


def test_a_table_that_is_needed_once_has_the_time_from_now_to_its_deadline() -> None:
    once = Table(rows=1, once_by=NOW + timedelta(hours=3))

    assert 3600 * 3 == once.slack_seconds(NOW)
    with pytest.raises(BadWorkload, match=r"must be after now, 2026-01-30 15:00:00 UTC, got 2026-01-30 15:00:00 UTC"):
        once.slack_seconds(NOW + timedelta(hours=3))


def test_a_deadline_without_its_zone_is_refused() -> None:
    with pytest.raises(ValidationError, match="timezone"):
        Table.model_validate({"rows": 1, "once_by": "2026-02-01T06:00:00"})


@pytest.mark.parametrize("consumer", [Requests(latency_ms=50), Events(within_seconds=60)])
def test_requests_and_events_must_say_when_they_come(consumer: Requests | Events) -> None:
    with pytest.raises(ValidationError, match="must say when they come, got no arrivals"):
        workload(consumer=consumer)


def test_a_table_has_rows_and_no_arrivals() -> None:
    with pytest.raises(ValidationError, match="must not have arrivals beside its rows"):
        workload(consumer=Table(rows=1), arrivals=ArrivalRate(per_second=1))


@pytest.mark.parametrize(
    ("what", "values"),
    [
        *[(ArrivalRate, {"per_second": value}) for value in (-1, math.nan, math.inf, 1e7)],
        *[(ArrivalRate, {"per_second": 1, "peak": value}) for value in (0.5, math.nan, 1000)],
        *[(ArrivalRate, {"per_second": 1, "rows_per_arrival": value}) for value in (0, -1, math.nan)],
        *[(Requests, {"latency_ms": value}) for value in (0, -5, math.nan, 1e9)],
        *[(Events, {"within_seconds": value}) for value in (0, math.nan, 1e9)],
        *[(Table, {"rows": 1, "due": value}) for value in ("25:00", "6", "06:60")],
        *[(Table, {"rows": value}) for value in (-1, 10**13)],
        *[(Machine, {"kind": "x", "speed": value}) for value in (0, -1, math.nan)],
        *[(Prices, {"on_demand": value}) for value in (0, -1, math.nan)],
    ],
)
def test_absurd_values_are_refused(what: type, values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        what(**values)


def test_a_workload_travels_as_json() -> None:
    asked = workload(consumer=Events(within_seconds=60), arrivals=ArrivalRate(per_second=1))

    assert asked == Workload.model_validate_json(asked.model_dump_json())
