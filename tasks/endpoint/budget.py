"""Whether a release keeps its budget under load: at the expected rate, and in a burst of twice that rate."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from serving.errors import BudgetBroken
from serving.model.batching import BURST_FACTOR
from serving.model.contract import Contract, Frozen
from serving.targets import Address
from tasks.endpoint.batching import BatchingChoice
from tasks.endpoint.load import Latency, measure_latency
from tasks.endpoint.resolve import Sample
from tasks.endpoint.spec import Budget

# One stall of a busy machine is no property of a setting: what breaks the budget is measured again.
_ATTEMPTS = 3
_ERROR_SHARE_MAX = 0.01


class BudgetCheck(Frozen):
    """How long requests waited at the expected rate and in a burst, and whether that is within the budget."""

    budget: Budget = Field(description="Within which 99 of 100 requests must be answered, and at what rate.")
    steady: Latency | None = Field(description="At the expected rate; null where no request was answered.")
    burst: Latency | None = Field(description="At twice that rate; null as above.")

    @property
    def is_kept(self) -> bool:
        """Whether 99 of 100 requests were answered within the budget, both times."""
        return all(
            each is not None
            and each.p99_ms <= self.budget.latency_ms
            and each.errors <= _ERROR_SHARE_MAX * each.requests
            for each in (self.steady, self.burst)
        )

    def describe(self) -> str:
        """Return what was measured, in words."""
        return f"{_describe(self.steady)}, and {_describe(self.burst)} in a burst"


def _describe(latency: Latency | None) -> str:
    if latency is None:
        return "no answer"
    errors = f" with {latency.errors} errors" if latency.errors else ""
    return f"p99 {latency.p99_ms:.3g} ms at {latency.rate:,.0f} requests/s{errors}"


def check_budget(
    address: Address, contract: Contract, sample: Sample, budget: Budget, *, seconds: float
) -> BudgetCheck:
    """Send single rows at the budget's rate, then at twice that rate, for so many seconds each.

    A release that breaks its budget is measured up to twice more, and the last figures count.
    """
    for _ in range(_ATTEMPTS):
        steady, burst = (
            measure_latency(address, contract, sample, rate=rate, seconds=seconds)
            for rate in (budget.rate, BURST_FACTOR * budget.rate)
        )
        check = BudgetCheck(budget=budget, steady=steady, burst=burst)
        if check.is_kept:
            break
    return check


def explain_broken_budget(
    tried: Sequence[tuple[BatchingChoice, BudgetCheck]], *, is_explicit: bool = False
) -> BudgetBroken:
    """Return the error for a release of which no setting that was tried, at least one, keeps the budget.

    Where the batching is explicit, the message also says that another may be chosen.
    """
    budget = tried[0][1].budget
    measured = "; ".join(f"{choice.describe()}: {check.describe()}" for choice, check in tried)
    other = "Give another batching, or leave batching out, and it is chosen for the budget. " if is_explicit else ""
    return BudgetBroken(
        f"99 of 100 requests must be answered within {budget.latency_ms:g} ms, at {budget.rate:g} rows a second and in "
        f"a burst of {BURST_FACTOR * budget.rate:g}, got {measured}. {other}Allow more latency_ms, expect a lower "
        "rate, raise replicas_max, or serve on a faster or less busy machine; measure_seconds=0 deploys it without "
        "this check."
    )
