"""Reviews how a workload is served, with hysteresis, since every change costs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from serving.model.contract import Frozen
from tasks.scheduler.decision import Alternative, Decision
from tasks.scheduler.deployment_plan import CurrentDeployment
from tasks.scheduler.prices import format_usd
from tasks.scheduler.report import describe_alternative, describe_break_even, summarize_decision

HISTORY_MAX = 100


class Hysteresis(Frozen):
    """When a change is worth it."""

    saving_min: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Share of the current cost that a change must save. It does not count where what serves now breaks "
        "its promise.",
    )
    reviews_min: int = Field(
        default=3, ge=1, le=HISTORY_MAX, description="Reviews in a row that must propose the same change."
    )
    apply: bool = Field(default=False, description="Whether a change is put into effect; else it is only recommended.")


class Verdict(Frozen):
    """The result of a review."""

    outcome: Literal["keep", "wait", "change"] = Field(description="wait: a change was not proposed often enough.")
    proposed: str = Field(description="Mode, policy and machine that were cheapest at this review.")
    reviews_in_a_row: int = Field(ge=0, description="Reviews in a row that have proposed it, this one among them.")
    saving: float | None = Field(description="Share of the cost that a change saves; null where that is not known.")
    reason: str


class Review(Frozen):
    """A review of how a workload is served."""

    decision: Decision
    current: str | None = Field(description="How it is served now; null where nothing of its name is deployed.")
    verdict: Verdict
    applied: bool = Field(description="Whether the change was put into effect.")

    def markdown(self) -> str:
        """Return it as Markdown."""
        verdict = self.verdict
        done = {"keep": "it stays", "wait": "it stays for now", "change": "a change is recommended"}[verdict.outcome]
        lines = [
            f"# Review of {self.decision.workload.name}: {'changed' if self.applied else done}",
            verdict.reason,
            summarize_decision(self.decision),
            f"- served now: {self.current or 'by nothing that choose_mode has deployed'}",
            f"- cheapest now: {verdict.proposed}, {verdict.reviews_in_a_row} reviews in a row",
            *(f"- would change: {describe_break_even(each)}" for each in self.decision.break_evens),
        ]
        return "\n\n".join(lines[:3]) + "\n\n" + "\n".join(lines[3:]) + "\n"


def judge_change(
    decision: Decision, current: CurrentDeployment | None, earlier: Sequence[str], hysteresis: Hysteresis
) -> Verdict:
    """Return whether what serves a workload must change.

    A change must save enough, or what serves now must break its promise; and it must have been proposed often enough
    in a row.

    Args:
        decision: The decision at the current traffic.
        current: What serves now; None where choose_mode has deployed nothing.
        earlier: The proposals of earlier reviews, the newest last.
        hysteresis: When a change is worth it.
    """
    proposed = name_alternative(decision.chosen)
    in_a_row = 1 + sum(1 for _ in itertools.takewhile(lambda each: each == proposed, reversed(earlier)))
    if current is None:
        return _make_verdict("change", proposed, in_a_row, None, "Nothing that choose_mode has deployed serves it yet.")
    if current.matches(decision.chosen):
        return _make_verdict("keep", proposed, in_a_row, 0.0, f"It is served in the cheapest way: {current.summary}.")
    now = next((each for each in decision.alternatives if current.matches(each)), None)
    saving = None if now is None or now.usd <= 0 else 1 - decision.chosen.usd / now.usd
    why, is_worth_it = _judge_saving(decision, now, saving, hysteresis)
    if not is_worth_it:
        return _make_verdict("keep", proposed, in_a_row, saving, why)
    if in_a_row < hysteresis.reviews_min:
        reason = f"{why} That is so at {in_a_row} of the {hysteresis.reviews_min} reviews in a row that are needed."
        return _make_verdict("wait", proposed, in_a_row, saving, reason)
    return _make_verdict("change", proposed, in_a_row, saving, f"{why} {in_a_row} reviews in a row say so.")


def name_alternative(alternative: Alternative) -> str:
    """Return what a review proposes, as it is kept and compared."""
    return f"{describe_alternative(alternative)}, on {alternative.machine}"


def _judge_saving(
    decision: Decision, now: Alternative | None, saving: float | None, hysteresis: Hysteresis
) -> tuple[str, bool]:
    """Return why a change is worth it or not, and whether it is."""
    chosen = decision.chosen
    if now is None:
        return "What serves now is none of the ways that the workload allows any more.", True
    if not now.is_feasible:
        return f"What serves now breaks its promise ({now.reason}).", True
    costs = f"{format_usd(now.usd)} now, {format_usd(chosen.usd)} with {describe_alternative(chosen)}"
    if saving is not None and saving >= hysteresis.saving_min:
        return f"A change saves {saving:.1%} ({costs}).", True
    return f"A change saves {saving or 0:.1%} ({costs}), less than the {hysteresis.saving_min:.0%} that it must.", False


def _make_verdict(
    outcome: Literal["keep", "wait", "change"], proposed: str, in_a_row: int, saving: float | None, reason: str
) -> Verdict:
    return Verdict(outcome=outcome, proposed=proposed, reviews_in_a_row=in_a_row, saving=saving, reason=reason)
