"""A dial on a kind of machine, and what an endpoint with it comes to.

The dial is the one with which a machine takes most within the promise; a pass begins as soon as a slot is free.

Shapes: T seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from serving.model.batching import CostModel
from tasks.scheduler.flow import Felt, feel
from tasks.scheduler.problem import Candidate, Kind, Problem, late_flaw
from tasks.scheduler.server import UTILISATIONS, Server, Waits, measure_waits

if TYPE_CHECKING:
    from tasks.scheduler.decision import Policy, Profile

BATCH_MAX = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A dial on a kind of machine: what requests wait there, and what each takes beside its pass."""

    batch_size_max: int
    waits: Waits
    beside: float
    wait: float = 0.0

    def flaw(self, problem: Problem) -> str | None:
        """Say why the dial can't keep the promise, however little comes; None where it can."""
        server = self.waits.server
        least = self.wait + 2 * server.time(server.requests_max) + self.beside
        if least <= problem.within:
            return None
        return (
            f"a pass takes {1000 * server.time(server.requests_max):.3g} ms, and a request may come behind another: at"
            f" least {1000 * least:.3g} ms must be allowed"
        )

    def most(self, problem: Problem) -> float:
        """Return the requests a second that a machine takes within the promise."""
        late_U = self.waits.late(problem.within - self.beside)
        good = int(np.argmax(late_U > problem.late_max)) if (late_U > problem.late_max).any() else len(late_U)
        return 0.0 if good == 0 else UTILISATIONS[good - 1] * self.waits.server.rate


def fits(problem: Problem, kind: Kind, batches: Iterable[int] | None = None) -> list[Fit]:
    """Return the dials that an endpoint may have on a kind of machine, the one that takes most first."""
    profile, rows = problem.profile, problem.rows_per_arrival
    each, beside = serving_time(profile, rows)
    least = math.ceil(rows)
    sizes = sorted(set(batches or (least << power for power in range(11) if least << power <= max(BATCH_MAX, least))))
    servers = [
        Server(
            slots=profile.slots,
            pass_time=each.fixed_seconds / kind.speed,
            request_time=each.row_seconds / kind.speed,
            requests_max=max(1, int(size / rows)),
            jitter=profile.jitter,
        )
        for size in sizes
        if size >= least
    ]
    waits = measure_waits(servers)
    usable = [each for each in waits if 2 * each.server.time(each.server.requests_max) + beside <= problem.within]
    found = [
        Fit(batch_size_max=max(least, math.ceil(each.server.requests_max * rows)), waits=each, beside=beside)
        for each in usable or waits[:1]
    ]
    return sorted(found, key=lambda fit: fit.most(problem), reverse=True)


def serving_time(profile: Profile, rows: float) -> tuple[CostModel, float]:
    """Return what n requests of so many rows take together in a slot, and the seconds that each waits beside that.

    As measured on a model server, whose requests had one row; else passes, and what keeps a slot busy beside them.
    """
    passes = profile.pass_time
    if profile.served is not None:
        served = profile.served
        beside = profile.request_ms / 1000 + passes.seconds(1) - served.seconds(1)
        cost = CostModel(
            fixed_seconds=served.fixed_seconds, row_seconds=served.row_seconds + passes.row_seconds * (rows - 1)
        )
    else:
        beside = (profile.request_ms - profile.busy_ms) / 1000
        row_seconds = passes.row_seconds * rows + profile.busy_ms / 1000
        cost = CostModel(fixed_seconds=passes.fixed_seconds, row_seconds=row_seconds)
    return cost, max(beside, 0.0)


def felt_at(problem: Problem, fit: Fit, machines: NDArray[np.int64] | int, *, cold: float = 0.0) -> Felt:
    """Return what requests feel at so many machines, each second or all the time."""
    return feel(problem.counts_T, machines, fit.waits, fit.beside, problem.within, ages=not problem.quick, cold=cold)


def candidate_of(
    problem: Problem, fit: Fit, policy: Policy, machines: int, seconds: float, felt: Felt, *, cold_starts: int = 0
) -> Candidate:
    """Return an endpoint that pays for so many machine seconds."""
    server = fit.waits.server
    work = float(problem.counts_T.sum()) * server.time(server.requests_max) / server.requests_max / server.slots
    return Candidate(
        mode="online",
        policy=policy,
        machines=machines,
        batch_size_max=fit.batch_size_max,
        wait=fit.wait,
        paid_seconds=seconds,
        busy_seconds=min(work, seconds),
        age_p50=felt.age_p50,
        age_p99=felt.age_p99,
        late=felt.late,
        cold_starts=cold_starts,
        flaw=fit.flaw(problem) or late_flaw(problem, felt.late, episodes=cold_starts or felt.episodes),
    )
