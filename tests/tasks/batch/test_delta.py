"""Delta Lake as the output: its types, its log, and what others do to the table; see also test_table_output.py."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from deltalake import write_deltalake
from deltalake.exceptions import CommitFailedError

from infra.local.s3 import S3Server
from serving.errors import DestinationUnusable, NoCompleteRun, PublishRefused, StorageDenied, StorageFault
from tasks.batch import delta
from tasks.batch.delta import check_delta
from tasks.batch.manifest import find_manifest, open_predictions
from tasks.batch.options import BatchOptions
from tasks.batch.part_footer import PartFooter
from tasks.batch.plan import Plan
from tasks.batch.publish import audit_parts, publish
from tasks.batch.runs import list_runs
from tasks.storage import Storage, open_storage
from tests.tasks.batch.small import a_contract, a_plan, put, put_parts
from tests.tasks.batch.tables import NEW, DeltaOutput, a_run, check, commit, describe_parts, find_footers, read_ids

DELTA = DeltaOutput()
APPEND, REPLACE = DELTA.options(), DELTA.options("replace")


def delete_a_row(destination: Storage, _: str) -> None:
    DELTA.open(destination).delete("id = 3")


def compact(destination: Storage, _: str) -> None:
    DELTA.open(destination).optimize.compact()


def replace_all(destination: Storage, place: str) -> None:
    commit(destination, a_run(place, REPLACE, range(25, 40)))


@pytest.mark.parametrize(("change", "parts"), [(delete_a_row, 3), (compact, 0), (replace_all, 0)])
def test_a_run_is_read_through_the_log_and_refused_where_the_table_has_not_all_of_it(
    destination: Storage, place: str, change: Callable[[Storage, str], None], parts: int
) -> None:
    plan = a_run(place, APPEND)
    publish(destination, plan, audit_parts(destination, plan))
    whole = (list_runs(destination), sorted(open_predictions(destination.url).collect()["id"]))
    change(destination, place)
    for is_vacuumed in (False, True):
        if is_vacuumed:
            DELTA.open(destination).vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
        with pytest.raises(NoCompleteRun, match=rf"4 parts of run {plan.run} as they were .* but has {parts} of them"):
            open_predictions(destination.url, plan.run)
        (told,) = list_runs(destination)
        assert ("complete", parts, 4, 25) == (told.state, told.parts, told.parts_planned, told.rows)
        assert f"{4 - parts} of its 4 parts are not in its table any more" in told.note

    assert ([("complete", 4, "")], list(range(25))) == ([(r.state, r.parts, r.note) for r in whole[0]], whole[1])


def test_a_table_that_another_has_just_created_is_written_to_and_not_created_again(
    place: str, destination: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = a_run(place, APPEND), a_run(place, APPEND, range(25, 40))
    parts = find_footers(destination, second)
    commit(destination, first)
    real = delta._delta_table
    seen = [None]
    # The second worker looked before the first one's commit.
    monkeypatch.setattr(delta, "_delta_table", lambda storage: seen.pop() if seen else real(storage))
    commit(destination, second, parts)

    assert ["WRITE", "CREATE TABLE"] == [made["operation"] for made in DELTA.open(destination).history()]
    assert list(range(40)) == read_ids(DELTA, destination)


def test_creations_that_race_make_one_table(tmp_path: Path) -> None:
    for attempt in range(15):
        place = f"{tmp_path}/{attempt}"
        plan, destination = a_run(place, APPEND, range(5)), open_storage(f"{place}/out")
        parts, barrier = find_footers(destination, plan), threading.Barrier(6)

        def race(_: int, given: tuple[Storage, Plan, tuple[PartFooter, ...]], barrier: threading.Barrier) -> None:
            barrier.wait()
            commit(*given)

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(race, range(6), [(destination, plan, parts)] * 6, [barrier] * 6))

        assert DELTA.open(destination).version() == 0
        assert list(range(5)) == read_ids(DELTA, destination)


def strangers(destination: Storage, table: pa.Table, **options: object) -> None:
    write_deltalake(destination.url, table, storage_options=delta.delta_options(destination), **options)  # type: ignore[call-overload]


@pytest.mark.parametrize("mode", [APPEND, REPLACE], ids=["append", "replace"])
def test_a_table_of_other_columns_is_refused_before_scoring_and_at_the_commit(
    destination: Storage, place: str, mode: BatchOptions
) -> None:
    plan = a_run(place, mode)
    strangers(destination, pa.table({"id": [1], "other": ["x"]}))
    told = r"'score' is float in the run and missing in the table; .* and 3 "
    for refused in (
        lambda: check(destination, plan),
        lambda: publish(destination, plan, audit_parts(destination, plan)),
    ):
        with pytest.raises(DestinationUnusable, match=told):
            refused()

    assert DELTA.open(destination).version() == 0
    assert read_ids(DELTA, destination) == [1]
    assert find_manifest(destination, plan.run) is None


@pytest.mark.parametrize(
    ("name", "value", "mode", "told"),
    [
        *(
            ("delta.constraints.small", "id >= 0", mode, "no rules for rows, but it has delta.constraints.small, ")
            for mode in ("append", "replace", "upsert")
        ),
        ("delta.appendOnly", "true", "replace", "must let its files be removed .* has delta.appendOnly=true. Take"),
    ],
)
def test_a_table_whose_rules_a_run_would_break_is_refused_before_scoring_and_at_the_commit(
    destination: Storage, place: str, name: str, value: str, mode: str, told: str
) -> None:
    commit(destination, a_run(place, APPEND))
    alter = DELTA.open(destination).alter
    if name == "delta.appendOnly":
        alter.set_table_properties({name: value})
    else:
        alter.add_constraint({"small": value})
    plan = a_run(place, DELTA.options(mode), range(25, 40))
    for refused in (
        lambda: check(destination, plan),
        lambda: publish(destination, plan, audit_parts(destination, plan)),
    ):
        with pytest.raises(DestinationUnusable, match=told):
            refused()

    assert list(range(25)) == read_ids(DELTA, destination)


def test_an_append_only_table_is_appended_to(destination: Storage, place: str) -> None:
    commit(destination, a_run(place, APPEND))
    DELTA.open(destination).alter.set_table_properties({"delta.appendOnly": "true"})
    plan = a_run(place, APPEND, range(25, 40))
    check(destination, plan)
    commit(destination, plan)

    assert list(range(40)) == read_ids(DELTA, destination)


def test_a_partitioned_table_or_one_without_nulls_is_refused(tmp_path: Path) -> None:
    plan = a_run(str(tmp_path), APPEND)
    schema = describe_parts(plan)
    table = schema.empty_table()
    generated = [field.with_metadata({"delta.generationExpression": "id"}) for field in schema]
    for name, made, told in (
        ("ruled", table.cast(pa.schema(generated)), "it has delta.generationExpression of 'id', "),
        ("partitioned", table, r"but it is partitioned by \['label'\]\. Choose another destination\."),
        ("strict", table.cast(pa.schema([field.with_nullable(field.name != "score") for field in schema])), "not null"),
    ):
        destination = open_storage(str(tmp_path / name))
        strangers(destination, made, partition_by=["label"] if name == "partitioned" else None)
        with pytest.raises(DestinationUnusable, match=told):
            check_delta(destination, schema, NEW)


@pytest.mark.parametrize(
    "given",
    [
        *(pa.uint64(), pa.time64("us"), pa.duration("s"), pa.timestamp("ns"), pa.timestamp("ns", "UTC")),
        *(pa.timestamp("us", "Europe/Berlin"), pa.null(), pa.list_(pa.time32("s")), pa.float16()),
        pa.struct({"t": pa.timestamp("ns")}),
    ],
    ids=str,
)
def test_a_type_that_delta_or_its_readers_lack_is_told_before_scoring(local: Storage, given: pa.DataType) -> None:
    with pytest.raises(DestinationUnusable, match=r"types that Delta and its readers have, got key \(") as caught:
        check_delta(local, pa.schema([("key", given), ("fine", pa.int64())]), NEW)

    assert str(given) in str(caught.value)


KEYS = {
    "dictionary": pa.array(["x", None]).dictionary_encode(),
    "large text": pa.array(["x", None], pa.large_string()),
    "small unsigned": pa.array([255, None], pa.uint8()),
    "unsigned": pa.array([2**32 - 1, None], pa.uint32()),
    "timestamp": pa.array([1, None], pa.timestamp("us")),
    "seconds": pa.array([1, None], pa.timestamp("s")),
    "UTC": pa.array([1, None], pa.timestamp("us", "UTC")),
    "date": pa.array([1, None], pa.date32()),
    "decimal": pa.array([1, None], pa.decimal128(10, 2)),
    "binary": pa.array([b"\xff", None]),
    "tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(4, dtype=np.float32).reshape(2, 2)),
    "struct": pa.array([{"x": 1, "y": ["z"]}, None]),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_of_many_types_are_read_by_every_reader(tmp_path: Path, name: str) -> None:
    place = str(tmp_path)
    source = put(f"{place}/in", {"a.parquet": {"key": KEYS[name], "a": np.zeros(2, np.float32)}})
    options = APPEND.model_copy(update={"key_columns": ("key",)})
    plan = a_plan(source, f"{place}/out", options, contract=a_contract("a"))
    destination = open_storage(f"{place}/out")
    check(destination, plan)
    put_parts(plan, destination)
    commit(destination, plan)
    check(destination, plan)
    polars = pl.scan_delta(destination.url).collect()["key"].to_list()
    arrow = DELTA.open(destination).to_pyarrow_dataset().to_table()["key"].to_pylist()

    assert KEYS[name].to_pylist() == polars == arrow


def test_a_vacuum_leaves_what_is_published_and_the_bookkeeping(destination: Storage, place: str) -> None:
    plan = a_run(place, APPEND)
    destination.put_new(f"{plan.folder}/plan.json", plan.model_dump_json().encode())
    publish(destination, plan, audit_parts(destination, plan))
    before = destination.entries()
    DELTA.open(destination).vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)

    assert set(before) <= set(destination.entries())
    assert list(range(25)) == read_ids(DELTA, destination)


def test_a_broken_log_is_told(local: Storage, tmp_path: Path) -> None:
    plan = a_run(str(tmp_path), APPEND)
    local.put_new("_delta_log/00000000000000000000.json", b"not a log")
    with pytest.raises(DestinationUnusable, match=r"The Delta table at .* must open, got: "):
        check(local, plan)


def test_a_table_that_takes_no_commit_is_publish_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def fail(*_: object) -> None:
        tries.append(1)
        message = "somebody else was first"
        raise CommitFailedError(message)

    plan = a_run(str(tmp_path), APPEND)
    destination = open_storage(f"{tmp_path}/out")
    monkeypatch.setattr(delta, "_commit", fail)
    with pytest.raises(PublishRefused, match=r"must take a commit, got: somebody else was first\. Call again"):
        publish(destination, plan, audit_parts(destination, plan))

    assert len(tries) == 20
    assert find_manifest(destination, plan.run) is None


def test_an_identity_that_may_only_read_is_storage_denied(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    place = f"s3://lake/{uuid.uuid4().hex}"
    plan = a_run(place, APPEND)
    destination = open_storage(f"{place}/out")
    parts = find_footers(destination, plan)
    for name, value in s3.read_only_environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StorageDenied, match=r"The Delta table at s3://lake/.* must be writable, got: "):
        commit(destination, plan, parts)


def test_a_folder_that_may_not_be_written_is_storage_denied(
    public_folder: Path, unprivileged: Callable[[], AbstractContextManager[None]]
) -> None:
    plan = a_run(str(public_folder), APPEND)
    destination = open_storage(f"{public_folder}/out")
    parts = find_footers(destination, plan)
    (public_folder / "out").chmod(0o555)
    with unprivileged(), pytest.raises(StorageDenied, match=r"must be writable, got: .*ermission denied"):
        commit(destination, plan, parts)
    (public_folder / "out").chmod(0o755)

    assert os.geteuid() == os.getuid()


@pytest.mark.usefixtures("s3")
def test_a_server_that_does_not_answer_is_a_storage_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = a_run(str(tmp_path), APPEND)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageFault):
        check(open_storage("s3://lake/x"), plan)
