"""An Iceberg table as a source: the rows of one snapshot, exactly, or a refusal by name."""

from __future__ import annotations

import datetime as dt
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.io.pyarrow import schema_to_pyarrow
from pyiceberg.partitioning import PartitionField, PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.table import Table
from pyiceberg.transforms import DayTransform, IdentityTransform
from pyiceberg.types import DoubleType, FloatType, IntegerType, LongType, NestedField, StringType, TimestampType

from serving.errors import (
    BadInput,
    SchemaMismatch,
    SourceChanged,
    SourceEmpty,
    SourceFormat,
    SourceNotFound,
    StorageFault,
)
from tasks.batch.dataset import Snapshot, open_dataset
from tasks.batch.options import BatchOptions
from tasks.batch.plan import run_key
from tasks.batch.source import TableVersion, pin_source
from tasks.batch.staging import stage
from tasks.storage import open_storage
from tests.tasks.batch.iceberg_tables import configure, delete_rows, open_lake
from tests.tasks.batch.small import PIN, a_contract, read_rows

ELSEWHERE = "/elsewhere"
NAME = "iceberg:lake.sales.customers"
SCHEMA = Schema(
    NestedField(1, "id", LongType()),
    NestedField(2, "a", FloatType()),
    NestedField(3, "b", FloatType()),
    NestedField(4, "city", StringType()),
)
USED = ("id", "a", "b")


@pytest.fixture
def lake(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    """A catalog whose tables lie on a local disk, or on the S3 server."""
    warehouse = place if place.startswith("s3://") else f"file://{place}"
    configure(monkeypatch, str(tmp_path), warehouse=warehouse)
    return open_lake(str(tmp_path), warehouse=warehouse)


@pytest.fixture
def local_lake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    configure(monkeypatch, str(tmp_path))
    return open_lake(str(tmp_path))


def rows(start: int, stop: int) -> pa.Table:
    ids = list(range(start, stop))
    floats = pa.array([float(at) for at in ids], pa.float32())
    return pa.table({"id": pa.array(ids, pa.int64()), "a": floats, "b": floats, "city": [f"c{at % 3}" for at in ids]})


def customers(lake: Catalog, *parts: tuple[int, int], **options: object) -> Table:
    """Create the table with an append for each range of rows."""
    table = lake.create_table("sales.customers", SCHEMA, **options)  # type: ignore[arg-type]
    for part in parts:
        table.append(rows(*part))
    return table


def pin(version: TableVersion | None = None, columns: tuple[str, ...] = USED, name: str = NAME) -> Snapshot:
    return pin_source(name, ELSEWHERE, columns, version)


def read(snapshot: Snapshot, columns: tuple[str, ...] = USED, staged_at: str | None = None) -> pa.Table:
    """Read columns of all rows, as a run reads them."""
    if snapshot.format != "parquet":
        assert staged_at is not None
        contract = a_contract(*columns)
        snapshot = stage(snapshot, open_storage(staged_at), "_overnight/run", contract, ())
    return read_rows(snapshot, *columns).sort_by("id")


def ids(snapshot: Snapshot, staged_at: str | None = None) -> list[int]:
    return read(snapshot, staged_at=staged_at)["id"].to_pylist()


def test_a_table_is_the_rows_of_its_current_snapshot_read_in_place(lake: Catalog) -> None:
    table = customers(lake, (0, 10), (10, 15))
    snapshot = pin()

    assert "parquet" == snapshot.format
    assert list(range(15)) == ids(snapshot)
    assert str(table.current_snapshot().snapshot_id) == snapshot.version
    table.overwrite(rows(100, 105))

    assert list(range(100, 105)) == ids(pin())


def test_each_snapshot_is_another_run_and_the_same_one_is_the_same_run_though_a_property_changed(lake: Catalog) -> None:
    table = customers(lake, (0, 3))
    first, again = pin(), pin()
    with table.transaction() as transaction:
        transaction.set_properties({"owner": "somebody"})
    changed = pin()
    table.append(rows(3, 5))
    keys = [run_key(PIN, snapshot, a_contract("a"), BatchOptions()) for snapshot in (first, changed, pin())]

    assert first == again
    assert first.iceberg != changed.iceberg
    assert keys[0] == keys[1] != keys[2]


def test_a_snapshot_is_read_by_its_id_or_by_a_time(lake: Catalog) -> None:
    table = customers(lake, (0, 3))
    first = table.current_snapshot()
    time.sleep(0.01)
    table.append(rows(3, 5))
    then = dt.datetime.fromtimestamp(first.timestamp_ms / 1000, dt.UTC)
    by_id, by_time = pin(TableVersion(number=first.snapshot_id)), pin(TableVersion(timestamp=then))

    assert by_id == by_time
    assert [0, 1, 2] == ids(by_id)
    assert [0, 1, 2, 3, 4] == ids(pin(TableVersion(timestamp=dt.datetime.now(dt.UTC))))
    contract = a_contract("a")
    assert run_key(PIN, pin(), contract, BatchOptions()) == run_key(
        PIN, pin(TableVersion(number=table.current_snapshot().snapshot_id)), contract, BatchOptions()
    )


@pytest.mark.parametrize(
    ("version", "told"),
    [
        (TableVersion(number=7), "snapshot 7, but has"),
        (TableVersion(timestamp=dt.datetime(2001, 1, 1, tzinfo=dt.UTC)), "a snapshot of 2001-01-01T00:00:00"),
    ],
)
def test_a_snapshot_that_is_not_there_is_refused_with_those_that_are(
    local_lake: Catalog, version: TableVersion, told: str
) -> None:
    table = customers(local_lake, (0, 3))
    with pytest.raises(BadInput, match=told) as caught:
        pin(version)

    assert str(table.current_snapshot().snapshot_id) in str(caught.value)


def test_deleted_rows_are_left_out(lake: Catalog, place: str) -> None:
    table = customers(lake, (0, 10), (10, 20))
    path = next(task.file.file_path for task in table.scan().plan_files())
    first = pq.read_table(table.io.new_input(path).open())["id"][0].as_py()
    before = pin()
    delete_rows(table, path, [0, 3, 9])
    snapshot = pin()
    expected = [at for at in range(20) if at - first not in (0, 3, 9)]

    assert "iceberg" == snapshot.format
    assert expected == ids(snapshot, f"{place}/copies")
    assert expected == sorted(table.scan().to_arrow()["id"].to_pylist())
    assert list(range(20)) == ids(before)


def test_a_delete_file_that_is_gone_is_told(local_lake: Catalog, tmp_path: Path) -> None:
    table = customers(local_lake, (0, 10))
    delete_rows(table, next(iter(table.scan().plan_files())).file.file_path, [1])
    snapshot = pin()
    next((tmp_path / "sales/customers/data").glob("*deletes.parquet")).unlink()
    with pytest.raises(SourceChanged, match=r"Every delete file of the Iceberg table .* is gone"):
        ids(snapshot, str(tmp_path / "copies"))


def test_deletes_by_equality_are_refused_by_name(local_lake: Catalog) -> None:
    table = customers(local_lake, (0, 10))
    delete_rows(table, "", [1], by_equality=True)
    with pytest.raises(SourceFormat, match="deletes by equality, which can't be read yet"):
        pin()


def test_a_column_that_was_added_later_is_null_in_older_files(lake: Catalog, place: str) -> None:
    table = customers(lake, (0, 3))
    with table.update_schema() as update:
        update.add_column("c", DoubleType())
    newer = rows(3, 5).append_column("c", pa.array([3.5, 4.5]))
    table.append(newer)
    snapshot = pin(columns=("id", "c"))

    assert "iceberg" == snapshot.format
    assert [None, None, None, 3.5, 4.5] == read(snapshot, ("id", "c"), f"{place}/copies")["c"].to_pylist()
    # A run that does not use the column reads the files in place.
    assert "parquet" == pin().format
    assert list(range(5)) == ids(pin())


def test_a_renamed_column_has_its_values_under_the_new_name(lake: Catalog, place: str) -> None:
    table = customers(lake, (0, 3))
    with table.update_schema() as update:
        update.rename_column("b", "c")
    renamed = pin(columns=("id", "c"))

    assert [0.0, 1.0, 2.0] == read(renamed, ("id", "c"), f"{place}/copies")["c"].to_pylist()
    assert f"{table.current_snapshot().snapshot_id}, schema 1" == renamed.version
    # An earlier snapshot is read by the schema that it was written with.
    earlier = pin(TableVersion(number=table.current_snapshot().snapshot_id))
    assert [0.0, 1.0, 2.0] == read(earlier, staged_at=f"{place}/earlier")["b"].to_pylist()


def test_columns_whose_names_files_do_not_have_are_found_by_their_field_ids(lake: Catalog, place: str) -> None:
    names = ("id", "net.worth", "churn-risk", "last visit", "90d")
    values = pa.table({name: pa.array([at, at + 10], pa.float32()) for at, name in enumerate(names)})
    lake.create_table("sales.customers", values.schema).append(values)
    snapshot = pin(columns=names)

    assert "iceberg" == snapshot.format
    assert values.equals(read(snapshot, names, f"{place}/staged"))


def test_a_data_file_that_is_listed_twice_is_refused(local_lake: Catalog) -> None:
    table = customers(local_lake, (0, 3), (3, 6))
    (_, again) = (task.file for task in table.scan().plan_files())
    with table.transaction() as transaction, transaction.update_snapshot().fast_append() as append:
        append.append_data_file(again)
    with pytest.raises(SourceFormat, match=r"must be listed once, but snapshot [0-9]+ of .* lists 1 more often"):
        pin()

    assert 9 == table.refresh().scan().to_arrow().num_rows


def test_two_columns_that_changed_names_are_not_taken_for_each_other(lake: Catalog, place: str) -> None:
    table = customers(lake)
    table.append(rows(0, 3).set_column(2, "b", pa.array([7.0, 8.0, 9.0], pa.float32())))
    for old, new in (("a", "x"), ("b", "a"), ("x", "b")):
        with table.update_schema() as update:
            update.rename_column(old, new)
    found = read(pin(), staged_at=f"{place}/copies")

    assert ([7.0, 8.0, 9.0], [0.0, 1.0, 2.0]) == (found["a"].to_pylist(), found["b"].to_pylist())


def test_a_column_that_was_dropped_and_made_again_has_none_of_the_old_values(lake: Catalog, place: str) -> None:
    table = customers(lake, (0, 3))
    with table.update_schema() as update:
        update.delete_column("b")
    with table.update_schema() as update:
        update.add_column("b", FloatType())
    snapshot = pin()

    assert "iceberg" == snapshot.format
    assert [None, None, None] == read(snapshot, staged_at=f"{place}/copies")["b"].to_pylist()


@pytest.mark.parametrize("change", ["dropped", "renamed"])
@pytest.mark.parametrize("used", [("id", "b"), ("b",)])
def test_a_column_that_the_table_has_no_more_is_not_read_from_its_old_files(
    local_lake: Catalog, tmp_path: Path, change: str, used: tuple[str, ...]
) -> None:
    table = customers(local_lake, (0, 3))
    with table.update_schema() as update:
        update.delete_column("b") if change == "dropped" else update.rename_column("b", "b_total")
    snapshot = pin(columns=used)

    with pytest.raises(SchemaMismatch, match=r"but \['b'\] are missing.* Columns found: id, a, .*earlier snapshot"):
        read(snapshot, used, f"{tmp_path}/copies")
    assert not (tmp_path / "copies").exists()


@pytest.mark.parametrize("change", ["dropped", "renamed", "never there"])
def test_a_column_that_the_model_does_without_may_be_missing_in_the_table(
    local_lake: Catalog, tmp_path: Path, change: str
) -> None:
    table, used = customers(local_lake, (0, 3)), ("id", "x" if change == "never there" else "b")
    if change == "never there":
        delete_rows(table, next(iter(table.scan().plan_files())).file.file_path, [1])
    else:
        with table.update_schema() as update:
            update.delete_column("b") if change == "dropped" else update.rename_column("b", "b_total")
    contract = a_contract(*used)
    (given,) = contract.inputs
    columns = tuple(each.model_copy(update={"required": each.name == "id"}) for each in given.columns)
    contract = contract.model_copy(update={"inputs": (given.model_copy(update={"columns": columns}),)})
    dataset = open_dataset(
        stage(pin(columns=used), open_storage(f"{tmp_path}/copies"), "_overnight/run", contract, ()), used, ()
    )

    assert ["id"] == dataset.schema.names
    assert dataset.rows == (2 if change == "never there" else 3)


def test_a_widened_column_is_of_its_new_type_in_every_file(lake: Catalog, place: str) -> None:
    schema = Schema(NestedField(1, "id", LongType()), NestedField(2, "n", IntegerType()))
    table = lake.create_table("sales.customers", schema)
    table.append(pa.table({"id": pa.array([1, 2], pa.int64()), "n": pa.array([1, 2], pa.int32())}))
    with table.update_schema() as update:
        update.update_column("n", LongType())
    table.append(pa.table({"id": pa.array([3], pa.int64()), "n": pa.array([2**40], pa.int64())}))
    found = read(pin(columns=("id", "n")), ("id", "n"), f"{place}/copies")

    assert (pa.int64(), [1, 2, 2**40]) == (found["n"].type, found["n"].to_pylist())


def test_partitions_that_are_hidden_and_that_changed_are_read_from_the_files(lake: Catalog, place: str) -> None:
    schema = Schema(*SCHEMA.fields, NestedField(5, "at", TimestampType()))
    spec = PartitionSpec(PartitionField(4, 1000, IdentityTransform(), "city"))
    table = lake.create_table("sales.customers", schema, partition_spec=spec)

    def timed(start: int, stop: int, day: int) -> pa.Table:
        times = pa.array([dt.datetime(2024, 1, day)] * (stop - start), pa.timestamp("us"))  # noqa: DTZ001 - it has no zone
        return rows(start, stop).append_column("at", times)

    table.append(timed(0, 9, 1))
    with table.update_spec() as update:
        update.remove_field("city")
        update.add_field("at", DayTransform(), "at_day")
    columns = ("id", "city", "at")
    before = pin(columns=columns)
    numbered = timed(9, 20, 2).cast(schema_to_pyarrow(table.schema()))
    with table.io.new_output(f"{table.location()}/data/b.parquet").create() as stream:
        pq.write_table(numbered, stream)
    table.add_files([f"{table.location()}/data/b.parquet"])
    expected = pa.concat_tables([timed(0, 9, 1), timed(9, 20, 2)])

    assert "parquet" == before.format
    assert () == open_dataset(before, columns, ()).hive
    assert timed(0, 9, 1).select(columns).to_pylist() == read(before, columns).to_pylist()
    # Files that were added may leave out a partition's column, so those of such a table are read by pyiceberg.
    assert expected.select(columns).to_pylist() == read(pin(columns=columns), columns, f"{place}/copies").to_pylist()
    assert ("parquet", list(range(20))) == (pin().format, ids(pin()))


def test_a_file_that_does_not_hold_the_fields_that_its_table_says_is_refused(local_lake: Catalog) -> None:
    customers(local_lake, (0, 3))
    snapshot = pin()
    assert snapshot.iceberg is not None
    other = snapshot.iceberg.model_copy(update={"field_ids": {"id": 1, "a": 3, "b": 2}})
    with pytest.raises(SourceFormat, match=r"\.parquet does not hold a, b so, though no schema of the table says why"):
        open_dataset(snapshot.model_copy(update={"iceberg": other}), USED, ())


@pytest.mark.parametrize("mapped", [False, True])
def test_files_without_field_ids_are_read_by_the_name_mapping_alone(
    local_lake: Catalog, tmp_path: Path, *, mapped: bool
) -> None:
    table = customers(local_lake)
    pq.write_table(rows(0, 4), tmp_path / "loose.parquet")
    table.add_files([f"file://{tmp_path}/loose.parquet"])
    if mapped:
        assert [0, 1, 2, 3] == ids(pin())
        return
    with table.transaction() as transaction:
        transaction.remove_properties("schema.name-mapping.default")
    with pytest.raises(SourceFormat, match="must hold the columns that are used under their present names"):
        ids(pin())


def test_the_copies_come_out_the_same_again(local_lake: Catalog, tmp_path: Path) -> None:
    table = customers(local_lake, (0, 1000))
    delete_rows(table, next(iter(table.scan().plan_files())).file.file_path, range(0, 1000, 7))
    snapshot = pin()
    copies = [
        [file.path for file in stage(snapshot, open_storage(str(tmp_path / at)), "r", a_contract(*USED), ()).files]
        for at in ("x", "y")
    ]

    assert copies[0] == copies[1]


def test_a_file_of_the_snapshot_that_is_gone_is_told(local_lake: Catalog, tmp_path: Path) -> None:
    customers(local_lake, (0, 3))
    next((tmp_path / "sales/customers/data").glob("*.parquet")).unlink()
    with pytest.raises(SourceChanged, match=r"Every file that snapshot [0-9]+ of the Iceberg table at .* 1 are gone"):
        pin()


def test_a_table_without_rows_is_source_empty(local_lake: Catalog) -> None:
    customers(local_lake)
    with pytest.raises(SourceEmpty, match="a table without files"):
        open_dataset(pin(), USED, ())


def test_a_table_is_named_by_a_metadata_file_or_by_its_folder_with_a_hint(lake: Catalog) -> None:
    table = customers(lake, (0, 3))
    earlier = table.metadata_location.removeprefix("file://")
    table.append(rows(3, 5))
    folder = table.location().removeprefix("file://")

    assert [0, 1, 2] == ids(pin(name=earlier))
    told = r"it has no metadata/version-hint\.text.* iceberg:CATALOG\.NAMESPACE\.TABLE"
    with pytest.raises(SourceFormat, match=told):
        pin(name=folder)
    hint = table.metadata_location.rpartition("/")[2]
    open_storage(folder).put_new("metadata/version-hint.text", hint.encode())

    assert [0, 1, 2, 3, 4] == ids(pin(name=folder))


@pytest.mark.parametrize("inside", ["/data", "/data/*.parquet", "/**/*.parquet", "/*/*", "/.."])
def test_files_of_a_table_past_its_metadata_are_refused(lake: Catalog, place: str, inside: str) -> None:
    table = customers(lake, (0, 3))
    folder = table.location().removeprefix("file://")
    source = place if inside == "/.." else f"{folder}{inside}"
    with pytest.raises(SourceFormat, match=r"past its log\. Name .*, or iceberg:CATALOG\.NAMESPACE\.TABLE"):
        pin_source(source, ELSEWHERE)


def test_a_name_that_the_catalog_does_not_have_is_refused_with_those_that_are_near(local_lake: Catalog) -> None:
    customers(local_lake)
    with pytest.raises(SourceNotFound, match=r"There is lake\.sales\.customers\. Correct the name"):
        pin(name="iceberg:lake.sales.custmers")
    with pytest.raises(SourceNotFound, match=r"must have the table market\.customers"):
        pin(name="iceberg:lake.market.customers")


@pytest.mark.parametrize("name", ["", "lake", "lake.customers", "lake..customers", "lake.sales.", "/lake/sales"])
def test_a_name_is_catalog_namespace_and_table(name: str) -> None:
    with pytest.raises(BadInput, match=r"must be CATALOG\.NAMESPACE\.TABLE, got"):
        pin(name=f"iceberg:{name}")


def test_a_catalog_that_is_not_configured_is_bad_input() -> None:
    with pytest.raises(BadInput, match=r"'nowhere' must be configured .* Set PYICEBERG_CATALOG__NOWHERE__URI"):
        pin(name="iceberg:nowhere.sales.customers")


def test_a_catalog_that_does_not_answer_is_a_storage_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYICEBERG_CATALOG__FAR__TYPE", "rest")
    # Port 9 is discard's, and nobody listens there.
    monkeypatch.setenv("PYICEBERG_CATALOG__FAR__URI", "http://127.0.0.1:9")
    with pytest.raises(StorageFault, match=r"The catalog of far\.sales\.customers must answer, got: .*Check PYICEBERG"):
        pin(name="iceberg:far.sales.customers")


def test_without_pyiceberg_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith(("pyiceberg", "tasks.batch.iceberg"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "pyiceberg", None)
    told = r"find the package pyiceberg, got none\. Run: pip install 'overnight\[iceberg\]'"
    with pytest.raises(BadInput, match=told):
        pin()


def test_a_destination_inside_the_table_is_refused(lake: Catalog) -> None:
    table = customers(lake, (0, 3))
    folder = table.location().removeprefix("file://")
    with pytest.raises(BadInput, match="The destination must lie outside the source"):
        pin_source(NAME, f"{folder}/scores", USED)


@pytest.mark.parametrize("version", [TableVersion(number=1), TableVersion(timestamp=dt.datetime.now(dt.UTC))])
def test_a_version_of_what_is_no_table_is_refused(tmp_path: Path, version: TableVersion) -> None:
    pq.write_table(rows(0, 3), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match="must go with a Delta or Iceberg table"):
        pin_source(str(tmp_path), ELSEWHERE, USED, version)


def test_the_snapshot_of_loose_files_is_written_as_before(tmp_path: Path) -> None:
    pq.write_table(rows(0, 3), tmp_path / "a.parquet")
    snapshot = pin_source(str(tmp_path), ELSEWHERE)

    assert "iceberg" not in snapshot.model_dump_json()
    assert snapshot == Snapshot.model_validate_json(snapshot.model_dump_json())
