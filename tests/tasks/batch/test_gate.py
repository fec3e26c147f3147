"""The gate: each rule is kept and broken, and what can't be judged is told."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from serving.errors import ApprovalNeeded
from tasks.batch.chunk_statistics import collect_statistics
from tasks.batch.column_statistics import ColumnStatistics, TableStatistics
from tasks.batch.gate import Finding, check_findings, describe_question, judge
from tasks.batch.gate_rules import (
    DEFAULT_RULES,
    ExpressionRule,
    Gate,
    KsRule,
    MeanShiftRule,
    NullRateRule,
    PsiRule,
    RangeRule,
    RejectRateRule,
    RowCountRule,
    Rule,
)

RANDOM = np.random.default_rng(7)
ROWS = 4_000
AGE, PLAN, SCORE = RANDOM.normal(40, 10, ROWS), RANDOM.choice(["basic", "plus"], ROWS), RANDOM.beta(2, 5, ROWS)
SINCE = pa.array(np.arange(ROWS), pa.timestamp("s"))


def a_run(*, rejects: int = 40, rows: int = ROWS, score: object = SCORE, **inputs: object) -> TableStatistics:
    """Return the statistics of a run like the baseline, but for what is given."""
    columns = {"age": AGE, "plan": PLAN, "since": SINCE} | inputs
    columns = {name: values for name, values in columns.items() if values is not None}
    return TableStatistics(
        rows=rows,
        rejects=rejects,
        inputs=collect_statistics(pa.table(columns)),
        outputs=collect_statistics(pa.table({"score": score})),
    )


BASELINE = a_run()


def find(rule: Rule, run: TableStatistics, baseline: TableStatistics | None = BASELINE) -> list[str]:
    """Return what a rule finds of a run, in words."""
    return [f"{finding.outcome}: {finding}" for finding in judge(run, baseline, [rule])]


def with_nulls(values: np.ndarray, share: float) -> pa.Array:
    return pa.array(values, mask=np.arange(len(values)) < share * len(values))


def test_a_run_like_its_baseline_breaks_nothing() -> None:
    rules = (*DEFAULT_RULES, KsRule(), MeanShiftRule(), ExpressionRule(condition="psi < 0.1 OR psi IS NULL"))

    assert () == judge(BASELINE, BASELINE, rules)
    assert () == judge(a_run(age=AGE[::-1], score=SCORE[::-1]), BASELINE, rules)


@pytest.mark.parametrize(
    ("rule", "run", "found"),
    [
        (
            NullRateRule(max_change=0.1),
            a_run(age=with_nulls(AGE, 0.25)),
            "broken: input age: null rate 0.25, in the baseline 0: 0.25 apart, at most 0.1 allowed",
        ),
        (
            NullRateRule(max_change=0.3, columns="since"),
            a_run(since=pa.nulls(ROWS, pa.timestamp("s"))),
            "broken: input since: null rate 1, in the baseline 0: 1 apart, at most 0.3 allowed",
        ),
        (PsiRule(max_psi=0.25), a_run(age=AGE + 20), "broken: input age: psi 3.837, at most 0.25 allowed"),
        (PsiRule(side="outputs"), a_run(score=SCORE**3), "broken: output score: psi"),
        (PsiRule(), a_run(plan=["max"] * ROWS), "broken: input plan: psi"),
        (KsRule(max_ks=0.2), a_run(age=AGE + 10), "broken: input age: ks 0.3"),
        (
            MeanShiftRule(max_deviations=0.5),
            a_run(age=AGE + 10),
            "broken: input age: mean 49.82, in the baseline 39.82: 1.009 standard deviations, at most 0.5 allowed",
        ),
        (RangeRule(slack=1), a_run(age=np.append(AGE[1:], 999.0)), "broken: input age: greatest value 999, 14"),
        (RangeRule(slack=1), a_run(age=np.append(AGE[1:], -999.0)), "broken: input age: least value -999, -6"),
        (
            RangeRule(columns="score", minimum=0.0, maximum=0.5),
            a_run(),
            "broken: output score: greatest value 0.87959, 0.5 or less allowed",
        ),
        (RangeRule(columns="plan", maximum=4), a_run(plan=["basic"] * ROWS), "broken: input plan: greatest value 5, 4"),
        (
            RowCountRule(max_change=0.5),
            a_run(rows=1_000),
            "broken: rows: 1,000 rows, in the baseline 4,000: a change by 0.75, at most 0.5 allowed",
        ),
        (RowCountRule(max_change=None, min_rows=5_000), a_run(), "broken: rows: 4,000 rows, 5,000 or more allowed"),
        (
            RejectRateRule(max_change=0.05),
            a_run(rejects=400),
            "broken: rejects: 0.1 of the rows are rejects, in the baseline 0.01: at most 0.05 more allowed",
        ),
        (
            RejectRateRule(max_change=None, max_rate=0.005),
            a_run(),
            "broken: rejects: 0.01 of the rows are rejects, at most 0.005 allowed",
        ),
        (
            ExpressionRule(condition="p99 < 2 * baseline_p50 AND kind = 'number'", columns="age"),
            a_run(age=AGE + 50),
            "broken: input age: p99 < 2 * baseline_p50 AND kind = 'number' must be true, got p99 11",
        ),
        (ExpressionRule(condition="reject_rate < 0.001", columns="age"), a_run(), "broken: input age: reject_rate < 0"),
        (ExpressionRule(condition="1 = 2", side="outputs"), a_run(), "broken: output score: 1 = 2 must be true"),
    ],
)
def test_each_rule_is_broken_by_what_it_is_about(rule, run, found) -> None:
    texts = find(rule, run)

    assert 1 == len(texts), texts
    assert texts[0].startswith(found)


def test_fewer_rejects_are_no_fault() -> None:
    assert [] == find(RejectRateRule(max_change=0.0), a_run(rejects=0))


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(2, 60))
def test_a_small_run_is_not_refused_for_what_chance_gives(seed, rows) -> None:
    random = np.random.default_rng(seed)
    run = TableStatistics(rows=rows, inputs=collect_statistics(pa.table({"age": random.choice(AGE, rows)})))
    rules = (PsiRule(max_psi=1e-6), KsRule(max_ks=1e-6), MeanShiftRule(max_deviations=1e-6))
    broken = [finding for finding in judge(run, BASELINE, rules) if finding.outcome == "broken"]

    # One in a thousand for each of three rules: of forty runs, one at most in nine of ten times.
    assert len(broken) <= 2


def test_rules_are_for_the_columns_and_sides_that_they_name() -> None:
    run = a_run(age=AGE + 20, score=SCORE + 20)

    assert ["input age"] == [finding.subject for finding in judge(run, BASELINE, [KsRule(columns="a*")])]
    assert ["output score"] == [finding.subject for finding in judge(run, BASELINE, [KsRule(side="outputs")])]
    assert [] == find(KsRule(columns=("score",), side="inputs"), run)


def test_times_always_move_and_are_judged_by_name_alone() -> None:
    run = a_run(since=pa.array(np.arange(ROWS) + 10**6, pa.timestamp("s")))

    assert [] == find(PsiRule(), run)
    assert ["input since"] == [finding.subject for finding in judge(run, BASELINE, [PsiRule(columns="since")])]


def test_a_baseline_of_another_schema_is_told_and_the_rest_is_judged() -> None:
    run = a_run(age=[str(value) for value in AGE], plan=None, tier=PLAN, score=SCORE + 20)
    findings = judge(run, BASELINE, [MeanShiftRule(severity="refuse"), PsiRule()])

    assert ["output score", "output score"] == [each.subject for each in findings if each.outcome == "broken"]
    assert {
        "input age: its values are of the kind text, in the baseline number",
        "input plan: only the baseline has it",
        "input tier: the baseline does not have it",
    } == {str(each) for each in findings if each.outcome == "not judged"}


def test_a_baseline_without_sketches_is_told() -> None:
    bare = TableStatistics(rows=ROWS, inputs={"age": ColumnStatistics(kind="number", rows=ROWS)})
    run = TableStatistics(rows=ROWS, inputs=collect_statistics(pa.table({"age": with_nulls(AGE, 0.5)})))
    findings = judge(run, bare, DEFAULT_RULES)

    assert [
        "input age: null rate 0.5, in the baseline 0: 0.5 apart, at most 0.1 allowed",
        "input age: the baseline has no sketch of it",
    ] == [str(finding) for finding in findings]


def test_without_a_baseline_only_bounds_of_a_rules_own_are_judged() -> None:
    rules = (*DEFAULT_RULES, RangeRule(columns="age", maximum=50), ExpressionRule(condition="mean < baseline_mean"))
    texts = [str(finding) for finding in judge(a_run(), None, rules)]

    assert texts[0].startswith("input age: greatest value")
    assert "the run: there is no baseline, so that only bounds of a rule's own are judged" in texts
    assert sum("says nothing of it" in text for text in texts) == 4
    assert () == judge(a_run(), None, [])


def test_a_rule_that_names_no_column_is_told() -> None:
    assert ["not judged: column agee: a rule names it, and neither run has it; did you mean 'age'?"] == find(
        PsiRule(columns=("agee",)), a_run()
    )


def test_a_broken_hard_rule_refuses_the_run_and_says_how_to_approve_it() -> None:
    run = a_run(rejects=2_000, rows=1_000, age=with_nulls(AGE + 100, 0.5), score=SCORE + 20)
    with pytest.raises(ApprovalNeeded) as caught:
        check_findings(judge(run, BASELINE, DEFAULT_RULES), "r1", "run r0", "overnight approve scores/ r1")

    message = str(caught.value)
    assert message.startswith("Run r1 must keep the rules of its gate to be published; beside run r0 it breaks 4:\n")
    assert "  - rows: 1,000 rows, in the baseline 4,000: a change by 0.75, at most 0.5 allowed\n" in message
    assert message.endswith("approve it: overnight approve scores/ r1")
    assert len(message.split("\n")) <= 12


def test_a_question_lists_what_is_broken_and_shows_names_of_the_data_as_they_are() -> None:
    inputs = {f"a_<b>*{at:02}": with_nulls(AGE, 0.5) for at in range(22)}
    findings = judge(a_run(**inputs), a_run(**dict.fromkeys(inputs, AGE)), [NullRateRule(severity="refuse"), PsiRule()])
    lines = describe_question(findings, "r1", "run r_0").splitlines()
    listed = [line for line in lines if line.startswith("- ")]

    assert "Run `r1` must keep the rules of its gate to be published. Beside run r\\_0 it breaks 22:" == lines[0]
    assert listed[0].startswith("- input a\\_\\<b\\>\\*00: ")
    assert ["- and 2 more"] == listed[20:]


def test_warnings_and_what_is_not_judged_refuse_nothing() -> None:
    findings = judge(a_run(age=AGE + 100, plan=None), BASELINE, [PsiRule(severity="warn"), KsRule(columns="no")])

    assert {"warn"} == {finding.severity for finding in findings}
    check_findings(findings, "r1", "run r0", "approve it")


def test_findings_that_refuse_come_first_and_what_is_not_judged_last() -> None:
    run = a_run(age=AGE + 100, rows=1, plan=None)
    rules = [PsiRule(), RowCountRule(severity="refuse")]

    assert ["rows", "input age", "input plan"] == [finding.subject for finding in judge(run, BASELINE, rules)]


@pytest.mark.parametrize(
    ("condition", "found"),
    [
        ("read_csv('/etc/passwd') = 1", "the word 'read_csv'"),
        ("EXISTS (SELECT 1)", "the word 'EXISTS'"),
        ("mean > 1; DROP", "the sign ';'"),
        ("__import__('os')", "the word '__import__'"),
        ('"mean" > 1', "the sign"),
        ("mean >", "condition must be a condition in SQL"),
        ("mean + 1", "one of the type Float64"),
        ("meen > 1", "the word 'meen'"),
        ("kind > 1", "condition must be"),
        ("", "at least 1 character"),
        ("mean > 1 OR " * 200, "at most 1000 characters"),
    ],
)
def test_a_condition_can_only_compare(condition, found) -> None:
    with pytest.raises(ValidationError) as caught:
        ExpressionRule(condition=condition)

    assert found in str(caught.value)


def test_a_gate_reads_from_json_as_it_is_written_and_unknown_rules_are_refused() -> None:
    gate = Gate(rules=(*DEFAULT_RULES, ExpressionRule(condition="mean > 0"), KsRule(columns="a")))

    assert gate == Gate.model_validate_json(gate.model_dump_json())
    with pytest.raises(ValidationError, match="does not match any of the expected tags"):
        Gate.model_validate({"rules": [{"kind": "kl_divergence"}]})


def test_every_field_is_described_and_every_rule_is_told_by_its_kind() -> None:
    schema = TypeAdapter(Gate).json_schema()
    rule = schema["properties"]["rules"]["items"]

    assert 8 == len(rule["discriminator"]["mapping"])
    assert [] == [
        (name, field)
        for name, value in schema["$defs"].items()
        for field, described in value["properties"].items()
        if "description" not in described
    ]


def test_a_finding_has_its_figures() -> None:
    found = judge(a_run(age=AGE + 20), BASELINE, [MeanShiftRule()])[0]

    assert isinstance(found, Finding)
    assert ("mean_shift", "warn", "input age", 0.5) == (found.rule, found.severity, found.subject, found.allowed)
    assert 2.0 == pytest.approx(found.value, rel=0.02)
