"""Replay a policy over traces of spot availability: what it costs, whether it is late, how often it moves.

A trace says for each tick whether spot is up during it. One job is replayed on every trace from its first tick; past a
trace's end spot is gone. Spot is taken at the start of a tick in which it is not up, and a decision that falls on that
tick knows of it. A move takes effect at once, and its machine is paid for from then on; it works once the changeover is
over. A changeover that ends within a tick leaves the rest of it for work, and the job ends within a tick as well.

Shapes: N traces, T ticks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.spot.deadline import must_be_possible
from tasks.spot.situation import SPELL_SECONDS, Place, Situation, Terms

Policy = Callable[[Situation, Terms], NDArray[np.int64]]
# Sums of floating point are further off than zero, and by far less than this.
_SECONDS_MIN = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job, what its machines cost, and how it is watched.

    work_seconds at the rate of one machine, to be done within deadline_seconds from the first tick. lost_seconds: the
    part of a changeover that is work done again where spot was taken. price_ratio: on-demand over spot.
    billing_seconds: what a machine's time is rounded up to, from its start to its end; zero for no rounding.
    tick_seconds: of the trace. ticks_per_decision: where it is not 1, a machine that is taken goes unnoticed for up to
    that many ticks less one, which the policy is told as part of the changeover. reserve_seconds, spell_seconds: as
    the policy's terms. Raises DeadlineImpossible where on-demand alone would be late.
    """

    work_seconds: float
    deadline_seconds: float
    changeover_seconds: float
    lost_seconds: float = 0.0
    price_ratio: float = 3.0
    billing_seconds: float = 0.0
    tick_seconds: float = 600.0
    ticks_per_decision: int = 1
    reserve_seconds: float = 0.0
    spell_seconds: float = SPELL_SECONDS

    def __post_init__(self) -> None:
        if not (self.tick_seconds > 0 and self.ticks_per_decision >= 1 and self.price_ratio > 0):
            msg = f"tick_seconds, ticks_per_decision and price_ratio must be positive, got {self}."
            raise ValueError(msg)
        must_be_possible(
            self.work_seconds,
            self.deadline_seconds,
            self.terms.changeover_seconds,
            reserve_seconds=self.reserve_seconds,
        )

    @property
    def terms(self) -> Terms:
        """What the policy is told."""
        return Terms(
            changeover_seconds=self.changeover_seconds + (self.ticks_per_decision - 1) * self.tick_seconds,
            price_ratio=self.price_ratio,
            interval_seconds=self.ticks_per_decision * self.tick_seconds,
            spell_seconds=self.spell_seconds,
            reserve_seconds=self.reserve_seconds,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a job on each trace.

    cost_N: over what the work costs on on-demand without a changeover. late_N: not done by the deadline. moves_N:
    machines started. kills_N: machines taken. recomputed_N: seconds of work done twice.
    """

    cost_N: NDArray[np.float64]
    late_N: NDArray[np.bool_]
    moves_N: NDArray[np.int64]
    kills_N: NDArray[np.int64]
    recomputed_N: NDArray[np.float64]


def replay(
    policy: Policy, spot_NT: NDArray[np.bool_], job: Job, on_demand_NT: NDArray[np.bool_] | None = None
) -> Outcome:
    """Replay a job under a policy on every trace; on-demand is always to be had where no trace of it is given.

    A job that is not done by the deadline is late; it goes no further, and its cost is what was spent by then.
    """
    run = _Replay(len(spot_NT), job)
    for tick in range(math.ceil(job.deadline_seconds / job.tick_seconds - _SECONDS_MIN)):
        on_demand_N = np.True_ if on_demand_NT is None else _at(on_demand_NT, tick)
        run.see(_at(spot_NT, tick))
        if tick % job.ticks_per_decision == 0:
            run.move(policy, tick * job.tick_seconds, on_demand_N)
        run.work(min(job.tick_seconds, job.deadline_seconds - tick * job.tick_seconds))
        if not run.left_N.any():
            break
    return run.outcome()


def _at(trace_NT: NDArray[np.bool_], tick: int) -> NDArray[np.bool_]:
    return trace_NT[:, tick] if tick < trace_NT.shape[1] else np.zeros(len(trace_NT), dtype=bool)


class _Replay:
    """Where each trace's job is, tick after tick."""

    def __init__(self, count: int, job: Job) -> None:
        self._job, self._terms = job, job.terms
        self._price = np.array([0.0, 1 / job.price_ratio, 1.0])
        self.left_N = np.full(count, job.work_seconds, dtype=float)
        self._place_N = np.full(count, Place.IDLE, dtype=np.int64)
        self._up_N = np.zeros(count, dtype=bool)
        self._spell_N, self._boot_N, self._lease_N = (np.zeros(count) for _ in range(3))
        self._cost_N, self._recomputed_N = (np.zeros(count) for _ in range(2))
        self._moves_N, self._kills_N = (np.zeros(count, dtype=np.int64) for _ in range(2))

    def see(self, up_N: NDArray[np.bool_]) -> None:
        """Take the machines of the traces on which spot is gone, and start anew the spells that changed."""
        taken_N = (self._place_N == Place.SPOT) & ~up_N
        self._kills_N += taken_N
        self._recomputed_N += np.where(taken_N & (self._boot_N <= 0), self._job.lost_seconds, 0.0)
        self._go(np.where(taken_N, Place.IDLE, self._place_N))
        self._spell_N[up_N != self._up_N] = 0.0
        self._up_N = up_N

    def move(self, policy: Policy, now: float, on_demand_N: NDArray[np.bool_] | np.bool_) -> None:
        """Ask the policy, and move where it says; on-demand that is not to be had is waited for."""
        seen = Situation(
            work_seconds=self.left_N,
            left_seconds=np.full_like(self.left_N, self._job.deadline_seconds - now),
            place=self._place_N,
            spot_up=self._up_N,
            spell_seconds=self._spell_N,
            booting_seconds=self._boot_N,
            on_demand_up=np.broadcast_to(on_demand_N, self._up_N.shape),
        )
        goes_N = policy(seen, self._terms)
        refused_N = (goes_N == Place.ON_DEMAND) & (self._place_N != Place.ON_DEMAND) & ~on_demand_N
        assert not ((goes_N == Place.SPOT) & ~self._up_N).any(), goes_N  # noqa: S101 - a policy's mistake is our own
        self._go(np.where(refused_N, Place.IDLE, goes_N))

    def _go(self, goes_N: NDArray[np.int64]) -> None:
        """Give back the machines that are left, and start the others."""
        moved_N = goes_N != self._place_N
        if not moved_N.any():
            return
        if self._job.billing_seconds > 0:
            rounded_N = -self._lease_N % self._job.billing_seconds
            self._cost_N += np.where(moved_N, rounded_N * self._price[self._place_N], 0.0)
        started_N = moved_N & (goes_N != Place.IDLE)
        self._moves_N += started_N
        self._boot_N = np.where(started_N, self._job.changeover_seconds, np.where(moved_N, 0.0, self._boot_N))
        self._lease_N = np.where(moved_N, 0.0, self._lease_N)
        self._place_N = goes_N

    def work(self, seconds: float) -> None:
        """Let a tick pass, or what of it is left before the deadline."""
        on_N = self._place_N != Place.IDLE
        used_N = np.where(on_N, np.minimum(seconds, self._boot_N + self.left_N), 0.0)
        self._cost_N += used_N * self._price[self._place_N]
        self._lease_N += used_N
        left_N = self.left_N - np.maximum(used_N - self._boot_N, 0.0)
        self.left_N = np.where(left_N < _SECONDS_MIN, 0.0, left_N)
        self._boot_N = np.maximum(self._boot_N - used_N, 0.0)
        self._spell_N = self._spell_N + seconds
        self._go(np.where(self.left_N > 0, self._place_N, Place.IDLE))

    def outcome(self) -> Outcome:
        """Give back every machine, and return what came of it."""
        late_N = self.left_N > 0
        self._go(np.full_like(self._place_N, Place.IDLE))
        return Outcome(
            cost_N=self._cost_N / max(self._job.work_seconds, _SECONDS_MIN),
            late_N=late_N,
            moves_N=self._moves_N,
            kills_N=self._kills_N,
            recomputed_N=self._recomputed_N,
        )
