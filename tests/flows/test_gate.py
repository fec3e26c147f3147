"""A run whose gate refuses it stays unpublished until somebody approves it; warnings are told, and it is published."""

from __future__ import annotations

import asyncio
from pathlib import Path

import mlflow
import pyarrow.parquet as pq
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.sorting import ArtifactSort

from serving.errors import ApprovalNeeded, BadInput, NoCompleteRun
from tasks.batch.column_statistics import write_statistics
from tasks.batch.gate_records import approve_run, find_statistics
from tasks.batch.gate_rules import Gate, MeanShiftRule, NamedRun, PsiRule, StatisticsFile, TrainingSet
from tasks.batch.manifest import find_complete_manifest, find_manifest
from tasks.batch.options import BatchOptions
from tasks.batch.report import BatchReport
from tasks.batch.verify import verify_run
from tasks.storage import open_storage
from tests.support import log_training_dataset, register_network, write_moved

pytestmark = pytest.mark.usefixtures("serverless")

OPTIONS = BatchOptions(key_columns=("customer",), batch_size=128, rows_per_chunk=1024, experiment=None, gate=Gate())


def infer(model: str, source: Path, destination: Path, options: BatchOptions = OPTIONS) -> BatchReport:
    from flows.batch import batch_inference

    return batch_inference(model, str(source), str(destination), options)


def write(folder: Path, shift: float, rows: int = 4_000) -> Path:
    return write_moved(folder, shift, rows, rows_per_group=1_000)


def list_artifacts(run: str) -> set[str]:
    """Return the keys of the gate's artifacts of a run, on a server that has those of other runs too."""
    keys = ArtifactFilterKey(any_=["batch-gate", "batch-drift", "batch-drift-plot"])

    async def read() -> set[str]:
        async with get_client() as client:
            found = await client.read_artifacts(
                artifact_filter=ArtifactFilter(key=keys), sort=ArtifactSort.CREATED_DESC, limit=200
            )
        flow_runs = {artifact.flow_run_id for artifact in found if run in str(artifact.description)}
        return {str(artifact.key) for artifact in found if artifact.flow_run_id in flow_runs}

    return asyncio.run(read())


@pytest.mark.usefixtures("prefect")
def test_a_run_that_moved_is_refused_with_all_its_parts_and_published_once_it_is_approved(
    linear: str, tmp_path: Path
) -> None:
    scores, storage = tmp_path / "scores", open_storage(str(tmp_path / "scores"))
    first = infer(linear, write(tmp_path / "in", 0.0), scores)
    write(tmp_path / "in", 5.0)
    messages = []
    for _ in range(2):
        with pytest.raises(ApprovalNeeded, match=rf"beside run {first.run} it breaks \d+:") as refused:
            infer(linear, tmp_path / "in", scores)
        messages.append(str(refused.value))
    run = messages[0].split()[1]
    parts = sorted(scores.glob(f"run={run}/part-*"))
    approve_run(storage, run, "the team", "prices were raised")
    second = infer(linear, tmp_path / "in", scores)

    assert messages[0] == messages[1]
    assert f"overnight approve {scores} {run}" in messages[0]
    assert len(messages[0].splitlines()) <= 12
    assert 4 == len(parts)
    assert (run, 0) == (second.run, second.rows_scored)
    assert any("output score: mean" in finding for finding in second.findings)
    assert {"batch-gate", "batch-drift", "batch-drift-plot"} == list_artifacts(run)


def test_statistics_are_in_parts_and_beside_the_run_and_verify_reads_them(linear: str, tmp_path: Path) -> None:
    scores, storage = tmp_path / "scores", open_storage(str(tmp_path / "scores"))
    report = infer(linear, write(tmp_path / "in", 0.0), scores)
    statistics = find_statistics(storage, find_complete_manifest(storage, report.run, ""))
    table = pq.read_table(tmp_path / "in")

    assert statistics is not None
    assert (4_000, 0, set("abc"), {"score"}) == (
        *(statistics.rows, statistics.rejects),
        *(set(statistics.inputs), set(statistics.outputs)),
    )
    assert table["a"].to_numpy().min() == statistics.inputs["a"].minimum
    assert "complete" == verify_run(storage, report.run).state
    assert all("no baseline" in finding for finding in report.findings)


def test_a_run_that_is_like_the_one_before_is_published_without_a_word(linear: str, tmp_path: Path) -> None:
    infer(linear, write(tmp_path / "in", 0.0), tmp_path / "scores")
    report = infer(linear, write(tmp_path / "in", 0.001), tmp_path / "scores")

    assert ("scored", ()) == (report.status, report.findings)


def test_a_warning_publishes_and_is_in_the_report(linear: str, tmp_path: Path) -> None:
    gate = Gate(rules=(PsiRule(columns=("a",), severity="warn"), MeanShiftRule(columns=("b",), severity="warn")))
    options = OPTIONS.model_copy(update={"gate": gate})
    infer(linear, write(tmp_path / "in", 0.0), tmp_path / "scores", options)
    report = infer(linear, write(tmp_path / "in", 3.0), tmp_path / "scores", options)

    assert ["input a: psi", "input b: mean"] == sorted(" ".join(each.split()[:3]) for each in report.findings)


def test_a_baseline_that_is_not_there_is_told_before_anything_is_scored(linear: str, tmp_path: Path) -> None:
    gate = Gate(baseline=NamedRun(run="yesterday"))
    with pytest.raises(NoCompleteRun, match="must hold the run 'yesterday', the gate's baseline"):
        infer(linear, write(tmp_path / "in", 0.0), tmp_path / "scores", OPTIONS.model_copy(update={"gate": gate}))

    assert not list((tmp_path / "scores").glob("run=*"))


def test_a_file_of_the_training_set_is_a_baseline(linear: str, tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "scores"))
    first = infer(linear, write(tmp_path / "in", 0.0), tmp_path / "scores")
    statistics = find_statistics(storage, find_complete_manifest(storage, first.run, ""))
    assert statistics is not None
    (tmp_path / "training.json").write_bytes(write_statistics(statistics))
    gate = Gate(baseline=StatisticsFile(address=str(tmp_path / "training.json")))
    with pytest.raises(ApprovalNeeded, match=r"beside .*training\.json it breaks"):
        infer(linear, write(tmp_path / "in", 9.0), tmp_path / "other", OPTIONS.model_copy(update={"gate": gate}))


def test_what_the_model_was_trained_on_is_a_baseline_and_one_that_is_not_there_is_told_first(
    registry: Path, tmp_path: Path
) -> None:
    model = register_network("trained", seed=0)
    training = write(tmp_path / "training", 0.0)
    frame = pq.read_table(training).to_pandas()
    client = mlflow.MlflowClient()
    version = client.get_model_version(*model.removeprefix("models:/").split("/"))
    with mlflow.start_run(run_id=version.run_id):
        log_training_dataset(frame, f"{training}/customers.parquet", "first")
    ours, none = (Gate(baseline=TrainingSet(dataset=name)) for name in (None, "second"))
    source = write(tmp_path / "in", 9.0)
    with pytest.raises(BadInput, match="must have the dataset 'second' for training for the gate, got 'first'"):
        infer(model, source, tmp_path / "scores", OPTIONS.model_copy(update={"gate": none}))
    assert not list((tmp_path / "scores").glob("run=*"))
    moves = (MeanShiftRule(columns="a", severity="refuse"), MeanShiftRule(columns="score", severity="refuse"))
    gate = ours.model_copy(update={"rules": moves})
    with pytest.raises(
        ApprovalNeeded, match=rf"beside the training set of {model} \(.*customers.parquet\) it breaks 1:"
    ):
        infer(model, source, tmp_path / "scores", OPTIONS.model_copy(update={"gate": gate}))
    like = infer(
        model, write(tmp_path / "in", 0.001, rows=9_000), tmp_path / "scores", OPTIONS.model_copy(update={"gate": ours})
    )

    assert "scored" == like.status
    assert {"output score"} == {finding.partition(":")[0] for finding in like.findings}
    assert all("the baseline does not have it" in finding for finding in like.findings)


def test_a_run_that_was_planned_without_a_gate_can_not_be_judged(linear: str, tmp_path: Path) -> None:
    scores = tmp_path / "scores"
    plain = infer(linear, write(tmp_path / "in", 0.0), scores, OPTIONS.model_copy(update={"gate": None}))
    (scores / "_overnight" / plain.run / "manifest.json").unlink()
    with pytest.raises(BadInput, match=r"the run was planned without one\. Leave gate out"):
        infer(linear, tmp_path / "in", scores)

    assert find_manifest(open_storage(str(scores)), plain.run) is None


def test_parts_that_are_reused_have_their_statistics(linear: str, tmp_path: Path) -> None:
    write(tmp_path / "in", 0.0)
    (tmp_path / "in" / "customers.parquet").rename(tmp_path / "in" / "first.parquet")
    write(tmp_path / "in", 0.0, rows=2_000)
    infer(linear, tmp_path / "in", tmp_path / "scores")
    write(tmp_path / "in", 0.1, rows=2_000)
    report = infer(linear, tmp_path / "in", tmp_path / "scores")
    full = infer(linear, tmp_path / "in", tmp_path / "full")

    assert (2_000, 4_000) == (report.rows_scored, report.rows_reused)
    both = [open_storage(str(tmp_path / name)) for name in ("scores", "full")]
    found = [find_statistics(storage, find_complete_manifest(storage, full.run, "")) for storage in both]
    assert found[0] is not None
    assert found[0] == found[1]
