"""Upsert by key: a table is what a dictionary would be, whoever writes to it meanwhile."""

from __future__ import annotations

import datetime as dt
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
from deltalake import write_deltalake
from hypothesis import given, settings
from hypothesis import strategies as st
from pyiceberg.catalog import Catalog

from serving.errors import DestinationUnusable, KeysUnfit, PublishRefused, StorageFault
from tasks.batch import delta, upsert
from tasks.batch.key_check import check_run_keys
from tasks.batch.manifest import find_manifest
from tasks.batch.options import BatchOptions
from tasks.batch.plan import Plan
from tasks.batch.publish import audit_parts, publish
from tasks.batch.verify import verify_run
from tasks.storage import LocalStorage, Storage, open_storage
from tests.tasks.batch.iceberg_tables import configure, delete_rows, open_lake
from tests.tasks.batch.small import a_contract, a_plan, put, put_parts
from tests.tasks.batch.tables import DeltaOutput, IcebergOutput, TableOutput, an_upsert, check, commit, read_scores

Scores = dict[int, float | None]
DELTA = DeltaOutput()
UPSERT, MARK, DELETE = (DELTA.options("upsert", missing_keys=missing) for missing in ("keep", "mark", "delete"))
ICEBERG = [IcebergOutput.options("upsert", missing_keys=missing) for missing in ("keep", "mark", "delete")]


def append(destination: Storage, ids: list[int], score: float = -1.0) -> None:
    """Add rows to the table as somebody else does."""
    table = DELTA.open(destination)
    schema = pa.schema(table.schema().to_arrow())
    rows = pa.table({"id": ids, "score": pa.array([score] * len(ids), pa.float32())})
    for name in schema.names[2:]:
        rows = rows.append_column(name, pa.nulls(len(ids), pa.string()))
    write_deltalake(table, rows, mode="append")


def test_rows_of_the_same_keys_are_replaced_and_others_added_in_one_commit(
    table: TableOutput, destination: Storage, place: str
) -> None:
    first = an_upsert(place, "first", dict.fromkeys(range(25), 1.0), 1, table.options("upsert"))
    second = an_upsert(place, "second", dict.fromkeys(range(20, 30), 2.0), 2, table.options("upsert"))
    for plan in (first, second, first, second):
        commit(destination, plan)

    assert [(key, 1.0) for key in range(20)] + [(key, 2.0) for key in range(20, 30)] == read_scores(table, destination)
    assert 2 == table.count_commits(destination)


def test_files_without_those_keys_stay_as_they_are(destination: Storage, place: str) -> None:
    first = an_upsert(place, "first", dict.fromkeys(range(30), 1.0), 1)
    commit(destination, first)
    before = set(delta._list_files(DELTA.open(destination)))
    commit(destination, an_upsert(place, "second", {10: 2.0}, 2))
    after = set(delta._list_files(DELTA.open(destination)))

    assert len(before) == 4
    assert len(before & after) == 3
    assert ["rewritten"] == [path.split("/")[0] for path in after - before if not path.startswith("run=")]


class LyingStorage(LocalStorage):
    """A folder that answers to have a rewritten file, the first time, and has a part of it, or nothing."""

    def __init__(self, root: Path, part: float | None) -> None:
        super().__init__(root)
        self._part, self._lies = part, True

    def put_new(self, path: str, data: bytes | memoryview) -> bool:
        if not (self._lies and path.startswith("rewritten/")):
            return super().put_new(path, data)
        self._lies = False
        return self._part is None or super().put_new(path, data[: int(len(data) * self._part)])


@pytest.mark.parametrize("part", [None, 0.5], ids=["lost", "torn"])
def test_a_rewritten_file_that_is_not_as_it_was_written_is_in_no_commit(tmp_path: Path, part: float | None) -> None:
    storage = LyingStorage(tmp_path / "out", part)
    commit(storage, an_upsert(str(tmp_path), "first", dict.fromkeys(range(10), 1.0), 1))
    second = an_upsert(str(tmp_path), "second", {3: 2.0}, 2)
    with pytest.raises(StorageFault, match="must be as it was written before a commit names it"):
        commit(storage, second)

    assert [(key, 1.0) for key in range(10)] == read_scores(DELTA, storage)
    commit(storage, second)
    assert [(key, 2.0 if key == 3 else 1.0) for key in range(10)] == read_scores(DELTA, storage)


def test_a_run_with_every_key_leaves_none_of_the_earlier_files(destination: Storage, place: str) -> None:
    for order in (1, 2):
        commit(destination, an_upsert(place, str(order), {key: float(order) for key in range(25)}, order))

    assert [(key, 2.0) for key in range(25)] == read_scores(DELTA, destination)
    assert destination.entries("rewritten") == []


@pytest.mark.parametrize(
    ("options", "left"), [(UPSERT, [(0, 1.0)]), (DELETE, []), (MARK, [(0, None)])], ids=["keep", "delete", "mark"]
)
def test_rows_whose_source_is_gone_are_kept_deleted_or_marked(
    destination: Storage, place: str, options: BatchOptions, left: list[tuple[int, float | None]]
) -> None:
    commit(destination, an_upsert(place, "first", {0: 1.0, 1: 1.0, 2: None}, 1, options))
    commit(destination, an_upsert(place, "second", {1: 2.0, 2: 2.0, 3: 2.0}, 2, options))

    assert [*left, (1, 2.0), (2, 2.0), (3, 2.0)] == read_scores(DELTA, destination)


def test_a_marked_row_says_why_and_is_not_written_again(destination: Storage, place: str) -> None:
    commit(destination, an_upsert(place, "first", {0: 1.0, 1: 1.0}, 1, MARK))
    commit(destination, an_upsert(place, "second", {1: 2.0}, 2, MARK))
    written = destination.entries("rewritten")
    commit(destination, an_upsert(place, "third", {1: 3.0}, 3, MARK))
    table = pl.scan_delta(destination.url, storage_options=delta.delta_options(destination)).collect().sort("id")

    assert [(0, None, None, "not in source"), (1, 3.0, None, None)] == table.rows()
    assert written == destination.entries("rewritten")
    commit(destination, an_upsert(place, "fourth", {0: 4.0, 1: 4.0}, 4, MARK))
    assert [(0, 4.0), (1, 4.0)] == read_scores(DELTA, destination)


KEYS = st.lists(st.integers(0, 30), min_size=1, max_size=25, unique=True)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("upsert"), KEYS, st.sampled_from([UPSERT, UPSERT, MARK, DELETE])),
        st.tuples(st.just("append"), KEYS, st.just(UPSERT)),
        st.tuples(st.just("compact"), KEYS, st.just(UPSERT)),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=25)
@given(steps=STEPS)
def test_a_sequence_of_upserts_is_a_dictionary(steps: list[tuple[str, list[int], BatchOptions]]) -> None:
    model: Scores = {}
    with tempfile.TemporaryDirectory() as place:
        destination = open_storage(f"{place}/out")
        for order, (kind, keys, options) in enumerate([("upsert", [0], UPSERT), *steps], start=1):
            if kind == "compact":
                DELTA.open(destination).optimize.compact()
            elif kind == "append":
                fresh = [key for key in keys if key not in model]
                model |= dict.fromkeys(fresh, -1.0)
                append(destination, fresh) if fresh else None
            else:
                plan = an_upsert(place, str(order), {key: float(order) for key in keys}, order, options)
                publish(destination, plan, audit_parts(destination, plan))
                # Called again, as after a kill between the commit and the manifest.
                commit(destination, plan)
                missing = model.keys() - set(keys)
                model = {} if options is DELETE else model | dict.fromkeys(missing if options is MARK else (), None)
                model |= dict.fromkeys(keys, float(order))

            assert sorted(model.items()) == read_scores(DELTA, destination)


KEYS_OF_TYPES = {
    "date": pa.array([dt.date(2026, 1, 1), dt.date(2026, 1, 2)]),
    "decimal": pa.array([Decimal("1.10"), Decimal("-3.00")], pa.decimal128(38, 2)),
    "binary": pa.array([b"\x00", b"\xff"]),
    "text": pa.array(["a", "ü"]),
    "dictionary": pa.array(["a", "b"]).dictionary_encode(),
    "UTC": pa.array([1, 2], pa.timestamp("us", "UTC")),
    "timestamp": pa.array([1, 2], pa.timestamp("us")),
    "seconds": pa.array([1, 2], pa.timestamp("s")),
    "unsigned": pa.array([1, 2**32 - 1], pa.uint32()),
    "small": pa.array([1, -1], pa.int8()),
    "float": pa.array([1.5, float("nan")]),
    "bool": pa.array([True, False]),
    "list": pa.array([["x"], ["x", "y"]]),
    "struct": pa.array([{"x": 1, "y": ["z"]}, {"x": 2, "y": ["z"]}]),
}


@pytest.mark.parametrize("name", [*KEYS_OF_TYPES, "all"])
def test_keys_of_every_type_and_of_several_columns_are_matched(tmp_path: Path, name: str) -> None:
    place = str(tmp_path)
    destination = open_storage(f"{place}/out")
    keys = KEYS_OF_TYPES if name == "all" else {"key": KEYS_OF_TYPES[name]}
    table = pa.table({**keys, "a": pa.array([0.0, 1.0], pa.float32())})
    options = UPSERT.model_copy(update={"key_columns": tuple(keys)})
    for order, rows in enumerate((table, table.slice(1)), start=1):
        source = put(f"{place}/in-{order}", {"a.parquet": rows})
        plan = a_plan(source, f"{place}/out", options, contract=a_contract("a")).model_copy(update={"order": order})
        put_parts(plan, destination, rejects=())
        commit(destination, plan)
    found = pl.scan_delta(destination.url).collect()

    # Scores are places: the second row of the first run is replaced by the first of the second.
    assert [0.0, 0.0] == found["score"].to_list()


def test_rows_that_another_adds_between_the_look_and_the_commit_are_seen(
    destination: Storage, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(destination, an_upsert(place, "first", dict.fromkeys(range(5), 1.0), 1))
    second = an_upsert(place, "second", dict.fromkeys(range(3, 8), 2.0), 2)
    real, examined = upsert.rewrite_files, []

    def look(storage: Storage, plan: Plan, parts: object, paths: list[str]) -> object:
        found = real(storage, plan, parts, paths)
        if not examined:
            append(destination, [7, 20])
        examined.append(paths)
        return found

    monkeypatch.setattr(upsert, "rewrite_files", look)
    commit(destination, second)

    expected = [(key, 1.0) for key in range(3)] + [(key, 2.0) for key in range(3, 8)] + [(20, -1.0)]
    assert expected == read_scores(DELTA, destination)
    # The second look is at what is new alone.
    assert [1, 1] == [len(paths) for paths in examined]
    assert examined[0] != examined[1]


def test_workers_that_race_commit_a_run_once(destination: Storage, place: str) -> None:
    commit(destination, an_upsert(place, "first", dict.fromkeys(range(25), 1.0), 1))
    second = an_upsert(place, "second", dict.fromkeys(range(20, 30), 2.0), 2)
    parts, barrier = audit_parts(destination, second).footers, threading.Barrier(4)

    def race(_: int) -> None:
        barrier.wait()
        commit(destination, second, parts)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(race, range(4)))

    assert [(key, 1.0) for key in range(20)] + [(key, 2.0) for key in range(20, 30)] == read_scores(DELTA, destination)
    assert DELTA.open(destination).version() == 1
    assert len(destination.entries("rewritten")) == 1


def test_files_that_another_compacts_meanwhile_are_read_where_they_are_now(
    destination: Storage, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(destination, an_upsert(place, "first", dict.fromkeys(range(25), 1.0), 1))
    real, examined = upsert.rewrite_files, []

    def look(storage: Storage, plan: Plan, parts: object, paths: list[str]) -> object:
        examined.append(paths)
        if len(examined) == 1:
            table = DELTA.open(destination)
            table.optimize.compact()
            table.vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
        return real(storage, plan, parts, paths)

    second = an_upsert(place, "second", {24: 2.0}, 2)
    parts = audit_parts(destination, second).footers
    monkeypatch.setattr(upsert, "rewrite_files", look)
    # What the table does not name yet is what a vacuum without a time of grace deletes too.
    kept = {part.path: destination.read(part.path) for part in parts}
    monkeypatch.setattr(
        upsert, "find_entries", lambda storage, paths: [put_back(storage, path, kept[path]) for path in paths]
    )
    commit(destination, second, parts)

    assert len(examined) == 2
    assert [(key, 1.0) for key in range(24)] + [(24, 2.0)] == read_scores(DELTA, destination)


def put_back(storage: Storage, path: str, data: bytes | None) -> object:
    storage.put_new(path, data or b"")
    return storage.find(path)


@pytest.mark.parametrize("mode", ["replace", "upsert"])
def test_parts_that_the_table_holds_already_stay(destination: Storage, place: str, mode: str) -> None:
    options = UPSERT.model_copy(update={"delta_mode": mode})
    first = an_upsert(place, "first", dict.fromkeys(range(16), 1.0), 1, options)
    commit(destination, first)
    held = audit_parts(destination, first).footers
    second = an_upsert(place, "second", {7: 2.0, 20: 2.0}, 2, options)
    # As of a run that refers to the part of an earlier one.
    parts = [held[1], *audit_parts(destination, second).footers]
    commit(destination, second, parts)
    kept = [(key, 1.0) for key in range(7)] if mode == "upsert" else []
    expected = sorted([*kept, *((key, 1.0) for key in range(8, 16)), (7, 2.0), (20, 2.0)])

    assert expected == read_scores(DELTA, destination)
    third = an_upsert(place, "third", {0: 3.0}, 3, options)
    # One that refers to all that there is.
    commit(destination, third, parts)
    assert DELTA.open(destination).version() == 2
    assert expected == read_scores(DELTA, destination)


def test_an_older_run_puts_no_rows_over_those_of_a_newer_one(
    table: TableOutput, destination: Storage, place: str
) -> None:
    older = an_upsert(place, "older", {0: 1.0}, 1, table.options("upsert"))
    commit(destination, an_upsert(place, "newer", {0: 2.0}, 2, table.options("upsert")))
    with pytest.raises(PublishRefused, match="must not go back to an older run"):
        commit(destination, older)

    assert [(0, 2.0)] == read_scores(table, destination)


def test_what_is_published_by_an_upsert_verifies(destination: Storage, place: str) -> None:
    plans = [
        an_upsert(place, str(order), {key: float(order) for key in range(order, 20 + order)}, order) for order in (1, 2)
    ]
    for plan in plans:
        destination.put_new(f"{plan.folder}/plan.json", plan.model_dump_json().encode())
        destination.put_new(f"_overnight/order/{plan.order:08d}.json", f'{{"run": "{plan.run}"}}'.encode())
        publish(destination, plan, audit_parts(destination, plan))
    found = [verify_run(destination, plan.run) for plan in plans]

    assert ["complete", "complete"] == [each.state for each in found]
    assert any("has replaced or rewritten them since" in note for note in found[0].notes)
    (rewritten,) = destination.entries("rewritten")
    destination.delete([rewritten.path])
    assert "A file of the table must have" in verify_run(destination, plans[1].run).damages[0].message


def test_doubled_keys_are_named_and_nothing_is_published(destination: Storage, place: str) -> None:
    plan = a_run_with_keys(place, destination, [1, 2, 2, 3, 3, 3])
    with pytest.raises(KeysUnfit, match=r"2 keys occur more than once in id: 3 \(3 rows\), 2 \(2 rows\)\. Nothing was"):
        check_run_keys(destination, plan, audit_parts(destination, plan).footers)

    assert find_manifest(destination, plan.run) is None


def test_null_keys_are_refused(destination: Storage, place: str) -> None:
    plan = a_run_with_keys(place, destination, [1, None, None])
    with pytest.raises(KeysUnfit, match=r"Every row must have a key .* but 2 rows of run .* have a null in id"):
        check_run_keys(destination, plan, audit_parts(destination, plan).footers)


def a_run_with_keys(place: str, destination: Storage, keys: list[int | None]) -> Plan:
    table = pa.table({"id": pa.array(keys, pa.int64()), "a": pa.array([0.0] * len(keys), pa.float32())})
    plan = a_plan(put(f"{place}/in", {"a.parquet": table}), f"{place}/out", UPSERT, contract=a_contract("a"))
    put_parts(plan, destination, rejects=())
    return plan


@pytest.mark.parametrize("name", ["delta.enableChangeDataFeed", "delta.appendOnly"])
def test_a_table_whose_files_may_not_be_written_again_is_refused_before_scoring(
    destination: Storage, place: str, name: str
) -> None:
    first = an_upsert(place, "first", {0: 1.0}, 1)
    commit(destination, first)
    DELTA.open(destination).alter.set_table_properties({name: "true"})
    for refused in (
        lambda: check(destination, first),
        lambda: commit(destination, an_upsert(place, "second", {0: 2.0}, 2)),
    ):
        with pytest.raises(DestinationUnusable, match=rf"must let its files be written again .* {name}=true"):
            refused()

    assert [(0, 1.0)] == read_scores(DELTA, destination)


@pytest.mark.parametrize("point", ["after a rewritten file", "before the commit", "after the commit"])
def test_a_kill_anywhere_leaves_the_table_exact_and_the_next_call_ends_it(tmp_path: Path, point: str) -> None:
    place = str(tmp_path)
    destination = open_storage(f"{place}/out")
    commit(destination, an_upsert(place, "first", dict.fromkeys(range(25), 1.0), 1))
    second = an_upsert(place, "second", dict.fromkeys(range(20, 30), 2.0), 2)
    destination.put_new(f"{second.folder}/plan.json", second.model_dump_json().encode())
    script = Path(__file__).with_name("upsert_kill_child.py")
    done = subprocess.run(
        [sys.executable, str(script), point, f"{place}/out"], capture_output=True, text=True, check=False
    )

    assert -9 == done.returncode, done.stderr
    before = [(key, 1.0) for key in range(25)]
    after = [(key, 1.0) for key in range(20)] + [(key, 2.0) for key in range(20, 30)]
    assert (after if point == "after the commit" else before) == read_scores(DELTA, destination)
    for _ in range(2):
        publish(destination, second, audit_parts(destination, second))
    assert after == read_scores(DELTA, destination)
    assert DELTA.open(destination).version() == 1
    assert find_manifest(destination, second.run) is not None
    assert len(destination.entries("rewritten")) == 1


ICEBERG_STEPS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 20), min_size=1, max_size=15, unique=True),
        st.sampled_from([*ICEBERG[:1], *ICEBERG, None]),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=5)
@given(steps=ICEBERG_STEPS)
def test_a_sequence_of_upserts_into_an_iceberg_table_is_a_dictionary(
    steps: list[tuple[list[int], BatchOptions | None]],
) -> None:
    model: Scores = {}
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        configure(patch, place)
        lake = open_lake(place)
        destination = open_storage(f"{place}/out")
        for order, (keys, options) in enumerate([([0], ICEBERG[0]), *steps], start=1):
            if options is None:
                fresh = dict.fromkeys([key for key in keys if key not in model] or [100 + order], -1.0)
                plan = an_upsert(place, str(order), fresh, order, IcebergOutput.options())
                model |= fresh
            else:
                plan = an_upsert(place, str(order), dict.fromkeys(keys, float(order)), order, options)
                missing = model.keys() - set(keys) if options.missing_keys == "mark" else ()
                model = {} if options.missing_keys == "delete" else model | dict.fromkeys(missing, None)
                model |= dict.fromkeys(keys, float(order))
            publish(destination, plan, audit_parts(destination, plan))
            commit(destination, plan)

            assert sorted(model.items()) == read_scores(IcebergOutput(lake), destination)


def test_rows_that_another_adds_meanwhile_to_an_iceberg_table_are_seen(
    lake: Catalog, destination: Storage, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(destination, an_upsert(place, "first", dict.fromkeys(range(5), 1.0), 1, ICEBERG[0]))
    real, examined = upsert.rewrite_files, []

    def look(storage: Storage, plan: Plan, parts: object, paths: list[str]) -> object:
        found = real(storage, plan, parts, paths)
        examined.append(paths)
        if len(examined) == 1:
            add_beside()
        return found

    other = an_upsert(place, "other", {7: -1.0, 20: -1.0}, 2, ICEBERG[0])
    add_beside = lambda: commit(destination, other)
    second = an_upsert(place, "second", dict.fromkeys(range(3, 8), 2.0), 3, ICEBERG[0])
    parts = audit_parts(destination, second).footers
    monkeypatch.setattr(upsert, "rewrite_files", look)
    commit(destination, second, parts)

    expected = [(key, 1.0) for key in range(3)] + [(key, 2.0) for key in range(3, 8)] + [(20, -1.0)]
    assert expected == read_scores(IcebergOutput(lake), destination)


def test_an_iceberg_table_with_deletes_or_files_elsewhere_is_refused(
    lake: Catalog, destination: Storage, place: str
) -> None:
    first = an_upsert(place, "first", {0: 1.0, 1: 1.0}, 1, ICEBERG[0])
    commit(destination, first)
    table = IcebergOutput(lake).open()
    (file,) = [task.file.file_path for task in table.scan().plan_files()]
    delete_rows(table, file, [0])
    for refused in (
        lambda: check(destination, first),
        lambda: commit(destination, an_upsert(place, "second", {0: 2.0}, 2, ICEBERG[0])),
        lambda: check(open_storage(f"{place}/elsewhere"), first),
    ):
        with pytest.raises(DestinationUnusable, match=r"must have all its files below .*, and no deletes beside them"):
            refused()
