"""The dial's position: as many rows in a pass as a latency budget allows at the rate that is expected.

A pass of b rows takes S(b) = a + c*b. A request waits w for others, at most until b rows have come, and may come when a
full batch has just begun: it is answered within w + 2*S(b). Times are in milliseconds, rates in rows a second.
"""

from __future__ import annotations

import itertools
import statistics
from bisect import bisect_right
from collections.abc import Callable, Sequence

import numpy as np
from pydantic import Field

from serving.errors import LatencyImpossible
from serving.model.contract import Contract, Frozen
from serving.model.encoding import Encoded
from serving.model.interface import Model
from serving.model.release import Dial
from serving.model.tuner import measure

_ROWS_MAX = 1024
_REPLICAS_MAX = 1024
_ROUNDS = 3


class PassTime(Frozen):
    """How long the forward pass of a model takes by its rows."""

    pass_ms: float = Field(ge=0, description="Milliseconds of a pass as such: a.")
    row_ms: float = Field(ge=0, description="Milliseconds that each of its rows adds: c.")

    def ms(self, rows: int) -> float:
        """Return the milliseconds of a pass of so many rows."""
        return self.pass_ms + self.row_ms * rows

    def rate(self, rows: int) -> float:
        """Return the rows a second of passes of so many rows, one after the other."""
        return 1000 * rows / self.ms(rows)


def choose_dial(time: PassTime, budget_ms: float, rate: float, *, replicas: int = 1, rows_max: int = _ROWS_MAX) -> Dial:
    """Return the dial with the largest batch that keeps the budget at the rate.

    `rate` is that of all replicas together, each of which collects its own share. `rows_max` bounds the batch, as
    by the callers that wait at a time. Raises LatencyImpossible with what would be needed.
    """
    if 2 * time.ms(1) > budget_ms:
        message = (
            f"The latency budget must be at least {2 * time.ms(1):.3g} ms, twice the {time.ms(1):.3g} ms that one row "
            f"takes this model, since a request may come behind a pass that has just begun, got {budget_ms:g} ms. "
            "Allow more, or serve a smaller model or one on a faster machine."
        )
        raise LatencyImpossible(message)
    rows = _largest(time, budget_ms, rate / replicas, rows_max)
    if time.rate(rows) <= rate / replicas:
        raise _too_much(time, budget_ms, rate, replicas, rows_max)
    return Dial(batch_size_max=rows, wait_ms_max=wait_ms(rows, rate / replicas))


def wait_ms(rows: int, rate: float) -> float:
    """Return the milliseconds until so many rows have come, from the first on."""
    return 1000 * (rows - 1) / rate


def latency_ms(time: PassTime, rows: int, rate: float) -> float:
    """Return the milliseconds within which a request is answered: the wait, and two passes."""
    return wait_ms(rows, rate) + 2 * time.ms(rows)


def _largest(time: PassTime, budget_ms: float, rate: float, rows_max: int) -> int:
    """Return the most rows that are answered within the budget. The latency grows with the rows, as does the rate."""
    return bisect_right(range(1, rows_max + 1), budget_ms, key=lambda rows: latency_ms(time, rows, rate))


def _too_much(time: PassTime, budget_ms: float, rate: float, replicas: int, rows_max: int) -> LatencyImpossible:
    rows = _largest(time, budget_ms, rate / replicas, rows_max)
    more = (each for each in range(replicas + 1, _REPLICAS_MAX + 1) if _keeps(time, budget_ms, rate / each, rows_max))
    enough = next(more, None)
    need = f"{enough} replicas keep it" if enough else f"Not even {_REPLICAS_MAX} replicas keep it"
    have = f"{replicas} {'replica' if replicas == 1 else 'replicas'}"
    return LatencyImpossible(
        f"{have} must take {rate:g} rows a second within {budget_ms:g} ms, but in batches of {rows}, the largest that "
        f"the budget allows, they take {replicas * time.rate(rows):.4g}. {need}: raise replicas_max or "
        "the budget, or expect less."
    )


def _keeps(time: PassTime, budget_ms: float, rate: float, rows_max: int) -> bool:
    rows = _largest(time, budget_ms, rate, rows_max)
    return rows > 0 and time.rate(rows) > rate


def fit(samples: Sequence[tuple[int, float]]) -> PassTime:
    """Return the line through pairs of rows and milliseconds, all above 0, by least squares of the relative errors.

    Neither part of it is below 0. Needs at least one sample; from a single one all its time is the pass's.
    """
    rows_S, ms_S = np.array(samples, dtype=np.float64).reshape(-1, 2).T
    weight_S = 1 / ms_S**2
    rows, ms = np.average(rows_S, weights=weight_S), np.average(ms_S, weights=weight_S)
    spread = np.average((rows_S - rows) ** 2, weights=weight_S)
    row_ms = np.average((rows_S - rows) * (ms_S - ms), weights=weight_S) / spread if spread > 0 else 0.0
    if row_ms <= 0:
        return PassTime(pass_ms=float(ms), row_ms=0.0)
    if ms < row_ms * rows:
        through_zero = np.average(rows_S * ms_S, weights=weight_S) / np.average(rows_S**2, weights=weight_S)
        return PassTime(pass_ms=0.0, row_ms=float(through_zero))
    return PassTime(pass_ms=float(ms - row_ms * rows), row_ms=float(row_ms))


def measure_passes(
    model: Model, contract: Contract, sample: Encoded, budget_ms: float, *, slots: int, clock: Callable[[], float]
) -> list[tuple[int, float]]:
    """Measure passes of 1, 2, 4, ... rows of the sample with all slots running; return pairs of rows and milliseconds.

    Ends with the first that takes longer than the budget. Each is a median of three. Raises what the model raises.
    """
    measured = []
    for rows in itertools.takewhile(lambda rows: rows <= min(_ROWS_MAX, sample.rows), map((1).__lshift__, range(32))):
        rates = [measure(model, contract, sample, rows, slots, clock) for _ in range(_ROUNDS)]
        measured.append((rows, 1000 * rows * slots / statistics.median(rates)))
        if measured[-1][1] > budget_ms:
            break
    return measured
