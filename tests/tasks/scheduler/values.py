"""Workloads, profiles and problems as the tests of the scheduler have them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.model.batching import CostModel
from tasks.scheduler.decision import Profile
from tasks.scheduler.scenario import InstanceType, Scenario
from tasks.scheduler.spot_simulation import SpotAvailability
from tasks.scheduler.workload import Prices, Requests, Workload
from tests.benchmarks.traces import synthetic_traces

HOUR = 3600
THIS = InstanceType(name="this", speed=1.0, on_demand=0.36 / HOUR, spot=0.12 / HOUR)
PRICES = {"this": Prices(on_demand=0.36, spot=0.12)}


def profile(**changes: Any) -> Profile:
    """A model that scores a row in 11 ms, and 100 a second and slot in full passes."""
    values: dict[str, Any] = {
        "model": "models:/toy/1",
        "digest": "0" * 64,
        "machine": "a machine",
        "slots": 2,
        "pass_time": CostModel(fixed_seconds=0.001, row_seconds=0.01),
        "batch_rows_per_second": 180.0,
        "cold_start_seconds": 20.0,
        "start_seconds": 30.0,
        "request_ms": 1.0,
        "request_busy_ms": 0.5,
        "measured_at": datetime(2026, 1, 2, tzinfo=UTC),
    }
    return Profile(**(values | changes))


def availability() -> SpotAvailability:
    """Spot that comes and goes."""
    return SpotAvailability(spot_NT=synthetic_traces(16, 288, seed=5), tick_seconds=300.0)


def scenario(counts_T: NDArray[np.int64] | None = None, **changes: Any) -> Scenario:
    """Requests that must be answered within 200 ms, two a second for an hour."""
    counts_T = np.full(HOUR, 2) if counts_T is None else counts_T
    values: dict[str, Any] = {
        "consumer": "requests",
        "deadline_seconds": 0.2,
        "share_in_time": 0.99,
        "counts_T": counts_T,
        "rows_per_arrival": 1.0,
        "rows_per_table": 0.0,
        "period_seconds": 0.0,
        "seconds": float(len(counts_T)),
        "scale": 1.0,
        "machines_max": 64,
        "profile": profile(),
        "availability": availability(),
    }
    return Scenario(**(values | changes))


def table_scenario(rows: float, **changes: Any) -> Scenario:
    """A table that is needed six hours after its input, every day for three days."""
    values: dict[str, Any] = {
        "consumer": "table",
        "deadline_seconds": 6.0 * HOUR,
        "share_in_time": 1.0,
        "counts_T": np.zeros(0, dtype=np.int64),
        "rows_per_table": rows,
        "period_seconds": 24.0 * HOUR,
        "seconds": 72.0 * HOUR,
    }
    return scenario(**(values | changes))


def workload(**changes: Any) -> Workload:
    """Requests that must be answered within 200 ms, for six hours."""
    values: dict[str, Any] = {
        "name": "toy",
        "model": "models:/toy/1",
        "consumer": Requests(latency_ms=200),
        "horizon_days": 0.25,
    }
    return Workload(**(values | changes))
