"""Champion and challengers compared row by row, by the parts of both: values that a report, a page and a file show.

Parts of one chunk have the same rows in the same order. One chunk at a time is read, and what it adds to sums, maxima
and sketches is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from serving.model.contract import Frozen
from tasks.batch.challenger_rules import GREATER_IS_BETTER, LabelKind, PromoteIf
from tasks.batch.manifest import ManifestPart
from tasks.batch.part_footer import PartFooter
from tasks.batch.plan import CHALLENGERS, FORMAT_VERSION, record_path

DIFFERENCES = (1e-6, 1e-4, 1e-2, 0.1, 1.0)
EVERY_OTHER_SEGMENT = "(every other)"


class OutputComparison(Frozen):
    """One output of the model beside that of a challenger, over rows that both have scored.

    The difference of two lists of numbers is the greatest of their places.
    """

    output: str
    kind: str = Field(description="number, class, list of numbers or list of classes.")
    rows: int = Field(description="Rows that both models have scored.")
    equal: int = Field(description="Rows whose predictions are equal.")
    equal_class: int | None = Field(
        default=None, description="Of lists of numbers, rows whose greatest number is at the same place."
    )
    champion_mean: float | None = Field(default=None, description="Mean of the model's predictions, of numbers alone.")
    challenger_mean: float | None = Field(default=None, description="Mean of the challenger's predictions.")
    difference_mean: float | None = Field(default=None, description="Mean of the absolute differences.")
    difference_max: float | None = Field(default=None, description="The greatest absolute difference.")
    rows_beyond: dict[str, int] = Field(
        default_factory=dict, description="How many rows differ by more than each of some numbers."
    )
    quantiles: dict[str, float] = Field(
        default_factory=dict,
        description="Quantiles of the absolute differences, by sketches: ranks are off by 1/256 at most.",
    )
    rows_decile_changed: int | None = Field(
        default=None,
        description="Rows that lie in another tenth of the challenger's predictions than of the model's; exact.",
    )


class SegmentComparison(Frozen):
    """The rows of one value of a segment column."""

    column: str
    value: str | None
    rows: int = Field(description="Rows that both models have scored.")
    rejects_champion: int = 0
    rejects_challenger: int = 0
    equal: dict[str, int] = Field(description="Rows whose predictions are equal, by output.")
    difference_mean: dict[str, float] = Field(default_factory=dict, description="By output, of numbers.")
    champion_mean: dict[str, float] = Field(default_factory=dict)
    challenger_mean: dict[str, float] = Field(default_factory=dict)


class LabelledSegment(Frozen):
    """The metrics of one value of a segment column."""

    column: str
    value: str | None
    rows: int
    champion: dict[str, float]
    challenger: dict[str, float]


class LabelComparison(Frozen):
    """Both models beside the labels, over rows that both have scored and whose label is known."""

    kind: LabelKind
    rows: int
    champion: dict[str, float] = Field(description="Metrics of the model of the run.")
    challenger: dict[str, float] = Field(description="Metrics of the challenger.")
    auc_error_max: float = Field(
        default=0.0, description="By how much each area under ROC may be off; 0 up to 1,048,576 rows."
    )
    segments: tuple[LabelledSegment, ...] = ()


class ChallengerComparison(Frozen):
    """What one challenger came to beside the model of a run."""

    model: str = Field(description="The pinned version of the challenger.")
    model_digest: str
    given_up: str | None = Field(default=None, description="Why it was given up before all rows were scored, if so.")
    not_compared: str | None = Field(default=None, description="Why it could not be compared, if so.")
    rows: int = Field(default=0, description="Rows that both models have scored.")
    rejects_champion_only: int = Field(
        default=0, description="Rows that the model of the run alone rejects, or predicts a null for."
    )
    rejects_challenger_only: int = Field(
        default=0, description="Rows that the challenger alone rejects, or predicts a null for."
    )
    rejects_both: int = Field(default=0, description="Rows that both reject, or predict a null for.")
    outputs: tuple[OutputComparison, ...] = ()
    segments: tuple[SegmentComparison, ...] = ()
    labels: LabelComparison | None = None


class RunComparison(Frozen):
    """A run's model beside its challengers, as it is kept beside the manifest."""

    format_version: int = FORMAT_VERSION
    run: str
    plan_digest: str
    model: str
    rows: int
    challengers: tuple[ChallengerComparison, ...]


class ChallengerParts(Frozen):
    """The parts of one challenger of a published run."""

    place: int
    model: str
    model_digest: str
    given_up: str | None = None
    parts: tuple[ManifestPart, ...]


class ChallengersRecord(Frozen):
    """The parts of all challengers of a published run, which its manifest does not name."""

    format_version: int = FORMAT_VERSION
    run: str
    plan_digest: str
    challengers: tuple[ChallengerParts, ...]


class Promotion(Frozen):
    """Whether an alias was moved to a challenger, and why."""

    outcome: Literal["promoted", "not promoted"]
    alias: str
    model: str = Field(description="The version that the alias named when the run was planned.")
    to: str | None = Field(default=None, description="The version that it names since, where it was moved.")
    why: str


def list_parts_made(footers: Iterable[PartFooter]) -> tuple[ManifestPart, ...]:
    """Return how the parts of a challenger that have these footers are listed."""
    return tuple(ManifestPart(path=f.path, rows=f.rows, bytes=f.bytes, digest=f.digest, chunk=f.chunk) for f in footers)


def challengers_path(run: str, plan_digest: str) -> str:
    """Return where the list of the challengers' parts of a run lies below the destination."""
    return record_path(run, plan_digest, CHALLENGERS)


def comparison_path(run: str, plan_digest: str) -> str:
    """Return where the comparison of a run lies below the destination."""
    return record_path(run, plan_digest, "comparison")


def promotion_path(run: str, plan_digest: str) -> str:
    """Return where the record lies that says whether a challenger of a run was promoted."""
    return record_path(run, plan_digest, "promotion")


def judge_promotion(rule: PromoteIf, compared: ChallengerComparison, rows: int) -> tuple[float, str]:
    """Return by how much a challenger is better than a rule asks for, below zero where it is not; and that in words.

    Args:
        rule: The rule.
        compared: The challenger beside the model of the run.
        rows: How many rows the run has.
    """
    if compared.given_up is not None or compared.not_compared is not None:
        return -math.inf, f"{compared.model} was {'given up' if compared.given_up is not None else 'not compared'}"
    labels, metric = compared.labels, rule.metric
    ours = labels.champion.get(metric) if labels else None
    theirs = labels.challenger.get(metric) if labels else None
    if labels is None or ours is None or theirs is None:
        return -math.inf, f"{compared.model} has no {metric}"
    gain = theirs - ours if metric in GREATER_IS_BETTER else ours - theirs
    told = f"{compared.model} has {metric} {theirs:.6g} over {labels.rows:,} rows, the model {ours:.6g}"
    if labels.rows < rule.min_rows:
        return -math.inf, f"{told}, and at least {rule.min_rows:,} rows with a label decide"
    more = compared.rejects_challenger_only - compared.rejects_champion_only
    if more / max(rows, 1) > rule.max_more_rejects:
        return -math.inf, f"{told}, but rejects {more:,} rows more"
    # What the areas under ROC may be off by must not decide.
    unsure = 2 * labels.auc_error_max if metric == "auc" else 0.0
    return gain - unsure - rule.by, f"{told}, and must be better by {rule.by:g}"
