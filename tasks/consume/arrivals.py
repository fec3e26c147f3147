"""When rows come: as a file says, as the gateway has metered, or at a rate that goes up and down over the day."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.consume.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """Arrivals of each second. counts_T: T seconds. notes: what was made of the source, in sentences for a person."""

    counts_T: NDArray[np.int64]
    rows_per_arrival: float = 1.0
    notes: tuple[str, ...] = ()


def read_arrivals(workload: Workload) -> Arrivals:
    """Return the arrivals of a workload of requests or events. Raises BadWorkload where there are none to be had."""
    raise NotImplementedError
