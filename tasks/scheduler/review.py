"""Whether a workload is to be served otherwise than it is: decided anew, with hysteresis, since every change costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from serving.model.contract import Frozen
from tasks.scheduler.decision import Alternative, Decision
from tasks.scheduler.effect import Standing
from tasks.scheduler.money import usd
from tasks.scheduler.report import flip, in_words, summary

HISTORY_MAX = 100


class Hysteresis(Frozen):
    """When a change is worth it."""

    saves_min: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Share of the cost of what serves now that a change must save. None is asked for where that breaks "
        "its promise.",
    )
    times_min: int = Field(
        default=3, ge=1, le=HISTORY_MAX, description="Reviews in a row that must come to the same answer."
    )
    apply: bool = Field(
        default=False, description="Whether a change is put into effect; else it is recommended, and that is all."
    )


class Verdict(Frozen):
    """What a review came to."""

    outcome: Literal["keep", "wait", "change"] = Field(description="wait: a change seems worth it, but not often yet.")
    proposed: str = Field(description="Mode, policy and machine that were cheapest at this review.")
    in_a_row: int = Field(ge=0, description="Reviews in a row that have proposed it, this one among them.")
    saving: float | None = Field(description="Share of the cost that a change saves; null where that is not known.")
    reason: str


class Review(Frozen):
    """A review of how a workload is served."""

    decision: Decision
    standing: str | None = Field(description="How it is served now; null where nothing of its name is deployed.")
    verdict: Verdict
    applied: bool = Field(description="Whether the change was put into effect.")

    def markdown(self) -> str:
        """Return it as Markdown."""
        verdict = self.verdict
        done = {"keep": "it stays", "wait": "it stays for now", "change": "a change is recommended"}[verdict.outcome]
        lines = [
            f"# Review of {self.decision.workload.name}: {'changed' if self.applied else done}",
            verdict.reason,
            summary(self.decision),
            f"- served now: {self.standing or 'by nothing that choose_mode has deployed'}",
            f"- cheapest now: {verdict.proposed}, {verdict.in_a_row} reviews in a row",
            *(f"- would change: {flip(each)}" for each in self.decision.flips),
        ]
        return "\n\n".join(lines[:3]) + "\n\n" + "\n".join(lines[3:]) + "\n"


def judge(decision: Decision, standing: Standing | None, earlier: Sequence[str], hysteresis: Hysteresis) -> Verdict:
    """Return what is to become of a workload; `earlier` are the proposals of earlier reviews, the newest last.

    What serves now is held against the cheapest at the traffic of now. A change must save enough, or what serves now
    must break its promise; and it must have been proposed often enough without a pause.
    """
    proposed = name_of(decision.chosen)
    in_a_row = 1 + _run_of(proposed, earlier)
    if standing is None:
        return _verdict("change", proposed, in_a_row, None, "Nothing that choose_mode has deployed serves it yet.")
    if standing.is_of(decision.chosen):
        return _verdict("keep", proposed, in_a_row, 0.0, f"It is served in the cheapest way: {standing.words}.")
    now = next((each for each in decision.alternatives if standing.is_of(each)), None)
    saving = None if now is None or now.usd <= 0 else 1 - decision.chosen.usd / now.usd
    why, worth = _worth(decision, now, saving, hysteresis)
    if not worth:
        return _verdict("keep", proposed, in_a_row, saving, why)
    if in_a_row < hysteresis.times_min:
        words = f"{why} That is so at {in_a_row} of the {hysteresis.times_min} reviews in a row that are needed."
        return _verdict("wait", proposed, in_a_row, saving, words)
    return _verdict("change", proposed, in_a_row, saving, f"{why} {in_a_row} reviews in a row say so.")


def name_of(alternative: Alternative) -> str:
    """Return what a review proposes, as it is remembered and compared."""
    return f"{in_words(alternative)}, on {alternative.machine}"


def _run_of(proposed: str, earlier: Sequence[str]) -> int:
    """Return how often a proposal stands at the end."""
    run = 0
    for each in reversed(earlier):
        if each != proposed:
            break
        run += 1
    return run


def _worth(
    decision: Decision, now: Alternative | None, saving: float | None, hysteresis: Hysteresis
) -> tuple[str, bool]:
    """Say why a change is worth it or not, and which."""
    chosen = decision.chosen
    if now is None:
        return "What serves now is none of the ways that the workload allows any more.", True
    if not now.stands:
        return f"What serves now breaks its promise ({now.reason}).", True
    told = f"{usd(now.usd)} now, {usd(chosen.usd)} with {in_words(chosen)}"
    if saving is not None and saving >= hysteresis.saves_min:
        return f"A change saves {saving:.1%} ({told}).", True
    return f"A change saves {saving or 0:.1%} ({told}), less than the {hysteresis.saves_min:.0%} that it must.", False


def _verdict(
    outcome: Literal["keep", "wait", "change"], proposed: str, in_a_row: int, saving: float | None, reason: str
) -> Verdict:
    return Verdict(outcome=outcome, proposed=proposed, in_a_row=in_a_row, saving=saving, reason=reason)
