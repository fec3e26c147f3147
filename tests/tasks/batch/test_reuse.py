"""A run has the parts of earlier runs where it would make the same, and its table is that of a run of all rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from hypothesis import given, settings

from serving.errors import DestinationUnusable, PublishRefused
from serving.faults import ProcessFailure
from serving.model.contract import Contract
from tasks.batch import reuse
from tasks.batch.chunk_layout import cut_chunks
from tasks.batch.dataset import SourceFile
from tasks.batch.delta import list_table_files
from tasks.batch.manifest import Manifest, find_damaged_parts, find_manifest, open_predictions, open_rejects
from tasks.batch.options import BatchOptions
from tasks.batch.plan import Plan, run_key
from tasks.batch.publish import audit_parts, publish
from tasks.batch.resolve import CompleteRun, find_run
from tasks.batch.reuse import EarlierRuns, find_earlier_runs
from tasks.batch.run_records import confirm_plan
from tasks.batch.run_request import RunRequest
from tasks.batch.score import Scorer
from tasks.batch.scoring_result import ScoringResult
from tasks.batch.source import pin_source
from tasks.batch.verify import verify_run
from tasks.storage import Storage, open_storage
from tests.simulation.data import CONTRACT, ToyModel, ToyResolved, load_toy

OPTIONS = BatchOptions(key_columns=("id",), batch_size=4, rows_per_chunk=12, memory_mb=1024, max_reject_fraction=1.0)


def plan_call(
    source: Path, destination: Path, options: BatchOptions = OPTIONS, version: int = 1, contract: Contract = CONTRACT
) -> Any:
    """Plan a call of the toy model, or find its run complete."""
    resolved: Any = ToyResolved(version)
    snapshot = pin_source(str(source), str(destination))
    key = run_key(resolved.pin, snapshot, contract, options)
    request = RunRequest(resolved=resolved, snapshot=snapshot, contract=contract, options=options, key=key)
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


def call(
    source: Path, destination: Path, options: BatchOptions = OPTIONS, version: int = 1, contract: Contract = CONTRACT
) -> tuple[Plan, int]:
    """Call as the flow does; return the plan, and how many rows were scored."""
    run, storage = plan_call(source, destination, options, version, contract), open_storage(str(destination))
    if isinstance(run, CompleteRun):
        return run.plan, 0
    result = score_plan(run.plan, storage)
    publish(storage, confirm_plan(storage, run.plan), audit_parts(storage, run.plan))
    return run.plan, result.rows


def published(run: str, destination: Path) -> Manifest:
    manifest = find_manifest(open_storage(str(destination)), run)
    assert manifest is not None
    return manifest


def read_parts(destination: Path, run: str) -> list[bytes]:
    """Return the bytes of the parts of a published run, in the order of its table."""
    return [(destination / part.path).read_bytes() for part in published(run, destination).parts]


def write(path: Path, start: int, rows: int, group: int = 9, key: str = "int64") -> None:
    """Write a file of rows whose numbers begin somewhere; one in seven lacks a value."""
    ids = np.arange(start, start + rows)
    a = pa.array((ids % 50) / 4, mask=ids % 7 == 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": ids.astype(key), "a": a, "b": ids / 8}), path, row_group_size=group)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Ten files of 24 rows."""
    for at in range(10):
        write(tmp_path / "in" / f"f{at}.parquet", at * 100, 24, group=12)
    return tmp_path / "in"


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

    folders = {part.path.split("/")[0] for part in published(last.run, tmp_path / "out").parts}
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
    (tmp_path / "out" / published(first.run, tmp_path / "out").parts[0].path).unlink()
    write(source / "f4.parquet", 5000, 24, group=12)
    second, scored = call(source, tmp_path / "out")

    assert 36 == scored
    assert second.reuse_note.endswith("chunks are new or changed, and 1 parts are gone or cut short.")


@pytest.mark.parametrize("listed", [True, False], ids=["reasons in the manifest", "reasons in the parts alone"])
def test_parts_with_rows_that_the_machine_may_have_failed_on_are_scored_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, listed: bool
) -> None:
    if not listed:
        monkeypatch.setattr("tasks.batch.manifest._REASONS_MAX", 0)
    plan, storage = plan_call(source, tmp_path / "out").plan, open_storage(str(tmp_path / "out"))
    score_plan(plan, storage, kind=DyingModel)
    publish(storage, confirm_plan(storage, plan), audit_parts(storage, plan))
    write(source / "f4.parquet", 5000, 24, group=12)
    second, scored = call(source, tmp_path / "out")
    reasons = {count.reason for count in published(plan.run, tmp_path / "out").rejects}

    assert listed is (reasons == {"the model's process died (SIGSEGV)", "ValueError: no such thing", "null"})
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
    assert not find_damaged_parts(storage, published(first.run, tmp_path / "out"))
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


KINDS = ("add", "remove", "rewrite", "rename", "reorder", "truncate", "narrow")
EDITS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 5), st.booleans()), min_size=1, max_size=4)


@settings(max_examples=12)
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


REPLACE = OPTIONS.model_copy(update={"output": "delta", "delta_mode": "replace"})
UPSERT = OPTIONS.model_copy(update={"output": "delta", "delta_mode": "upsert"})


def read_delta(destination: Path) -> list[tuple[Any, ...]]:
    return sorted(pl.read_delta(str(destination)).rows(), key=lambda row: row[0])


def read_full(source: Path, destination: Path) -> list[tuple[Any, ...]]:
    """Return the rows of a run over a whole source into an empty destination."""
    plan, _ = call(source, destination)
    return sorted(open_predictions(str(destination), plan.run).collect().rows(), key=lambda row: row[0])


def score_changed_file(source: Path, destination: Path, options: BatchOptions) -> tuple[Plan, Storage]:
    """Publish a run, and score another one after a file of ten has changed; it is not published yet."""
    call(source, destination, options)
    write(source / "f4.parquet", 400, 24, group=12)
    plan, storage = plan_call(source, destination, options).plan, open_storage(str(destination))
    score_plan(plan, storage)
    return plan, storage


def read_actions(destination: Path, version: int) -> dict[str, list[str]]:
    """Return the paths that a commit of a Delta table adds and removes."""
    lines = (destination / "_delta_log" / f"{version:020d}.json").read_text().splitlines()
    actions = [json.loads(line) for line in lines]
    return {kind: [each[kind]["path"] for each in actions if kind in each] for kind in ("add", "remove")}


@pytest.mark.parametrize("options", [REPLACE, UPSERT], ids=["replace", "upsert"])
def test_a_delta_table_keeps_the_parts_of_files_that_did_not_change(
    source: Path, tmp_path: Path, options: BatchOptions
) -> None:
    out = tmp_path / "out"
    call(source, out, options)
    write(source / "f4.parquet", 400, 24, group=12)
    second, scored = call(source, out, options)
    changes = read_actions(out, 1)
    _, nothing = call(source, out, options)

    assert (24, 216, 0) == (scored, second.rows_reused, nothing)
    assert read_full(source, tmp_path / "full") == read_delta(out)
    assert [2, 2] == [len(paths) for paths in changes.values()]
    assert all(path.startswith(f"run={second.run}/") for path in changes["add"])
    assert "complete" == verify_run(open_storage(str(out)), second.run).state


def test_rows_that_are_gone_from_the_source_are_gone_from_a_table_that_is_replaced(
    source: Path, tmp_path: Path
) -> None:
    call(source, tmp_path / "out", REPLACE)
    (source / "f3.parquet").unlink()
    _, scored = call(source, tmp_path / "out", REPLACE)

    assert 0 == scored
    assert {"add": 0, "remove": 2} == {kind: len(paths) for kind, paths in read_actions(tmp_path / "out", 1).items()}
    assert read_full(source, tmp_path / "full") == read_delta(tmp_path / "out")


@pytest.mark.parametrize("options", [REPLACE, UPSERT], ids=["replace", "upsert"])
def test_parts_that_a_delta_table_has_rewritten_are_scored_again(
    source: Path, tmp_path: Path, options: BatchOptions
) -> None:
    call(source, tmp_path / "out", options)
    DeltaTable(tmp_path / "out").optimize.compact()
    write(source / "f4.parquet", 400, 24, group=12)
    plan, scored = call(source, tmp_path / "out", options)

    assert 240 == scored
    assert "no files of the Delta table any more" in plan.reuse_note
    assert read_full(source, tmp_path / "full") == read_delta(tmp_path / "out")


@pytest.mark.parametrize("options", [REPLACE, UPSERT], ids=["replace", "upsert"])
def test_parts_that_a_delta_table_gives_up_after_planning_are_added_under_other_names(
    source: Path, tmp_path: Path, options: BatchOptions
) -> None:
    out = tmp_path / "out"
    plan, storage = score_changed_file(source, out, options)
    DeltaTable(out).optimize.compact()
    publish(storage, confirm_plan(storage, plan), audit_parts(storage, plan))
    changes = read_actions(out, 2)
    # A vacuum that began before the commit deletes what the table had given up by then.
    for path in {part.path for part in plan.reused}:
        (out / path).unlink()

    assert 216 == plan.rows_reused
    assert 18 == len([path for path in changes["add"] if path.startswith(f"rewritten/{plan.run}/")])
    assert read_full(source, tmp_path / "full") == read_delta(out)
    assert read_delta(out) == sorted(open_predictions(str(out), plan.run).collect().rows(), key=lambda row: row[0])


def test_a_part_that_is_deleted_between_its_audit_and_the_commit_is_never_committed(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    plan, storage = score_changed_file(source, out, REPLACE)
    DeltaTable(out).optimize.compact()
    audit = audit_parts(storage, plan)
    (out / plan.reused[5].path).unlink()
    with pytest.raises(PublishRefused, match="since the run has it from an earlier one"):
        publish(storage, confirm_plan(storage, plan), audit)
    _, scored = call(source, out, REPLACE)

    assert 12 == scored
    assert read_full(source, tmp_path / "full") == read_delta(out)


def test_a_table_has_the_rows_of_two_equal_files_twice_where_an_earlier_run_has_their_parts(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    lines = [f"{at},{at if at % 5 else ''},3" for at in range(12)]
    for name in ("a.csv", "b.csv"):
        (source / name).write_text("\n".join(["id,a,b", *lines]))
    call(source, out)
    (source / "c.csv").write_text("id,a,b\n12,4,5\n")
    plan, scored = call(source, out)
    parts = published(plan.run, out).parts

    assert 3 == len({part.path for part in parts}) == len(parts)
    assert 13 == scored
    assert sorted([*range(12), *range(13)]) == sorted(open_predictions(str(out)).collect()["id"].cast(int).to_list())
    assert [0, 0, 5, 5, 10, 10] == sorted(open_rejects(str(out)).collect()["id"].cast(int).to_list())


def test_a_manifest_that_names_a_part_twice_is_read_twice(source: Path, tmp_path: Path) -> None:
    plan, _ = call(source, tmp_path / "out")
    path = tmp_path / "out/_overnight" / plan.run / "manifest.json"
    told = json.loads(path.read_text())
    told["parts"].append(told["parts"][0])
    path.write_text(json.dumps(told))

    assert 10 * 24 + told["parts"][0]["rows"] == open_predictions(str(tmp_path / "out")).collect().height


def test_a_delta_table_has_the_rows_of_two_equal_files_twice(source: Path, tmp_path: Path) -> None:
    """Two chunks that have the same part are two files of a table: it can't have one twice."""
    out, options = tmp_path / "out", REPLACE
    first, _ = call(source, out, options)
    plan = plan_call(source, tmp_path / "other", options).plan
    (run,) = [published(first.run, out)]
    doubled = plan.model_copy(update={"shards": (*plan.shards, plan.shards[0])})
    runs = EarlierRuns(manifests=(run,), made_with=plan.made_with, note="")
    referring = reuse.refer_to_parts(open_storage(str(out)), doubled, runs)
    paths = [part.path for part in referring.reused]

    assert len(doubled.chunks) - len(plan.shards[0]) == len(paths) == len(set(paths))
    assert "are another chunk's" in referring.reuse_note


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"output": "delta"}, "its rows are appended to a Delta table, which can't have a file twice"),
        ({"output": "iceberg", "iceberg_table": "a.b.c"}, "its rows go into an Iceberg table, by files of their own"),
    ],
)
def test_other_tables_get_every_row_scored_and_the_plan_says_why(
    tmp_path: Path, options: dict[str, Any], why: str
) -> None:
    given = OPTIONS.model_copy(update=options)
    found = find_earlier_runs(open_storage(str(tmp_path)), "", (), "models:/toy/1", given)

    assert () == found.manifests
    assert why in found.note


def test_no_part_is_kept_of_a_delta_table_with_deleted_rows(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan, storage = score_changed_file(source, out, REPLACE)
    log = out / "_delta_log" / f"{0:020d}.json"
    log.write_text("\n".join(json.dumps(delete_rows(json.loads(line))) for line in log.read_text().splitlines()))
    with pytest.raises(DestinationUnusable, match="must hold its files as they were added where a run keeps some"):
        publish(storage, confirm_plan(storage, plan), audit_parts(storage, plan))

    assert 216 == plan.rows_reused
    assert {} == list_table_files(storage).whole


def delete_rows(action: dict[str, Any]) -> dict[str, Any]:
    """Return an action of a log with deletion vectors, as if rows had been deleted from every file."""
    if "protocol" in action:
        features = {"readerFeatures": ["deletionVectors"], "writerFeatures": ["deletionVectors"]}
        return {"protocol": {"minReaderVersion": 3, "minWriterVersion": 7, **features}}
    if "add" in action:
        vector = {"storageType": "u", "pathOrInlineDv": "ab^-aqEH.-t@S}K{vb[*k^", "offset": 1}
        return {"add": {**action["add"], "deletionVector": {**vector, "sizeInBytes": 36, "cardinality": 2}}}
    return action


@settings(max_examples=8)
@given(edits=EDITS, options=st.sampled_from([REPLACE, UPSERT.model_copy(update={"missing_keys": "delete"})]))
def test_after_any_edits_and_kills_a_delta_table_has_the_rows_of_a_run_of_all_rows(
    edits: list[tuple[str, int, bool]], options: BatchOptions, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("edits")
    for at in range(5):
        write(folder / "in" / f"f{at}.parquet", at * 100, 10 + 7 * at)
    call(folder / "in", folder / "out", options)
    seen = {describe_source(folder / "in")}
    for number, (kind, at, is_killed) in enumerate(edits):
        edit(folder / "in", kind, at, number)
        if describe_source(folder / "in") in seen:
            # A call over what the source was before is that earlier run, and a table does not go back to one.
            continue
        seen.add(describe_source(folder / "in"))
        if is_killed:
            score_plan(plan_call(folder / "in", folder / "out", options).plan, open_storage(str(folder / "out")), [0])
            if at % 2:
                continue
        call(folder / "in", folder / "out", options)

        assert read_full(folder / "in", folder / f"full-{number}") == read_delta(folder / "out")


def describe_source(folder: Path) -> tuple[tuple[str, int], ...]:
    """Return the files of a source as a call on a local disk tells them from others."""
    return tuple((path.name, path.stat().st_mtime_ns) for path in sorted(folder.glob("*.parquet")))


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
    elif kind == "narrow":
        for path in files[at:]:
            narrowed = pq.read_table(path)
            pq.write_table(narrowed.set_column(2, "b", narrowed["b"].cast(pa.float32())), path, row_group_size=9)
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
