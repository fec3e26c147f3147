"""The gate before the manifest: judge the statistics of a run by rules, beside those of a baseline."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import Field

from serving.errors import ApprovalNeeded, list_shortly, suggest_name
from serving.model.contract import Frozen
from serving.redaction import hide_secrets
from tasks.batch.column_statistics import TableStatistics
from tasks.batch.drift import ColumnDrift, Distance, compare_rates, compare_tables
from tasks.batch.gate_expression import find_false_columns
from tasks.batch.gate_rules import (
    AnyColumnRule,
    ExpressionRule,
    KsRule,
    MeanShiftRule,
    NullRateRule,
    PsiRule,
    RangeRule,
    RejectRateRule,
    RowCountRule,
    Rule,
    Severity,
)

_SHOWN, _ASKED = 5, 20
_PATTERN = "*?["
_MARKDOWN = re.compile(r"[\\`*_{}\[\]()#+!|<>~&]")


class Finding(Frozen):
    """A rule that a run breaks, or that could not be judged."""

    rule: str = Field(description="The kind of the rule; empty where no rule of a column could be judged.")
    severity: Severity = Field(description="Whether the run is refused for it, where it is broken.")
    outcome: Literal["broken", "not judged"] = Field(description="Only what is broken refuses a run.")
    subject: str = Field(description="The column, or rows, or rejects.")
    value: float | None = Field(default=None, description="What the run has.")
    allowed: float | None = Field(default=None, description="What the rule allows.")
    text: str = Field(description="The value beside what is allowed, in words.")

    def __str__(self) -> str:
        return f"{self.subject}: {self.text}"


def judge(statistics: TableStatistics, baseline: TableStatistics | None, rules: Sequence[Rule]) -> tuple[Finding, ...]:
    """Return the rules that a run breaks, those that refuse it first, then what could not be judged.

    A distance that chance alone gives in one of a thousand samples of this size is allowed, whatever the bound of the
    rule: a hundred rows say little about a distribution.

    Args:
        statistics: The statistics of the run.
        baseline: Those it is held against; None where there are none, so that only bounds of a rule's own are judged.
        rules: The rules.
    """
    drifts = compare_tables(statistics, baseline)
    found = [finding for rule in rules for finding in _judge_rule(rule, statistics, baseline, drifts)]
    if baseline is None and rules:
        found.append(_tell("the run", "there is no baseline, so that only bounds of a rule's own are judged"))
    # A column that no rule can judge is told once.
    unique = dict.fromkeys(found)
    return tuple(sorted(unique, key=lambda finding: (finding.outcome != "broken", finding.severity != "refuse")))


def check_findings(
    findings: Sequence[Finding], run: str, baseline: str, approve: str, answer: str | None = None
) -> None:
    """Raise ApprovalNeeded where a run breaks a rule that refuses it.

    Args:
        findings: What `judge` found.
        run: The name of the run.
        baseline: What it was held against, in words.
        approve: What to do so that it is published as it is: a command, or a call.
        answer: What came of asking for approval, as a sentence; None where nobody was asked.
    """
    broken = list_refusing(findings)
    if broken:
        listed = list_shortly([str(finding) for finding in broken], _SHOWN)
        message = (
            f"Run {run} must keep the rules of its gate to be published; beside {baseline} it breaks {len(broken)}:\n"
            f"{listed}\nAll its parts are there, and nothing is published. {f'{answer} ' if answer else ''}Correct the "
            f"data or the model and call again; or, where the change is meant, approve it: {approve}"
        )
        raise ApprovalNeeded(message)


def describe_question(findings: Sequence[Finding], run: str, baseline: str) -> str:
    """Return what a person is asked who may approve a run, as markdown: what was broken, beside what."""
    broken = list_refusing(findings)
    listed = [f"- {_escape_markdown(str(finding))}" for finding in broken[:_ASKED]]
    if len(broken) > _ASKED:
        listed.append(f"- and {len(broken) - _ASKED} more")
    beside = _escape_markdown(hide_secrets(baseline))
    begin = f"Run `{run}` must keep the rules of its gate to be published. Beside {beside} it breaks {len(broken)}:"
    end = (
        "All its parts are there, and nothing is published. Approve it to have it published as it is. Leave *approve* "
        "off to refuse it."
    )
    return "\n".join([begin, "", *listed, "", end])


def _escape_markdown(text: str) -> str:
    """Return text that markdown shows as it is: names of columns and frequent texts are of the data."""
    return _MARKDOWN.sub(r"\\\g<0>", " ".join(text.split()))


def list_refusing(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Return the findings for which a run is refused."""
    return tuple(finding for finding in findings if finding.outcome == "broken" and finding.severity == "refuse")


def _judge_rule(
    rule: Rule, statistics: TableStatistics, baseline: TableStatistics | None, drifts: Sequence[ColumnDrift]
) -> Iterator[Finding]:
    if isinstance(rule, RowCountRule):
        yield from _judge_rows(rule, statistics, baseline)
    elif isinstance(rule, RejectRateRule):
        yield from _judge_rejects(rule, statistics, baseline)
    else:
        yield from _find_unknown(rule, drifts)
        chosen = [drift for drift in drifts if _is_for(rule, drift)]
        if isinstance(rule, ExpressionRule):
            yield from _judge_expression(rule, statistics, baseline, chosen)
        else:
            for drift in chosen:
                yield from _judge_column(rule, drift, has_baseline=baseline is not None)


def _is_for(rule: AnyColumnRule, drift: ColumnDrift) -> bool:
    """Return whether a rule is for a column; of times, which always move, those of distributions only by name."""
    if rule.side not in ("both", f"{drift.side}s"):
        return False
    if drift.name in rule.columns:
        return True
    is_time = drift.current is not None and drift.current.kind == "time"
    judges_any = isinstance(rule, NullRateRule | ExpressionRule)
    return (judges_any or not is_time) and any(fnmatchcase(drift.name, pattern) for pattern in rule.columns)


def _find_unknown(rule: AnyColumnRule, drifts: Sequence[ColumnDrift]) -> Iterator[Finding]:
    known = {drift.name for drift in drifts}
    for name in rule.columns:
        if name not in known and not any(sign in name for sign in _PATTERN):
            yield _tell(f"column {name}", f"a rule names it, and neither run has it{suggest_name(name, known)}")


def _judge_column(rule: AnyColumnRule, drift: ColumnDrift, *, has_baseline: bool) -> Iterator[Finding]:
    if isinstance(rule, RangeRule):
        yield from _judge_range(rule, drift, has_baseline=has_baseline)
    elif has_baseline:
        distance, limit, words = _find_distance(rule, drift)
        if math.isnan(distance.value):
            yield _tell(drift.title, drift.problem or "it has no rows")
        elif distance.value > (allowed := max(limit, distance.chance)):
            yield _break(rule, drift.title, distance.value, allowed, f"{words}, at most {allowed:.4g} allowed")


def _find_distance(rule: AnyColumnRule, drift: ColumnDrift) -> tuple[Distance, float, str]:
    """Return how far a column is from the baseline by a rule, the bound of the rule, and the distance in words."""
    now, then = drift.current, drift.baseline
    if isinstance(rule, PsiRule):
        return drift.psi, rule.max_psi, f"psi {drift.psi.value:.4g}"
    if isinstance(rule, KsRule):
        return drift.ks, rule.max_ks, f"ks {drift.ks.value:.4g}"
    if isinstance(rule, MeanShiftRule):
        moved = f"mean {now.mean:.4g}, in the baseline {then.mean:.4g}: " if now and then else ""
        return drift.mean, rule.max_deviations, f"{moved}{drift.mean.value:.4g} standard deviations"
    if isinstance(rule, NullRateRule):
        rates = f"null rate {now.null_rate:.4g}, in the baseline {then.null_rate:.4g}" if now and then else ""
        return drift.null_rate, rule.max_change, f"{rates}: {drift.null_rate.value:.4g} apart"
    message = f"A rule of the kind {type(rule).__name__} has no distance."
    raise TypeError(message)


def _judge_range(rule: RangeRule, drift: ColumnDrift, *, has_baseline: bool) -> Iterator[Finding]:
    now, then = drift.current, drift.baseline
    if now is None or now.minimum is None or now.maximum is None:
        return
    low, high = rule.minimum, rule.maximum
    if low is None and high is None:
        if not has_baseline:
            return
        if drift.problem or then is None or then.minimum is None or then.maximum is None:
            yield _tell(drift.title, drift.problem or "the baseline has no range of it")
            return
        width = rule.slack * (then.maximum - then.minimum)
        low, high = then.minimum - width, then.maximum + width
    # Beyond what float64 holds, a width is infinite, and allows everything.
    if low is not None and now.minimum < low:
        yield _break(rule, drift.title, now.minimum, low, f"least value {now.minimum:.6g}, {low:.6g} or more allowed")
    if high is not None and now.maximum > high:
        words = f"greatest value {now.maximum:.6g}, {high:.6g} or less allowed"
        yield _break(rule, drift.title, now.maximum, high, words)


def _judge_rows(rule: RowCountRule, statistics: TableStatistics, baseline: TableStatistics | None) -> Iterator[Finding]:
    rows = statistics.rows
    if rule.min_rows is not None and rows < rule.min_rows:
        yield _break(rule, "rows", rows, rule.min_rows, f"{rows:,} rows, {rule.min_rows:,} or more allowed")
    if rule.max_change is None or baseline is None or not baseline.rows:
        return
    change = abs(rows / baseline.rows - 1)
    if change > rule.max_change:
        words = f"{rows:,} rows, in the baseline {baseline.rows:,}: a change by {change:.4g}"
        yield _break(rule, "rows", change, rule.max_change, f"{words}, at most {rule.max_change:.4g} allowed")


def _judge_rejects(
    rule: RejectRateRule, statistics: TableStatistics, baseline: TableStatistics | None
) -> Iterator[Finding]:
    rate = statistics.reject_rate
    if rule.max_rate is not None and rate > rule.max_rate:
        words = f"{rate:.4g} of the rows are rejects, at most {rule.max_rate:.4g} allowed"
        yield _break(rule, "rejects", rate, rule.max_rate, words)
    if rule.max_change is None or baseline is None:
        return
    distance = compare_rates(statistics.rejects, statistics.rows, baseline.rejects, baseline.rows)
    allowed = max(rule.max_change, distance.chance)
    if rate > baseline.reject_rate and distance.value > allowed:
        words = f"{rate:.4g} of the rows are rejects, in the baseline {baseline.reject_rate:.4g}"
        yield _break(rule, "rejects", distance.value, allowed, f"{words}: at most {allowed:.4g} more allowed")


def _judge_expression(
    rule: ExpressionRule,
    statistics: TableStatistics,
    baseline: TableStatistics | None,
    drifts: Sequence[ColumnDrift],
) -> Iterator[Finding]:
    for drift, outcome in find_false_columns(rule.condition, drifts, statistics, baseline):
        if outcome.is_null:
            yield _tell(drift.title, f"{rule.condition} says nothing of it ({outcome.values})")
        else:
            yield _break(rule, drift.title, None, None, f"{rule.condition} must be true, got {outcome.values}")


def _break(rule: Rule, subject: str, value: float | None, allowed: float | None, text: str) -> Finding:
    return Finding(
        rule=rule.kind,
        severity=rule.severity,
        outcome="broken",
        subject=subject,
        value=value,
        allowed=allowed,
        text=text,
    )


def _tell(subject: str, text: str) -> Finding:
    return Finding(rule="", severity="warn", outcome="not judged", subject=subject, text=text)
