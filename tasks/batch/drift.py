"""How far the columns of a run are from those of a baseline: population stability index, Kolmogorov-Smirnov, means.

All of it is computed from statistics, so that no row of the baseline is read again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from tasks.batch.column_statistics import ColumnStatistics, TableStatistics

Side = Literal["input", "output"]

# A column of no more different values has a bin for each; any other one for each tenth of the baseline's rows.
VALUES_MAX = 20
_TENTHS = np.arange(1, 10) / 10
# The share of a bin in which there is no row: its logarithm is needed.
_SHARE_MIN = 1e-4
# Of a normal distribution, one in a thousand is above 3.09, and one in a thousand is further than 3.29 to either side.
_ONE_SIDED, _TWO_SIDED = 3.09, 3.29
# One in a thousand of two samples of one distribution is further apart than this, by sqrt(-ln(0.001 / 2) / 2).
_KOLMOGOROV = 1.95
EVERY_OTHER = "every other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How far two distributions are apart, and what chance alone gives in one of a thousand samples as large as these.

    NaN where it can't be said.
    """

    value: float = math.nan
    chance: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnDrift:
    """One column of a run beside that of the baseline; `problem` says why their values can't be compared, if so."""

    side: Side
    name: str
    current: ColumnStatistics | None
    baseline: ColumnStatistics | None
    problem: str = ""
    null_rate: Distance = Distance()
    mean: Distance = Distance()
    psi: Distance = Distance()
    ks: Distance = Distance()

    @property
    def title(self) -> str:
        """The column as messages call it."""
        return f"{self.side} {self.name}"


def tabulate_drift(drifts: Sequence[ColumnDrift]) -> list[dict[str, str]]:
    """Return a table for people, the columns that moved most first: those of this run beside the baseline's."""
    ordered = sorted(drifts, key=lambda drift: (1.0 if math.isnan(drift.psi.value) else -drift.psi.value, drift.title))
    return [
        {
            "column": drift.title,
            "psi": _write_distance(drift.psi),
            "ks": _write_distance(drift.ks),
            "mean": _write_pair(drift, "mean"),
            "deviation": _write_pair(drift, "deviation"),
            "null rate": _write_pair(drift, "null_rate"),
            "note": drift.problem,
        }
        for drift in ordered
    ]


def _write_distance(distance: Distance) -> str:
    return "" if math.isnan(distance.value) else f"{distance.value:.3g}"


def _write_pair(drift: ColumnDrift, name: str) -> str:
    """Return a figure of this run, and of the baseline in brackets."""
    now, then = (math.nan if column is None else getattr(column, name) for column in (drift.current, drift.baseline))
    shown = "" if math.isnan(now) else f"{now:.4g}"
    return shown if math.isnan(then) else f"{shown} ({then:.4g})".lstrip()


def compare_tables(current: TableStatistics, baseline: TableStatistics | None) -> tuple[ColumnDrift, ...]:
    """Return every column of a run or of its baseline, inputs first, with how far the two are apart."""
    before = baseline or TableStatistics()
    sides: tuple[tuple[Side, Mapping[str, ColumnStatistics], Mapping[str, ColumnStatistics]], ...] = (
        ("input", current.inputs, before.inputs),
        ("output", current.outputs, before.outputs),
    )
    return tuple(
        compare_column(side, name, now.get(name), then.get(name))
        for side, now, then in sides
        for name in sorted(now.keys() | then.keys())
    )


def compare_column(
    side: Side, name: str, current: ColumnStatistics | None, baseline: ColumnStatistics | None
) -> ColumnDrift:
    """Return how far a column is from that of the baseline; either may be missing."""
    if current is None or baseline is None:
        problem = "the baseline does not have it" if baseline is None else "only the baseline has it"
        return ColumnDrift(side=side, name=name, current=current, baseline=baseline, problem=problem)
    problem = _find_problem(current, baseline)
    null_rate = compare_rates(current.nulls + current.nans, current.rows, baseline.nulls + baseline.nans, baseline.rows)
    if problem:
        return ColumnDrift(
            side=side, name=name, current=current, baseline=baseline, problem=problem, null_rate=null_rate
        )
    return ColumnDrift(
        side=side,
        name=name,
        current=current,
        baseline=baseline,
        null_rate=null_rate,
        mean=compare_means(current, baseline),
        psi=measure_psi(current, baseline),
        ks=measure_ks(current, baseline),
    )


def _find_problem(current: ColumnStatistics, baseline: ColumnStatistics) -> str:
    if current.kind != baseline.kind:
        return f"its values are of the kind {current.kind}, in the baseline {baseline.kind}"
    if current.kind == "other":
        return "of values like these only nulls are counted"
    for which, column in (("the baseline", baseline), ("this run", current)):
        if not column.finite:
            return f"{which} has no value in it"
        if not column.summed or not column.quantiles.points:
            return f"{which} has no sketch of it"
    return ""


def compare_rates(count: int, rows: int, count_before: int, rows_before: int) -> Distance:
    """Return by how much two shares of rows differ, and the bound of a two-sided test of equal shares."""
    if not rows or not rows_before:
        return Distance()
    pooled = (count + count_before) / (rows + rows_before)
    error = math.sqrt(pooled * (1 - pooled) * (1 / rows + 1 / rows_before))
    return Distance(value=abs(count / rows - count_before / rows_before), chance=_TWO_SIDED * error)


def compare_means(current: ColumnStatistics, baseline: ColumnStatistics) -> Distance:
    """Return by how many of the baseline's standard deviations the mean has moved; infinite where it had none."""
    distance, deviation = abs(current.mean - baseline.mean), baseline.deviation
    if deviation == 0:
        return Distance(value=math.inf if distance else 0.0)
    error = math.sqrt((current.deviation / deviation) ** 2 / current.summed + 1 / baseline.summed)
    return Distance(value=distance / deviation, chance=_TWO_SIDED * error)


def measure_psi(current: ColumnStatistics, baseline: ColumnStatistics) -> Distance:
    """Return the population stability index, the sum of (p - q) ln(p / q) over bins, by the baseline's bins.

    A bin without rows counts as one with 0.01 % of them. By chance it is about (1 / n + 1 / m) times a chi-squared
    variable with one degree of freedom less than bins (Yurdakul and Naranjo 2020).
    """
    before, now = _bin_shares(current, baseline)
    p, q = np.maximum(now, _SHARE_MIN), np.maximum(before, _SHARE_MIN)
    value = float(np.sum((p - q) * np.log(p / q)))
    chance = _chi_squared(len(p) - 1) * (1 / current.sampled + 1 / baseline.sampled) if len(p) > 1 else 0.0
    return Distance(value=value, chance=chance)


def _chi_squared(freedom: int) -> float:
    """Return what one in a thousand exceeds, by Wilson and Hilferty's approximation of 1931."""
    part = 2 / (9 * freedom)
    return freedom * (1 - part + _ONE_SIDED * math.sqrt(part)) ** 3


def _bin_shares(
    current: ColumnStatistics, baseline: ColumnStatistics
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the share of each bin, in the baseline and in the run."""
    if baseline.kind == "text" and (baseline.frequent or current.frequent):
        _, before, now = share_texts(current, baseline)
        return before, now
    edges = find_edges(baseline)
    shares = [
        np.diff(np.concatenate([[0.0], column.quantiles.share_up_to(edges), [1.0]])) for column in (baseline, current)
    ]
    return shares[0], shares[1]


def find_edges(baseline: ColumnStatistics) -> npt.NDArray[np.float64]:
    """Return the upper edges of the baseline's bins; above the last of them there is one bin more."""
    points = baseline.quantiles.points
    if len(points) <= VALUES_MAX:
        return np.array(points)
    return np.unique([baseline.quantiles.quantile(share) for share in _TENTHS])


def share_texts(
    current: ColumnStatistics, baseline: ColumnStatistics
) -> tuple[Sequence[str], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the texts that either names, and the share of each in the baseline and in the run; last, of all others.

    Of a text that one of them does not name it takes the share that is nearest to the other's and possible: it may have
    as many rows there as the least frequent of those that are named.
    """
    before, now = (_count_shares(column) for column in (baseline, current))
    names = sorted(before.keys() | now.keys())
    shares = []
    for column, known, other in ((baseline, before, now), (current, now, before)):
        most = column.unnamed_max / max(1, sum(column.quantiles.weights))
        named = np.array([known.get(name, min(most, other.get(name, 0.0))) for name in names])
        shares.append(np.append(named, max(0.0, 1 - float(named.sum()))))
    return [*names, EVERY_OTHER], shares[0], shares[1]


def _count_shares(column: ColumnStatistics) -> dict[str, float]:
    rows = max(1, sum(column.quantiles.weights))
    return {text: count / rows for text, count in column.frequent}


def measure_ks(current: ColumnStatistics, baseline: ColumnStatistics) -> Distance:
    """Return the greatest difference of the two distribution functions (Kolmogorov-Smirnov), from 0 to 1.

    Each sketch is off by 1 / 256 at most, beside what the sample is. Of texts it is that of their lengths.
    """
    points = np.union1d(current.quantiles.points, baseline.quantiles.points)
    difference = current.quantiles.share_up_to(points) - baseline.quantiles.share_up_to(points)
    chance = _KOLMOGOROV * math.sqrt(1 / current.sampled + 1 / baseline.sampled)
    return Distance(value=float(np.abs(difference).max()), chance=chance)
