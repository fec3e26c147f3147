"""Decisions for the tests of what follows from one."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

from serving.model.batching import CostModel
from tasks.scheduler.decision import Alternative, BreakEven, Decision, Profile
from tasks.scheduler.workload import ArrivalRate, Events, Machine, Prices, Requests, Table, Workload

MACHINE = "c7i.large"
MODEL = "models:/churn@champion"
NOW = datetime(2026, 1, 30, 12, tzinfo=UTC)

NIGHTLY = Workload(
    name="nightly",
    model=MODEL,
    consumer=Table(rows=1000, ready="01:30", due="06:00"),
    machines=(Machine(kind=MACHINE),),
)
BACKFILL = NIGHTLY.model_copy(
    update={"consumer": Table(rows=9, once_by=datetime(2026, 2, 1, 6, tzinfo=timezone(timedelta(hours=1))))}
)
FRAUD = Workload(
    name="fraud",
    model=MODEL,
    consumer=Requests(latency_ms=50),
    arrivals=ArrivalRate(per_second=20),
    machines=(Machine(kind=MACHINE, speed=1),),
)
EVENTS = Workload(
    name="events",
    model=MODEL,
    consumer=Events(within_seconds=30),
    arrivals=ArrivalRate(per_second=20),
    machines=(Machine(kind=MACHINE, speed=2),),
)


def profile(**changes: Any) -> Profile:
    """Return a profile with made-up figures."""
    values = {
        "model": "models:/churn/3",
        "digest": "ab" * 32,
        "machine": "a machine, 2 cores",
        "slots": 2,
        "pass_time": CostModel(fixed_seconds=2e-4, row_seconds=1e-6),
        "batch_rows_per_second": 1000.0,
        "cold_start_seconds": 4.0,
        "start_seconds": 6.5,
        "request_ms": 2.0,
        "measured_at": NOW,
    }
    return Profile.model_validate(values | changes)


def alternative(mode: str, policy: str, usd: float, **changes: Any) -> Alternative:
    """Return an alternative with this cost."""
    values = {
        "mode": mode,
        "policy": policy,
        "machine": MACHINE,
        "machines": 1,
        "usd": usd,
        "age_seconds_p50": 0.01,
        "age_seconds_p99": 0.04,
        "late_share": 0.0,
        "utilisation": 0.4,
        "is_feasible": True,
        "reason": f"it costs {usd:g}.",
    }
    return Alternative.model_validate(values | changes)


def decision(workload: Workload, *alternatives: Alternative, **changes: Any) -> Decision:
    """Return the decision for the first of these alternatives, the last of which is always on."""
    first, last = alternatives[0], alternatives[-1]
    values = {
        "workload": workload,
        "profile": profile(),
        "prices": {MACHINE: Prices(on_demand=0.09, spot=0.03)},
        "price_origin": "by hand",
        "decided_at": NOW,
        "rows": 30_000,
        "chosen": first,
        "alternatives": alternatives,
        "waste_usd": last.usd - first.usd,
        "waste_factor": last.usd / first.usd if first.usd else None,
        "break_evens": (BreakEven(input="traffic", factor=3.2, to="online, always-on"),),
    }
    return Decision.model_validate(values | changes)
