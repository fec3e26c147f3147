"""The cheapest that a job could have been, had the whole trace been known: exact, by dynamic programming.

Backward over the stretches of a trace in which spot stays as it is. `idle_C[w]` and `on_demand_C[w]` hold the least
cost of doing w units of work from the start of a stretch to the deadline, for a job that is on no machine, or on
on-demand, at that moment. A changeover counts as that much more work: to start a machine and give it up before it works
gains nothing, and is never the cheapest. Two facts keep the choices few. A stretch of spot is used from its start to
its end or to that of the job, or not at all, since no work is cheaper. And within a stretch on-demand is run in one go.

Machines may be started and left at any moment, so that no ticks and no interval between decisions make a policy that
is cheaper. Costs are in seconds of on-demand. Exact where stretches, work, deadline and changeover are whole numbers of
the unit; else work and changeover are rounded down to it and the deadline up, and the cost is at most the least.

Shapes: C units of work.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tasks.spot.replay import Job

_Costs = NDArray[np.float64]


def optimum(spot_T: NDArray[np.bool_], job: Job, unit_seconds: int | None = None) -> float:
    """Return the least cost over what the work costs on on-demand without a changeover.

    Billing is by the second. Without a unit, the largest is taken in which everything is a whole number of seconds.
    """
    unit = unit_seconds or _unit(job)
    work, moving = int(job.work_seconds // unit), int(job.changeover_seconds // unit)
    if work == 0:
        return 0.0
    spot_price = 1 / job.price_ratio
    # No cheapest course ever owes more than all of the work and two changeovers.
    units_C = np.arange(work + 2 * moving + 1, dtype=float)
    idle_C = np.where(units_C > 0, math.inf, 0.0)
    on_demand_C = idle_C
    for up, length in reversed(_stretches(spot_T, job, unit)):
        waits_C, stays_C = idle_C, on_demand_C
        # To stay to the end of the stretch, or to leave within it; to wait it out, or to start within it.
        leaves_C = units_C + _least_within(waits_C - units_C, length)
        on_demand_C = np.minimum(np.minimum(units_C, length) + _less(stays_C, length), leaves_C)
        starts_C = _more(units_C + _least_within(stays_C - units_C, length), moving)
        idle_C = np.minimum(waits_C, starts_C)
        if up:
            spot_C = _more(spot_price * np.minimum(units_C, length) + _less(waits_C, length), moving)
            idle_C, on_demand_C = np.minimum(idle_C, spot_C), np.minimum(on_demand_C, spot_C)
        idle_C[0] = on_demand_C[0] = 0.0
    return float(idle_C[work]) * unit / job.work_seconds


def _unit(job: Job) -> int:
    seconds = (job.tick_seconds, job.work_seconds, job.deadline_seconds, job.changeover_seconds)
    return max(math.gcd(*(int(span) for span in seconds)), 1)


def _stretches(spot_T: NDArray[np.bool_], job: Job, unit: int) -> list[tuple[bool, int]]:
    """Return whether spot is up, and for how many units, up to the deadline; past the trace's end it is gone."""
    end = math.ceil(job.deadline_seconds / unit)
    ticks = math.ceil(job.deadline_seconds / job.tick_seconds)
    spot_T = np.append(spot_T[:ticks], np.zeros(max(ticks - len(spot_T), 0), dtype=bool))
    starts = [0, *(np.flatnonzero(np.diff(spot_T)) + 1).tolist(), ticks]
    edges = [min(round(start * job.tick_seconds / unit), end) for start in starts]
    return [(bool(spot_T[start]), b - a) for start, a, b in zip(starts, edges, edges[1:], strict=False) if b > a]


def _less(costs_C: _Costs, units: int) -> _Costs:
    """Return the costs of what is left once that many units are done."""
    return costs_C[np.maximum(np.arange(len(costs_C)) - units, 0)]


def _more(costs_C: _Costs, units: int) -> _Costs:
    """Return the costs of so many units more; beyond the largest there is no cheapest course."""
    return np.append(costs_C[units:], np.full(units, math.inf))


def _least_within(costs_C: _Costs, units: int) -> _Costs:
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
