"""Files of one source that differ in the types, the order and the number of their columns."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from hypothesis import given, settings

from serving.errors import KeysUnfit, SchemaMismatch
from serving.model.contract import ColumnPolicy, Contract
from tasks.batch.challenger_rules import Labels
from tasks.batch.column_types import pack_schema, widen_types
from tasks.batch.dataset import Snapshot, open_dataset
from tasks.batch.labels import open_label_table
from tasks.batch.manifest import open_predictions
from tasks.batch.options import BatchOptions
from tasks.batch.source import pin_source
from tests.simulation.data import CONTRACT
from tests.tasks.batch.small import put
from tests.tasks.batch.test_reuse import OPTIONS, call, published, read_parts, write

VERSION = 2
FILLING = OPTIONS.model_copy(update={"missing_columns": "null"})


def fill_nulls(name: str, value: float) -> Contract:
    """Return the contract of the toy model with a value in place of the nulls of a column."""
    (given,) = CONTRACT.inputs
    policies = {name: ColumnPolicy(null=value)}
    columns = tuple(each.model_copy(update={"policy": policies.get(each.name, each.policy)}) for each in given.columns)
    return CONTRACT.model_copy(update={"inputs": (given.model_copy(update={"columns": columns}),)})


NULL_B = fill_nulls("b", 0.5)


def publish(
    source: Path, destination: Path, options: BatchOptions = OPTIONS, contract: Contract = CONTRACT
) -> tuple[pl.DataFrame, pa.DataType]:
    """Score a source, and return the published table in the order of its keys, and the type of these in every part."""
    plan, _ = call(source, destination, options, VERSION, contract)
    parts = published(plan.run, destination).parts
    first, *others = (pq.read_schema(destination / part.path).remove_metadata() for part in parts)
    assert all(first == other for other in others)
    table = open_predictions(str(destination), plan.run).collect()
    return table.sort("id", "y"), first.field("id").type


def answer(frame: pl.DataFrame) -> pl.DataFrame:
    """Return the key of each row and what the toy model makes of it, in the order of the keys."""
    x = pl.col("a").cast(pl.Float64) * VERSION + pl.col("b").cast(pl.Float64).fill_null(0.5)
    return frame.select("id", y=x).sort("id", "y")


INDICES = pa.int8(), pa.uint16(), pa.int32()
TEXT = [pa.string(), pa.large_string(), pa.string_view(), *(pa.dictionary(each, pa.string()) for each in INDICES)]
INTEGERS = [pa.int8(), pa.int16(), pa.int32(), pa.uint8(), pa.uint16()]
# The values of a family fit the narrowest of its types.
FAMILIES: dict[str, tuple[list[pa.DataType], list[Any], pl.DataType]] = {
    "integers": ([*INTEGERS, pa.int64()], [0, 1, 7, 100, 127], pl.Int64()),
    "text": (TEXT, ["", "a", "ü", "longer than a view holds itself"], pl.String()),
    "bytes": (
        [pa.binary(), pa.large_binary(), pa.binary_view()],
        [b"", b"\0a", b"more than a view holds"],
        pl.Binary(),
    ),
    "decimals": (
        [pa.decimal128(5, 2), pa.decimal128(20, 2), pa.decimal128(38, 2)],
        [Decimal("0.10"), Decimal("-999.99"), Decimal("1.00")],
        pl.Decimal(38, 2),
    ),
    "dates": (
        [pa.date32(), pa.timestamp("ms"), pa.timestamp("us"), pa.timestamp("ns")],
        [dt.date(1970, 1, 1), dt.date(2024, 2, 29), dt.date(1901, 12, 31)],
        pl.Datetime("ns"),
    ),
    "a": (INTEGERS, [0, 1, 5, 127], pl.Float64()),
    "b": ([pa.float16(), pa.float32(), pa.float64()], [0.25, -1.5, 1024.0], pl.Float64()),
}


def columns_of(family: str, rows: int) -> st.SearchStrategy[pa.Array]:
    """Draw a column of a family, in one of its types; one of nulls alone may have none."""
    types, values, _ = FAMILIES[family]
    drawn = st.lists(st.sampled_from([None, *values]), min_size=rows, max_size=rows)
    typed = st.builds(
        lambda some, kind: pa.array(some, FAMILIES[family][0][0]).cast(kind), drawn, st.sampled_from(types)
    )
    return typed | st.just(pa.nulls(rows))


@st.composite
def evolved_files(draw: st.DrawFn) -> tuple[str, list[pa.Table]]:
    """Draw a family of keys, and files whose columns are in types of one family, in any order, or missing."""
    family = draw(st.sampled_from(["integers", "text", "bytes", "decimals", "dates"]))
    tables = []
    for at in range(draw(st.integers(2, 4))):
        rows = draw(st.integers(1, 9))
        columns = {name: draw(columns_of(each, rows)) for name, each in (("id", family), ("a", "a"), ("b", "b"))}
        if at:
            columns.pop(draw(st.sampled_from(["id", "a", "b", ""])), None)
        elif columns["id"].type == pa.null():
            columns["id"] = pa.nulls(rows, FAMILIES[family][0][0])
        columns |= {"unused": pa.array([at] * rows) if at % 2 else pa.array(["text"] * rows)}
        tables.append(pa.table({name: columns[name] for name in draw(st.permutations(sorted(columns)))}))
    return family, draw(st.permutations(tables))


@settings(max_examples=10)
@given(drawn=evolved_files(), rows_per_chunk=st.sampled_from([4, 8, 100]))
def test_files_that_differ_give_what_polars_makes_of_them_in_any_order_and_any_chunks(
    drawn: tuple[str, list[pa.Table]], rows_per_chunk: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    family, tables = drawn
    kind = FAMILIES[family][2]
    place = tmp_path_factory.mktemp("evolved")
    for name, ordered in (("in", tables), ("turned", tables[::-1])):
        put(str(place / name), {f"{at}.parquet": table for at, table in enumerate(ordered)})
    found, stored = publish(place / "in", place / "out", FILLING, NULL_B)
    options = FILLING.model_copy(update={"rows_per_chunk": rows_per_chunk})
    again, stored_again = publish(place / "turned", place / "other", options, NULL_B)
    wide = [pl.DataFrame(each).drop("unused") for each in tables]
    wide = [frame.cast({name: FAMILIES.get(name, FAMILIES[family])[2] for name in frame.columns}) for frame in wide]

    assert answer(pl.concat(wide, how="diagonal")).rows() == found.cast({"id": kind}).select("id", "y").rows()
    assert found.select("id", "y").rows() == again.select("id", "y").rows()
    held = [each.schema.field("id").type for each in tables if "id" in each.column_names]
    assert widen_types(held) == widen_types([stored]) == widen_types([stored_again])


ONE = pa.array([1])
REFUSED: dict[str, tuple[list[dict[str, object] | pa.Table], str]] = {
    "a number beside text": (
        [{"id": ONE, "a": [1.0]}, {"id": ["x"], "a": [1.0]}],
        "  - column 'id': int64 in 0.parquet, string in 1.parquet",
    ),
    "an integer beside a float": (
        [{"id": ONE, "a": [1.0]}, {"id": ONE, "a": ONE}, {"id": ONE, "a": ONE}, {"id": ONE, "a": [True]}],
        "  - column 'a': double in 0.parquet, int64 in 1.parquet, bool in 3.parquet",
    ),
    "integers that none holds": (
        [{"id": ONE.cast(pa.uint64()), "a": [1.0]}, {"id": ONE.cast(pa.int8()), "a": [1.0]}],
        "  - column 'id': uint64 in 0.parquet, int8 in 1.parquet",
    ),
    "decimals of two scales": (
        [{"id": pa.array([1], pa.decimal128(9, scale)), "a": [1.0]} for scale in (2, 3)],
        "  - column 'id': decimal128(9, 2) in 0.parquet, decimal128(9, 3) in 1.parquet",
    ),
    "a date beside a time in a zone": (
        [{"id": pa.array([1], kind), "a": [1.0]} for kind in (pa.date32(), pa.timestamp("us", "UTC"))],
        "  - column 'id': date32[day] in 0.parquet, timestamp[us, tz=UTC] in 1.parquet",
    ),
    "lists of two lengths": (
        [{"id": pa.array([[1] * size], pa.list_(pa.int8(), size)), "a": [1.0]} for size in (1, 2)],
        (
            "  - column 'id': fixed_size_list<element: int8>[1] in 0.parquet, "
            "fixed_size_list<element: int8>[2] in 1.parquet"
        ),
    ),
    "a column that one file has twice": (
        [{"id": ONE, "a": [1.0]}, pa.table([[1], [1.0], [1.0]], ["id", "a", "a"])],
        "  - column 'a': double in 0.parquet, more than one of the name in 1.parquet",
    ),
    "more types than a message names": (
        [{"id": pa.array([value]), "a": [1.0]} for value in (1, "x", 1.0, True, b"", dt.time(1))],
        (
            "  - column 'id': int64 in 0.parquet, string in 1.parquet, double in 2.parquet, bool in 3.parquet, "
            "and 2 more types"
        ),
    ),
    "a key and an input that are missing": (
        [{"id": ONE, "a": [1.0]}, {"a": [1.0]}, {"id": ONE}],
        (
            "  - column 'a': double in 0.parquet, missing in 2.parquet\n"
            "  - column 'id': int64 in 0.parquet, missing in 1.parquet"
        ),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_columns_that_no_type_holds_or_that_are_missing_are_told_with_the_first_file_of_each(
    tmp_path: Path, case: str
) -> None:
    files, told = REFUSED[case]
    put(str(tmp_path), {f"{at}.parquet": columns for at, columns in enumerate(files)})
    with pytest.raises(SchemaMismatch) as caught:
        open_dataset(pin_source(str(tmp_path), "/out"), ["a"], ["id"], CONTRACT.nullable)

    _, listed, advice = str(caught.value).partition(told)
    assert listed
    assert advice.startswith("\nRewrite the files, or narrow the source by a glob.")
    assert ("missing in" in told) == ("missing_columns='null' in the options reads missing columns as nulls." in advice)


def test_a_column_that_a_file_lacks_is_null_there_where_the_contract_or_an_option_lets_it_be(tmp_path: Path) -> None:
    put(str(tmp_path / "in"), {"0.csv": b"id,a,b\n1,2,3\n", "1.csv": b"id,a\n4,5\n", "2.csv": b"a,b\n6,7\n"})
    with pytest.raises(SchemaMismatch, match=r"2\.csv must have every column that the run reads, but \['id'\] are"):
        publish(tmp_path / "in", tmp_path / "out", contract=NULL_B)
    (tmp_path / "in/2.csv").unlink()
    with pytest.raises(SchemaMismatch, match=r"1\.csv must have every column that the run reads, but \['b'\] are"):
        publish(tmp_path / "in", tmp_path / "out")
    by_contract, _ = publish(tmp_path / "in", tmp_path / "out", contract=NULL_B)
    by_option, _ = publish(tmp_path / "in", tmp_path / "out", FILLING)

    assert [("1", 7.0), ("4", 10.5)] == by_contract.select("id", "y").rows()
    assert [("1", 7.0, None), ("4", None, "null")] == by_option.select("id", "y", "reject_reason").rows()


def test_a_column_that_other_files_have_in_their_path_is_no_null(tmp_path: Path) -> None:
    put(str(tmp_path), {"0.parquet": {"id": ONE, "a": [1.0]}, "a=2/1.parquet": {"id": ONE}})
    with pytest.raises(SchemaMismatch, match=r"got 'a' in the path of a=2/1\.parquet and in other files themselves"):
        open_dataset(pin_source(str(tmp_path), "/out"), ["a"], ["id"], ["a"])


def test_a_date_that_a_time_does_not_hold_is_refused_by_its_file(tmp_path: Path) -> None:
    kinds = pa.date32(), pa.timestamp("ns")
    files = {
        f"{at}.parquet": {"id": pa.array([200_000], kind), "a": [1.0], "b": [1.0]} for at, kind in enumerate(kinds)
    }
    put(str(tmp_path / "in"), files)
    with pytest.raises(SchemaMismatch, match=r"in/0\.parquet must hold values in column 'id' that fit timestamp\[ns\]"):
        publish(tmp_path / "in", tmp_path / "out")


def test_a_part_is_reused_only_where_its_columns_are_read_in_the_same_type(tmp_path: Path) -> None:
    for at, key in enumerate(("int32", "int32", "int64")):
        write(tmp_path / f"in/f{at}.parquet", at * 100, 12, key=key)
        plan, scored = call(tmp_path / "in", tmp_path / "out")
        full, _ = call(tmp_path / "in", tmp_path / f"full-{at}")

        # The third file widens the keys of those before it; the second did not.
        assert (12, 12, 36)[at] == scored
        assert read_parts(tmp_path / f"full-{at}", full.run) == read_parts(tmp_path / "out", plan.run)
    write(tmp_path / "in/f3.parquet", 300, 12, key="int16")

    assert 12 == call(tmp_path / "in", tmp_path / "out")[1]


def change_table(address: str, number: int) -> None:
    """Change a Delta table as its owner does from night to night."""
    table = DeltaTable(address)
    ids = pa.array([3, 100 + number], pa.int64())
    rows = pa.table({"id": ids, "plan": ["new", None], "a": pa.array([0.5, 0.25]), "b": pa.array([2.0, None])})
    if number == 0:
        # The column b is one that the first files do not have.
        merge = table.merge(rows, "t.id = s.id", source_alias="s", target_alias="t", merge_schema=True)
        merge.when_matched_update_all().when_not_matched_insert_all().execute()
    elif number == 1:
        table.update(updates={"plan": "'none'"}, predicate="id = 7")
    elif number == 2:
        table.delete("id = 4")
    elif number == 3:
        labels = {"plan": pa.large_string()}
        write_deltalake(
            address, rows.cast(pa.schema([f.with_type(labels.get(f.name, f.type)) for f in rows.schema])), mode="append"
        )
    elif number == 4:
        table.optimize.compact()
    elif number == 5:
        table.optimize.z_order(["id"])
    else:
        write_deltalake(address, rows, mode="append")


def test_a_delta_table_that_lives_is_scored_whole_after_each_change(tmp_path: Path) -> None:
    address, options = str(tmp_path / "in"), OPTIONS.model_copy(update={"key_columns": ("id", "plan")})
    for start in (0, 20):
        ids = pa.array(range(start, start + 20), pa.int64())
        rows = pa.table(
            {"id": ids, "plan": [f"p{at}" for at in range(20)], "a": pa.array([at / 4 for at in range(20)])}
        )
        write_deltalake(address, rows, mode="append")
    for number in range(7):
        change_table(address, number)
        held = pl.read_delta(address)
        found, stored = publish(tmp_path / "in", tmp_path / "out", options, NULL_B)

        assert pa.int64() == stored
        assert answer(held).rows() == found.select("id", "y").rows()
        assert sorted(held["plan"], key=str) == sorted(found["plan"], key=str)


def test_a_delta_table_has_the_types_of_its_schema(tmp_path: Path) -> None:
    address = str(tmp_path / "in")
    times = pa.array([dt.datetime(2024, 1, 1, tzinfo=dt.UTC)], pa.timestamp("us", "UTC"))
    write_deltalake(address, pa.table({"id": times, "a": [1.0], "b": [1.0]}))
    # Spark writes times as INT96, which have no zone.
    (file,) = (tmp_path / "in").glob("*.parquet")
    sized = file.stat().st_size
    pq.write_table(pq.read_table(file), file, use_deprecated_int96_timestamps=True, store_schema=False)
    log = tmp_path / "in/_delta_log/00000000000000000000.json"
    log.write_text(log.read_text().replace(f'"size":{sized}', f'"size":{file.stat().st_size}'))

    assert pa.timestamp("us", "UTC") == publish(tmp_path / "in", tmp_path / "out")[1]


def test_labels_of_one_key_in_several_types_are_told(tmp_path: Path) -> None:
    put(
        str(tmp_path),
        {"0.parquet": {"id": pa.array([1, 2], pa.int32()), "y": [0, 1]}, "1.parquet": {"id": pa.array([2]), "y": [1]}},
    )
    keys = pa.schema([("id", pa.int64())])
    with pytest.raises(KeysUnfit, match="1 key occurs more than once in id: 2"):
        open_label_table(Labels(source=str(tmp_path), column="y"), ["id"], keys, "/out")


def test_partitions_have_the_types_that_are_asked_for(tmp_path: Path) -> None:
    days = {"2024-02-29": "007", "1969-12-31": "-1", "__HIVE_DEFAULT_PARTITION__": "5"}
    put(str(tmp_path / "in"), {f"id={day}/a={a}/0.parquet": {"b": [0.5]} for day, a in days.items()})
    typed = OPTIONS.model_copy(update={"partition_types": {"id": "date", "a": "int64"}})
    contract = fill_nulls("a", 0)
    with pytest.raises(SchemaMismatch, match="column 'a' must be float64, got int64, which may lose digits"):
        publish(tmp_path / "in", tmp_path / "out", typed)
    typed = typed.model_copy(update={"partition_types": {"id": "date"}})
    found, stored = publish(tmp_path / "in", tmp_path / "out", typed, contract)

    assert pa.date32() == stored
    assert [(None, 10.5), (dt.date(1969, 12, 31), -1.5), (dt.date(2024, 2, 29), 14.5)] == found.select("id", "y").rows()
    assert pa.string() == publish(tmp_path / "in", tmp_path / "text")[1]


def test_partitions_of_a_delta_table_have_the_types_of_its_schema(tmp_path: Path) -> None:
    days = [dt.date(2024, 2, 29), dt.date(1969, 12, 31)]
    table = pa.table({"id": days, "a": [1.5, 2.5], "b": [0.5, 0.5], "y": [0, 1]})
    write_deltalake(str(tmp_path / "in"), table, partition_by=["id", "a"])
    found, stored = publish(tmp_path / "in", tmp_path / "out")
    labels = open_label_table(
        Labels(source=str(tmp_path / "in"), column="y"), ["id"], pa.schema([("id", stored)]), "/out"
    )

    assert pa.date32() == stored
    assert [(days[1], 5.5), (days[0], 3.5)] == found.sort("id").select("id", "y").rows()
    assert set(days) == {day for each in labels.iterate() for day in each["id"].to_pylist()}
    as_text = OPTIONS.model_copy(update={"partition_types": {"id": "text"}})
    assert pa.string() == publish(tmp_path / "in", tmp_path / "text", as_text)[1]


@pytest.mark.parametrize(
    ("types", "told"),
    [
        ({"dya": "date"}, r"partition_types must name partitions .* got 'dya'; did you mean 'day'\?"),
        ({"a": "int64"}, r"got 'a'; partitions found: \['day'\]"),
        (
            {"day": "date"},
            r"partition 'day' must be of the type date, .* got day=2024-02-30/1\.parquet: Failed to parse",
        ),
        ({"day": "int64"}, r"must be of the type int64, .* got day=2024-02-29/0\.parquet"),
    ],
)
def test_types_that_partitions_do_not_have_are_refused(tmp_path: Path, types: dict[str, Any], told: str) -> None:
    files = {f"day=2024-02-{29 + at}/{at}.parquet": {"id": ONE, "a": [1.0]} for at in range(2)}
    put(str(tmp_path), files)
    with pytest.raises(SchemaMismatch, match=told):
        open_dataset(pin_source(str(tmp_path), "/out"), ["a"], ["id"], (), types)


def test_partitions_of_a_dataset_without_rows_have_the_types_that_are_asked_for() -> None:
    told = pa.schema([("day", pa.string()), ("a", pa.float64())])
    empty = Snapshot(root="nowhere", format="parquet", files=(), empty_schema=pack_schema(told))
    found = open_dataset(empty, ["a"], ["day"], None, {"day": "date"}, may_be_empty=True)

    assert pa.schema([("day", pa.date32()), ("a", pa.float64())]) == found.schema
