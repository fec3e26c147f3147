"""The judge of a version on trial: it wins, loses, or goes on, by what it answered so far."""

from __future__ import annotations

from typing import Literal

from pydantic import AwareDatetime, Field

from serving.gateway.route import Rollout
from serving.model.contract import Frozen

Outcome = Literal["promoted", "rolled back"]


class Tally(Frozen):
    """What a version on trial has done so far."""

    requests: int = Field(default=0, ge=0, description="Requests that it answered or failed.")
    errors: int = Field(default=0, ge=0, description="Those that it failed.")
    slow: int = Field(default=0, ge=0, description="Those that took longer than the rule's p99_ms_max.")

    def plus(self, rule: Rollout, *, failed: bool, latency_ms: float) -> Tally:
        """Return the tally after one more request."""
        slow = rule.p99_ms_max is not None and latency_ms > rule.p99_ms_max
        return Tally(requests=self.requests + 1, errors=self.errors + failed, slow=self.slow + slow)


class Trial(Frozen):
    """A trial that goes on."""

    began: AwareDatetime = Field(description="When it began.")
    tally: Tally = Field(default=Tally(), description="What the version has done since.")


class Verdict(Frozen):
    """How a trial ended, and why."""

    version: str = Field(description="The version that was on trial.")
    outcome: Outcome = Field(description="promoted: it gets every request. rolled back: it gets none.")
    reason: str = Field(description="The figures that decided.")
    tally: Tally = Field(description="What the version had done.")
    at: AwareDatetime = Field(description="When it ended.")


def judge(rule: Rollout, tally: Tally, *, age_s: float) -> tuple[Outcome, str] | None:
    """Return how a trial ends and why, None while it goes on.

    It is lost as soon as it could not be won any more: where the errors, or the slow answers, are more than the rule
    allows of requests_min requests, or of those that there were. p99 is above its limit exactly where more than one
    in a hundred is slow.
    """
    most = max(tally.requests, rule.requests_min)
    if tally.errors > rule.error_rate_max * most:
        return "rolled back", f"{tally.errors} of {tally.requests} requests failed; {rule.error_rate_max:.2%} may"
    if tally.slow > most / 100:
        return "rolled back", f"{tally.slow} of {tally.requests} requests took over {rule.p99_ms_max:g} ms; 1.00% may"
    if tally.requests >= rule.requests_min and age_s >= rule.seconds_min:
        slow = "" if rule.p99_ms_max is None else f", {tally.slow} took over {rule.p99_ms_max:g} ms"
        return "promoted", f"{tally.errors} of {tally.requests} requests failed{slow}"
    return None
