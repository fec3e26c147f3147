"""Which source a destination has the predictions of: no run over another one takes their place, unless it is to."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from serving.errors import OvernightError
from tasks.batch.destination_source import claim_source
from tasks.batch.options import BatchOptions
from tasks.batch.plan import Plan
from tasks.storage import Storage
from tests.simulation.oracle import Oracle
from tests.simulation.scheduler import Process, Scheduler

_MANIFEST = re.compile(r"_overnight/([^/]+)/manifest\.json")
_REFUSED = "must have the source that"


@dataclass(kw_only=True)
class Claim:
    """A call that was about to publish a run: over which source, whether it was to replace another, and its steps."""

    run: str
    source: str
    is_replacing: bool
    began: int
    ended: int | None = None

    def ends_before(self, step: int) -> bool:
        """Whether the destination was claimed before a step."""
        return self.ended is not None and self.ended < step


@dataclass(kw_only=True)
class ClaimOracle:
    """Holds the runs that are published against the sources of those before, by when each has claimed the destination.

    Of two runs over different sources, of which the later one was not to replace the other, there must be a claim
    between them that was to. Where both claim at once, either may be the earlier one.
    """

    scheduler: Scheduler
    oracle: Oracle
    takes_place: bool
    _claims: dict[Process, Claim] = field(default_factory=dict)
    _published: list[Claim] = field(default_factory=list)

    def claim(self, storage: Storage, plan: Plan, options: BatchOptions) -> None:
        """Claim the destination for the source of a plan, as flows.batch does it. Raises PublishRefused."""
        claim = Claim(
            run=plan.run,
            source=plan.addresses[0],
            is_replacing=options.other_source == "replace",
            began=self.scheduler.steps,
        )
        self._claims[self.scheduler.process] = claim
        claim_source(storage, plan, options)
        claim.ended = self.scheduler.steps

    def see_put(self, path: str, *, is_late: bool) -> None:
        """Check a run that is published, by the claim of the call that does it."""
        match = _MANIFEST.fullmatch(path)
        if match is None or not self.takes_place:
            return
        # A put that arrives late is nobody's.
        claim = None if is_late else self._claims.get(self.scheduler.process)
        if claim is None or claim.ended is None:
            return
        # Without the records that were deleted nobody knows what was there.
        if claim.began > self.oracle.damaged_at:
            for other in self._published:
                if other.began > self.oracle.damaged_at:
                    self._check_pair(other, claim)
        self._published.append(claim)

    def check_refusal(self, options: BatchOptions, error: OvernightError) -> None:
        """Check that a call which is refused for its source was not to replace another, and that there was another."""
        is_refused = _REFUSED in str(error)
        if is_refused and (options.other_source == "replace" or not self._claims):
            self._violate(f"a call that may replace another source is refused: {error}")

    def _check_pair(self, one: Claim, other: Claim) -> None:
        first, second = (one, other) if one.began <= other.began else (other, one)
        if first.source == second.source:
            return
        is_after = first.ends_before(second.began)
        if second.is_replacing or (not is_after and first.is_replacing):
            return
        sources = {second.source} if is_after else {first.source, second.source}
        between = (
            each
            for each in self._claims.values()
            if each.is_replacing
            and each.source in sources
            and not each.ends_before(first.began)
            and each.began < (second.ended or second.began)
        )
        if not any(between):
            self._violate(
                f"run {second.run} of {second.source} takes the place of run {first.run} of {first.source}, and nobody "
                "has asked for that"
            )

    def _violate(self, text: str) -> None:
        self.oracle.violations.append(f"source: {text}")
