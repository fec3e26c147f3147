"""What the cheapest way of each mode costs with more or less traffic, for the plot of a decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serving.errors import BadWorkload
from tasks.consume.arrivals import Arrivals, scaled
from tasks.consume.availability import Availability
from tasks.consume.decide import decide
from tasks.consume.decision import Decision, Mode, Profile
from tasks.consume.prices import Priced
from tasks.consume.workload import Table, Workload

FACTORS = (0.1, 0.3, 3.0, 10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Everything that a decision is computed from."""

    workload: Workload
    profile: Profile
    arrivals: Arrivals | None
    priced: Priced
    availability: Availability | None


def decide_by(inputs: Inputs) -> Decision:
    """Return the decision for what was read, measured and priced. Raises BadWorkload."""
    return decide(
        inputs.workload,
        inputs.profile,
        inputs.arrivals,
        inputs.priced.prices,
        inputs.availability,
        inputs.priced.priced_at,
    )


def sweep(
    inputs: Inputs, decision: Decision, factors: Sequence[float] = FACTORS
) -> Mapping[Mode, list[tuple[float, float]]]:
    """Return, for each mode, its cheapest way that stands by the factor of the traffic: pairs of factor and dollars."""
    costs: dict[Mode, list[tuple[float, float]]] = {}
    for factor in sorted({*factors, 1.0}):
        try:
            decided = decision if factor == 1 else decide_by(_scaled(inputs, factor))
        except BadWorkload:
            continue
        for each in decided.alternatives:
            points = costs.setdefault(each.mode, [])
            if each.stands and not any(at == factor for at, _ in points):
                points.append((factor, each.usd))
    return costs


def _scaled(inputs: Inputs, factor: float) -> Inputs:
    workload, arrivals = inputs.workload, inputs.arrivals
    if isinstance(workload.consumer, Table):
        consumer = workload.consumer.model_copy(update={"rows": round(workload.consumer.rows * factor)})
        workload = workload.model_copy(update={"consumer": consumer})
    return Inputs(
        workload=workload,
        profile=inputs.profile,
        arrivals=None if arrivals is None else scaled(arrivals, factor),
        priced=inputs.priced,
        availability=inputs.availability,
    )
