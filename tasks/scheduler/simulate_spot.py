"""A batch run under a deadline on spot machines, as the policy of nightly runs buys them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serving.errors import DeadlineImpossible
from tasks.scheduler.availability import Availability
from tasks.spot.policy import PolicyParameters, Situation, decide_placements
from tasks.spot.replay import Job, replay

_TICKS_MAX = 96
_TICK_SECONDS_MIN = 20.0
_REPLAYS_MAX = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SpotRun:
    """What a run on one machine comes to over the traces.

    paid_seconds: on average; those of spot count for as many on-demand seconds as they cost. seconds_p99: until 99 of
    100 are done.
    """

    paid_seconds: float
    seconds_p50: float
    seconds_p99: float
    late: float


def spot_run(
    work: float,
    deadline: float,
    changeover: float,
    price_ratio: float,
    availability: Availability,
    *,
    quick: bool = False,
) -> SpotRun | None:
    """Return what so much work comes to on a machine; None where not even on-demand alone is sure to be in time."""
    tick = max(_TICK_SECONDS_MIN, deadline / (_TICKS_MAX // 2 if quick else _TICKS_MAX))
    try:
        job = Job(
            work_seconds=work,
            deadline_seconds=deadline,
            changeover_seconds=changeover,
            price_ratio=price_ratio,
            tick_seconds=tick,
        )
    except DeadlineImpossible:
        return None
    # Two changeovers and an interval: with less, the policy knows no wait and its promise has no room.
    if deadline - work < 2 * changeover + tick:
        return None
    spot_NT = windows(availability, tick, math.ceil(deadline / tick))
    # Each is done by the end of the last tick in which it was seen at work.
    done_N = np.zeros(len(spot_NT))

    def watched(seen: Situation, terms: PolicyParameters) -> NDArray[np.int64]:
        now = deadline - float(np.max(seen.left_seconds))
        done_N[np.greater(seen.work_seconds, 0)] = min(now + tick, deadline)
        return decide_placements(seen, terms)

    outcome = replay(watched, spot_NT, job)
    p50, p99 = np.quantile(done_N, (0.5, 0.99))
    return SpotRun(
        paid_seconds=float(outcome.cost_N.mean()) * work,
        seconds_p50=float(p50),
        seconds_p99=float(p99),
        late=float(outcome.late_N.mean()),
    )


def windows(availability: Availability, tick: float, ticks: int) -> NDArray[np.bool_]:
    """Return windows of the traces, so many ticks long: spot is up in a tick where it is up all through it."""
    spot_NT = availability.spot_NT
    step = tick / availability.tick_seconds
    length = max(1, int(spot_NT.shape[1] / step))
    starts = np.floor(np.arange(length) * step).astype(np.int64)
    resampled_NT = np.logical_and.reduceat(spot_NT, starts, axis=1) if step > 1 else spot_NT[:, starts]
    pieces = [resampled_NT[:, at : at + ticks] for at in range(0, max(length - ticks, 0) + 1, ticks)]
    # A trace that is shorter than a run begins anew.
    full = [np.tile(piece, (1, math.ceil(ticks / piece.shape[1])))[:, :ticks] for piece in pieces]
    all_NT = np.concatenate(full)
    return all_NT[:: max(1, len(all_NT) // _REPLAYS_MAX)][:_REPLAYS_MAX]
