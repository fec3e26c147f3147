"""Batching: what a batch of b rows costs, S(b) = a + c*b, and the setting with the least latency that carries a rate.

Everything that collects rows into batches uses BatchingConfig and CostModel: endpoints, streams, and the simulation of
queues. A request waits for others until b rows have arrived, w at most, and may arrive just after a full batch has
begun. Endpoints whose batching is chosen have w = 0: a pass takes what has come while the one before it ran.

Shapes: L servers, N requests.
"""

from __future__ import annotations

import functools
import itertools
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from serving.errors import LatencyImpossible
from serving.model.contract import Frozen
from serving.model.queueing import BatchingServer, simulate_servers

BATCH_ROWS_MAX = 1024
# Headroom of the expected rate, and the burst that must be carried too.
UTILISATION_MAX = 0.7
BURST_FACTOR, BURST_SECONDS = 2.0, 2.0
# The rest of the budget is for what a request takes beside the queue and its pass, and for what chance adds.
_BUDGET_SHARE = 0.8
# Less than this share of the budget is no difference in latency.
_GAIN_SHARE_MIN = 0.05
_REPLICAS_MAX = 1024
_REPLICA_COUNTS_TRIED = 3
_REQUESTS, _WARM_UP = 2000, 200
_REST_SECONDS, _REST_REQUESTS, _BURST_REQUESTS = 4.0, 400, 1500
_SEED = 23


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


class BatchingSetting(Frozen):
    """A batching on so many replicas, and what single rows wait there by the simulation of its queue."""

    batching: BatchingConfig = Field(description="Rows of a pass, at most. No row waits for others.")
    replicas: int = Field(ge=1, description="Replicas that carry the expected rate.")
    utilisation: float = Field(ge=0, description="The expected rate over what the replicas take in full passes.")
    p99_ms: float = Field(ge=0, description="Milliseconds within which 99 of 100 rows are answered at that rate.")
    burst_p99_ms: float = Field(ge=0, description="The same for the rows of a burst of twice the rate.")

    def keeps_budget(self, budget_ms: float) -> bool:
        """Whether rows are answered within the share of the budget that the simulated queue may take."""
        return max(self.p99_ms, self.burst_p99_ms) <= _BUDGET_SHARE * budget_ms


def list_batchings(
    cost: CostModel,
    budget_ms: float,
    rows_per_second: float,
    *,
    replicas_min: int = 1,
    replicas_max: int = 1,
    rows_max: int = BATCH_ROWS_MAX,
) -> tuple[BatchingSetting, ...]:
    """Return the settings that keep a latency budget by the simulation, in the order in which to try them.

    A pass takes what came while its replica was busy, and no row waits for others that do not come: of several
    callers, each gets what a lone one gets as soon as a replica is free. A larger batch only says how much a busy
    replica takes at once. Each setting carries the expected rate at no more than 70 % of what it takes in full passes,
    and twice the rate for two seconds.

    The first has the fewest replicas, and on them the least latency, up to 5 % of the budget: by passes of single rows,
    else by the largest batch. What follows is for a server that takes longer than its passes: the largest batch of all
    on as many replicas, then more of them.

    Args:
        cost: S(b) of the model on one replica.
        budget_ms: Milliseconds within which a request must be answered.
        rows_per_second: The rate of all replicas together; each has a queue for its own share.
        replicas_min: How many replicas there are at least.
        replicas_max: How many replicas there may be.
        rows_max: Upper bound of the batch, as by the number of callers that wait at a time.

    Raises:
        LatencyImpossible: No setting keeps the budget at that rate; the message says what would.
    """
    one_ms = 1000 * cost.seconds(1)
    if 2 * one_ms > budget_ms:
        message = (
            f"The latency budget must be at least {2 * one_ms:.3g} ms, twice the {one_ms:.3g} ms that one row "
            f"takes this model, since a request may come behind a pass that has just begun, got {budget_ms:g} ms. "
            "Allow more, or serve a smaller model or one on a faster machine."
        )
        raise LatencyImpossible(message)
    load = _ExpectedLoad(cost=cost, budget_ms=budget_ms, rows_per_second=rows_per_second, rows_max=rows_max)
    fewest = load.find_fewest_replicas(max(1, replicas_min), max(1, replicas_min, replicas_max))
    if fewest is None:
        raise load.explain_impossible(max(1, replicas_min, replicas_max))
    counts = range(fewest, max(fewest, replicas_max) + 1)[:_REPLICA_COUNTS_TRIED]
    return tuple(setting for replicas in counts for setting in load.list_settings(replicas))


@dataclass(frozen=True, slots=True, kw_only=True)
class _ExpectedLoad:
    """What replicas must carry: a rate within a budget, by the cost of a pass."""

    cost: CostModel
    budget_ms: float
    rows_per_second: float
    rows_max: int

    def list_settings(self, replicas: int) -> list[BatchingSetting]:
        """Return the setting of least latency on so many replicas, and the one with the largest batch.

        A larger batch costs nothing until rows come faster than expected. Only passes of single rows need no queue at
        all, and come first where they are fast enough.
        """
        kept = [each for each in self._simulate(replicas) if each.keeps_budget(self.budget_ms)]
        if not kept:
            return []
        most_ms = min(each.burst_p99_ms for each in kept) + _GAIN_SHARE_MIN * self.budget_ms
        fast = [each for each in kept if each.burst_p99_ms <= most_ms]
        first = fast[0] if fast[0].batching.batch_size_max == 1 else fast[-1]
        return [first] if first is kept[-1] else [first, kept[-1]]

    def _simulate(self, replicas: int) -> list[BatchingSetting]:
        """Return the settings of all sizes of which a request behind a full pass is answered within the budget."""
        rows_per_second = self.rows_per_second / replicas
        sizes = [
            rows
            for rows in _list_sizes(self.cost, rows_per_second, self.rows_max)
            if 2000 * self.cost.seconds(rows) <= self.budget_ms
        ]
        return list(_simulate_settings(self.cost, rows_per_second, tuple(sizes), replicas))

    def find_fewest_replicas(self, low: int, high: int) -> int | None:
        """Return the fewest replicas in the range that keep the budget, None where not even all of them do."""
        top = low
        # Doubled first: far fewer counts are simulated than by a bisection of a long range.
        while top < high and not self.list_settings(top):
            low, top = top + 1, min(2 * top, high)
        counts = range(low, top + 1)
        found = bisect_left(counts, 1, key=lambda replicas: bool(self.list_settings(replicas)))
        return counts[found] if found < len(counts) else None

    def explain_impossible(self, replicas: int) -> LatencyImpossible:
        """Return the error for a rate that so many replicas do not carry, with what would carry it."""
        enough = self.find_fewest_replicas(replicas + 1, max(replicas + 1, _REPLICAS_MAX))
        need = f"{enough} replicas keep it" if enough else f"Not even {_REPLICAS_MAX} replicas keep it"
        have = f"{replicas} {'replica' if replicas == 1 else 'replicas'}"
        most = replicas * self.cost.rows_per_second(self.rows_max)
        return LatencyImpossible(
            f"{have} must take {self.rows_per_second:g} rows a second within {self.budget_ms:g} ms, at no more than "
            f"{UTILISATION_MAX:.0%} of what full passes take, and twice as many for {BURST_SECONDS:g} s. Passes of "
            f"{self.rows_max} rows take {most:.4g} a second. {need}: raise replicas_max or the budget, or expect less."
        )


def _list_sizes(cost: CostModel, rows_per_second: float, rows_max: int) -> list[int]:
    """Return batch sizes that carry a rate at 70 % of what full passes take: the smallest, doubled, up to the bound."""
    left = UTILISATION_MAX - rows_per_second * cost.row_seconds
    needed = rows_per_second * cost.fixed_seconds / left if left > 0 else math.inf
    if needed > rows_max:
        return []
    smallest = max(1, math.ceil(needed - 1e-9))
    doubled = itertools.takewhile(lambda rows: rows < rows_max, (smallest << power for power in itertools.count()))
    return [*doubled, rows_max]


@functools.lru_cache(maxsize=64)
def _simulate_settings(
    cost: CostModel, rows_per_second: float, sizes: tuple[int, ...], replicas: int
) -> tuple[BatchingSetting, ...]:
    """Simulate single rows at one replica with each batch size: at the rate, and in bursts of twice the rate."""
    if not sizes:
        return ()
    steady_N, burst_N, in_burst_N = _draw_arrivals(rows_per_second)
    servers = [BatchingServer(slots=1, cost=cost, requests_max=rows) for rows in sizes]
    at_LN = np.concatenate([np.tile(each_N, (len(servers), 1)) for each_N in (steady_N, burst_N)])
    waits_LN = simulate_servers([*servers, *servers], at_LN)
    p99_L = np.percentile(waits_LN[: len(servers), _WARM_UP:], 99, axis=1)
    burst_p99_L = np.percentile(waits_LN[len(servers) :, in_burst_N], 99, axis=1)
    found = []
    for server, p99, burst_p99 in zip(servers, p99_L, burst_p99_L, strict=True):
        utilisation = rows_per_second / server.requests_per_second
        # What is left of a burst that brings more than a replica takes, and that is too long to be simulated.
        behind = max(0.0, BURST_FACTOR * utilisation - 1) * BURST_SECONDS
        found.append(
            BatchingSetting(
                batching=BatchingConfig(batch_size_max=server.requests_max),
                replicas=replicas,
                utilisation=utilisation,
                p99_ms=1000 * float(p99),
                burst_p99_ms=1000 * max(float(burst_p99), behind),
            )
        )
    return tuple(found)


def _draw_arrivals(
    rows_per_second: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Return Poisson arrivals at a rate, others that alternate between it and twice the rate, and which are of bursts.

    At high rates the bursts are shorter, so that there are always about as many requests.
    """
    expected_N = np.cumsum(np.random.default_rng(_SEED).exponential(size=_REQUESTS))
    rest = min(_REST_SECONDS, _REST_REQUESTS / rows_per_second)
    burst = min(BURST_SECONDS, _BURST_REQUESTS / (BURST_FACTOR * rows_per_second))
    cycle_N, place_N = np.divmod(expected_N / rows_per_second, rest + BURST_FACTOR * burst)
    in_burst_N = place_N > rest
    time_N = np.where(in_burst_N, rest + (place_N - rest) / BURST_FACTOR, place_N)
    return expected_N / rows_per_second, cycle_N * (rest + burst) + time_N, in_burst_N
