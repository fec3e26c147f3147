"""Iceberg as the output: its types, its snapshots, and a publication that is killed; see also test_table_output.py."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from pyiceberg.catalog import Catalog

from serving.errors import BadInput, DestinationUnusable, NoCompleteRun, PublishRefused, StorageFault
from tasks.batch.dataset import open_dataset
from tasks.batch.iceberg_table import check_iceberg, open_table_folder
from tasks.batch.manifest import open_predictions
from tasks.batch.options import BatchOptions
from tasks.batch.plan import Plan
from tasks.batch.publish import audit_parts, publish
from tasks.batch.run_records import save_plan
from tasks.batch.runs import list_runs
from tasks.batch.source import pin_source
from tasks.batch.verify import verify_run
from tasks.storage import Storage, open_storage
from tests.eventually import PROCESS_SECONDS
from tests.tasks.batch.iceberg_tables import configure, delete_rows, open_lake
from tests.tasks.batch.tables import NAME, NEW, IcebergOutput, a_run, check, commit, read_ids

APPEND, REPLACE = IcebergOutput.options(), IcebergOutput.options("replace")


def test_a_commit_is_found_when_its_snapshot_has_expired(lake: Catalog, destination: Storage, place: str) -> None:
    first, second = a_run(place, APPEND), a_run(place, APPEND, range(25, 40))
    for plan in (first, second):
        commit(destination, plan)
    table = IcebergOutput(lake).open()
    table.maintenance.expire_snapshots().by_id(table.snapshots()[0].snapshot_id).commit()
    commit(destination, first)

    assert 1 == len(IcebergOutput(lake).open().snapshots())
    assert list(range(40)) == read_ids(IcebergOutput(lake), destination)


@pytest.mark.parametrize(("by_equality", "parts"), [(None, 3), (False, 0), (True, 0)])
def test_a_run_is_read_through_the_table_and_refused_where_the_table_has_not_all_of_it(
    lake: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, by_equality: bool | None, parts: int
) -> None:
    place, destination = str(tmp_path), open_storage(f"{tmp_path}/out")
    plan = save_plan(destination, a_run(place, APPEND))
    publish(destination, plan, audit_parts(destination, plan))
    whole = (list_runs(destination), sorted(open_predictions(destination.url).collect()["id"]))
    table = IcebergOutput(lake).open()
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
    lake: Catalog, tmp_path: Path, *, by_equality: bool
) -> None:
    place, destination = str(tmp_path), open_storage(f"{tmp_path}/out")
    commit(destination, a_run(place, APPEND))
    table = IcebergOutput(lake).open()
    path = next(iter(table.scan().plan_files())).file.file_path
    delete_rows(table, path, [0, 1], by_equality=by_equality)
    commit(destination, a_run(place, REPLACE, range(25, 40)))
    files = IcebergOutput(lake).open().inspect.data_files()["record_count"].to_pylist()

    assert 15 == sum(files)
    if not by_equality:
        assert list(range(25, 40)) == read_ids(IcebergOutput(lake), destination)


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


def test_of_two_runs_of_one_number_the_second_does_not_replace_the_first(
    lake: Catalog, destination: Storage, place: str
) -> None:
    commit(destination, a_run(place, REPLACE, order=2))
    with pytest.raises(PublishRefused, match=r"number 2, and run .* is number 2"):
        commit(destination, a_run(place, REPLACE, range(25, 40), order=2))

    assert list(range(25)) == read_ids(IcebergOutput(lake), destination)


def test_parts_that_the_table_has_without_their_record_are_not_added_again(
    lake: Catalog, destination: Storage, place: str
) -> None:
    plan = a_run(place, APPEND)
    commit(destination, plan)
    with IcebergOutput(lake).open().transaction() as transaction:
        transaction.remove_properties(f"overnight.run.{plan.key}")
    with pytest.raises(PublishRefused, match="must not get the parts of a run twice"):
        commit(destination, plan)

    assert list(range(25)) == read_ids(IcebergOutput(lake), destination)


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
    destination, plan = open_storage(f"{tmp_path}/out"), a_run(str(tmp_path), options)
    lake.create_table("sales.scores", schema)
    for refused in (
        lambda: check(destination, plan),
        lambda: publish(destination, plan, audit_parts(destination, plan)),
    ):
        with pytest.raises(DestinationUnusable, match=told):
            refused()

    assert IcebergOutput(lake).open().current_snapshot() is None


def test_a_table_with_the_same_columns_in_another_order_takes_the_parts(
    lake: Catalog, destination: Storage, place: str
) -> None:
    lake.create_table("sales.scores", pa.schema(FIELDS[::-1]))
    plan = save_plan(destination, a_run(place, APPEND))
    assert 0 == check(destination, plan)
    publish(destination, plan, audit_parts(destination, plan))

    assert [open_predictions(destination.url).collect().sort("id").to_dicts()] == IcebergOutput(lake).read(destination)


def test_a_partitioned_table_is_refused(lake: Catalog, tmp_path: Path) -> None:
    plan = a_run(str(tmp_path), APPEND)
    table = lake.create_table("sales.scores", pa.schema(FIELDS))
    with table.update_spec() as update:
        update.add_identity("label")
    with pytest.raises(DestinationUnusable, match=r"partitioned by \['label'\]\..*drop this one, which is empty"):
        check(open_storage(f"{tmp_path}/out"), plan)


def test_a_table_whose_name_mapping_lacks_a_column_is_refused(lake: Catalog, tmp_path: Path) -> None:
    plan = a_run(str(tmp_path), APPEND)
    mapping = '[{"field-id": 1, "names": ["id"]}]'
    lake.create_table("sales.scores", pa.schema(FIELDS), properties={"schema.name-mapping.default": mapping})
    with pytest.raises(DestinationUnusable, match="must name every column, since parts have no field ids"):
        check(open_storage(f"{tmp_path}/out"), plan)


@pytest.mark.parametrize(
    "unfit", [pa.uint64(), pa.timestamp("ns"), pa.timestamp("us", "Europe/Berlin"), pa.duration("us"), pa.null()]
)
def test_types_that_iceberg_does_not_have_are_refused_by_name(
    lake: Catalog, local: Storage, unfit: pa.DataType
) -> None:
    with pytest.raises(DestinationUnusable, match=r"must have columns of types that Iceberg has, got key \("):
        check_iceberg(local, pa.schema([("key", unfit)]), NEW, APPEND)


def test_a_catalog_that_is_not_there_is_told_before_scoring(local: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = pa.schema([("id", pa.int64())])
    options = APPEND.model_copy(update={"iceberg_table": "nowhere.sales.scores"})
    with pytest.raises(BadInput, match="The catalog 'nowhere' must be configured"):
        check_iceberg(local, schema, NEW, options)
    monkeypatch.setenv("PYICEBERG_CATALOG__NOWHERE__URI", "http://127.0.0.1:9")
    with pytest.raises(StorageFault, match=r"The catalog of nowhere\.sales\.scores must answer"):
        check_iceberg(local, schema, NEW, options)


def test_the_table_of_a_run_is_a_source(lake: Catalog, destination: Storage, place: str) -> None:
    plan = a_run(place, APPEND)
    publish(destination, plan, audit_parts(destination, plan))
    snapshot = pin_source(f"iceberg:{NAME}", "/elsewhere", ["id", "score"])
    dataset = open_dataset(snapshot, ["score"], ["id"])

    assert ("parquet", 25) == (snapshot.format, dataset.rows)


def test_a_run_is_verified_against_its_table(lake: Catalog, destination: Storage, place: str) -> None:
    first, second = a_run(place, APPEND, order=1), a_run(place, REPLACE, range(25, 40), order=2)
    for plan in (first, second):
        save_plan(destination, plan)
        publish(destination, plan, audit_parts(destination, plan))
    tables = [
        [damage for damage in verify_run(destination, plan.run).damages if damage.kind == "table"]
        for plan in (first, second)
    ]
    replaced = verify_run(destination, first.run).notes
    with IcebergOutput(lake).open().transaction() as transaction:
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
                commit(open_storage(f"{folder}/out"), a_run(str(folder), APPEND, range(100, 120)))
            plan = a_run(str(folder), options, order=1)
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
        table = IcebergOutput(lake)
        found[point] = (
            read_ids(table, destination),
            table.count_commits(destination),
            open_predictions(destination.url).collect().height,
        )

    assert [-9] * len(points) == codes
    snapshots = 1 if options is APPEND else 2
    assert dict.fromkeys(points, (list(range(25)), snapshots, 25)) == found
