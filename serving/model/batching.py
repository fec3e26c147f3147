"""Batching: what a batch of b rows costs, S(b) = a + c*b, and the largest batch that a latency budget allows.

Everything that collects rows into batches uses these two types: endpoints, streams, and the simulation of queues.
A request waits for others until b rows have arrived, w at most, and may arrive just after a full batch has begun.
It is answered within w + 2*S(b).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from serving.errors import LatencyImpossible
from serving.model.contract import Frozen

BATCH_ROWS_MAX = 1024
_REPLICAS_MAX = 1024


class BatchingConfig(Frozen):
    """Maximum batch size and maximum queue delay of a server or a stream: throughput against latency."""

    batch_size_max: int = Field(default=1, ge=1, le=1 << 20, description="Rows of one forward pass, at most.")
    wait_ms_max: float = Field(
        default=0.0, ge=0, le=3_600_000, description="Milliseconds that a row waits for others, at most."
    )

    @property
    def wait_seconds_max(self) -> float:
        """`wait_ms_max` in seconds."""
        return self.wait_ms_max / 1000


class CostModel(Frozen):
    """The seconds that a batch of b rows takes: S(b) = a + c*b.

    `fixed_seconds` is a: what every batch costs, however few its rows. `row_seconds` is c: what each row adds.
    Where a server counts requests in place of rows, b is the number of requests and c the seconds that each adds.
    """

    fixed_seconds: float = Field(ge=0, description="Seconds that a batch takes whatever its size: a.")
    row_seconds: float = Field(ge=0, description="Seconds that each row adds: c.")

    @model_validator(mode="before")
    @classmethod
    def _read_milliseconds(cls, value: Any) -> Any:
        """Read what release 0.1 kept in the tags of model versions, in milliseconds."""
        if isinstance(value, Mapping) and value.keys() == {"pass_ms", "row_ms"}:
            return {"fixed_seconds": value["pass_ms"] / 1000, "row_seconds": value["row_ms"] / 1000}
        return value

    def seconds(self, rows: float) -> float:
        """Return S(rows), in seconds."""
        return self.fixed_seconds + self.row_seconds * rows

    def rows_per_second(self, rows: float) -> float:
        """Return the throughput of batches of so many rows, one after the other."""
        return rows / self.seconds(rows)

    def describe(self, unit: str = "b") -> str:
        """Return S as a formula for people, in milliseconds: '0.2 ms + b x 0.05 ms'."""
        return f"{1000 * self.fixed_seconds:.3g} ms + {unit} x {1000 * self.row_seconds:.3g} ms"

    def scale(self, factor: float) -> Self:
        """Return the same model with both terms multiplied by the factor, as on a machine of another speed."""
        return self.model_copy(
            update={"fixed_seconds": self.fixed_seconds * factor, "row_seconds": self.row_seconds * factor}
        )


def fit_cost_model(
    samples: Sequence[tuple[int, float]],
    *,
    errors: Literal["relative", "absolute"] = "relative",
    if_flat: Literal["fixed", "per_row"] = "fixed",
) -> CostModel:
    """Fit S(b) to measured batches by least squares; neither term is below 0.

    Args:
        samples: Pairs of rows and seconds, all above 0; at least one.
        errors: What is made small: errors relative to the measured time, or in seconds.
        if_flat: Where the time does not grow with the rows (as with a single sample), which term takes all of it.
    """
    rows_S, seconds_S = np.array(samples, dtype=np.float64).reshape(-1, 2).T
    weight_S = 1 / seconds_S**2 if errors == "relative" else np.ones_like(seconds_S)
    rows, seconds = np.average(rows_S, weights=weight_S), np.average(seconds_S, weights=weight_S)
    spread = np.average((rows_S - rows) ** 2, weights=weight_S)
    slope = np.average((rows_S - rows) * (seconds_S - seconds), weights=weight_S) / spread if spread > 0 else 0.0
    if slope <= 0:
        fixed, slope = (seconds, 0.0) if if_flat == "fixed" else (0.0, seconds / rows)
    elif seconds < slope * rows:
        # The best line through the origin.
        fixed, slope = 0.0, np.average(rows_S * seconds_S, weights=weight_S) / np.average(rows_S**2, weights=weight_S)
    else:
        fixed = seconds - slope * rows
    return CostModel(fixed_seconds=float(fixed), row_seconds=float(slope))


def choose_batching(
    cost: CostModel, budget_ms: float, rows_per_second: float, *, replicas: int = 1, rows_max: int = BATCH_ROWS_MAX
) -> BatchingConfig:
    """Return the largest batch that keeps the latency budget at the expected rate, and how long it may wait.

    Args:
        cost: S(b) of the model on one replica.
        budget_ms: Milliseconds within which a request must be answered.
        rows_per_second: The rate of all replicas together; each collects its own share.
        replicas: How many replicas there are.
        rows_max: Upper bound of the batch, as by the number of callers that wait at a time.

    Raises:
        LatencyImpossible: No batch keeps the budget at that rate; the message says what would.
    """
    one_ms = 1000 * cost.seconds(1)
    if 2 * one_ms > budget_ms:
        message = (
            f"The latency budget must be at least {2 * one_ms:.3g} ms, twice the {one_ms:.3g} ms that one row "
            f"takes this model, since a request may come behind a pass that has just begun, got {budget_ms:g} ms. "
            "Allow more, or serve a smaller model or one on a faster machine."
        )
        raise LatencyImpossible(message)
    rows = _find_largest_batch(cost, budget_ms, rows_per_second / replicas, rows_max)
    if cost.rows_per_second(rows) <= rows_per_second / replicas:
        raise _rate_too_high(cost, budget_ms, rows_per_second, replicas, rows_max)
    return BatchingConfig(batch_size_max=rows, wait_ms_max=estimate_wait_ms(rows, rows_per_second / replicas))


def estimate_wait_ms(rows: int, rows_per_second: float) -> float:
    """Return the milliseconds until so many rows have arrived, counted from the first."""
    return 1000 * (rows - 1) / rows_per_second


def estimate_latency_ms(cost: CostModel, rows: int, rows_per_second: float) -> float:
    """Return the milliseconds within which a request is answered: the wait, and two passes."""
    return estimate_wait_ms(rows, rows_per_second) + 2000 * cost.seconds(rows)


def _find_largest_batch(cost: CostModel, budget_ms: float, rows_per_second: float, rows_max: int) -> int:
    """Return the most rows that are answered within the budget; latency and throughput both grow with the rows."""
    sizes = range(1, rows_max + 1)
    return bisect_right(sizes, budget_ms, key=lambda rows: estimate_latency_ms(cost, rows, rows_per_second))


def _rate_too_high(
    cost: CostModel, budget_ms: float, rows_per_second: float, replicas: int, rows_max: int
) -> LatencyImpossible:
    rows = _find_largest_batch(cost, budget_ms, rows_per_second / replicas, rows_max)
    more = range(replicas + 1, _REPLICAS_MAX + 1)
    enough = next((count for count in more if _carries_rate(cost, budget_ms, rows_per_second / count, rows_max)), None)
    need = f"{enough} replicas keep it" if enough else f"Not even {_REPLICAS_MAX} replicas keep it"
    have = f"{replicas} {'replica' if replicas == 1 else 'replicas'}"
    return LatencyImpossible(
        f"{have} must take {rows_per_second:g} rows a second within {budget_ms:g} ms, but in batches of {rows}, the "
        f"largest that the budget allows, they take {replicas * cost.rows_per_second(rows):.4g}. {need}: raise "
        "replicas_max or the budget, or expect less."
    )


def _carries_rate(cost: CostModel, budget_ms: float, rows_per_second: float, rows_max: int) -> bool:
    rows = _find_largest_batch(cost, budget_ms, rows_per_second, rows_max)
    return rows > 0 and cost.rows_per_second(rows) > rows_per_second
