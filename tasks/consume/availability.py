"""When spot machines are to be had: as a file of traces says, or as often as they are said to be taken."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.consume.workload import Spot


@dataclass(frozen=True, slots=True, kw_only=True)
class Availability:
    """Whether spot is up in each tick. Shapes: N traces, T ticks."""

    spot_NT: NDArray[np.bool_]
    tick_seconds: float


def read_availability(spot: Spot) -> Availability:
    """Return traces of spot. Raises BadWorkload where the file holds none."""
    raise NotImplementedError
