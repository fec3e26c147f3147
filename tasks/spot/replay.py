"""Replay a policy over traces of spot availability: what it costs, whether it is late, how often it moves.

A trace has for each tick whether spot is up during it. One job is replayed on every trace from its first tick; past a
trace's end spot is gone. Spot is taken at the start of a tick in which it is not up, and a decision on that tick knows
it. A move takes effect at once, and its machine is paid for from then on; it works once the changeover is over. A
changeover that ends within a tick leaves the rest of it for work, and a job may end within a tick.

Shapes: N traces, T ticks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.spot.policy import SPELL_SECONDS, Placement, PolicyParameters, Situation, check_deadline_feasible

Policy = Callable[[Situation, PolicyParameters], NDArray[np.int64]]
# Rounding errors of sums are far below this.
_SECONDS_MIN = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job, the prices of its machines, and how often the policy decides.

    Args:
        work_seconds: The work, at the rate of one machine.
        deadline_seconds: When it must be done, from the first tick.
        changeover_seconds: As the policy's parameter.
        lost_seconds: The part of a changeover that is work done again where spot was taken.
        price_ratio: The price of on-demand over that of spot.
        billing_seconds: What the time of a machine is rounded up to; 0 for no rounding.
        tick_seconds: The length of a tick of the trace.
        ticks_per_decision: Where it is not 1, a machine that is taken goes unnoticed for up to that many ticks less
            one, which the policy gets as part of the changeover.
        reserve_seconds: As the policy's parameter.
        spell_seconds: As the policy's parameter.

    Raises:
        DeadlineImpossible: On-demand alone would be late.
        ValueError: A figure that must be positive is not.
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
        check_deadline_feasible(
            self.work_seconds,
            self.deadline_seconds,
            self.parameters.changeover_seconds,
            reserve_seconds=self.reserve_seconds,
        )

    @property
    def parameters(self) -> PolicyParameters:
        """The parameters of the policy."""
        return PolicyParameters(
            changeover_seconds=self.changeover_seconds + (self.ticks_per_decision - 1) * self.tick_seconds,
            price_ratio=self.price_ratio,
            interval_seconds=self.ticks_per_decision * self.tick_seconds,
            spell_seconds=self.spell_seconds,
            reserve_seconds=self.reserve_seconds,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The outcome of a job on each trace.

    cost_N is relative to the cost of the work on on-demand without a changeover. late_N: not done by the deadline.
    moves_N: machines started. kills_N: machines taken. recomputed_N: seconds of work done twice.
    """

    cost_N: NDArray[np.float64]
    late_N: NDArray[np.bool_]
    moves_N: NDArray[np.int64]
    kills_N: NDArray[np.int64]
    recomputed_N: NDArray[np.float64]


def replay(
    policy: Policy, spot_NT: NDArray[np.bool_], job: Job, on_demand_NT: NDArray[np.bool_] | None = None
) -> Outcome:
    """Replay a job under a policy on every trace; on-demand is always available where no trace of it is given.

    A job that is not done by the deadline is late and stops there; its cost is what was spent by then.
    """
    replayed = _Replay(len(spot_NT), job)
    for tick in range(math.ceil((job.deadline_seconds - _SECONDS_MIN) / job.tick_seconds)):
        on_demand_N = np.True_ if on_demand_NT is None else _select_tick(on_demand_NT, tick)
        replayed.take_machines(_select_tick(spot_NT, tick))
        if tick % job.ticks_per_decision == 0:
            replayed.move(policy, tick * job.tick_seconds, on_demand_N)
        replayed.work(min(job.tick_seconds, job.deadline_seconds - tick * job.tick_seconds))
        if not replayed.left_N.any():
            break
    return replayed.outcome()


def _select_tick(trace_NT: NDArray[np.bool_], tick: int) -> NDArray[np.bool_]:
    return trace_NT[:, tick] if tick < trace_NT.shape[1] else np.zeros(len(trace_NT), dtype=bool)


class _Replay:
    """The job of each trace, tick after tick."""

    def __init__(self, count: int, job: Job) -> None:
        self._job, self._parameters = job, job.parameters
        self._price = np.array([0.0, 1 / job.price_ratio, 1.0])
        self.left_N = np.full(count, job.work_seconds, dtype=float)
        self._placement_N = np.full(count, Placement.IDLE, dtype=np.int64)
        self._up_N = np.zeros(count, dtype=bool)
        self._spell_N, self._boot_N, self._lease_N = (np.zeros(count) for _ in range(3))
        self._cost_N, self._recomputed_N = (np.zeros(count) for _ in range(2))
        self._moves_N, self._kills_N = (np.zeros(count, dtype=np.int64) for _ in range(2))

    def take_machines(self, up_N: NDArray[np.bool_]) -> None:
        """Take the machines of the traces on which spot is gone, and begin the spells that changed."""
        taken_N = (self._placement_N == Placement.SPOT) & ~up_N
        self._kills_N += taken_N
        self._recomputed_N += np.where(taken_N & (self._boot_N <= 0), self._job.lost_seconds, 0.0)
        self._switch(np.where(taken_N, Placement.IDLE, self._placement_N))
        self._spell_N[up_N != self._up_N] = 0.0
        self._up_N = up_N

    def move(self, policy: Policy, now: float, on_demand_N: NDArray[np.bool_] | np.bool_) -> None:
        """Ask the policy, and move as it decides; on-demand that is not available is waited for."""
        situation = Situation(
            work_seconds=self.left_N,
            left_seconds=np.full_like(self.left_N, self._job.deadline_seconds - now),
            placement=self._placement_N,
            spot_up=self._up_N,
            spell_seconds=self._spell_N,
            booting_seconds=self._boot_N,
            on_demand_up=np.broadcast_to(on_demand_N, self._up_N.shape),
        )
        placement_N = policy(situation, self._parameters)
        refused_N = (placement_N == Placement.ON_DEMAND) & (self._placement_N != Placement.ON_DEMAND) & ~on_demand_N
        assert not ((placement_N == Placement.SPOT) & ~self._up_N).any(), placement_N  # noqa: S101 - it would be a bug of the policy
        self._switch(np.where(refused_N, Placement.IDLE, placement_N))

    def _switch(self, placement_N: NDArray[np.int64]) -> None:
        """Release the machines that are left, and start the others."""
        moved_N = placement_N != self._placement_N
        if not moved_N.any():
            return
        if self._job.billing_seconds > 0:
            rounded_N = -self._lease_N % self._job.billing_seconds
            self._cost_N += np.where(moved_N, rounded_N * self._price[self._placement_N], 0.0)
        started_N = moved_N & (placement_N != Placement.IDLE)
        self._moves_N += started_N
        self._boot_N = np.where(started_N, self._job.changeover_seconds, np.where(moved_N, 0.0, self._boot_N))
        self._lease_N = np.where(moved_N, 0.0, self._lease_N)
        self._placement_N = placement_N

    def work(self, seconds: float) -> None:
        """Work for a tick, or for the part of it before the deadline."""
        on_N = self._placement_N != Placement.IDLE
        used_N = np.where(on_N, np.minimum(seconds, self._boot_N + self.left_N), 0.0)
        self._cost_N += used_N * self._price[self._placement_N]
        self._lease_N += used_N
        left_N = self.left_N - np.maximum(used_N - self._boot_N, 0.0)
        self.left_N = np.where(left_N <= _SECONDS_MIN, 0.0, left_N)
        self._boot_N = np.maximum(self._boot_N - used_N, 0.0)
        self._spell_N = self._spell_N + seconds
        self._switch(np.where(self.left_N > 0, self._placement_N, Placement.IDLE))

    def outcome(self) -> Outcome:
        """Release every machine, and return the outcome."""
        late_N = self.left_N > 0
        self._switch(np.full_like(self._placement_N, Placement.IDLE))
        return Outcome(
            cost_N=self._cost_N / max(self._job.work_seconds, _SECONDS_MIN),
            late_N=late_N,
            moves_N=self._moves_N,
            kills_N=self._kills_N,
            recomputed_N=self._recomputed_N,
        )
