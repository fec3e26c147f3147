"""Events in micro-batches: machines that are always on, and a dial that follows from how fresh the scores must be."""

from __future__ import annotations

from dataclasses import replace

from tasks.scheduler.fit import BATCH_MAX, Fit
from tasks.scheduler.problem import Candidate, Kind, Problem
from tasks.scheduler.server import Server, measure_waits
from tasks.scheduler.simulate_online import always_on

# A batch waits for others this share of the time that its rows have, at most, and never longer than a second.
_WAIT_SHARE, _WAIT_MAX = 0.1, 1.0
NO_ANSWER = "a stream gives no answer to one who waits for it"


def stream(problem: Problem, kind: Kind) -> list[Candidate]:
    """Return the fewest machines on which micro-batches keep the promise all the time."""
    if problem.consumer == "table":
        return []
    found = replace(always_on(problem, stream_fit(problem, kind)), mode="streaming", policy="micro-batches")
    if problem.consumer == "requests":
        found = replace(found, flaw=NO_ANSWER)
    return [found]


def stream_fit(problem: Problem, kind: Kind) -> Fit:
    """Return the dial of a stream: rows of a pass, and how long they wait for each other.

    A row costs what it costs in a pass, and no less than what was measured from broker to broker.
    """
    profile = problem.profile
    measured = profile.stream_rows_per_second or profile.batch_rows_per_second
    row = max(profile.pass_time.row_seconds, profile.slots / measured) / kind.speed
    wait = 0.0 if problem.quick else min(_WAIT_MAX, _WAIT_SHARE * problem.within)
    size = _largest(problem, row, profile.pass_time.fixed_seconds / kind.speed, wait)
    server = Server(
        slots=profile.slots,
        pass_time=profile.pass_time.fixed_seconds / kind.speed,
        request_time=row * problem.rows_per_arrival,
        requests_max=max(1, int(size / problem.rows_per_arrival)),
        wait=wait,
    )
    return Fit(batch_size_max=max(size, 1), waits=measure_waits([server])[0], beside=0.0, wait=wait)


def _largest(problem: Problem, row: float, begin: float, wait: float) -> int:
    """Return the most rows, in powers of two, of which two passes fit into the time that is left."""
    size = BATCH_MAX
    while size > 1 and wait + 2 * (begin + row * size) > problem.within:
        size //= 2
    return size
