"""Other policies over the same situations, to hold ours against.

Greedy and Uniform Progress are those of "Can't Be Late: Optimizing Spot Instance Savings under Deadlines" (Wu et al.,
NSDI 2024, sections 3.3 to 5.2), with one change: their safety net, "idle and R < C + 2d", looks at the moment of a
decision only, and is late where the next decision comes after the last moment. Here the interval is added to it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tasks.spot.situation import Place, Situation, Terms, reach


def greedy(seen: Situation, terms: Terms) -> NDArray[np.int64]:
    """Use spot whenever it is up, else wait, until the safety net holds: then on-demand to the end."""
    return _safe(np.where(seen.spot_up, Place.SPOT, Place.IDLE), seen, terms)


class UniformProgress:
    """Keep progress on a straight line from the start to the deadline, by on-demand where spot is gone.

    Idle and below the line: on-demand. Spot whenever it is up, but from on-demand only once progress has reached where
    the line will be in two changeovers; then on-demand is left, for spot or to wait.
    """

    def __init__(self, work_seconds: float, deadline_seconds: float) -> None:
        self._work, self._deadline = work_seconds, deadline_seconds

    def __call__(self, seen: Situation, terms: Terms) -> NDArray[np.int64]:
        """Return where the work of each machine goes until the next decision."""
        done = self._work - seen.work_seconds
        elapsed = self._deadline - seen.left_seconds
        ahead = reach(done, self._line(elapsed + 2 * terms.changeover_seconds))
        below = ~reach(done, self._line(elapsed))
        goes = np.where(seen.spot_up, Place.SPOT, np.where(below, Place.ON_DEMAND, Place.IDLE))
        goes = np.where(np.equal(seen.now_on, Place.ON_DEMAND) & ~ahead, Place.ON_DEMAND, goes)
        return _safe(goes, seen, terms)

    def _line(self, elapsed: float | NDArray[np.float64]) -> float | NDArray[np.float64]:
        return self._work * elapsed / self._deadline


def _safe(goes: NDArray[np.int64], seen: Situation, terms: Terms) -> NDArray[np.int64]:
    """Stay on spot until it is taken; on-demand where else the deadline would be missed; nowhere once done.

    On on-demand slack no longer changes, so that whoever is there by the safety net stays to the end.
    """
    need = 2 * terms.changeover_seconds + terms.interval_seconds
    goes = np.where(reach(seen.slack(terms), need), goes, Place.ON_DEMAND)
    goes = np.where(np.equal(seen.now_on, Place.SPOT), Place.SPOT, goes)
    return np.where(np.less_equal(seen.work_seconds, 0), Place.IDLE, goes)
