"""Pinning a source: a table by its log and a destination by its manifest, never as loose files."""

from __future__ import annotations

import datetime as dt
import json
import re
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from serving.errors import BadInput, NoCompleteRun, SourceChanged, SourceEmpty, SourceFormat, SourceNotFound
from tasks.batch.dataset import Snapshot, open_dataset
from tasks.batch.delta import delta_options
from tasks.batch.manifest import open_predictions
from tasks.batch.options import BatchOptions
from tasks.batch.parts import part_path
from tasks.batch.plan import Plan, run_key
from tasks.batch.publish import audit_parts, publish
from tasks.batch.run_records import save_plan
from tasks.batch.source import TableVersion, pin_source
from tasks.storage import open_storage
from tests.tasks.batch.small import PIN, a_contract, a_plan, numbers, put, put_parts, read_rows

ELSEWHERE = "/elsewhere"


def write(address: str, table: pa.Table, mode: str = "append", **options: Any) -> None:
    write_deltalake(address, table, mode=mode, storage_options=delta_options(open_storage(address)), **options)


def ids(snapshot: Snapshot) -> list[int]:
    return sorted(read_rows(snapshot, "id")["id"].to_pylist())


def refusal(source: str) -> str:
    with pytest.raises(SourceFormat) as caught:
        pin_source(source, ELSEWHERE)
    return str(caught.value)


def test_a_delta_table_is_the_rows_of_its_current_version(place: str) -> None:
    write(place, numbers(0, 10))
    write(place, numbers(100, 105), mode="overwrite")
    snapshot = pin_source(place, ELSEWHERE)

    assert list(range(100, 105)) == ids(snapshot)
    assert ("1", "parquet", place) == (snapshot.version, snapshot.format, snapshot.root)


def test_each_version_of_a_delta_table_is_another_run(place: str) -> None:
    write(place, numbers(0, 3))
    first = pin_source(place, ELSEWHERE)
    again = pin_source(f"{place}/", ELSEWHERE)
    write(place, numbers(3, 5))
    second = pin_source(place, ELSEWHERE)
    contract, options = a_contract("a"), BatchOptions()

    assert first == again
    assert run_key(PIN, first, contract, options) != run_key(PIN, second, contract, options)
    assert first.model_copy(update={"version": "7"}) != first
    assert run_key(PIN, first, contract, options) != run_key(
        PIN, first.model_copy(update={"version": "7"}), contract, options
    )
    assert [0, 1, 2] == ids(first)
    assert f"{place} (version 1)" == second.title


def test_a_delta_table_is_read_at_a_version_or_as_of_a_time(place: str) -> None:
    write(place, numbers(0, 3))
    first = pin_source(place, ELSEWHERE)
    between = dt.datetime.now(dt.UTC)
    time.sleep(0.05)
    write(place, numbers(3, 5))
    by_number = pin_source(place, ELSEWHERE, None, TableVersion(number=0))
    by_time = pin_source(place, ELSEWHERE, None, TableVersion(timestamp=between))
    newest = pin_source(place, ELSEWHERE, None, TableVersion(timestamp=dt.datetime.now(dt.UTC) + timedelta(hours=1)))

    assert first == by_number == by_time
    assert [0, 1, 2] == ids(by_number)
    # A version is the same run, by whichever of its names.
    assert pin_source(place, ELSEWHERE) == newest == pin_source(place, ELSEWHERE, None, TableVersion(number=1))


@pytest.mark.parametrize("silent", [(), (0,), (1,), (2,), (4,), (1, 2), (0, 1, 2, 3, 4)])
def test_a_commit_that_says_no_time_makes_no_other_version_that_of_a_time(
    tmp_path: Path, silent: tuple[int, ...]
) -> None:
    for at in range(5):
        write(str(tmp_path), numbers(at, at + 1))
        rewrite_commit(tmp_path, at, None if at in silent else 1_000_000 * (at + 1))
    for at in range(5):
        version = TableVersion(timestamp=dt.datetime.fromtimestamp(1_000 * (at + 1) + 1, dt.UTC))
        if at in silent or at + 1 in silent:
            with pytest.raises(BadInput, match=r"must say when they were made .* but version \d does not"):
                pin_source(str(tmp_path), ELSEWHERE, None, version)
        else:
            assert list(range(at + 1)) == ids(pin_source(str(tmp_path), ELSEWHERE, None, version))


def test_a_time_within_a_commit_goes_before_the_time_that_its_writer_says(tmp_path: Path) -> None:
    for at in range(3):
        write(str(tmp_path), numbers(at, at + 1))
        # The clock of the writer goes backwards.
        rewrite_commit(tmp_path, at, 9_000 - at, inCommitTimestamp=1_000_000 * (at + 1))
    for at in range(3):
        version = TableVersion(timestamp=dt.datetime.fromtimestamp(1_000 * (at + 1) + 1, dt.UTC))

        assert list(range(at + 1)) == ids(pin_source(str(tmp_path), ELSEWHERE, None, version))


@pytest.mark.parametrize("silent", [None, 3])
def test_versions_whose_commits_are_in_a_checkpoint_alone_are_no_versions_of_a_time(
    tmp_path: Path, silent: int | None
) -> None:
    """After a clean-up the log has a checkpoint of version 2, and the commits since; a vacuum takes replaced files."""
    for at in range(5):
        write(str(tmp_path), numbers(at, at + 1), "overwrite")
        rewrite_commit(tmp_path, at, None if at == silent else 1_000_000 * (at + 1))
        if at == 2:
            DeltaTable(str(tmp_path)).create_checkpoint()
    for at in range(3):
        (tmp_path / "_delta_log" / f"{at:020}.json").unlink()
    DeltaTable(str(tmp_path)).vacuum(0, dry_run=False, enforce_retention_duration=False)
    newest = TableVersion(timestamp=dt.datetime.fromtimestamp(5_001, dt.UTC))
    of_checkpoint = TableVersion(timestamp=dt.datetime.fromtimestamp(3_001, dt.UTC))
    vacuumed = TableVersion(timestamp=dt.datetime.fromtimestamp(4_001, dt.UTC))

    assert [4] == ids(pin_source(str(tmp_path), ELSEWHERE, None, newest))
    with pytest.raises(BadInput, match=r"must (still have a version of|say when they were made)"):
        pin_source(str(tmp_path), ELSEWHERE, None, of_checkpoint)
    with pytest.raises(BadInput if silent else SourceChanged, match="version 3"):
        pin_source(str(tmp_path), ELSEWHERE, None, vacuumed)


def rewrite_commit(table: Path, version: int, milliseconds: int | None, **more: int) -> None:
    """Have a commit say when it was made, or nothing of itself, as the protocol of Delta allows."""
    path = table / "_delta_log" / f"{version:020}.json"
    actions = [each for each in map(json.loads, path.read_text().splitlines()) if "commitInfo" not in each]
    info = [] if milliseconds is None else [{"commitInfo": {"timestamp": milliseconds, **more}}]
    path.write_text("".join(f"{json.dumps(each)}\n" for each in [*info, *actions]))


@pytest.mark.parametrize(
    ("version", "told"),
    [
        (TableVersion(number=7), "must still have version 7, but its newest version is 0"),
        (TableVersion(timestamp=dt.datetime(2001, 1, 1, tzinfo=dt.UTC)), "a version of 2001-01-01T00:00:00"),
    ],
)
def test_a_version_that_a_delta_table_does_not_have_is_refused(
    tmp_path: Path, version: TableVersion, told: str
) -> None:
    write(str(tmp_path), numbers(0, 3))
    with pytest.raises(BadInput, match=told):
        pin_source(str(tmp_path), ELSEWHERE, None, version)


def test_a_version_whose_files_were_removed_is_told(tmp_path: Path) -> None:
    write(str(tmp_path), numbers(0, 3))
    write(str(tmp_path), numbers(3, 5), mode="overwrite")
    DeltaTable(str(tmp_path)).vacuum(0, dry_run=False, enforce_retention_duration=False)
    with pytest.raises(SourceChanged, match=r"version 0 of the Delta table at .* 1 are gone"):
        pin_source(str(tmp_path), ELSEWHERE, None, TableVersion(number=0))


def test_without_deltalake_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(str(tmp_path), numbers(0, 3))
    monkeypatch.setitem(sys.modules, "deltalake", None)
    with pytest.raises(BadInput, match=r"find the package deltalake, got none\. Run: pip install 'overnight\[delta\]'"):
        pin_source(str(tmp_path), ELSEWHERE)


def test_a_delta_table_that_was_deleted_from_is_what_is_left(tmp_path: Path) -> None:
    write(str(tmp_path), numbers(0, 10))
    DeltaTable(str(tmp_path)).delete("id >= 4")

    assert [0, 1, 2, 3] == ids(pin_source(str(tmp_path), ELSEWHERE))


def test_a_delta_table_with_a_checkpoint_is_read(tmp_path: Path) -> None:
    for at in range(3):
        write(str(tmp_path), numbers(at, at + 1))
    DeltaTable(str(tmp_path)).create_checkpoint()
    DeltaTable(str(tmp_path)).cleanup_metadata()
    write(str(tmp_path), numbers(3, 4))

    assert [0, 1, 2, 3] == ids(pin_source(str(tmp_path), ELSEWHERE))


def test_partitions_of_a_delta_table_have_the_values_of_its_log_and_the_types_of_its_schema(place: str) -> None:
    values = {
        "city": ["New York", "a/b", "100%", "ü=1", None],
        "n": [7, -1, None, 8, 9],
        "day": [dt.date(2024, 2, 29), None, dt.date(1, 1, 1), dt.date(2024, 1, 1), dt.date(2024, 1, 2)],
        "sure": [True, False, None, True, False],
        "size": [0.1, -1e25, None, 2.0, 1e-7],
        "at": [
            dt.datetime.fromisoformat(day) if day else None
            for day in ("2024-02-29T12:30:00.00025", "0001-01-01", "", "2024-01-01", "2024-01-02")
        ],
    }
    types = {"city": "string", "n": "int64", "day": "date32[day]", "sure": "bool", "size": "double"}
    write(place, pa.table({"id": list(range(5)), **values}), partition_by=list(values))
    snapshot = pin_source(place, ELSEWHERE)
    table = read_rows(snapshot, "id", *values).sort_by("id")

    assert values == table.select(list(values)).to_pydict()
    assert types | {"at": "timestamp[us]"} == {name: str(table.schema.field(name).type) for name in values}


def edit_log(folder: Path, edit: Any) -> None:
    """Change the actions of the first commit of a Delta table."""
    log = folder / "_delta_log" / f"{0:020d}.json"
    actions = [json.loads(line) for line in log.read_text().splitlines()]
    for action in actions:
        edit(action)
    log.write_text("".join(json.dumps(action) + "\n" for action in actions))


def move_file(folder: Path, path: str) -> None:
    """Give the one file of a Delta table another path, in its log too."""

    def move(action: dict[str, Any]) -> None:
        if "add" in action:
            (folder / path).parent.mkdir(exist_ok=True)
            next(folder.rglob("*.parquet")).rename(folder / path)
            action["add"]["path"] = path

    edit_log(folder, move)


def test_the_log_goes_before_the_path_of_a_file(tmp_path: Path) -> None:
    write(str(tmp_path), pa.table({"id": [1], "city": ["Rome"]}), partition_by=["city"])
    move_file(tmp_path, "x.parquet")

    assert ["Rome"] == read_rows(pin_source(str(tmp_path), ELSEWHERE), "city")["city"].to_pylist()


def test_a_folder_in_the_form_of_a_partition_is_none_where_the_log_has_none(tmp_path: Path) -> None:
    write(str(tmp_path), pa.table({"id": [1]}))
    move_file(tmp_path, "city=Rome/x.parquet")

    assert () == open_dataset(pin_source(str(tmp_path), ELSEWHERE), ["id"], ()).hive


def test_a_partition_whose_text_is_only_in_the_log_is_refused(tmp_path: Path) -> None:
    at = pa.array([dt.datetime(2024, 1, 1, 12, tzinfo=dt.UTC)], pa.timestamp("us", "UTC"))
    write(str(tmp_path), pa.table({"id": [1], "at": at}), partition_by=["at"])
    assert ["2024-01-01 12:00:00"] == [
        str(value)[:19] for value in read_rows(pin_source(str(tmp_path), ELSEWHERE), "at")["at"].to_pylist()
    ]
    move_file(tmp_path, "x.parquet")

    assert "got at (timestamp[us, tz=UTC]) of x.parquet" in refusal(str(tmp_path))


@pytest.mark.parametrize(
    ("feature", "properties", "told"),
    [
        ("columnMapping", {"delta.columnMapping.mode": "name"}, "columnMapping by name"),
        ("typeWidening", {}, "has typeWidening, which can't be read yet"),
        ("deletionVectors", {}, "has deletionVectors"),
        ("catalogManaged", {}, "must be one that can be read here, got: .*atalog"),
        ("fromTheFuture", {}, "must be one that can be read here, got: .*fromTheFuture"),
    ],
)
def test_a_feature_that_the_files_alone_do_not_show_is_refused_by_name(
    tmp_path: Path, feature: str, properties: dict[str, str], told: str
) -> None:
    write(str(tmp_path), numbers(0, 4))
    vector = {"storageType": "u", "pathOrInlineDv": "ab^-aqEH.-t@S}K{vb[*k^", "offset": 1}
    vector |= {"sizeInBytes": 36, "cardinality": 2}

    def change(action: dict[str, Any]) -> None:
        if "protocol" in action:
            features = {"readerFeatures": [feature], "writerFeatures": [feature]}
            action["protocol"] = {"minReaderVersion": 3, "minWriterVersion": 7, **features}
        if "metaData" in action:
            action["metaData"]["configuration"] = properties
            if properties:
                schema = json.loads(action["metaData"]["schemaString"])
                for at, field in enumerate(schema["fields"]):
                    field["metadata"] = {"delta.columnMapping.id": at, "delta.columnMapping.physicalName": f"c{at}"}
                action["metaData"]["schemaString"] = json.dumps(schema)
        if "add" in action and feature == "deletionVectors":
            action["add"]["deletionVector"] = vector

    edit_log(tmp_path, change)
    with pytest.raises(SourceFormat, match=told):
        pin_source(str(tmp_path), ELSEWHERE)


def test_features_that_change_nothing_in_the_files_are_read(tmp_path: Path) -> None:
    write(str(tmp_path), numbers(0, 4))

    def change(action: dict[str, Any]) -> None:
        if "protocol" in action:
            features = ["timestampNtz", "deletionVectors", "v2Checkpoint", "columnMapping"]
            action["protocol"] = {"minReaderVersion": 3, "minWriterVersion": 7}
            action["protocol"] |= {"readerFeatures": features, "writerFeatures": features}

    edit_log(tmp_path, change)

    assert [0, 1, 2, 3] == ids(pin_source(str(tmp_path), ELSEWHERE))


def test_a_clone_that_shares_files_is_refused(tmp_path: Path) -> None:
    write(f"{tmp_path}/t", numbers(0, 4))

    def change(action: dict[str, Any]) -> None:
        if "add" in action:
            action["add"]["path"] = f"file://{tmp_path}/t/{action['add']['path']}"

    edit_log(tmp_path / "t", change)

    assert "a clone that shares the files of another table can't be read yet" in refusal(f"{tmp_path}/t")


def test_a_file_of_the_log_that_is_gone_or_cut_short_is_told_with_the_version(place: str) -> None:
    write(place, numbers(0, 3))
    storage = open_storage(place)
    (entry,) = (entry for entry in storage.entries() if entry.path.endswith(".parquet"))
    storage.delete([entry.path])
    for data in (None, b"PAR1"):
        if data:
            storage.put_new(entry.path, data)
        with pytest.raises(SourceChanged, match=rf"version 0 of the Delta table at .* 1 are gone .*{entry.path}"):
            pin_source(place, ELSEWHERE)


def test_a_delta_table_without_rows_is_source_empty(tmp_path: Path) -> None:
    write(str(tmp_path), numbers(0, 3))
    DeltaTable(str(tmp_path)).delete()
    with pytest.raises(SourceEmpty, match=r"a table without files at .* \(version 1\)"):
        open_dataset(pin_source(str(tmp_path), ELSEWHERE), ["a"], ())


def test_a_log_that_is_none_is_refused(place: str) -> None:
    put(place, {"_delta_log/0.json": b"{}", "a.parquet": numbers(0, 1)})

    assert f"The log of the Delta table at {place} must be one that can be read here" in refusal(place)


@pytest.mark.parametrize(
    "inside",
    ["/city=Rome", "/*.parquet", "/**/*.parquet", "/city=*/", "/city=*/*.parquet", "/city=Rome/*.parquet", "/*/*"],
)
def test_files_of_a_delta_table_past_its_log_are_refused(place: str, inside: str) -> None:
    table = pa.table({"id": [1, 2], "city": ["Rome", "Oslo"]})
    write(f"{place}/t", table, partition_by=["city"])
    put(f"{place}/t", {"loose.parquet": numbers(0, 1)})

    assert f"past its log. Name {place}/t itself, or one file by its full name." in refusal(f"{place}/t{inside}")
    with pytest.raises(SourceFormat, match="past its log"):
        pin_source(f"{place}/t{inside}", ELSEWHERE)


@pytest.mark.parametrize("source", ["", "/*", "/**", "/*/*.parquet", "/deep"])
def test_a_table_below_the_source_is_refused_by_its_own_name(place: str, source: str) -> None:
    write(f"{place}/deep/t", numbers(0, 3))
    put(place, {"deep/a.parquet": numbers(0, 1), "a.parquet": numbers(0, 1)})
    if source in ("/*", "/*/*.parquet"):
        # No file of the table is selected by these.
        assert 1 == open_dataset(pin_source(f"{place}{source}", ELSEWHERE), ["a"], ()).rows
    else:
        assert f"Name {place}/deep/t itself" in refusal(f"{place}{source}")


def test_a_link_into_a_table_is_refused(tmp_path: Path) -> None:
    write(f"{tmp_path}/t", pa.table({"id": [1, 2], "city": ["Rome", "Oslo"]}), partition_by=["city"])
    (tmp_path / "rome").symlink_to(tmp_path / "t/city=Rome")

    assert f"Name {tmp_path}/t itself" in refusal(f"{tmp_path}/rome")


def test_one_file_by_its_full_name_is_that_file_wherever_it_lies(place: str) -> None:
    write(f"{place}/t", numbers(0, 3))
    write(f"{place}/t", numbers(3, 5), mode="overwrite")
    first = next(entry for entry in open_storage(f"{place}/t").entries() if entry.path.endswith(".parquet"))

    assert ids(pin_source(f"{place}/t/{first.path}", ELSEWHERE)) in ([0, 1, 2], [3, 4])


LOGS = {"Hudi": ".hoodie/hoodie.properties", "Spark": "_spark_metadata/0"}


@pytest.mark.parametrize("kind", LOGS)
@pytest.mark.parametrize("inside", ["", "/data", "/data/*.parquet", "/**", "/*/*", "/.."])
def test_a_table_whose_log_is_not_read_yet_is_refused_by_name(place: str, kind: str, inside: str) -> None:
    put(f"{place}/t", {LOGS[kind]: b"{}", "data/a.parquet": numbers(0, 1)})
    source = place if inside == "/.." else f"{place}/t{inside}"

    assert f"logs of {kind} are not read yet" in refusal(source)


@pytest.mark.parametrize("name", ["metadata/a.parquet", "metadata/notes/x.metadata.json.parquet", "data/a.parquet"])
def test_a_folder_called_metadata_alone_is_no_table(place: str, name: str) -> None:
    put(place, {name: numbers(0, 2)})

    assert [0, 1] == ids(pin_source(place, ELSEWHERE))


def published(place: str, name: str, rows: range = range(25), hours: int = 0, **options: Any) -> Plan:
    """Publish a run of rows into `out` below a place, planned so many hours later."""
    source = put(f"{place}/in-{name}", {"a.parquet": numbers(rows.start, rows.stop)})
    chosen = BatchOptions(name=name, rows_per_chunk=10, key_columns=("id",), **options)
    plan = a_plan(source, f"{place}/out", chosen)
    plan = plan.model_copy(update={"planned_at": plan.planned_at + timedelta(hours=hours)})
    storage = open_storage(f"{place}/out")
    save_plan(storage, plan)
    put_parts(plan, storage)
    publish(storage, plan, audit_parts(storage, plan))
    return plan


def test_a_destination_is_its_newest_complete_run(place: str) -> None:
    published(place, "first")
    published(place, "second", range(100, 115), hours=1)
    begun = a_plan(
        f"{place}/in-first", f"{place}/out", BatchOptions(name="third", rows_per_chunk=10, key_columns=("id",))
    )
    put_parts(begun, open_storage(f"{place}/out"), [(0, 0)])
    save_plan(open_storage(f"{place}/out"), begun)
    snapshot = pin_source(f"{place}/out", ELSEWHERE)

    assert open_predictions(f"{place}/out").select("id").collect()["id"].to_list() == ids(snapshot)
    assert list(range(100, 115)) == ids(snapshot)
    assert "second" == snapshot.version
    assert () == open_dataset(snapshot, ["score"], ()).hive


def test_a_run_by_its_folder_is_that_run(place: str) -> None:
    published(place, "first")
    published(place, "second", range(100, 115), hours=1)
    # Nothing of it is the run's.
    put(f"{place}/out/run=first", {"stray.parquet": numbers(7, 9)})

    assert list(range(25)) == ids(pin_source(f"{place}/out/run=first", ELSEWHERE))
    assert list(range(25)) == ids(pin_source(f"{place}/out/run=first/", f"{place}/out"))


def test_a_destination_or_run_that_is_not_complete_is_refused(place: str) -> None:
    put(f"{place}/in", {"a.parquet": numbers(0, 25)})
    plan = a_plan(f"{place}/in", f"{place}/out", BatchOptions(name="begun", rows_per_chunk=10))
    save_plan(open_storage(f"{place}/out"), plan)
    with pytest.raises(NoCompleteRun, match=r"A run of the Overnight destination .* must be complete"):
        pin_source(f"{place}/out", ELSEWHERE)
    put_parts(plan, open_storage(f"{place}/out"))
    with pytest.raises(NoCompleteRun, match=r"A run of the Overnight destination .* must be complete"):
        pin_source(f"{place}/out", ELSEWHERE)
    with pytest.raises(NoCompleteRun, match=r"Run begun of the Overnight destination .* must be complete"):
        pin_source(f"{place}/out/run=begun", ELSEWHERE)


@pytest.mark.parametrize(
    "inside", ["/*/*.parquet", "/run=*/", "/run=*/*.parquet", "/run=a/*.parquet", "/**/*.parquet", "/_overnight", "/.."]
)
def test_parts_of_a_destination_past_its_manifests_are_refused(place: str, inside: str) -> None:
    published(f"{place}/top", "a")
    source = f"{place}/top" if inside == "/.." else f"{place}/top/out{inside}"

    assert f"Name {place}/top/out itself, or one of its runs as {place}/top/out/run=NAME" in refusal(source)


def test_loose_files_beside_the_runs_of_a_destination_are_a_source(place: str) -> None:
    published(place, "a")
    put(f"{place}/out", {"in/a.parquet": numbers(0, 25), "b.parquet": numbers(30, 33)})

    assert list(range(25)) == ids(pin_source(f"{place}/out/in", f"{place}/out"))
    assert list(range(30, 33)) == ids(pin_source(f"{place}/out/*.parquet", f"{place}/out"))
    assert list(range(25)) == ids(pin_source(f"{place}/out/in/*.parquet", f"{place}/out"))


def test_a_part_of_a_run_that_is_gone_is_told(place: str) -> None:
    plan = published(place, "a")
    path = part_path(plan, (0, 1))
    open_storage(f"{place}/out").delete([path])
    with pytest.raises(SourceChanged, match=rf"Every part of run a at .* the first {re.escape(path)}"):
        pin_source(f"{place}/out", ELSEWHERE)


def test_the_delta_table_of_a_destination_is_read_through_its_log(place: str) -> None:
    published(place, "a", output="delta", delta_mode="replace")
    published(place, "b", range(100, 115), hours=1, output="delta", delta_mode="replace")
    snapshot = pin_source(f"{place}/out", ELSEWHERE)

    assert list(range(100, 115)) == ids(snapshot)
    assert "1" == snapshot.version
    assert f"Name {place}/out itself" in refusal(f"{place}/out/run=b")


def test_a_destination_with_a_table_and_a_newer_run_beside_it_is_refused(tmp_path: Path) -> None:
    published(str(tmp_path), "a", output="delta")
    published(str(tmp_path), "b", hours=1)

    assert "A source must have one log" in refusal(f"{tmp_path}/out")


def test_a_run_whose_table_lost_its_log_is_refused(tmp_path: Path) -> None:
    published(str(tmp_path), "a", output="delta")
    (tmp_path / "out/_delta_log").rename(tmp_path / "log")

    assert "that log is gone" in refusal(f"{tmp_path}/out")


def test_a_destination_inside_a_table_that_is_the_source_is_refused(place: str) -> None:
    write(f"{place}/t", numbers(0, 3))
    for destination in (f"{place}/t", f"{place}/t/scores"):
        with pytest.raises(BadInput, match="The destination must lie outside the source"):
            pin_source(f"{place}/t", destination)


def test_a_part_rewritten_since_the_snapshot_is_source_changed(place: str) -> None:
    write(place, numbers(0, 3))
    snapshot = pin_source(place, ELSEWHERE)
    storage = open_storage(place)
    storage.delete([snapshot.files[0].path])
    put(place, {snapshot.files[0].path: numbers(5, 8)})
    with pytest.raises(SourceChanged):
        ids(snapshot)


class TestSeveralAddresses:
    """A list of files, folders and globs is one source."""

    def test_is_the_files_of_each_once_by_their_paths(self, place: str) -> None:
        put(place, {"a/x.parquet": numbers(0, 2), "b/day=1/y.parquet": numbers(2, 4), "b/z.parquet": numbers(4, 5)})
        sources = [f"{place}/b", f"{place}/a/x.parquet", f"{place}/b/*.parquet"]
        snapshot = pin_source(sources, ELSEWHERE)

        assert ["a/x.parquet", "b/day=1/y.parquet", "b/z.parquet"] == [file.path for file in snapshot.files]
        assert [0, 1, 2, 3, 4] == ids(snapshot)
        assert snapshot == pin_source(sources[::-1], ELSEWHERE)

    def test_of_one_is_that_one(self, place: str) -> None:
        put(place, {"a.parquet": numbers(0, 2)})

        assert pin_source(f"{place}/a.parquet", ELSEWHERE) == pin_source((f"{place}/a.parquet",), ELSEWHERE)

    def test_must_each_be_there(self, place: str) -> None:
        put(place, {"a.parquet": numbers(0, 2)})
        with pytest.raises(SourceNotFound, match=r"got none at .*/b\.parquet"):
            pin_source([f"{place}/a.parquet", f"{place}/b.parquet"], ELSEWHERE)
        with pytest.raises(SourceNotFound, match="got an empty list"):
            pin_source([], ELSEWHERE)

    def test_must_lie_in_one_store_outside_of_tables_and_beside_the_destination(self, place: str) -> None:
        put(place, {"a.parquet": numbers(0, 2), "t/_delta_log/0.json": b"{}", "t/b.parquet": numbers(2, 3)})
        with pytest.raises(SourceFormat, match="got the Delta table"):
            pin_source([f"{place}/a.parquet", f"{place}/t"], ELSEWHERE)
        put(f"{place}/in", {"c.parquet": numbers(3, 4)})
        with pytest.raises(BadInput, match="must lie outside the source"):
            pin_source([f"{place}/*.parquet", f"{place}/in"], f"{place}/in/out")
