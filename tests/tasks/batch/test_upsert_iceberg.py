"""Upsert by key into Iceberg tables: one snapshot, made of the same files as in a Delta table."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyiceberg.catalog import Catalog
from pyiceberg.table import Table

from serving.errors import DestinationUnusable, PublishRefused
from tasks.batch import upsert
from tasks.batch.iceberg_table import check_iceberg, commit_iceberg
from tasks.batch.options import BatchOptions
from tasks.batch.plan import Plan
from tasks.batch.publish import audit_parts, publish
from tasks.storage import Storage, open_storage
from tests.tasks.batch.iceberg_tables import configure, delete_rows, open_lake
from tests.tasks.batch.upserts import an_upsert

UPSERT = BatchOptions(
    rows_per_chunk=10,
    output="iceberg",
    iceberg_table="lake.sales.scores",
    iceberg_mode="upsert",
    key_columns=("id",),
)
MARK = UPSERT.model_copy(update={"missing_keys": "mark"})
DELETE = UPSERT.model_copy(update={"missing_keys": "delete"})


@pytest.fixture
def lake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    configure(monkeypatch, str(tmp_path))
    return open_lake(str(tmp_path))


@pytest.fixture
def destination(place: str) -> Storage:
    return open_storage(f"{place}/out")


def commit(destination: Storage, plan: Plan) -> None:
    commit_iceberg(destination, plan, audit_parts(destination, plan).footers)


def the_table(lake: Catalog) -> Table:
    return lake.load_table(("sales", "scores"))


def read_rows(lake: Catalog) -> list[tuple[int, float | None]]:
    found = the_table(lake).scan(selected_fields=("id", "score")).to_arrow()
    return sorted((row["id"], row["score"]) for row in found.to_pylist())


def test_rows_of_the_same_keys_are_replaced_and_others_added_in_one_snapshot(
    lake: Catalog, destination: Storage, place: str
) -> None:
    first = an_upsert(place, "first", dict.fromkeys(range(25), 1.0), 1, UPSERT)
    second = an_upsert(place, "second", dict.fromkeys(range(20, 30), 2.0), 2, UPSERT)
    for plan in (first, second, first, second):
        commit(destination, plan)

    assert [(key, 1.0) for key in range(20)] + [(key, 2.0) for key in range(20, 30)] == read_rows(lake)
    assert 2 == len(the_table(lake).snapshots())


STEPS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 20), min_size=1, max_size=15, unique=True),
        st.sampled_from([UPSERT, UPSERT, MARK, DELETE, None]),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=5)
@given(steps=STEPS)
def test_a_sequence_of_upserts_is_a_dictionary(steps: list[tuple[list[int], BatchOptions | None]]) -> None:
    model: dict[int, float | None] = {}
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        configure(patch, place)
        lake = open_lake(place)
        destination = open_storage(f"{place}/out")
        for order, (keys, options) in enumerate([([0], UPSERT), *steps], start=1):
            if options is None:
                plan = an_upsert(
                    place,
                    str(order),
                    dict.fromkeys([key for key in keys if key not in model] or [100 + order], -1.0),
                    order,
                    UPSERT.model_copy(update={"iceberg_mode": "append"}),
                )
                model |= dict.fromkeys([key for key in keys if key not in model] or [100 + order], -1.0)
            else:
                plan = an_upsert(place, str(order), dict.fromkeys(keys, float(order)), order, options)
                missing = model.keys() - set(keys) if options is MARK else ()
                model = {} if options is DELETE else model | dict.fromkeys(missing, None)
                model |= dict.fromkeys(keys, float(order))
            publish(destination, plan, audit_parts(destination, plan))
            commit(destination, plan)

            assert sorted(model.items()) == read_rows(lake)


def test_rows_that_another_adds_between_the_look_and_the_commit_are_seen(
    lake: Catalog, destination: Storage, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(destination, an_upsert(place, "first", dict.fromkeys(range(5), 1.0), 1, UPSERT))
    real, examined = upsert.rewrite_files, []

    def look(storage: Storage, plan: Plan, parts: object, paths: list[str]) -> object:
        found = real(storage, plan, parts, paths)
        examined.append(paths)
        if len(examined) == 1:
            add_beside()
        return found

    other = an_upsert(place, "other", {7: -1.0, 20: -1.0}, 2, UPSERT)
    add_beside = lambda: commit(destination, other)
    second = an_upsert(place, "second", dict.fromkeys(range(3, 8), 2.0), 3, UPSERT)
    parts = audit_parts(destination, second).footers
    monkeypatch.setattr(upsert, "rewrite_files", look)
    commit_iceberg(destination, second, parts)

    expected = [(key, 1.0) for key in range(3)] + [(key, 2.0) for key in range(3, 8)] + [(20, -1.0)]
    assert expected == read_rows(lake)


def test_an_older_run_puts_no_rows_over_those_of_a_newer_one(lake: Catalog, destination: Storage, place: str) -> None:
    older = an_upsert(place, "older", {0: 1.0}, 1, UPSERT)
    commit(destination, an_upsert(place, "newer", {0: 2.0}, 2, UPSERT))
    with pytest.raises(PublishRefused, match="must not go back to an older run"):
        commit(destination, older)

    assert [(0, 2.0)] == read_rows(lake)


def test_a_table_with_deletes_or_files_elsewhere_is_refused(
    lake: Catalog, destination: Storage, place: str, tmp_path: Path
) -> None:
    first = an_upsert(place, "first", {0: 1.0, 1: 1.0}, 1, UPSERT)
    commit(destination, first)
    table = the_table(lake)
    (file,) = [task.file.file_path for task in table.scan().plan_files()]
    delete_rows(table, file, [0])
    schema = pa.schema([("id", pa.int64()), ("score", pa.float32())])
    schema = pa.schema([*schema, ("reject_column", pa.string()), ("reject_reason", pa.string())])
    for refused in (
        lambda: check_iceberg(destination, schema, "0" * 32, UPSERT),
        lambda: commit(destination, an_upsert(place, "second", {0: 2.0}, 2, UPSERT)),
        lambda: check_iceberg(open_storage(f"{place}/elsewhere"), schema, "0" * 32, UPSERT),
    ):
        with pytest.raises(DestinationUnusable, match=r"must have all its files below .*, and no deletes beside them"):
            refused()
