"""What a gate keeps beside a run: statistics, refusals, and approvals of exactly what was refused."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from serving.errors import ApprovalNeeded, BadInput, NoCompleteRun, PublishRefused, SourceNotFound
from tasks.batch.chunk_statistics import collect_statistics, describe_table
from tasks.batch.column_statistics import TableStatistics, write_statistics
from tasks.batch.gate import judge
from tasks.batch.gate_records import (
    FoundBaseline,
    JudgedRun,
    NoBaseline,
    approve_run,
    check_approved,
    find_baseline,
    find_statistics,
    is_approved,
    judge_run,
    list_refusals,
    record_refusal,
    save_statistics,
    sum_statistics,
)
from tasks.batch.gate_rules import (
    Gate,
    LastRun,
    MeanShiftRule,
    NamedRun,
    RangeRule,
    RowCountRule,
    StatisticsFile,
    TrainingSet,
)
from tasks.batch.manifest import Manifest
from tasks.batch.plan import manifest_path
from tasks.storage import Storage, open_storage
from tests.tasks.batch.small import PIN
from tests.tasks.batch.test_reuse import OPTIONS, plan_call, score_plan, write

RUN = TableStatistics(rows=3, inputs=collect_statistics(pa.table({"age": [1.0, 2.0, None]})))
FINDINGS = judge(RUN, None, [RowCountRule(min_rows=10, severity="refuse"), RangeRule(maximum=1.5)])


def pass_gate(storage: Storage, plan_digest: str, gate: Gate, statistics: TableStatistics) -> JudgedRun:
    """Judge a run as the flow does."""
    assert not isinstance(gate.baseline, TrainingSet)
    judged = judge_run(storage, "r1", plan_digest, gate.rules, find_baseline(storage, gate.baseline, "r1"), statistics)
    check_approved("r1", judged, "approve it")
    return judged


def publish(storage: Storage, run: str, order: int) -> Manifest:
    """Write the manifest of a run, and return it."""
    manifest = Manifest(
        key=run,
        run=run,
        order=order,
        planned_at=dt.datetime.now(dt.UTC),
        model=PIN,
        source="customers",
        output="parquet",
        rows=3,
        rejects=(),
        parts=(),
        plan_digest="plan",
    )
    storage.put_new(manifest_path(run), manifest.model_dump_json().encode())
    return manifest


@pytest.mark.parametrize("left", [0, 2])
def test_a_run_is_not_judged_by_some_of_its_rows_where_parts_go_after_they_were_counted(
    tmp_path: Path, left: int
) -> None:
    write(tmp_path / "in/f.parquet", 0, 36, group=12)
    options = OPTIONS.model_copy(update={"gate": Gate()})
    plan, storage = plan_call(tmp_path / "in", tmp_path / "out", options).plan, open_storage(str(tmp_path / "out"))
    score_plan(plan, storage)
    assert 36 == sum_statistics(storage, plan).rows
    parts = storage.entries(plan.parts_folder)
    storage.delete([entry.path for entry in parts[left:]])

    assert 3 == len(parts)
    with pytest.raises(PublishRefused, match=f"must hold the 36 rows of run {plan.run}, got {12 * left}"):
        sum_statistics(storage, plan)


def test_statistics_are_kept_beside_the_run_and_the_first_ones_stand(place: str) -> None:
    storage = open_storage(place)

    run = publish(storage, "r1", 1)

    assert find_statistics(storage, run) is None
    assert save_statistics(storage, "r1", "plan", RUN)
    assert not save_statistics(storage, "r1", "plan", TableStatistics(rows=4))
    assert save_statistics(storage, "r1", "another plan of that name", TableStatistics(rows=5))
    assert find_statistics(storage, run) == RUN


def test_the_last_run_is_the_baseline_and_one_may_be_named(local: Storage) -> None:
    nothing = NoBaseline(reason=f"no other run of {local.url} was published before")
    assert nothing == find_baseline(local, LastRun(), "now")

    for order, run in enumerate(["r1", "r2"], start=1):
        publish(local, run, order)
        save_statistics(local, run, "plan", TableStatistics(rows=order))

    first, second = (FoundBaseline(title=f"run r{at}", statistics=TableStatistics(rows=at)) for at in (1, 2))

    assert second == find_baseline(local, LastRun(), "now")
    assert first == find_baseline(local, LastRun(), "r2")
    assert first == find_baseline(local, NamedRun(run="r1"), "now")


def test_a_run_without_statistics_is_no_baseline_and_says_so(local: Storage) -> None:
    publish(local, "old", 1)

    assert NoBaseline(reason="run old was published without statistics") == find_baseline(local, LastRun(), "now")


def test_a_named_run_must_be_published(local: Storage) -> None:
    with pytest.raises(NoCompleteRun, match="must hold the run 'r9', the gate's baseline, got none"):
        find_baseline(local, NamedRun(run="r9"), "now")


def test_a_file_may_hold_the_statistics_of_the_training_set(
    local: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 600_000
    table = pa.table({"age": np.arange(rows) % 90, "churned": np.arange(rows) % 2})
    statistics = describe_table(table, outputs="churned")
    (tmp_path / "training.json").write_bytes(write_statistics(statistics))
    monkeypatch.chdir(tmp_path)

    assert (rows, ["age"], ["churned"]) == (statistics.rows, list(statistics.inputs), list(statistics.outputs))
    for address in ("training.json", str(tmp_path / "training.json")):
        assert FoundBaseline(title=address, statistics=statistics) == find_baseline(
            local, StatisticsFile(address=address), "now"
        )
    with pytest.raises(SourceNotFound, match=r"no.json must hold the statistics of the gate's baseline"):
        find_baseline(local, StatisticsFile(address=str(tmp_path / "no.json")), "now")
    (tmp_path / "damaged.json").write_text("{}")
    with pytest.raises(BadInput, match="must hold statistics that Overnight has written"):
        find_baseline(local, StatisticsFile(address=str(tmp_path / "damaged.json")), "now")


def test_an_output_that_is_not_in_the_table_is_named() -> None:
    told = r"must have the outputs named, got no column 'chrned'; did you mean 'churned'\?"
    with pytest.raises(BadInput, match=told):
        describe_table(pa.table({"churned": [1]}), outputs="chrned")


def test_an_approval_is_of_exactly_what_the_run_was_refused_for(place: str) -> None:
    storage = open_storage(place)
    with pytest.raises(BadInput, match="must have been refused by its gate to be approved, got no refusal"):
        approve_run(storage, "r1")

    record_refusal(storage, "r1", "plan", "run r0", FINDINGS)
    record_refusal(storage, "r1", "plan", "run r0", FINDINGS)
    assert 1 == len(list_refusals(storage, "r1"))
    assert not is_approved(storage, "r1", "plan", FINDINGS)

    refusal = approve_run(storage, "r1", approved_by="ada", reason="a new market")
    approve_run(storage, "r1")

    assert ["rows: 3 rows, 10 or more allowed"] == [str(finding) for finding in refusal.findings]
    assert is_approved(storage, "r1", "plan", FINDINGS)
    assert is_approved(storage, "r1", "plan", FINDINGS[:1])
    assert not is_approved(storage, "r1", "another plan", FINDINGS)
    assert not is_approved(storage, "r1", "plan", judge(RUN, None, [RowCountRule(min_rows=11, severity="refuse")]))
    assert not is_approved(storage, "r2", "plan", FINDINGS)


def test_the_last_refusal_is_approved(local: Storage) -> None:
    first, second = (judge(RUN, None, [RowCountRule(min_rows=rows, severity="refuse")]) for rows in (5, 6))
    record_refusal(local, "r1", "plan", "run r0", first)
    record_refusal(local, "r1", "plan", "run r0", second)
    approve_run(local, "r1")

    assert [False, True] == [is_approved(local, "r1", "plan", findings) for findings in (first, second)]


def test_a_run_passes_the_gate_once_what_it_is_refused_for_is_approved(place: str) -> None:
    storage = open_storage(place)
    publish(storage, "r0", 1)
    before = TableStatistics(rows=3, inputs=collect_statistics(pa.table({"age": [7.0] * 50})))
    save_statistics(storage, "r0", "plan", before)
    run = TableStatistics(rows=3, inputs=collect_statistics(pa.table({"age": [1.0] * 50})))
    gate = Gate(rules=(MeanShiftRule(severity="refuse"), RangeRule(maximum=0)))

    # The baseline has no deviation, so that the distance is infinite: that too must be written and read.
    for _ in range(2):
        with pytest.raises(ApprovalNeeded, match=r"it breaks 1:\n  - input age: mean 1, in the baseline 7"):
            pass_gate(storage, "plan", gate, run)
    approve_run(storage, "r1")
    passed = pass_gate(storage, "plan", gate, run)

    assert (True, 2, "run r0") == (passed.approved, len(passed.findings), passed.title)
    with pytest.raises(ApprovalNeeded):
        pass_gate(storage, "another plan", gate, run)


def test_the_first_run_of_a_destination_passes_with_what_could_not_be_judged(local: Storage) -> None:
    passed = pass_gate(local, "plan", Gate(), RUN)

    assert isinstance(passed.baseline, NoBaseline)
    assert (False, ["not judged"]) == (passed.approved, [finding.outcome for finding in passed.findings])
    assert {} == list_refusals(local, "r1")
