"""The cheapest way to serve a workload that keeps its promise, and what it would take for another to be chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tasks.consume.arrivals import Arrivals
from tasks.consume.availability import Availability
from tasks.consume.decision import Decision, Profile
from tasks.consume.workload import Prices, Workload


def decide(
    workload: Workload,
    profile: Profile,
    arrivals: Arrivals | None,
    prices: Mapping[str, Prices],
    availability: Availability | None,
    priced_at: str,
    progress: Callable[[str], None] | None = None,
) -> Decision:
    """Return the choice for a workload, every alternative, and how near the choice is to another.

    `arrivals`: None for a table. `prices`: by the kind of machine. `availability`: of spot; without it, and for kinds
    without a spot price, spot is not considered. `progress` is told what is simulated next. Raises BadWorkload where
    nothing keeps the promise, with what would be needed, and where a kind lacks its speed or its price.
    """
    raise NotImplementedError
