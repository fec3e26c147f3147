"""A call is resolved, then found complete or planned, before anything is scored."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pyarrow as pa
import pytest
import torch
from deltalake import write_deltalake
from mlflow import MlflowClient

from serving.errors import BadInput, DestinationUnusable, ModelUnfit, RunDamaged, SchemaMismatch, SourceChanged
from serving.model.contract import ColumnPolicy
from serving.model.interface import Engine
from serving.model.loading import load_model
from tasks.batch import tuning
from tasks.batch.chunk_reader import open_reader
from tasks.batch.memory import check_memory, free_memory
from tasks.batch.options import BatchOptions
from tasks.batch.plan import Plan
from tasks.batch.planned_models import load_planned_model, open_planned_model
from tasks.batch.publish import audit_parts, publish
from tasks.batch.resolve import find_complete_run, find_run, restage_plan
from tasks.batch.run_records import save_plan
from tasks.batch.run_request import RunRequest, resolve_request
from tasks.storage import Storage, open_storage
from tests.support import register_script, write_customers
from tests.tasks.batch.small import put, put_parts


@pytest.fixture
def source(tmp_path: Path) -> str:
    return str(write_customers(tmp_path / "customers", rows=5_000, files=2, rows_per_group=1_000))


def test_pinning_a_call_writes_nothing(linear: str, source: str, tmp_path: Path) -> None:
    destination = str(tmp_path / "scores")
    request = resolve_request(linear, source, destination, BatchOptions())

    assert find_complete_run(open_storage(destination), request) is None
    assert not (tmp_path / "scores").exists()


def plan_run(request: RunRequest, destination: Storage) -> Plan:
    """Return the plan of a request that a flow run of its own makes."""
    return find_run(request, destination, str(uuid.uuid4())).plan


def test_copies_that_were_deleted_with_publishing_are_staged_again(linear: str, source: str, tmp_path: Path) -> None:
    table = pl.read_parquet(f"{source}/*.parquet")
    (tmp_path / "csv").mkdir()
    table.write_csv(tmp_path / "csv" / "customers.csv")
    destination = open_storage(str(tmp_path / "scores"))
    plan = plan_run(resolve_request(linear, str(tmp_path / "csv"), destination.url, BatchOptions()), destination)
    before = [destination.read(file.path) for file in plan.snapshot.files]
    destination.delete([entry.path for entry in destination.entries(f"{plan.folder}/staged")])
    again = restage_plan(plan, destination)

    assert before == [destination.read(file.path) for file in again.snapshot.files]
    assert [destination.find(file.path) for file in again.snapshot.files] == [
        file.entry for file in again.snapshot.files
    ]
    assert plan.snapshot.files[0].row_groups == again.snapshot.files[0].row_groups


def test_copies_that_come_out_otherwise_are_refused(linear: str, source: str, tmp_path: Path) -> None:
    (tmp_path / "csv").mkdir()
    pl.read_parquet(f"{source}/*.parquet").write_csv(tmp_path / "csv" / "customers.csv")
    destination = open_storage(str(tmp_path / "scores"))
    plan = plan_run(resolve_request(linear, str(tmp_path / "csv"), destination.url, BatchOptions()), destination)
    file = plan.snapshot.files[0].model_copy(update={"path": "_overnight/x/staged/another.parquet"})
    other = plan.model_copy(update={"snapshot": plan.snapshot.model_copy(update={"files": (file,)})})

    with pytest.raises(RunDamaged, match=r"staged/another\.parquet"):
        restage_plan(other, destination)


def test_a_run_over_parquet_has_no_copies(linear: str, source: str, tmp_path: Path) -> None:
    destination = open_storage(str(tmp_path / "scores"))
    plan = plan_run(resolve_request(linear, source, destination.url, BatchOptions()), destination)

    assert plan == restage_plan(plan, destination)
    assert [] == destination.entries(f"{plan.folder}/staged")


def test_a_plan_is_made_once_and_read_ever_after(linear: str, source: str, tmp_path: Path) -> None:
    destination = open_storage(str(tmp_path / "scores"))
    request = resolve_request(linear, source, destination.url, BatchOptions())
    first = plan_run(request, destination)
    second = plan_run(resolve_request(linear, source, destination.url, BatchOptions()), destination)

    assert first == second


def test_sizes_that_are_given_are_kept(linear: str, source: str, tmp_path: Path) -> None:
    destination = open_storage(str(tmp_path / "scores"))
    request = resolve_request(linear, source, destination.url, BatchOptions(batch_size=50, rows_per_chunk=500))
    plan = plan_run(request, destination)

    assert 50 == plan.batch_size
    assert {500} == {chunk.rows for chunk in plan.chunks.values()}


@pytest.mark.parametrize("null", [float("inf"), -1.5, "keep"])
def test_a_plan_is_read_back_with_the_policies_it_was_made_with(
    null: float | str, linear: str, source: str, tmp_path: Path
) -> None:
    destination = open_storage(str(tmp_path / "scores"))
    request = resolve_request(linear, source, destination.url, BatchOptions(policies={"a": ColumnPolicy(null=null)}))

    assert plan_run(request, destination) == plan_run(request, destination)


def test_a_plan_is_scored_with_the_very_files_it_was_made_for(linear: str, source: str, tmp_path: Path) -> None:
    destination = open_storage(str(tmp_path / "scores"))
    plan = plan_run(resolve_request(linear, source, destination.url, BatchOptions()), destination)
    other = plan.model_copy(update={"model": plan.model.model_copy(update={"digest": "0" * 64})})

    assert plan.model == open_planned_model(plan).pin
    with pytest.raises(ModelUnfit, match="must be those that run"):
        open_planned_model(other)


def test_stated_memory_grows_with_slots_and_chunks_not_with_rows(linear: str, tmp_path: Path) -> None:
    destination = open_storage(str(tmp_path / "scores"))
    options = BatchOptions(batch_size=100, rows_per_chunk=1_000)
    stated: list[list[int]] = []
    for rows in (5_000, 20_000):
        source = write_customers(tmp_path / str(rows), rows=rows, files=1, rows_per_group=1_000)
        plan = plan_run(resolve_request(linear, str(source), destination.url, options), destination)
        stated.append([check_memory(plan, slots, options) for slots in (1, 2)])

    assert stated[0] == stated[1]
    assert 2 * stated[0][0] == stated[0][1]


def test_free_memory_is_what_is_available_within_the_cgroup() -> None:
    files = {
        Path("/proc/meminfo"): "MemTotal: 100 kB\nMemAvailable:   64 kB\n",
        Path("/sys/fs/cgroup/memory.max"): "50000\n",
        Path("/sys/fs/cgroup/memory.current"): "10000\n",
    }

    assert 40_000 == free_memory(files.__getitem__)
    assert 65_536 == free_memory({**files, Path("/sys/fs/cgroup/memory.max"): "max\n"}.__getitem__)


def test_a_plan_that_was_tuned_is_scored_on_its_engine(
    linear: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_WORK_SECONDS_MIN", 0.0)
    destination = open_storage(str(tmp_path / "scores"))
    request = resolve_request(linear, source, destination.url, BatchOptions(slots=1))
    plan = plan_run(request, destination)
    other = plan.model_copy(update={"engine": Engine(threads=3)})
    with load_planned_model(other, request.resolved, request.options).slot():
        threads = torch.get_num_threads()

    assert plan.tuning is not None
    assert plan.tuning.engine == plan.engine
    assert 3 == threads


def test_a_delta_table_is_scored_by_its_version_and_a_newer_one_is_another_run(
    linear: str, source: str, tmp_path: Path
) -> None:
    table = pl.read_parquet(f"{source}/*.parquet")
    destination = open_storage(str(tmp_path / "scores"))
    write_deltalake(str(tmp_path / "table"), table.to_arrow())
    write_deltalake(str(tmp_path / "table"), table[:2_000].to_arrow(), mode="overwrite")
    first = resolve_request(linear, str(tmp_path / "table"), destination.url, BatchOptions())
    plan = plan_run(first, destination)
    write_deltalake(str(tmp_path / "table"), table[2_000:2_500].to_arrow(), mode="append")
    second = resolve_request(linear, str(tmp_path / "table"), destination.url, BatchOptions())

    assert (2_000, "1") == (plan.rows, plan.source.version)
    assert first.key != second.key
    assert plan == plan_run(first, destination)
    assert 2_500 == plan_run(second, destination).rows


@pytest.mark.parametrize("lost", [[], ["manifest.json"]], ids=["published", "ended before its manifest"])
def test_a_delta_table_does_not_get_the_rows_that_an_earlier_release_appended_once_more(
    linear: str, source: str, tmp_path: Path, lost: list[str]
) -> None:
    destination = open_storage(str(tmp_path / "scores"))
    options = BatchOptions(output="delta", rows_per_chunk=1_000)
    request = resolve_request(linear, source, destination.url, options)
    earlier = _as_of_earlier_release(plan_run(request, destination))
    destination.delete([entry.path for entry in destination.entries("_overnight")])
    put_parts(earlier, destination, rejects=())
    publish(destination, earlier, audit_parts(destination, earlier))
    save_plan(destination, earlier)
    destination.delete([f"{earlier.folder}/{name}" for name in lost])
    with pytest.raises(DestinationUnusable, match=rf"not get the rows of a call twice, but holds run {earlier.key}"):
        plan_run(request, destination)

    # Other files, or all of the table in place of them, are another matter.
    plan_run(resolve_request(linear, f"{source}/*-00.parquet", destination.url, options), destination)
    replacing = options.model_copy(update={"delta_mode": "replace"})
    plan_run(resolve_request(linear, source, destination.url, replacing), destination)


def _as_of_earlier_release(plan: Plan) -> Plan:
    """Return a plan with another key, without a digest or an order, over files that are pinned by one time each."""
    files = tuple(file.model_copy(update={"tag": file.tag.partition("/")[0]}) for file in plan.source.files)
    source = plan.source.model_copy(update={"files": files})
    return plan.model_copy(update={"key": "e" * 32, "run": "e" * 32, "digest": "", "order": 0, "source": source})


def test_a_local_source_rewritten_with_its_size_and_time_is_another_run_and_no_half_of_one(
    linear: str, source: str, tmp_path: Path
) -> None:
    destination = open_storage(str(tmp_path / "scores"))
    first = resolve_request(linear, source, destination.url, BatchOptions())
    plan = plan_run(first, destination)
    for file in Path(source).iterdir():
        before = file.stat()
        file.write_bytes(file.read_bytes())
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert first.key != resolve_request(linear, source, destination.url, BatchOptions()).key
    with pytest.raises(SourceChanged):
        next(open_reader(plan).blocks(plan.chunks[0, 0]))


def test_a_key_that_no_reader_reads_back_is_refused_before_anything_is_written(linear: str, tmp_path: Path) -> None:
    wide = pa.array([Decimal(at) for at in range(10)], pa.decimal256(40, 2))
    features = {name: pa.array([0.5] * 10, pa.float32()) for name in "abc"}
    put(f"{tmp_path}/in", {"x.parquet": pa.table({"key": wide, **features})})
    destination = open_storage(str(tmp_path / "scores"))
    request = resolve_request(linear, f"{tmp_path}/in", destination.url, BatchOptions(key_columns=("key",)))
    with pytest.raises(BadInput, match=r"got 'key' of type decimal256\(40, 2\): no more than 38 digits are read"):
        plan_run(request, destination)

    assert [] == [entry.path for entry in destination.entries() if entry.path.endswith((".parquet", "plan.json"))]


def test_a_key_column_that_stands_twice_is_refused(linear: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.csv").write_text("id,id,a,b,c\n1,2,0.5,0.5,0.5\n")
    destination = open_storage(str(tmp_path / "scores"))
    request = resolve_request(linear, f"{tmp_path}/in", destination.url, BatchOptions(key_columns=("id",)))
    with pytest.raises(SchemaMismatch, match=r"must be one column of the dataset, got \['id'\]"):
        plan_run(request, destination)


@pytest.mark.parametrize("output", ["parquet", "delta"])
def test_a_destination_with_a_newline_is_refused_before_anything_is_written(
    output: Literal["parquet", "delta"], linear: str, source: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="must hold no control characters"):
        resolve_request(linear, source, f"{tmp_path}/sco\nres", BatchOptions(output=output))

    assert ["customers"] == [path.name for path in tmp_path.iterdir()]


def test_a_loop_of_links_below_the_source_is_refused(linear: str, source: str, tmp_path: Path) -> None:
    (Path(source) / "more").mkdir()
    (Path(source) / "more/again").symlink_to(source)
    with pytest.raises(BadInput, match="must not lead back to a folder that it lies in"):
        resolve_request(linear, source, str(tmp_path / "scores"), BatchOptions())


def test_a_run_whose_alias_moves_while_it_is_planned_is_of_what_the_alias_names_then(
    registry: Path, source: str, tmp_path: Path
) -> None:
    one, two = (register_script("moved-while-planned", "pass") for _ in range(2))
    destination = open_storage(str(tmp_path / "scores"))
    point_alias(one)
    request = resolve_request("models:/moved-while-planned@champion", source, destination.url, BatchOptions())
    later: list[Plan] = []

    def load_slowly(*args: Any, **options: Any) -> Any:
        if not later:
            # Meanwhile the alias moves, and the run of that move is planned.
            point_alias(two)
            later.append(plan_run(resolve_request(two, source, destination.url, BatchOptions()), destination))
        return load_model(*args, **options)

    measured: list[str] = []

    @contextmanager
    def measure(step: str) -> Iterator[None]:
        measured.append(step)
        yield

    run = find_run(request, destination, str(uuid.uuid4()), load=load_slowly, measure=measure)

    assert ["load", "tune"] == measured
    assert [two, two] == [later[0].model.uri, run.plan.model.uri]
    assert (later[0].run, later[0].order) == (run.plan.run, run.plan.order)


def point_alias(uri: str) -> None:
    _, name, version = uri.split("/")
    MlflowClient().set_registered_model_alias(name, "champion", version)
