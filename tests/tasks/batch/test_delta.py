"""Delta Lake as the output: one commit adds exactly the parts, once, whichever worker commits."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import CommitFailedError

from infra.local.s3 import S3Server
from serving.errors import (
    DestinationUnusable,
    NoCompleteRun,
    OvernightError,
    PublishRefused,
    StorageDenied,
    StorageFault,
)
from serving.model.contract import Output
from tasks.batch import delta
from tasks.batch.dataset import open_dataset
from tasks.batch.delta import check_delta, commit_delta
from tasks.batch.manifest import find_manifest, open_predictions
from tasks.batch.options import BatchOptions
from tasks.batch.part_footer import PartFooter
from tasks.batch.parts import part_schema
from tasks.batch.plan import Plan
from tasks.batch.publish import audit_parts, claim_order_number, publish
from tasks.batch.runs import list_runs
from tasks.batch.source import pin_source
from tasks.storage import Storage, open_storage
from tests.tasks.batch.small import a_contract, a_plan, numbers, put, put_parts

APPEND = BatchOptions(rows_per_chunk=10, output="delta")
REPLACE = BatchOptions(rows_per_chunk=10, output="delta", delta_mode="replace")
NEW = "0" * 32  # the key of a run that no table holds
OUTPUTS = (
    Output(name="score", dtype="float32"),
    Output(name="label", dtype="str"),
    Output(name="count", dtype="uint16"),
    Output(name="wide", dtype="float32", shape=(2, 2)),
)


@pytest.fixture
def destination(place: str) -> Storage:
    return open_storage(f"{place}/out")


def a_run(place: str, rows: range = range(25), options: BatchOptions = APPEND) -> Plan:
    """Plan a run over rows with keys of their own, and write its parts."""
    source = put(f"{place}/in-{rows.start}-{rows.stop}", {"a.parquet": numbers(rows.start, rows.stop)})
    options = options.model_copy(update={"key_columns": ("id",)})
    plan = a_plan(source, f"{place}/out", options, contract=a_contract("a", "b", outputs=OUTPUTS))
    put_parts(plan, open_storage(f"{place}/out"))
    return plan


def footers(destination: Storage, plan: Plan) -> tuple[PartFooter, ...]:
    return audit_parts(destination, plan).footers


def commit(destination: Storage, plan: Plan) -> None:
    commit_delta(destination, plan, footers(destination, plan))


def the_table(destination: Storage) -> DeltaTable:
    return DeltaTable(destination.url, storage_options=delta.delta_options(destination))


def ids(destination: Storage) -> list[int]:
    options = delta.delta_options(destination)
    return sorted(pl.scan_delta(destination.url, storage_options=options).select("id").collect()["id"].to_list())


def test_every_reader_sees_the_same_rows(destination: Storage, place: str) -> None:
    plan = a_run(place)
    publish(destination, plan, audit_parts(destination, plan))
    options = delta.delta_options(destination)
    expected = open_predictions(destination.url).collect().sort("id")
    polars = pl.scan_delta(destination.url, storage_options=options).collect().sort("id")
    arrow = the_table(destination).to_pyarrow_dataset().to_table().sort_by("id")

    assert expected.height == 25
    assert expected.to_dicts() == polars.to_dicts() == arrow.to_pylist()


def test_one_commit_adds_exactly_the_parts_and_says_of_which_run(destination: Storage, place: str) -> None:
    plan = a_run(place)
    commit(destination, plan)
    table = the_table(destination)
    adds = pa.table(table.get_add_actions(flatten=True)).to_pylist()

    assert table.version() == 0
    assert sorted((footer.path, footer.bytes, footer.rows) for footer in footers(destination, plan)) == sorted(
        (add["path"], add["size_bytes"], add["num_records"]) for add in adds
    )
    assert (plan.run, "models:/churn/3") == tuple(
        table.history()[0][name] for name in ("overnight.run", "overnight.model")
    )


def test_a_second_commit_of_a_run_adds_nothing(destination: Storage, place: str) -> None:
    plan = a_run(place)
    for _ in range(3):
        commit(destination, plan)
    publish(destination, plan, audit_parts(destination, plan))

    assert the_table(destination).version() == 0
    assert list(range(25)) == ids(destination)


def test_another_run_is_appended(destination: Storage, place: str) -> None:
    first, second = a_run(place), a_run(place, range(25, 40))
    for plan in (first, second, first):
        commit(destination, plan)

    assert list(range(40)) == ids(destination)
    assert the_table(destination).version() == 1


def test_another_run_replaces_the_rows_of_the_first(destination: Storage, place: str) -> None:
    first, second = a_run(place, options=REPLACE), a_run(place, range(25, 40), REPLACE)
    commit(destination, first)
    commit(destination, second)

    assert list(range(25, 40)) == ids(destination)
    # A late call of the first run finds that it was committed, and does not bring its rows back.
    commit(destination, first)

    assert list(range(25, 40)) == ids(destination)


def delete_a_row(destination: Storage, _: str) -> None:
    the_table(destination).delete("id = 3")


def compact(destination: Storage, _: str) -> None:
    the_table(destination).optimize.compact()


def replace_all(destination: Storage, place: str) -> None:
    commit(destination, a_run(place, range(25, 40), REPLACE))


@pytest.mark.parametrize(("change", "parts"), [(delete_a_row, 3), (compact, 0), (replace_all, 0)])
def test_a_run_is_read_through_the_log_and_refused_where_the_table_has_not_all_of_it(
    destination: Storage, place: str, change: Callable[[Storage, str], None], parts: int
) -> None:
    plan = a_run(place)
    publish(destination, plan, audit_parts(destination, plan))
    whole = (list_runs(destination), sorted(open_predictions(destination.url).collect()["id"]))
    change(destination, place)
    for is_vacuumed in (False, True):
        if is_vacuumed:
            the_table(destination).vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
        with pytest.raises(NoCompleteRun, match=rf"4 parts of run {plan.run} as they were .* but has {parts} of them"):
            open_predictions(destination.url, plan.run)
        (told,) = list_runs(destination)
        assert ("complete", parts, 4, 25) == (told.state, told.parts, told.parts_planned, told.rows)
        assert f"{4 - parts} of its 4 parts are not in its table any more" in told.note

    assert ([("complete", 4, "")], list(range(25))) == ([(r.state, r.parts, r.note) for r in whole[0]], whole[1])


@pytest.mark.parametrize("options", [APPEND, REPLACE], ids=["append", "replace"])
@pytest.mark.parametrize("standing", [False, True], ids=["a new table", "a table"])
def test_threads_that_race_commit_a_run_once(
    destination: Storage,
    place: str,
    options: BatchOptions,
    standing: bool,  # noqa: FBT001
) -> None:
    if standing:
        commit(destination, a_run(place, range(100, 120)))
    plan = a_run(place, options=options)
    parts = footers(destination, plan)
    barrier = threading.Barrier(6)

    def race(_: int) -> None:
        barrier.wait()
        commit_delta(destination, plan, parts)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(race, range(6)))

    kept = list(range(100, 120)) if standing and options is APPEND else []
    assert list(range(25)) + kept == ids(destination)
    assert the_table(destination).version() == int(standing)


def test_a_table_that_another_has_just_created_is_written_to_and_not_created_again(
    place: str, destination: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = a_run(place), a_run(place, range(25, 40))
    parts = footers(destination, second)
    commit(destination, first)
    real = delta._delta_table
    seen = [None]
    # The second worker looked before the first one's commit.
    monkeypatch.setattr(delta, "_delta_table", lambda storage: seen.pop() if seen else real(storage))
    commit_delta(destination, second, parts)

    assert ["WRITE", "CREATE TABLE"] == [made["operation"] for made in the_table(destination).history()]
    assert list(range(40)) == ids(destination)


def test_creations_that_race_make_one_table(tmp_path: Path) -> None:
    for attempt in range(15):
        place = f"{tmp_path}/{attempt}"
        plan, destination = a_run(place, range(5)), open_storage(f"{place}/out")
        parts, barrier = footers(destination, plan), threading.Barrier(6)

        def race(_: int, given: tuple[Storage, Plan, tuple[PartFooter, ...]], barrier: threading.Barrier) -> None:
            barrier.wait()
            commit_delta(*given)

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(race, range(6), [(destination, plan, parts)] * 6, [barrier] * 6))

        assert the_table(destination).version() == 0
        assert list(range(5)) == ids(destination)


def commit_in_child(address: str, plan: str, start: float) -> str:
    """Commit a run in a process of its own, all at one time."""
    destination = open_storage(address)
    mine = Plan.model_validate_json(plan)
    parts = footers(destination, mine)
    time.sleep(max(0.0, start - time.time()))
    try:
        commit_delta(destination, mine, parts)
    except OvernightError as error:
        return f"{type(error).__name__}: {error}"
    return "done"


@pytest.mark.machines
def test_processes_that_race_commit_each_run_once(destination: Storage, place: str) -> None:
    plans = [a_run(place), a_run(place, range(25, 40))]
    given = [plan.model_dump_json() for plan in plans for _ in range(2)]
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        start = time.time() + 4
        told = list(pool.map(commit_in_child, [destination.url] * 4, given, [start] * 4))

    assert told == ["done"] * 4
    assert list(range(40)) == ids(destination)
    assert the_table(destination).version() == 1


def test_runs_that_race_are_both_appended(destination: Storage, place: str) -> None:
    plans = [a_run(place, range(start, start + 10)) for start in (0, 10, 20)]
    barrier = threading.Barrier(3)

    def race(plan: Plan) -> None:
        parts = footers(destination, plan)
        barrier.wait()
        commit_delta(destination, plan, parts)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(race, plans))

    assert list(range(30)) == ids(destination)


def numbered(plan: Plan, order: int) -> Plan:
    return plan.model_copy(update={"order": order})


def test_an_older_run_does_not_replace_a_newer_one(destination: Storage, place: str) -> None:
    older, newer = numbered(a_run(place, options=REPLACE), 1), numbered(a_run(place, range(25, 40), REPLACE), 2)
    commit(destination, newer)
    with pytest.raises(PublishRefused, match=r"must not go back to an older run.*number 2.*number 1: it was planned"):
        publish(destination, older, audit_parts(destination, older))

    assert list(range(25, 40)) == ids(destination)
    assert find_manifest(destination, older.run) is None
    # What the message says: planned again, it is the newest, and the parts that are there are those of its plan.
    again = numbered(
        older, claim_order_number(destination, older.run, above=check_delta(destination, a_schema(older, place), NEW))
    )
    publish(destination, again, audit_parts(destination, again))
    assert list(range(25)) == ids(destination)


def test_an_older_run_is_appended_beside_newer_ones_but_not_after_one_that_replaced_all(
    destination: Storage, place: str
) -> None:
    first, second, third = (numbered(a_run(place, range(at, at + 5)), at // 5 + 1) for at in (0, 5, 10))
    for plan in (second, first):
        commit(destination, plan)
    assert list(range(10)) == ids(destination)
    commit(destination, numbered(a_run(place, range(25, 40), REPLACE), 9))
    with pytest.raises(PublishRefused, match="must not go back to an older run"):
        commit(destination, third)

    assert list(range(25, 40)) == ids(destination)


def test_a_run_that_the_table_holds_from_another_plan_is_not_added_again(destination: Storage, place: str) -> None:
    plan = a_run(place)
    commit(destination, plan)
    replanned = plan.model_copy(update={"digest": "0" * 64})
    put_parts(replanned, destination)
    with pytest.raises(PublishRefused, match="holds those of another plan of the run"):
        publish(destination, replanned, audit_parts(destination, replanned))
    with pytest.raises(DestinationUnusable, match="already, whose plan below _overnight is gone"):
        check_delta(destination, a_schema(plan, place), plan.key)

    assert list(range(25)) == ids(destination)


def test_the_order_goes_on_above_what_the_table_holds(destination: Storage, place: str) -> None:
    plan = numbered(a_run(place), 7)
    commit(destination, plan)
    held = check_delta(destination, a_schema(plan, place), NEW)

    assert (7, 8) == (held, claim_order_number(destination, "b", above=held))
    assert 9 == claim_order_number(destination, "c")


def a_schema(plan: Plan, place: str) -> pa.Schema:
    dataset = open_dataset(pin_source(f"{place}/in-0-25", f"{place}/out"), ["a", "b"], ["id"])
    return part_schema(plan.contract, plan.options, dataset)


def test_a_destination_without_a_table_or_with_the_runs_own_is_fine(destination: Storage, place: str) -> None:
    plan = a_run(place)
    check_delta(destination, a_schema(plan, place), NEW)
    commit(destination, plan)
    check_delta(destination, a_schema(plan, place), NEW)


def strangers(destination: Storage, table: pa.Table, **options: object) -> None:
    write_deltalake(destination.url, table, storage_options=delta.delta_options(destination), **options)  # type: ignore[call-overload]


@pytest.mark.parametrize("mode", [APPEND, REPLACE], ids=["append", "replace"])
def test_a_table_of_other_columns_is_refused_before_scoring_and_at_the_commit(
    destination: Storage, place: str, mode: BatchOptions
) -> None:
    plan = a_run(place, options=mode)
    strangers(destination, pa.table({"id": [1], "other": ["x"]}))
    for refused in (
        lambda: check_delta(destination, a_schema(plan, place), NEW),
        lambda: publish(destination, plan, audit_parts(destination, plan)),
    ):
        with pytest.raises(
            DestinationUnusable, match=r"'score' is float in the run and missing in the table; .* and 2 "
        ):
            refused()

    assert the_table(destination).version() == 0
    assert ids(destination) == [1]
    assert find_manifest(destination, plan.run) is None


def test_a_partitioned_table_or_one_without_nulls_is_refused(tmp_path: Path) -> None:
    plan = a_run(str(tmp_path))
    schema = a_schema(plan, str(tmp_path))
    table = schema.empty_table()
    for name, made, told in (
        ("partitioned", table, r"no partitions, but it is partitioned by \['label'\]\."),
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
        *(
            pa.timestamp("us", "Europe/Berlin"),
            pa.null(),
            pa.list_(pa.time32("s")),
            pa.struct({"t": pa.timestamp("ns")}),
        ),
        pa.float16(),
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
    dataset = open_dataset(pin_source(source, destination.url), ["a"], ["key"])
    check_delta(destination, part_schema(plan.contract, options, dataset), NEW)
    put_parts(plan, destination)
    commit(destination, plan)
    check_delta(destination, part_schema(plan.contract, options, dataset), NEW)
    polars = pl.scan_delta(destination.url).collect()["key"].to_list()

    assert KEYS[name].to_pylist() == polars == the_table(destination).to_pyarrow_dataset().to_table()["key"].to_pylist()


def test_an_address_that_readers_would_decode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DestinationUnusable, match="must not hold %, which its readers take for an escape"):
        check_delta(open_storage(str(tmp_path / "100%20")), pa.schema([("id", pa.int64())]), NEW)


def test_a_vacuum_leaves_what_is_published_and_the_bookkeeping(destination: Storage, place: str) -> None:
    plan = a_run(place)
    destination.put_new(f"{plan.folder}/plan.json", plan.model_dump_json().encode())
    publish(destination, plan, audit_parts(destination, plan))
    before = destination.entries()
    the_table(destination).vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)

    assert set(before) <= set(destination.entries())
    assert list(range(25)) == ids(destination)


def test_a_broken_log_is_told(local: Storage, tmp_path: Path) -> None:
    plan = a_run(str(tmp_path))
    local.put_new("_delta_log/00000000000000000000.json", b"not a log")
    with pytest.raises(DestinationUnusable, match=r"The Delta table at .* must open, got: "):
        check_delta(local, a_schema(plan, str(tmp_path)), NEW)


def test_a_table_that_takes_no_commit_is_publish_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def fail(*_: object) -> None:
        tries.append(1)
        message = "somebody else was first"
        raise CommitFailedError(message)

    plan = a_run(str(tmp_path))
    destination = open_storage(f"{tmp_path}/out")
    monkeypatch.setattr(delta, "_commit", fail)
    with pytest.raises(PublishRefused, match=r"must take a commit, got: somebody else was first\. Call again"):
        publish(destination, plan, audit_parts(destination, plan))

    assert len(tries) == 20
    assert find_manifest(destination, plan.run) is None


def test_an_identity_that_may_only_read_is_storage_denied(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    place = f"s3://lake/{uuid.uuid4().hex}"
    plan = a_run(place)
    destination = open_storage(f"{place}/out")
    parts = footers(destination, plan)
    for name, value in s3.read_only_environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StorageDenied, match=r"The Delta table at s3://lake/.* must be writable, got: "):
        commit_delta(destination, plan, parts)


def test_a_folder_that_may_not_be_written_is_storage_denied(
    public_folder: Path, unprivileged: Callable[[], AbstractContextManager[None]]
) -> None:
    plan = a_run(str(public_folder))
    destination = open_storage(f"{public_folder}/out")
    parts = footers(destination, plan)
    (public_folder / "out").chmod(0o555)
    with unprivileged(), pytest.raises(StorageDenied, match=r"must be writable, got: .*ermission denied"):
        commit_delta(destination, plan, parts)
    (public_folder / "out").chmod(0o755)

    assert os.geteuid() == os.getuid()


@pytest.mark.usefixtures("s3")
def test_a_server_that_does_not_answer_is_a_storage_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = a_run(str(tmp_path))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageFault):
        check_delta(open_storage("s3://lake/x"), a_schema(plan, str(tmp_path)), NEW)
