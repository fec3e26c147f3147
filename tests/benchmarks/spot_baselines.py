"""Policies that ours is compared with, over the same situations, and the optimum.

Greedy and Uniform Progress are those of "Can't Be Late: Optimizing Spot Instance Savings under Deadlines" (Wu et al.,
NSDI 2024, sections 3.3 to 5.2), with one change: their safety net, "idle and R < C + 2d", considers only the moment of
a decision, and is late where the next decision comes after the last moment. Here the interval is added to it.

The optimum knows the whole trace. It is exact, by dynamic programming backward over the stretches of a trace in which
spot stays as it is. `idle_C[w]` and `on_demand_C[w]` hold the least cost of doing w units of work from the start of a
stretch to the deadline, for a job that is idle, or on on-demand, at that moment. A changeover counts as that much more
work: to start a machine and leave it before it works gains nothing, and is never the cheapest. Two facts keep the
choices few. A stretch of spot is used from its start to its end or to that of the job, or not at all, since no work is
cheaper. And within a stretch on-demand is run in one piece.

Machines may be started and left at any moment, so finer ticks or intervals do not make a cheaper policy. Costs are in
seconds of on-demand. They are exact where stretches, work, deadline and changeover are whole numbers of the unit. Else
work and changeover are rounded down to it and the deadline up, and the result is at most the least cost.

Shapes: C units of work.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tasks.spot.policy import Placement, PolicyParameters, Situation, is_at_least
from tasks.spot.replay import Job

_Costs = NDArray[np.float64]


def greedy(situation: Situation, parameters: PolicyParameters) -> NDArray[np.int64]:
    """Use spot whenever it is up, else wait, until the safety net applies: then on-demand to the end."""
    return _keep_safe(np.where(situation.spot_up, Placement.SPOT, Placement.IDLE), situation, parameters)


class UniformProgress:
    """Keep progress on a straight line from the start to the deadline, by on-demand where spot is gone.

    Idle and below the line: on-demand. Spot whenever it is up, but from on-demand only once progress has reached where
    the line will be in two changeovers; then on-demand is left, for spot or to wait.
    """

    def __init__(self, work_seconds: float, deadline_seconds: float) -> None:
        self._work, self._deadline = work_seconds, deadline_seconds

    def __call__(self, situation: Situation, parameters: PolicyParameters) -> NDArray[np.int64]:
        """Return where the work of each machine runs until the next decision."""
        done = self._work - situation.work_seconds
        elapsed = self._deadline - situation.left_seconds
        ahead = is_at_least(done, self._line(elapsed + 2 * parameters.changeover_seconds))
        below = ~is_at_least(done, self._line(elapsed))
        on_demand = np.equal(situation.current_placement, Placement.ON_DEMAND)
        placements = np.where(situation.spot_up, Placement.SPOT, np.where(below, Placement.ON_DEMAND, Placement.IDLE))
        placements = np.where(on_demand & ~ahead, Placement.ON_DEMAND, placements)
        return _keep_safe(placements, situation, parameters)

    def _line(self, elapsed: float | NDArray[np.float64]) -> float | NDArray[np.float64]:
        return self._work * elapsed / self._deadline


def _keep_safe(placements: NDArray[np.int64], situation: Situation, parameters: PolicyParameters) -> NDArray[np.int64]:
    """Stay on spot until it is taken; on-demand where the deadline would else be missed; idle once done.

    On on-demand slack no longer changes, so a job that the safety net has put there stays to the end.
    """
    need = 2 * parameters.changeover_seconds + parameters.interval_seconds
    placements = np.where(is_at_least(situation.slack_seconds(parameters), need), placements, Placement.ON_DEMAND)
    placements = np.where(np.equal(situation.current_placement, Placement.SPOT), Placement.SPOT, placements)
    return np.where(np.less_equal(situation.work_seconds, 0), Placement.IDLE, placements)


def optimum(spot_T: NDArray[np.bool_], job: Job, unit_seconds: int | None = None) -> float:
    """Return the least cost over what the work costs on on-demand without a changeover.

    Billing is by the second. Without a unit, the largest is taken in which everything is a whole number of seconds.
    """
    unit = unit_seconds or _choose_unit(job)
    work, moving = int(job.work_seconds // unit), int(job.changeover_seconds // unit)
    if work == 0:
        return 0.0
    spot_price = 1 / job.price_ratio
    # No cheapest course ever owes more than all of the work and two changeovers.
    units_C = np.arange(work + 2 * moving + 1, dtype=float)
    idle_C = np.where(units_C > 0, math.inf, 0.0)
    on_demand_C = idle_C
    for up, length in reversed(_find_stretches(spot_T, job, unit)):
        waits_C, stays_C = idle_C, on_demand_C
        # To stay to the end of the stretch, or to leave within it; to wait it out, or to start within it.
        leaves_C = units_C + _least_in_window(waits_C - units_C, length)
        on_demand_C = np.minimum(np.minimum(units_C, length) + _after_work(stays_C, length), leaves_C)
        starts_C = _with_more_work(units_C + _least_in_window(stays_C - units_C, length), moving)
        idle_C = np.minimum(waits_C, starts_C)
        if up:
            spot_C = _with_more_work(spot_price * np.minimum(units_C, length) + _after_work(waits_C, length), moving)
            idle_C, on_demand_C = np.minimum(idle_C, spot_C), np.minimum(on_demand_C, spot_C)
        idle_C[0] = on_demand_C[0] = 0.0
    return float(idle_C[work]) * unit / job.work_seconds


def _choose_unit(job: Job) -> int:
    seconds = (job.tick_seconds, job.work_seconds, job.deadline_seconds, job.changeover_seconds)
    return max(math.gcd(*(int(span) for span in seconds)), 1)


def _find_stretches(spot_T: NDArray[np.bool_], job: Job, unit: int) -> list[tuple[bool, int]]:
    """Return whether spot is up, and for how many units, up to the deadline; past the trace's end it is gone."""
    end = math.ceil(job.deadline_seconds / unit)
    ticks = math.ceil(job.deadline_seconds / job.tick_seconds)
    spot_T = np.append(spot_T[:ticks], np.zeros(max(ticks - len(spot_T), 0), dtype=bool))
    starts = [0, *(np.flatnonzero(np.diff(spot_T)) + 1).tolist(), ticks]
    edges = [min(round(start * job.tick_seconds / unit), end) for start in starts]
    return [(bool(spot_T[start]), b - a) for start, a, b in zip(starts, edges, edges[1:], strict=False) if b > a]


def _after_work(costs_C: _Costs, units: int) -> _Costs:
    """Return the costs of what is left once that many units are done."""
    return costs_C[np.maximum(np.arange(len(costs_C)) - units, 0)]


def _with_more_work(costs_C: _Costs, units: int) -> _Costs:
    """Return the costs of so many units more; beyond the largest there is no cheapest course."""
    return np.append(costs_C[units:], np.full(units, math.inf))


def _least_in_window(costs_C: _Costs, units: int) -> _Costs:
    """Return the least of each cost and of the given number before it.

    In blocks of the window's length, the least from the window's start to its block's end, and from there to its end:
    van Herk's and Gil and Werman's way, whose time does not grow with the window.
    """
    window = units + 1
    count = len(costs_C)
    padded = np.full(-(-(count + units) // window) * window, math.inf)
    padded[units : units + count] = costs_C
    blocks = padded.reshape(-1, window)
    from_start = np.minimum.accumulate(blocks, axis=1).ravel()
    to_end = np.minimum.accumulate(blocks[:, ::-1], axis=1)[:, ::-1].ravel()
    return np.asarray(np.minimum(to_end[:count], from_start[units : units + count]))
