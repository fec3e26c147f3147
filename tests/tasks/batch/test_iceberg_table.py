"""Iceberg as the output: one commit adds exactly the parts, once, whichever worker commits or is killed."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.table import Table

from serving.errors import (
    BadInput,
    DestinationUnusable,
    NoCompleteRun,
    OvernightError,
    PublishRefused,
    StorageFault,
)
from serving.model.contract import Output
from tasks.batch.dataset import open_dataset
from tasks.batch.iceberg_table import check_iceberg, commit_iceberg, open_table_folder
from tasks.batch.manifest import find_manifest, open_predictions
from tasks.batch.options import BatchOptions
from tasks.batch.part_footer import PartFooter
from tasks.batch.parts import part_schema
from tasks.batch.plan import Plan
from tasks.batch.publish import audit_parts, claim_order_number, publish
from tasks.batch.run_records import save_plan
from tasks.batch.runs import list_runs
from tasks.batch.source import pin_source
from tasks.batch.verify import verify_run
from tasks.storage import Storage, open_storage
from tests.eventually import PROCESS_SECONDS
from tests.tasks.batch.iceberg_tables import configure, delete_rows, open_lake
from tests.tasks.batch.small import a_contract, a_plan, numbers, put, put_parts

NAME = "lake.sales.scores"
APPEND = BatchOptions(rows_per_chunk=10, output="iceberg", iceberg_table=NAME)
REPLACE = BatchOptions(rows_per_chunk=10, output="iceberg", iceberg_table=NAME, iceberg_mode="replace")
NEW = "0" * 32  # the key of a run that no table holds
OUTPUTS = (
    Output(name="score", dtype="float32"),
    Output(name="label", dtype="str"),
    Output(name="count", dtype="uint16"),
    Output(name="tiny", dtype="int8"),
    Output(name="wide", dtype="float32", shape=(2, 2)),
)


@pytest.fixture
def lake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    configure(monkeypatch, str(tmp_path))
    return open_lake(str(tmp_path))


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
    commit_iceberg(destination, plan, footers(destination, plan))


def the_table(lake: Catalog) -> Table:
    return lake.load_table(("sales", "scores"))


def ids(lake: Catalog) -> list[int]:
    return sorted(the_table(lake).scan(selected_fields=("id",)).to_arrow()["id"].to_pylist())


def numbered(plan: Plan, order: int) -> Plan:
    return plan.model_copy(update={"order": order})


def a_schema(plan: Plan, place: str) -> pa.Schema:
    dataset = open_dataset(pin_source(f"{place}/in-0-25", f"{place}/out"), ["a", "b"], ["id"])
    return part_schema(plan.contract, plan.options, dataset)


def test_every_reader_sees_the_same_rows(lake: Catalog, destination: Storage, place: str) -> None:
    plan = save_plan(destination, a_run(place))
    publish(destination, plan, audit_parts(destination, plan))
    expected = open_predictions(destination.url).collect().sort("id")
    found = the_table(lake).scan().to_arrow().sort_by("id")

    assert expected.height == 25
    assert expected.to_dicts() == found.to_pylist()
    assert find_manifest(destination, plan.run).output == "iceberg"


def test_one_snapshot_adds_exactly_the_parts_and_says_of_which_run(
    lake: Catalog, destination: Storage, place: str
) -> None:
    plan = a_run(place)
    commit(destination, plan)
    table = the_table(lake)
    files = [task.file for task in table.scan().plan_files()]

    assert 1 == len(table.snapshots())
    assert sorted((part.path, part.bytes, part.rows) for part in footers(destination, plan)) == sorted(
        (file.file_path.partition("/out/")[2], file.file_size_in_bytes, file.record_count) for file in files
    )
    told = table.current_snapshot().summary
    assert (plan.run, "models:/churn/3") == (told["overnight.run"], told["overnight.model"])


def test_a_second_commit_of_a_run_adds_nothing(lake: Catalog, destination: Storage, place: str) -> None:
    plan = a_run(place)
    for _ in range(3):
        commit(destination, plan)
    publish(destination, plan, audit_parts(destination, plan))

    assert 1 == len(the_table(lake).snapshots())
    assert list(range(25)) == ids(lake)


def test_a_commit_is_found_when_its_snapshot_has_expired(lake: Catalog, destination: Storage, place: str) -> None:
    first, second = a_run(place), a_run(place, range(25, 40))
    for plan in (first, second):
        commit(destination, plan)
    table = the_table(lake)
    table.maintenance.expire_snapshots().by_id(table.snapshots()[0].snapshot_id).commit()
    commit(destination, first)

    assert 1 == len(the_table(lake).snapshots())
    assert list(range(40)) == ids(lake)


def test_another_run_replaces_the_rows_of_the_first_in_one_snapshot(
    lake: Catalog, destination: Storage, place: str
) -> None:
    first, second = a_run(place, options=REPLACE), a_run(place, range(25, 40), REPLACE)
    commit(destination, first)
    commit(destination, second)

    assert list(range(25, 40)) == ids(lake)
    assert 2 == len(the_table(lake).snapshots())
    # A late call of the first run finds that it was committed, and does not bring its rows back.
    commit(destination, first)

    assert list(range(25, 40)) == ids(lake)


@pytest.mark.parametrize(("by_equality", "parts"), [(None, 3), (False, 0), (True, 0)])
def test_a_run_is_read_through_the_table_and_refused_where_the_table_has_not_all_of_it(
    lake: Catalog,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    by_equality: bool | None,  # noqa: FBT001
    parts: int,
) -> None:
    place, destination = str(tmp_path), open_storage(f"{tmp_path}/out")
    plan = save_plan(destination, a_run(place))
    publish(destination, plan, audit_parts(destination, plan))
    whole = (list_runs(destination), sorted(open_predictions(destination.url).collect()["id"]))
    table = the_table(lake)
    if by_equality is None:
        table.delete("id = 3")
    else:
        # Such deletes do not say which of the files they belong to.
        path = next(iter(table.scan().plan_files())).file.file_path
        delete_rows(table, path, [0, 1], by_equality=by_equality)
    with pytest.raises(NoCompleteRun, match=rf"4 parts of run {plan.run} as they were .* but has {parts} of them"):
        open_predictions(destination.url)
    (told,) = list_runs(destination)
    monkeypatch.setenv("PYICEBERG_CATALOG__LAKE__TYPE", "none")
    (unasked,) = list_runs(destination)

    assert ("complete", parts, 4) == (told.state, told.parts, told.parts_planned)
    assert "complete" == unasked.state
    assert "What its table has of it is not known: The catalog 'lake' must be configured" in unasked.note
    assert ([("complete", 4, "")], list(range(25))) == ([(r.state, r.parts, r.note) for r in whole[0]], whole[1])


@pytest.mark.parametrize("by_equality", [False, True])
def test_deletes_of_others_go_with_the_rows_that_are_replaced(
    lake: Catalog,
    tmp_path: Path,
    by_equality: bool,  # noqa: FBT001
) -> None:
    place, destination = str(tmp_path), open_storage(f"{tmp_path}/out")
    commit(destination, a_run(place))
    table = the_table(lake)
    path = next(iter(table.scan().plan_files())).file.file_path
    delete_rows(table, path, [0, 1], by_equality=by_equality)
    commit(destination, a_run(place, range(25, 40), REPLACE))
    files = the_table(lake).inspect.data_files()["record_count"].to_pylist()

    assert 15 == sum(files)
    if not by_equality:
        assert list(range(25, 40)) == ids(lake)


@pytest.mark.parametrize("options", [APPEND, REPLACE], ids=["append", "replace"])
@pytest.mark.parametrize("standing", [False, True], ids=["a new table", "a table"])
def test_threads_that_race_commit_a_run_once(
    lake: Catalog,
    destination: Storage,
    place: str,
    options: BatchOptions,
    standing: bool,  # noqa: FBT001
) -> None:
    if standing:
        commit(destination, a_run(place, range(100, 120)))
    plan = a_run(place, options=options)
    parts = footers(destination, plan)
    barrier = threading.Barrier(4)

    def race(_: int) -> None:
        barrier.wait()
        commit_iceberg(destination, plan, parts)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(race, range(4)))

    kept = list(range(100, 120)) if standing and options is APPEND else []
    assert list(range(25)) + kept == ids(lake)
    assert 1 + standing == len(the_table(lake).snapshots())


def test_plans_that_race_make_one_table_in_one_namespace(lake: Catalog, tmp_path: Path) -> None:
    destinations, schema = [open_storage(f"{tmp_path}/{at}") for at in range(4)], pa.schema([("id", pa.int64())])
    for attempt in range(5):
        options = APPEND.model_copy(update={"iceberg_table": f"lake.space{attempt}.scores"})
        barrier = threading.Barrier(4)

        def race(destination: Storage, options: BatchOptions, barrier: threading.Barrier) -> str:
            barrier.wait()
            return open_table_folder(destination, schema, options).url

        with ThreadPoolExecutor(4) as pool:
            places = set(pool.map(race, destinations, [options] * 4, [barrier] * 4))
        (table,) = lake.list_tables(f"space{attempt}")

        assert {lake.load_table(table).location().removeprefix("file://")} == places


def commit_in_child(address: str, plan: str, start: float) -> str:
    """Commit a run in a process of its own, all at one time."""
    destination = open_storage(address)
    mine = Plan.model_validate_json(plan)
    parts = footers(destination, mine)
    time.sleep(max(0.0, start - time.time()))
    try:
        commit_iceberg(destination, mine, parts)
    except OvernightError as error:
        return f"{type(error).__name__}: {error}"
    return "done"


@pytest.mark.machines
def test_processes_that_race_commit_each_run_once(lake: Catalog, tmp_path: Path) -> None:
    plans = [a_run(str(tmp_path)), a_run(str(tmp_path), range(25, 40))]
    given = [plan.model_dump_json() for plan in plans for _ in range(2)]
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        start = time.time() + 5
        told = list(pool.map(commit_in_child, [f"{tmp_path}/out"] * 4, given, [start] * 4))

    assert told == ["done"] * 4
    assert list(range(40)) == ids(lake)
    assert 2 == len(the_table(lake).snapshots())


def test_an_older_run_does_not_replace_a_newer_one(lake: Catalog, destination: Storage, place: str) -> None:
    older, newer = numbered(a_run(place, options=REPLACE), 1), numbered(a_run(place, range(25, 40), REPLACE), 2)
    commit(destination, newer)
    with pytest.raises(PublishRefused, match=r"must not go back to an older run.*number 2.*number 1: it was planned"):
        publish(destination, older, audit_parts(destination, older))

    with pytest.raises(PublishRefused, match=r"number 2, and run .* is number 2"):
        commit(destination, numbered(older, 2))

    assert list(range(25, 40)) == ids(lake)
    assert find_manifest(destination, older.run) is None
    # What the message says: planned again, it is the newest, and the parts that are there are those of its plan.
    held = check_iceberg(destination, a_schema(older, place), NEW, REPLACE)
    again = numbered(older, claim_order_number(destination, older.run, above=held))
    publish(destination, again, audit_parts(destination, again))
    assert list(range(25)) == ids(lake)


def test_an_older_run_is_appended_beside_newer_ones_but_not_after_one_that_replaced_all(
    lake: Catalog, destination: Storage, place: str
) -> None:
    first, second, third = (numbered(a_run(place, range(at, at + 5)), at // 5 + 1) for at in (0, 5, 10))
    for plan in (second, first):
        commit(destination, plan)
    assert list(range(10)) == ids(lake)
    commit(destination, numbered(a_run(place, range(25, 40), REPLACE), 9))
    with pytest.raises(PublishRefused, match="must not go back to an older run"):
        commit(destination, third)

    assert list(range(25, 40)) == ids(lake)


def test_a_run_that_the_table_holds_from_another_plan_is_not_added_again(
    lake: Catalog, destination: Storage, place: str
) -> None:
    plan = a_run(place)
    commit(destination, plan)
    replanned = plan.model_copy(update={"digest": "0" * 64})
    put_parts(replanned, destination)
    with pytest.raises(PublishRefused, match="holds those of another plan of the run"):
        publish(destination, replanned, audit_parts(destination, replanned))
    with pytest.raises(DestinationUnusable, match="already, whose plan below _overnight is gone"):
        check_iceberg(destination, a_schema(plan, place), plan.key, plan.options)

    assert list(range(25)) == ids(lake)


def test_parts_that_the_table_has_without_their_record_are_not_added_again(
    lake: Catalog, destination: Storage, place: str
) -> None:
    plan = a_run(place)
    commit(destination, plan)
    with the_table(lake).transaction() as transaction:
        transaction.remove_properties(f"overnight.run.{plan.key}")
    with pytest.raises(PublishRefused, match="must not get the parts of a run twice"):
        commit(destination, plan)

    assert list(range(25)) == ids(lake)


FIELDS = [("id", pa.int64()), ("score", pa.float32()), ("label", pa.string()), ("count", pa.int32())]
FIELDS += [("tiny", pa.int32()), ("wide", pa.list_(pa.float32())), ("reject_column", pa.string())]
FIELDS += [("reject_reason", pa.string())]


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        (pa.schema(FIELDS[:1]), r"'score' is float in the run and missing in the table; .* and 2 more "),
        (pa.schema([*FIELDS, ("other", pa.string())]), r"but 'other' is in the table alone\."),
        (
            pa.schema([*FIELDS[:-1], ("reject_reason", pa.int32())]),
            r"but 'reject_reason' is string in the run and int32 in the table\.",
        ),
        (
            pa.schema([pa.field("id", pa.int64(), nullable=False), *FIELDS[1:]]),
            r"but 'id' is int64 in the run and int64 not null in the table\.",
        ),
    ],
)
@pytest.mark.parametrize("options", [APPEND, REPLACE], ids=["append", "replace"])
def test_a_table_of_other_columns_is_refused_before_scoring_and_at_the_commit(
    lake: Catalog, tmp_path: Path, schema: pa.Schema, told: str, options: BatchOptions
) -> None:
    destination, plan = open_storage(f"{tmp_path}/out"), a_run(str(tmp_path), options=options)
    lake.create_table("sales.scores", schema)
    for refused in (
        lambda: check_iceberg(destination, a_schema(plan, str(tmp_path)), NEW, options),
        lambda: publish(destination, plan, audit_parts(destination, plan)),
    ):
        with pytest.raises(DestinationUnusable, match=told):
            refused()

    assert the_table(lake).current_snapshot() is None


def test_a_table_with_the_same_columns_in_another_order_takes_the_parts(
    lake: Catalog, destination: Storage, place: str
) -> None:
    lake.create_table("sales.scores", pa.schema(FIELDS[::-1]))
    plan = save_plan(destination, a_run(place))
    assert 0 == check_iceberg(destination, a_schema(plan, place), NEW, APPEND)
    commit(destination, plan)
    expected = open_table(destination, plan)

    assert expected == the_table(lake).scan().to_arrow().sort_by("id").select([n for n, _ in FIELDS]).to_pylist()


def open_table(destination: Storage, plan: Plan) -> list[dict[str, object]]:
    publish(destination, plan, audit_parts(destination, plan))
    return open_predictions(destination.url).collect().sort("id").to_dicts()


def test_a_partitioned_table_is_refused(lake: Catalog, tmp_path: Path) -> None:
    plan = a_run(str(tmp_path))
    table = lake.create_table("sales.scores", pa.schema(FIELDS))
    with table.update_spec() as update:
        update.add_identity("label")
    with pytest.raises(DestinationUnusable, match=r"partitioned by \['label'\]\..*drop this one, which is empty"):
        check_iceberg(open_storage(f"{tmp_path}/out"), a_schema(plan, str(tmp_path)), NEW, APPEND)


def test_a_table_whose_name_mapping_lacks_a_column_is_refused(lake: Catalog, tmp_path: Path) -> None:
    plan = a_run(str(tmp_path))
    mapping = '[{"field-id": 1, "names": ["id"]}]'
    lake.create_table("sales.scores", pa.schema(FIELDS), properties={"schema.name-mapping.default": mapping})
    with pytest.raises(DestinationUnusable, match="must name every column, since parts have no field ids"):
        check_iceberg(open_storage(f"{tmp_path}/out"), a_schema(plan, str(tmp_path)), NEW, APPEND)


@pytest.mark.parametrize(
    "unfit", [pa.uint64(), pa.timestamp("ns"), pa.timestamp("us", "Europe/Berlin"), pa.duration("us"), pa.null()]
)
def test_types_that_iceberg_does_not_have_are_refused_by_name(
    lake: Catalog, local: Storage, unfit: pa.DataType
) -> None:
    with pytest.raises(DestinationUnusable, match=r"must have columns of types that Iceberg has, got key \("):
        check_iceberg(local, pa.schema([("key", unfit)]), NEW, APPEND)


def test_an_address_with_an_escape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DestinationUnusable, match="must not hold %"):
        check_iceberg(open_storage(f"{tmp_path}/a%20b"), pa.schema([("id", pa.int64())]), NEW, APPEND)


def test_a_catalog_that_is_not_there_is_told_before_scoring(local: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = pa.schema([("id", pa.int64())])
    options = APPEND.model_copy(update={"iceberg_table": "nowhere.sales.scores"})
    with pytest.raises(BadInput, match="The catalog 'nowhere' must be configured"):
        check_iceberg(local, schema, NEW, options)
    monkeypatch.setenv("PYICEBERG_CATALOG__NOWHERE__URI", "http://127.0.0.1:9")
    with pytest.raises(StorageFault, match=r"The catalog of nowhere\.sales\.scores must answer"):
        check_iceberg(local, schema, NEW, options)


def test_the_table_of_a_run_is_a_source(lake: Catalog, destination: Storage, place: str) -> None:
    plan = a_run(place)
    publish(destination, plan, audit_parts(destination, plan))
    snapshot = pin_source(f"iceberg:{NAME}", "/elsewhere", ["id", "score"])
    dataset = open_dataset(snapshot, ["score"], ["id"])

    assert ("parquet", 25) == (snapshot.format, dataset.rows)


def test_a_run_is_verified_against_its_table(lake: Catalog, destination: Storage, place: str) -> None:
    first, second = numbered(a_run(place), 1), numbered(a_run(place, range(25, 40), REPLACE), 2)
    for plan in (first, second):
        save_plan(destination, plan)
        publish(destination, plan, audit_parts(destination, plan))
    tables = [
        [damage for damage in verify_run(destination, plan.run).damages if damage.kind == "table"]
        for plan in (first, second)
    ]
    replaced = verify_run(destination, first.run).notes
    with the_table(lake).transaction() as transaction:
        transaction.remove_properties(f"overnight.run.{second.key}")

    assert [[], []] == tables
    assert any("parts are not in version" in note for note in replaced), replaced
    assert ["table"] == [d.kind for d in verify_run(destination, second.run).damages if d.path == "snapshots"]


# At each of these a process is killed; see iceberg_kill_child.py.
POINTS = [
    *("before the table", "after the table", "before the snapshot", "after a manifest", "before the commit"),
    *("after the metadata", "after the commit", "before the manifest", "after the manifest"),
]


@pytest.mark.machines
@pytest.mark.parametrize("options", [APPEND, REPLACE], ids=["append", "replace"])
def test_a_publication_killed_between_any_two_steps_ends_in_exactly_one_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: BatchOptions
) -> None:
    points = POINTS if options is APPEND else POINTS[2:7]

    def kill(point: str) -> int:
        folder = tmp_path / point.replace(" ", "-")
        child = [sys.executable, "tests/tasks/batch/iceberg_kill_child.py", point, str(folder)]
        return subprocess.run(
            child, cwd=Path(__file__).parents[3], check=False, capture_output=True, timeout=PROCESS_SECONDS
        ).returncode

    with pytest.MonkeyPatch.context() as patch:
        for point in points:
            folder = tmp_path / point.replace(" ", "-")
            folder.mkdir()
            configure(patch, str(folder))
            lake = open_lake(str(folder))
            if options is REPLACE:
                commit(open_storage(f"{folder}/out"), a_run(str(folder), range(100, 120)))
            plan = numbered(a_run(str(folder), options=options), 1)
            save_plan(open_storage(f"{folder}/out"), plan)
            lake.close()
    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(kill, points))
    found = {}
    for point in points:
        folder = tmp_path / point.replace(" ", "-")
        configure(monkeypatch, str(folder))
        destination, lake = open_storage(f"{folder}/out"), open_lake(str(folder))
        (path,) = [entry.path for entry in destination.entries("_overnight") if entry.path.endswith("/plan.json")]
        plan = Plan.model_validate_json(destination.read(path) or b"")
        publish(destination, plan, audit_parts(destination, plan))
        found[point] = ids(lake), len(the_table(lake).snapshots()), open_predictions(destination.url).collect().height

    assert [-9] * len(points) == codes
    snapshots = 1 if options is APPEND else 2
    assert dict.fromkeys(points, (list(range(25)), snapshots, 25)) == found
