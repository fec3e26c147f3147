"""When an endpoint goes to zero, on real functions: what a policy pays over what one pays who knows the future.

Paid for are the idle minutes between requests, and a cold start's worth for each start, the first one of each function
included in both.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tests.benchmarks.keep_warm_policies import Windows, fixed_windows, histogram_windows, optimal_cost, policy_cost
from tests.benchmarks.modes_workloads import TRACES

MINUTES = (5, 15, 60)
EXPECTED = (1.40, 1.32, 1.24)

_Gaps = NDArray[np.int64]


def keep_warm_figures() -> dict[str, dict[str, float]]:
    """Return for each policy its cost over the least, by what a cold start is worth; empty without the traces."""
    path = TRACES / "requests_per_minute.csv"
    if not path.exists():
        return {}
    counts = pl.read_csv(path).drop("function").to_numpy()
    gaps = [_idle(row) for row in counts if row.any()]
    policies: dict[str, Callable[[_Gaps, float], Windows]] = {
        "T*": lambda gap_G, worth: fixed_windows(round(worth), len(gap_G)),
        "10 minutes": lambda gap_G, _: fixed_windows(600, len(gap_G)),
        "histogram": lambda gap_G, _: histogram_windows(gap_G),
    }
    return {
        name: {f"{minutes} min": round(_over_least(gaps, policy, 60.0 * minutes), 3) for minutes in MINUTES}
        for name, policy in policies.items()
    }


def _idle(counts_M: NDArray[np.int64]) -> _Gaps:
    """Return the idle seconds between a function's requests, where there are any."""
    gaps = 60 * (np.diff(np.flatnonzero(counts_M)) - 1)
    return np.asarray(gaps[gaps > 0])


def _over_least(gaps: list[_Gaps], policy: Callable[[_Gaps, float], Windows], worth: float) -> float:
    spent = sum(policy_cost(gap_G, policy(gap_G, worth), worth) for gap_G in gaps)
    return spent / sum(optimal_cost(gap_G, worth) for gap_G in gaps)
