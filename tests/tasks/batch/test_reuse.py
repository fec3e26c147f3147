"""A run has the parts of earlier runs where it would make the same, and its table is that of a run of all rows."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from serving.faults import ProcessFailure
from tasks.batch import reuse
from tasks.batch.chunk_layout import cut_chunks
from tasks.batch.dataset import SourceFile
from tasks.batch.manifest import Manifest, find_damaged_parts, find_manifest, open_predictions
from tasks.batch.options import BatchOptions
from tasks.batch.plan import Plan, run_key
from tasks.batch.publish import audit_parts, publish
from tasks.batch.resolve import CompleteRun, RunRequest, find_run
from tasks.batch.run_records import confirm_plan
from tasks.batch.score import Scorer
from tasks.batch.scoring_result import ScoringResult
from tasks.batch.source import pin_source
from tasks.batch.verify import verify_run
from tasks.storage import Storage, open_storage
from tests.simulation.data import CONTRACT, ToyModel, ToyResolved, load_toy

OPTIONS = BatchOptions(key_columns=("id",), batch_size=4, rows_per_chunk=12, memory_mb=1024, max_reject_fraction=1.0)


def plan_call(source: Path, destination: Path, options: BatchOptions = OPTIONS, version: int = 1) -> Any:
    """Plan a call of the toy model, or find its run complete."""
    resolved: Any = ToyResolved(version)
    snapshot = pin_source(str(source), str(destination))
    key = run_key(resolved.pin, snapshot, CONTRACT, options)
    request = RunRequest(resolved=resolved, snapshot=snapshot, contract=CONTRACT, options=options, key=key)
    load: Any = load_toy
    return find_run(request, open_storage(str(destination)), f"flow-{key}", load=load)


@dataclass(frozen=True)
class DyingModel(ToyModel):
    """A model whose process dies over one value, and which raises an error over another one."""

    def predict(self, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Return y of N rows. Raises ProcessFailure and ValueError."""
        if (inputs["x"][:, 1] == 0.125).any():
            end = "the model's process died (SIGSEGV)"
            raise ProcessFailure(end, "row")
        if (inputs["x"][:, 1] == 300 / 8 + 0.25).any():
            message = "no such thing"
            raise ValueError(message)
        return super().predict(inputs)


def score_plan(
    plan: Plan, storage: Storage, shards: list[int] | None = None, kind: type[ToyModel] = ToyModel
) -> ScoringResult:
    """Score what is missing of a plan, or of some of its shards."""
    model = kind(int(plan.model.version))
    scorer = Scorer(plan=plan, destination=storage, model=model, max_reject_fraction=1.0)
    result = ScoringResult()
    for shard in scorer.scheduler.begin():
        if shards is None or shard in shards:
            result.add(scorer.score_shard(shard))
    return result


def call(source: Path, destination: Path, options: BatchOptions = OPTIONS, version: int = 1) -> tuple[Plan, int]:
    """Call as the flow does; return the plan, and how many rows were scored."""
    run, storage = plan_call(source, destination, options, version), open_storage(str(destination))
    if isinstance(run, CompleteRun):
        return run.plan, 0
    result = score_plan(run.plan, storage)
    publish(storage, confirm_plan(storage, run.plan), audit_parts(storage, run.plan))
    return run.plan, result.rows


def read_parts(destination: Path, run: str) -> list[bytes]:
    """Return the bytes of the parts of a published run, in the order of its table."""
    manifest = find_manifest(open_storage(str(destination)), run)
    assert manifest is not None
    return [(destination / part.path).read_bytes() for part in manifest.parts]


def write(path: Path, start: int, rows: int, group: int = 9) -> None:
    """Write a file of rows whose numbers begin somewhere; one in seven lacks a value."""
    ids = np.arange(start, start + rows)
    a = pa.array((ids % 50) / 4, mask=ids % 7 == 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": ids, "a": a, "b": ids / 8}), path, row_group_size=group)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Ten files of 24 rows."""
    for at in range(10):
        write(tmp_path / "in" / f"f{at}.parquet", at * 100, 24, group=12)
    return tmp_path / "in"


def published(plan: Plan, destination: Path) -> Manifest:
    manifest = find_manifest(open_storage(str(destination)), plan.run)
    assert manifest is not None
    return manifest


def test_one_changed_file_of_ten_is_all_that_is_scored(source: Path, tmp_path: Path) -> None:
    first, scored = call(source, tmp_path / "out")
    write(source / "f4.parquet", 5000, 24, group=12)
    second, again = call(source, tmp_path / "out")
    full, _ = call(source, tmp_path / "full")

    assert (240, 24, 216) == (scored, again, second.rows_reused)
    assert read_parts(tmp_path / "full", full.run) == read_parts(tmp_path / "out", second.run)
    assert f"since {first.run}, the files of 2 chunks are new or changed." == second.reuse_note
    assert not list((tmp_path / "out" / f"run={second.run}").glob("part-00000-0000*"))


def test_a_run_of_a_run_of_a_run_refers_to_the_parts_of_the_first(source: Path, tmp_path: Path) -> None:
    first, _ = call(source, tmp_path / "out")
    for at in range(3):
        write(source / f"f{at}.parquet", 5000 + 100 * at, 24, group=12)
        last, scored = call(source, tmp_path / "out")
        assert 24 == scored

    folders = {part.path.split("/")[0] for part in published(last, tmp_path / "out").parts}
    assert 4 == len(folders)
    assert f"run={first.run}" in folders
    assert "complete" == verify_run(open_storage(str(tmp_path / "out")), last.run).state


@pytest.mark.parametrize(
    ("options", "version", "why"),
    [
        (OPTIONS.model_copy(update={"reuse": "none"}), 1, "reuse is 'none'"),
        (OPTIONS.model_copy(update={"rescore": "again"}), 1, "its options, columns or signature were others"),
        (OPTIONS.model_copy(update={"batch_size": 6}), 1, "its options, columns or signature were others"),
        (OPTIONS, 2, "it was scored by models:/toy/1"),
        (OPTIONS.model_copy(update={"key_columns": ()}), 1, "its options, columns or signature were others"),
    ],
)
def test_nothing_is_reused_of_another_call_and_the_plan_says_why(
    source: Path, tmp_path: Path, options: BatchOptions, version: int, why: str
) -> None:
    call(source, tmp_path / "out")
    write(source / "f4.parquet", 5000, 24)
    plan, scored = call(source, tmp_path / "out", options, version)

    assert (240, 0) == (scored, plan.rows_reused)
    assert why in plan.reuse_note


def test_parts_of_other_versions_are_reused_where_the_caller_allows_any(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(source, tmp_path / "out")
    write(source / "f4.parquet", 5000, 24, group=12)
    monkeypatch.setattr(reuse, "describe_arithmetic", lambda: "another processor")
    strict, scored = call(source, tmp_path / "out")
    write(source / "f4.parquet", 6000, 24, group=12)
    monkeypatch.setattr(reuse, "describe_arithmetic", lambda: "a third one")
    _, few = call(source, tmp_path / "out", OPTIONS.model_copy(update={"reuse": "any"}))

    assert (240, 24) == (scored, few)
    assert "on another processor: " in strict.reuse_note
    assert "another processor" in strict.reuse_note


def test_without_keys_a_part_holds_the_names_of_its_files_and_is_reused_under_the_same_name_alone(
    source: Path, tmp_path: Path
) -> None:
    options = OPTIONS.model_copy(update={"key_columns": ()})
    call(source, tmp_path / "out", options)
    write(source / "f4.parquet", 5000, 24, group=12)
    second, scored = call(source, tmp_path / "out", options)
    full, _ = call(source, tmp_path / "full", options)

    assert 24 == scored
    assert read_parts(tmp_path / "full", full.run) == read_parts(tmp_path / "out", second.run)


def test_a_reused_part_that_is_gone_before_planning_is_scored(source: Path, tmp_path: Path) -> None:
    first, _ = call(source, tmp_path / "out")
    (tmp_path / "out" / published(first, tmp_path / "out").parts[0].path).unlink()
    write(source / "f4.parquet", 5000, 24, group=12)
    second, scored = call(source, tmp_path / "out")

    assert 36 == scored
    assert second.reuse_note.endswith("chunks are new or changed, and 1 parts are gone or cut short.")


def test_parts_with_rows_that_the_machine_may_have_failed_on_are_scored_again(source: Path, tmp_path: Path) -> None:
    plan, storage = plan_call(source, tmp_path / "out").plan, open_storage(str(tmp_path / "out"))
    score_plan(plan, storage, kind=DyingModel)
    publish(storage, confirm_plan(storage, plan), audit_parts(storage, plan))
    write(source / "f4.parquet", 5000, 24, group=12)
    second, scored = call(source, tmp_path / "out")

    assert {"the model's process died (SIGSEGV)", "ValueError: no such thing", "null"} == {
        count.reason for count in published(plan, tmp_path / "out").rejects
    }
    # The changed file, and the chunk of the row that ended the process; the model's own error would come again.
    assert 24 + 12 == scored
    assert "1 parts have rows that ended the model's process, or took too long" in second.reuse_note


@pytest.mark.parametrize("damage", ["gone", "cut", "other bytes"])
def test_a_reused_part_that_is_damaged_after_planning_is_scored_again_where_it_was(
    source: Path, tmp_path: Path, damage: str
) -> None:
    first, _ = call(source, tmp_path / "out")
    write(source / "f4.parquet", 5000, 24, group=12)
    plan, storage = plan_call(source, tmp_path / "out").plan, open_storage(str(tmp_path / "out"))
    path = tmp_path / "out" / plan.reused[3].path
    whole = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(whole[:-20] if damage == "cut" else bytes(len(whole)))
    score_plan(plan, storage)
    audit = audit_parts(storage, plan)
    if audit.missing:
        assert (plan.reused[3].shard, plan.reused[3].place) in audit.missing
        score_plan(plan, storage)
    publish(storage, confirm_plan(storage, plan), audit_parts(storage, plan))

    assert whole == path.read_bytes()
    assert not find_damaged_parts(storage, published(first, tmp_path / "out"))
    full, _ = call(source, tmp_path / "full")
    assert read_parts(tmp_path / "full", full.run) == read_parts(tmp_path / "out", plan.run)


def test_a_published_run_whose_reused_part_is_deleted_is_damaged_and_the_same_call_mends_it(
    source: Path, tmp_path: Path
) -> None:
    first, _ = call(source, tmp_path / "out")
    write(source / "f4.parquet", 5000, 24, group=12)
    second, _ = call(source, tmp_path / "out")
    wanted = read_parts(tmp_path / "out", second.run)
    shutil.rmtree(tmp_path / "out" / f"run={first.run}")
    assert "damaged" == verify_run(open_storage(str(tmp_path / "out")), second.run).state
    _, scored = call(source, tmp_path / "out")

    assert 216 == scored
    assert wanted == read_parts(tmp_path / "out", second.run)


def test_sizes_of_a_tuning_are_kept_so_that_chunks_stay_as_they_were(source: Path, tmp_path: Path) -> None:
    options = OPTIONS.model_copy(update={"batch_size": None, "rows_per_chunk": None, "slots": 1})
    first, _ = call(source, tmp_path / "out", options)
    for at in range(10, 16):
        write(source / f"f{at}.parquet", at * 100, 24, group=12)
    second, scored = call(source, tmp_path / "out", options)

    assert (first.batch_size, first.rows_per_chunk) == (second.batch_size, second.rows_per_chunk)
    assert 24 * 6 <= scored < 24 * 8


def test_a_run_of_a_far_larger_dataset_is_cut_anew(source: Path, tmp_path: Path) -> None:
    options = OPTIONS.model_copy(update={"batch_size": None, "rows_per_chunk": None, "slots": 1})
    first, _ = call(source, tmp_path / "out", options)
    write(source / "large.parquet", 10_000, 24_000, group=2_000)
    second, _ = call(source, tmp_path / "out", options)

    assert second.rows_per_chunk > 8 * first.rows_per_chunk


KINDS = ("add", "remove", "rewrite", "rename", "reorder", "truncate")
EDITS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 5), st.booleans()), min_size=1, max_size=4)


@settings(max_examples=12, deadline=None)
@given(edits=EDITS, keys=st.sampled_from([("id",), ()]))
def test_after_any_edits_and_kills_the_table_is_that_of_a_run_of_all_rows(
    edits: list[tuple[str, int, bool]], keys: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("edits")
    options = OPTIONS.model_copy(update={"key_columns": keys})
    for at in range(5):
        write(folder / "in" / f"f{at}.parquet", at * 100, 10 + 7 * at)
    call(folder / "in", folder / "out", options)
    for number, (kind, at, is_killed) in enumerate(edits):
        edit(folder / "in", kind, at, number)
        if is_killed:
            # As a kill leaves it: planned, some shards scored, nothing published.
            run = plan_call(folder / "in", folder / "out", options)
            if not isinstance(run, CompleteRun):
                score_plan(run.plan, open_storage(str(folder / "out")), [0])
            if at % 2:
                # The source goes on changing, and the run that was killed is never ended.
                continue
        plan, _ = call(folder / "in", folder / "out", options)
        full, _ = call(folder / "in", folder / f"full-{number}", options)

        assert read_parts(folder / f"full-{number}", full.run) == read_parts(folder / "out", plan.run)
        # The source may be what it was before: an earlier run is complete then, and not the newest.
        found, wanted = (open_predictions(str(folder / name), plan.run).collect() for name in ("out", f"full-{number}"))
        assert found.equals(wanted)


def edit(folder: Path, kind: str, at: int, number: int) -> None:
    """Change the files of a folder in one way."""
    files = sorted(folder.glob("*.parquet"))
    chosen = files[at % len(files)]
    if kind == "add":
        write(folder / f"a{number}.parquet", 10_000 + 100 * number, 5 + 11 * at)
    elif kind == "remove" and len(files) > 1:
        chosen.unlink()
    elif kind == "rewrite":
        write(chosen, 20_000 + 100 * number, 30)
    elif kind == "rename":
        chosen.rename(folder / f"z{number}.parquet")
    elif kind == "truncate":
        write(chosen, 30_000 + 100 * number, 3)
    elif kind == "reorder":
        other = files[(at + 1) % len(files)]
        swap = folder / "swap"
        chosen.rename(swap)
        other.rename(chosen)
        swap.rename(other)


class TestCuts:
    def files(self, rows: list[int]) -> list[SourceFile]:
        return [
            SourceFile(path=f"{at}", size=1000 + at, tag=f"t{at}", row_groups=(count,)) for at, count in enumerate(rows)
        ]

    def rows_by_mark(self, files: list[SourceFile], per_chunk: int) -> set[tuple[str, ...]]:
        return {tuple(files[piece.file].mark for piece in chunk.pieces) for chunk in cut_chunks(files, per_chunk, 64)}

    def test_large_files_end_their_chunks(self) -> None:
        files = self.files([100_000] * 100)
        assert {(file.mark,) for file in files} == self.rows_by_mark(files, 490_000)

    @pytest.mark.parametrize("at", [0, 57, 3_999])
    def test_a_small_file_that_is_added_changes_the_chunks_near_it_alone(self, at: int) -> None:
        files = self.files([1_000 + number % 700 for number in range(4_000)])
        before = self.rows_by_mark(files, 65_536)
        added = SourceFile(path="new", size=1, tag="new", row_groups=(1_500,))
        after = self.rows_by_mark([*files[:at], added, *files[at:]], 65_536)

        assert len(after - before) <= 6
        assert 100 < len(before) < 500

    def test_chunks_of_many_files_are_full_where_there_would_be_too_many(self) -> None:
        files = self.files([20_000] * 120_000)
        assert len(cut_chunks(files, 24_000, 64)) <= 120_000


@pytest.mark.parametrize("record", ["order/00000002.json", "{run}/manifest.json"])
def test_records_of_earlier_runs_that_do_not_read_are_passed_over(source: Path, tmp_path: Path, record: str) -> None:
    for at in range(2):
        write(source / "f0.parquet", 5000 + 100 * at, 24, group=12)
        last, _ = call(source, tmp_path / "out")
    (tmp_path / "out" / "_overnight" / record.format(run=last.run)).write_text("{")
    write(source / "f1.parquet", 9000, 24, group=12)
    _, scored = call(source, tmp_path / "out")

    assert 48 == scored
