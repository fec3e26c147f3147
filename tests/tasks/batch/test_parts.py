"""Parts: the same bytes in every attempt, nulls exactly at rejects, and footers that tell torn from whole."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import BadInput, SchemaMismatch
from serving.model.contract import Contract, Output
from serving.model.encoding import Flags
from tasks.batch.chunk_layout import Chunk, Piece
from tasks.batch.dataset import Dataset, Snapshot, open_dataset
from tasks.batch.options import BatchOptions
from tasks.batch.part_footer import count_reasons, read_footer
from tasks.batch.parts import check_names, encode_part, key_names, list_parts, part_path, part_schema, stored_type
from tasks.batch.plan import Plan, digest_chunk
from tasks.batch.source import pin_source
from tasks.storage import Entry, Storage
from tests.tasks.batch.small import a_contract, a_part, a_plan, numbers, parquet, put

OUTPUTS = (
    Output(name="score", dtype="float32"),
    Output(name="class", dtype="int64"),
    Output(name="label", dtype="str"),
    Output(name="wide", dtype="float64", shape=(3,)),
    Output(name="grid", dtype="float32", shape=(2, 2)),
    Output(name="words", dtype="str", shape=(2,)),
    Output(name="sure", dtype="bool"),
)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    source = put(f"{tmp_path}/in", {"a.parquet": numbers(0, 25)})
    return a_plan(source, f"{tmp_path}/out", contract=a_contract("a", "b", outputs=OUTPUTS))


@pytest.fixture
def keys() -> pa.Table:
    return pa.table({"source_file": ["a.parquet"] * 4, "source_row": [0, 1, 2, 3]})


PREDICTIONS = {
    "score": np.array([0.5, 1, np.nan, 2], dtype=np.float32).reshape(4, 1),
    "class": np.array([1, 2, 3, 4]),
    "label": np.array(["x", "y", None, "ü"], dtype=object),
    "wide": np.arange(12, dtype=np.float64).reshape(4, 3),
    "grid": np.arange(16, dtype=np.float32).reshape(4, 2, 2),
    "words": np.array([["a", "b"], ["c", "d"], [None, None], ["e", ""]], dtype=object),
    "sure": np.array([True, False, True, False]),
}


CHUNK = Chunk(pieces=(Piece(file=0, row_group=0, row_start=0, row_stop=4),))


def flagged(rows: Sequence[tuple[int, str, str]], count: int = 4) -> Flags:
    flags = Flags.all_good(count)
    for row, column, reason in rows:
        flags.mark_row(row, column, reason)
    return flags


def read(data: memoryview) -> pa.Table:
    return pq.read_table(pa.BufferReader(data))


def test_predictions_are_null_exactly_at_rejects_which_say_why(plan: Plan, keys: pa.Table) -> None:
    flags = flagged([(2, "a", "null"), (3, "", "ValueError: x")])
    table = read(encode_part(plan, CHUNK, keys, PREDICTIONS, flags, 4))

    second = {"score": 1.0, "class": 2, "label": "y", "wide": [3.0, 4.0, 5.0], "grid": [4.0, 5.0, 6.0, 7.0]}
    second |= {"words": ["c", "d"], "sure": False}
    expected = [
        (1, second, None, None),
        (2, dict.fromkeys(PREDICTIONS), "a", "null"),
        (3, dict.fromkeys(PREDICTIONS), None, "ValueError: x"),
    ]

    assert [
        {"source_file": "a.parquet", "source_row": row, **predictions, "reject_column": column, "reject_reason": reason}
        for row, predictions, column, reason in expected
    ] == table.slice(1).to_pylist()


@pytest.mark.parametrize("rejects", [0, 4])
def test_a_part_of_no_rejects_or_of_rejects_alone_has_predictions_everywhere_or_nowhere(
    plan: Plan, keys: pa.Table, rejects: int
) -> None:
    good = PREDICTIONS | {"label": np.array(list("abcd"), dtype=object), "words": np.full((4, 2), "w", dtype=object)}
    table = read(encode_part(plan, CHUNK, keys, good, flagged([(row, "a", "null") for row in range(rejects)]), 4))

    assert dict.fromkeys(PREDICTIONS, rejects) == {name: table[name].null_count for name in PREDICTIONS}
    assert ["null" if rejects else None] * 4 == table["reject_reason"].to_pylist()
    assert 4 - rejects == table["reject_column"].null_count


def test_polars_pandas_and_arrow_read_the_same_rows(plan: Plan, keys: pa.Table) -> None:
    data = encode_part(plan, CHUNK, keys, PREDICTIONS, flagged([(2, "a", "null")]), 4)
    names = [name for name in PREDICTIONS if name != "words"]
    frame = read(data).to_pandas()

    assert read(data).select(names).to_pylist() == pl.read_parquet(bytes(data)).select(names).to_dicts()
    assert [4.0, 5.0, 6.0, 7.0] == list(frame["grid"][1])
    assert frame["grid"][2] is None


def test_the_metadata_name_model_and_chunk_and_nothing_of_the_attempt(plan: Plan, keys: pa.Table) -> None:
    flags = flagged([(3, "b", "null"), (0, "a", "null"), (1, "b", "null")])
    metadata = read(encode_part(plan, CHUNK, keys, PREDICTIONS, flags, 2)).schema.metadata

    assert {
        b"overnight.format_version": b"2",
        b"overnight.chunk_digest": digest_chunk(plan, CHUNK).encode(),
        b"overnight.model": b"churn",
        b"overnight.model_version": b"3",
        b"overnight.model_digest": b"d" * 64,
        b"overnight.batch_size": b"2",
        b"overnight.rejects": json.dumps([["a", "null", 1], ["b", "null", 2]]).encode(),
        b"overnight.rows_key_null": b"0",
    } == metadata


def test_a_part_has_the_same_bytes_twice_and_however_its_keys_are_cut(plan: Plan, keys: pa.Table) -> None:
    flags = flagged([(2, "a", "null")])
    first = encode_part(plan, CHUNK, keys, PREDICTIONS, flags, 4)
    cut = pa.concat_tables([keys.slice(0, 1), keys.slice(1, 2), keys.slice(3)])

    assert first == encode_part(plan, CHUNK, keys, PREDICTIONS, flags, 4)
    assert first == encode_part(plan, CHUNK, cut, PREDICTIONS, flags, 4)


def test_what_the_model_left_in_a_rejects_place_does_not_show(plan: Plan, keys: pa.Table) -> None:
    flags = flagged([(2, "a", "null")])
    other = {name: value.copy() for name, value in PREDICTIONS.items()}
    for name, value in other.items():
        value[2] = PREDICTIONS[name][0]

    assert encode_part(plan, CHUNK, keys, PREDICTIONS, flags, 4) == encode_part(plan, CHUNK, keys, other, flags, 4)


CHILD = """
import hashlib, sys
from tasks.batch.run_records import load_plan
from tasks.storage import open_storage
from tests.tasks.batch.small import a_part
plan = load_plan(open_storage(sys.argv[1]), sys.argv[2])
for chunk in plan.chunks:
    print(hashlib.sha256(a_part(plan, chunk, rejects=[1])).hexdigest())
"""


def test_a_part_has_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    table = numbers(0, 30).append_column("kind", pa.array(["x", None, "y"] * 10).dictionary_encode())
    put(f"{tmp_path}/in", {"a.parquet": parquet(table, row_group_size=17)})
    plan = a_plan(
        f"{tmp_path}/in", f"{tmp_path}/out", BatchOptions(rows_per_chunk=10, key_columns=("kind", "id")), batch_size=3
    )
    put(f"{tmp_path}/out", {f"{plan.folder}/plan.json": plan.model_dump_json().encode()})
    done = subprocess.run(
        [sys.executable, "-c", CHILD, f"{tmp_path}/out", plan.run], capture_output=True, text=True, check=True
    )
    # Chunks are read here in another order than there, so with other cursors.
    here = {chunk: hashlib.sha256(a_part(plan, chunk, rejects=[1])).hexdigest() for chunk in reversed(plan.chunks)}

    assert [here[chunk] for chunk in plan.chunks] == done.stdout.split()


KEYS = {
    "int8": pa.array([1, None, -3], pa.int8()),
    "uint64": pa.array([1, None, 2**64 - 1], pa.uint64()),
    "text": pa.array(["x", None, ""]),
    "large text": pa.array(["x", None, ""], pa.large_string()),
    "text view": pa.array(["x", None, ""], pa.string_view()),
    "dictionary": pa.array(["x", None, "x"]).dictionary_encode(),
    "dictionary of numbers": pa.array([7, None, 7]).dictionary_encode(),
    "nulls alone": pa.nulls(3),
    "binary": pa.array([b"\xff", None, b""]),
    "fixed binary": pa.array([b"ab", None, b"cd"], pa.binary(2)),
    "timestamp": pa.array([1, None, 3], pa.timestamp("us", "Europe/Berlin")),
    "nanoseconds": pa.array([1, None, 3], pa.timestamp("ns")),
    "date": pa.array([dt.date(2024, 2, 29), None, dt.date(1, 1, 1)]),
    "decimal": pa.array([Decimal("1.23"), None, Decimal("-0.01")]),
    "double": pa.array([0.1, None, -0.0]),
    "half": pa.array([np.float16(0.5), None, np.float16(2)], pa.float16()),
    "boolean": pa.array([True, None, False]),
    "list": pa.array([[1], None, []], pa.list_(pa.int8())),
    "decimal of few digits in 32 bytes": pa.array([Decimal("1.23"), None, Decimal("-0.01")], pa.decimal256(10, 2)),
    "decimal of 38 digits": pa.array([Decimal(10) ** 37, None, -(Decimal(10) ** 37)], pa.decimal128(38, 0)),
    "time": pa.array([1, None, 86399], pa.time32("s")),
    "seconds": pa.array([1, None, 3], pa.timestamp("s")),
    "duration": pa.array([1, None, 3], pa.duration("ms")),
    "a zone by its minutes": pa.array([1, None, 3], pa.timestamp("us", "+02:00")),
    "struct": pa.array([{"x": 1}, None, {"x": None}]),
    "fixed list": pa.array([[1, 2], [3, 4], [5, None]], pa.list_(pa.int8(), 2)),
    "tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(6, dtype=np.int8).reshape(3, 2)),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_of_any_type_come_through(place: str, name: str) -> None:
    table = pa.table({"key": KEYS[name], "a": np.arange(3, dtype=np.float32)})
    put(f"{place}/in", {"a.parquet": table, "b.parquet": table})
    contract = a_contract("a")
    options = BatchOptions(rows_per_chunk=10, key_columns=("key",))
    plan = a_plan(f"{place}/in", f"{place}/out", options, contract=contract)
    part = read(a_part(plan, (0, 0)))
    dataset = open_dataset(pin_source(f"{place}/in", f"{place}/out"), ["a"], ["key"])

    assert KEYS[name].to_pylist() * 2 == part["key"].to_pylist()
    assert part.schema.remove_metadata().equals(part_schema(contract, options, dataset))
    # Python's times have no nanoseconds, so they are no help in comparing them.
    if name != "nanoseconds":
        assert part["key"].to_pylist() == pl.read_parquet(bytes(a_part(plan, (0, 0))))["key"].to_list()


UNREADABLE = {
    "decimal of 39 digits": pa.decimal256(39, 2),
    "decimal of 76 digits": pa.decimal256(76, 0),
    "dictionary of wide decimals": pa.dictionary(pa.int8(), pa.decimal256(40, 1)),
    "list of wide decimals": pa.list_(pa.decimal256(40, 1)),
    "struct of wide decimals": pa.struct([("x", pa.list_(pa.decimal256(40, 1)))]),
    "map of wide decimals": pa.map_(pa.string(), pa.decimal256(40, 1)),
    "interval": pa.month_day_nano_interval(),
    "struct of nothing": pa.struct([]),
    "binary of no bytes": pa.binary(0),
    "list view": pa.list_view(pa.int8()),
    "large list view": pa.large_list_view(pa.int8()),
    "list of list views": pa.list_(pa.list_view(pa.int8())),
    "union": pa.sparse_union([pa.field("a", pa.int8())]),
    "runs": pa.run_end_encoded(pa.int32(), pa.string()),
    "a decimal of hundreds": pa.decimal128(10, -2),
}


@pytest.mark.parametrize("output", ["parquet", "delta"])
@pytest.mark.parametrize("name", UNREADABLE)
def test_a_key_of_a_type_that_readers_lack_is_refused_by_name(name: str, output: Literal["parquet", "delta"]) -> None:
    schema = pa.schema([("key", UNREADABLE[name]), ("a", pa.float32())])
    dataset = Dataset(snapshot=Snapshot(root="/in", format="parquet", files=()), schema=schema, hive=())
    with pytest.raises(BadInput, match=r"read back by pyarrow and polars, got 'key' of type .*Cast it in the source"):
        check_names(dataset, a_contract("a"), BatchOptions(key_columns=("key",), output=output))


@st.composite
def key_types(draw: st.DrawFn) -> pa.DataType:
    """Draw any type that a Parquet file may give a column, lists and structs of others too."""
    plain = [pa.null(), pa.bool_(), pa.int8(), pa.uint64(), pa.float16(), pa.float64(), pa.date32(), pa.date64()]
    plain += [pa.string(), pa.large_binary(), pa.string_view(), pa.binary(7), pa.time64("ns"), pa.duration("s")]
    plain += [pa.timestamp(unit, zone) for unit in ("s", "ns") for zone in (None, "UTC", "+05:30", "Asia/Tokyo", "X/Y")]
    plain += [pa.decimal128(38, 5), pa.decimal256(38, 5), pa.decimal256(39, 5), pa.decimal64(9, 9), pa.decimal32(5, 0)]
    plain += [pa.uuid(), pa.json_(), pa.bool8()]
    if draw(st.integers(0, 2)):
        return draw(st.sampled_from(plain))
    inner = draw(key_types())
    name = draw(st.sampled_from(["x", "", "a.b"]))
    nested = [pa.list_(inner), pa.large_list(inner), pa.list_(inner, 2), pa.list_view(inner)]
    nested += [pa.struct([(name, inner)]), pa.map_(pa.string(), inner)]
    return draw(st.sampled_from(nested))


@settings(max_examples=150)
@given(kind=key_types())
def test_a_key_of_any_type_is_refused_or_read_back(kind: pa.DataType) -> None:
    dataset = Dataset(
        snapshot=Snapshot(root="/in", format="parquet", files=()), schema=pa.schema([("key", kind)]), hive=()
    )
    options = BatchOptions(key_columns=("key",))
    try:
        check_names(dataset, a_contract("a"), options)
    except BadInput:
        return
    stored = part_schema(a_contract("a"), options, dataset).field("key").type
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(pa.table({"key": pa.nulls(3, stored)}), f"{folder}/part.parquet")

        assert 3 == pq.read_table(f"{folder}/part.parquet").num_rows
        assert [None] * 3 == pl.scan_parquet(f"{folder}/part.parquet").collect()["key"].to_list()


@pytest.mark.parametrize(
    ("output", "given", "expected"),
    [
        ("parquet", pa.dictionary(pa.int8(), pa.large_string()), pa.large_string()),
        ("parquet", pa.list_(pa.float32(), 3), pa.list_(pa.float32())),
        ("parquet", pa.fixed_shape_tensor(pa.float32(), [2, 3]), pa.list_(pa.float32())),
        ("parquet", pa.uint32(), pa.uint32()),
        ("parquet", pa.string(), pa.string()),
        ("delta", pa.uint8(), pa.int16()),
        ("delta", pa.uint16(), pa.int32()),
        ("delta", pa.uint32(), pa.int64()),
        ("delta", pa.uint64(), pa.uint64()),
        ("delta", pa.float16(), pa.float32()),
        ("delta", pa.list_(pa.uint8(), 3), pa.list_(pa.int16())),
        ("delta", pa.dictionary(pa.int8(), pa.uint16()), pa.int32()),
        ("delta", pa.int32(), pa.int32()),
    ],
)
def test_a_type_that_readers_or_delta_lack_is_stored_as_one_that_holds_it(
    output: Literal["parquet", "delta"], given: pa.DataType, expected: pa.DataType
) -> None:
    assert expected == stored_type(given, output)


def test_a_part_for_delta_has_types_that_delta_has(tmp_path: Path) -> None:
    table = pa.table({"key": pa.array([1, 255], pa.uint8()), "a": np.arange(2, dtype=np.float32)})
    put(f"{tmp_path}/in", {"a.parquet": table})
    contract = a_contract(
        "a", outputs=(Output(name="y", dtype="uint16"), Output(name="wide", dtype="uint8", shape=(2,)))
    )
    options = BatchOptions(rows_per_chunk=10, key_columns=("key",), output="delta")
    plan = a_plan(f"{tmp_path}/in", f"{tmp_path}/out", options, contract=contract)
    part = read(a_part(plan, (0, 0), rejects=[0]))
    dataset = open_dataset(pin_source(f"{tmp_path}/in", f"{tmp_path}/out"), ["a"], ["key"])

    assert [pa.int16(), pa.int32(), pa.list_(pa.int16())] == part.schema.types[:3]
    assert [(1, None, None), (255, 1, [1, 1])] == [(row["key"], row["y"], row["wide"]) for row in part.to_pylist()]
    assert part.schema.remove_metadata().equals(part_schema(contract, options, dataset))


def test_without_key_columns_file_and_row_are_the_key(plan: Plan) -> None:
    table = read(a_part(plan, (0, 1)))

    assert ["source_file", "source_row"] == key_names(BatchOptions()) == table.column_names[:2]
    assert list(range(8, 16)) == table["source_row"].to_pylist()
    assert {"a.parquet"} == set(table["source_file"].to_pylist())


def a_dataset(*names: str) -> Dataset:
    schema = pa.schema([(name, pa.int64()) for name in names])
    return Dataset(snapshot=Snapshot(root="/in", format="parquet", files=()), schema=schema, hive=())


def test_keys_that_the_dataset_lacks_are_told() -> None:
    told = r"must be one column of the dataset, got \['x', 'source_file'\]\. .*\['id'\]"
    with pytest.raises(SchemaMismatch, match=told):
        check_names(a_dataset("id"), a_contract("a"), BatchOptions(key_columns=("id", "x", "source_file")))


def clashing(*outputs: str) -> Contract:
    return a_contract("a", outputs=tuple(Output(name=name, dtype="float32") for name in outputs))


@pytest.mark.parametrize(
    ("contract", "keys"),
    [
        (clashing("id"), ("id",)),
        (clashing("reject_reason"), ("id",)),
        (clashing("source_row"), ()),
        (clashing("y", "y"), ()),
        (clashing("y"), ("id", "id")),
    ],
)
def test_columns_of_a_part_that_clash_are_told(contract: Contract, keys: tuple[str, ...]) -> None:
    with pytest.raises(BadInput, match="columns must have different names, got "):
        check_names(a_dataset("id"), contract, BatchOptions(key_columns=keys))


def test_names_that_differ_by_case_alone_are_told_for_a_delta_table_which_takes_them_for_one() -> None:
    keys = ("Y",)
    with pytest.raises(BadInput, match=r"must have different names, got \['Y', 'y'\]"):
        check_names(a_dataset("Y"), clashing("y"), BatchOptions(key_columns=keys, output="delta"))
    check_names(a_dataset("Y"), clashing("y"), BatchOptions(key_columns=keys))


def test_a_feature_named_like_the_key_is_told() -> None:
    contract = a_contract("source_row")
    with pytest.raises(BadInput, match=r"\['source_row'\] name a row, got columns of the model called so"):
        check_names(a_dataset("source_row", "id"), contract, BatchOptions())
    check_names(a_dataset("source_row", "id"), contract, BatchOptions(key_columns=("id",)))


def test_columns_named_like_the_key_may_be_keys(tmp_path: Path) -> None:
    put(f"{tmp_path}/in", {"a.parquet": {"source_file": ["x", "y"], "source_row": [7, 8], "a": [0.0, 1.0]}})
    options = BatchOptions(rows_per_chunk=10, key_columns=("source_file", "source_row"))
    plan = a_plan(f"{tmp_path}/in", f"{tmp_path}/out", options, contract=a_contract("a"))

    assert [("x", 7), ("y", 8)] == [
        (row["source_file"], row["source_row"]) for row in read(a_part(plan, (0, 0))).to_pylist()
    ]


def test_reasons_are_counted() -> None:
    flags = flagged([(0, "a", "null"), (3, "a", "null"), (1, "b", "null")])

    assert Counter({("a", "null"): 2, ("b", "null"): 1}) == count_reasons(flags)
    assert Counter() == count_reasons(Flags.all_good(3))


def test_parts_of_a_plan_are_listed_and_all_else_is_ignored(storage: Storage, plan: Plan) -> None:
    plan = plan.model_copy(update={"run": "a", "digest": "0123456789abcdef"})
    digest = "0123456789ab"
    for path in (
        *(f"run=a/part-{at}-{digest}.parquet" for at in ("00000-0000", "00012-0003", "100000-10000")),
        *("run=a/part-00007-0000.parquet", "run=a/part-00008-0000-ba9876543210.parquet"),
        *(f"run=a/.part-00001-0000-{digest}.parquet.ab.aside", f"run=a/part-1-1-{digest}.parquet"),
        *(f"run=a/sub/part-00002-0000-{digest}.parquet", f"run=a/part-000003-0000-{digest}.parquet", "run=a/notes.txt"),
        *(f"run=ab/part-00004-0000-{digest}.parquet", f"part-00005-0000-{digest}.parquet"),
        *(f"run=a/part-00006-0000-{digest}.PARQUET", f"run=a/part-00001-0000-{digest}.parquet.bak"),
    ):
        storage.put_new(path, b"x")
    parts = list_parts(storage, plan)

    assert {(0, 0), (12, 3), (100000, 10000)} == set(parts)
    assert {part_path(plan, chunk) for chunk in parts} == {entry.path for entry in parts.values()}
    assert list_parts(storage, plan.model_copy(update={"run": "none"})) == {}


def entry_of(storage: Storage, path: str) -> Entry:
    found = storage.find(path)
    assert found is not None
    return found


def test_a_footer_says_rows_and_rejects(storage: Storage, plan: Plan) -> None:
    storage.put_new("part", a_part(plan, (0, 0), rejects=[1, 4]))
    entry = entry_of(storage, "part")
    footer = read_footer(storage, plan, plan.chunks[0, 0], entry)

    assert footer is not None
    assert ("part", 8, entry.size) == (footer.path, footer.rows, footer.bytes)
    assert Counter({("a", "null"): 2}) == footer.rejects


@pytest.mark.parametrize(
    ("keys", "rows"),
    [
        ({"k": ["x", None, "y", None]}, 2),
        ({"k": [1, None, 3, None], "l": [None, None, "b", "c"]}, 3),
        ({"k": "abcd"}, 0),
    ],
)
def test_a_footer_counts_the_rows_whose_key_holds_a_null(
    storage: Storage, plan: Plan, keys: dict[str, Sequence[object]], rows: int
) -> None:
    whole = pa.table({name: list(values) for name, values in keys.items()})
    table = pa.concat_tables([whole.slice(0, 1), whole.slice(1)])
    storage.put_new("part", encode_part(plan, CHUNK, table, PREDICTIONS, Flags.all_good(4), 4))
    footer = read_footer(storage, plan, CHUNK, entry_of(storage, "part"))

    assert footer is not None
    assert rows == footer.rows_key_null


def test_a_part_that_is_torn_or_a_strangers_has_no_footer(storage: Storage, plan: Plan) -> None:
    chunk, good = plan.chunks[0, 0], bytes(a_part(plan, (0, 0)))
    stranger = plan.model_copy(update={"shape": "0" * 32})
    elsewhere = plan.model_copy(update={"made_with": ("another processor",)})
    flipped = bytearray(good)
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    flipped[footer : footer + 20] = bytes(0xFF ^ byte for byte in good[footer : footer + 20])
    torn = {
        "empty": b"",
        "cut": good[:-1],
        "half": good[: len(good) // 2],
        "garbage": b"PAR1" + bytes(1000) + b"PAR1",
        "flipped": bytes(flipped),
        "another model's": bytes(a_part(stranger, (0, 0))),
        "another machine's": bytes(a_part(elsewhere, (0, 0))),
        "another chunk's": bytes(a_part(plan, (0, 1))),
        "other rows": bytes(a_part(plan, (0, 3))),
        "no metadata": parquet(numbers(0, 8)),
    }
    for name, data in torn.items():
        storage.put_new(name, data)

    assert dict.fromkeys(torn) == {name: read_footer(storage, plan, chunk, entry_of(storage, name)) for name in torn}


def test_a_part_that_was_set_aside_meanwhile_has_no_footer(storage: Storage, plan: Plan) -> None:
    storage.put_new("part", b"torn")
    entry = entry_of(storage, "part")
    storage.set_aside(entry)

    assert read_footer(storage, plan, plan.chunks[0, 0], entry) is None
    storage.put_new("part", a_part(plan, (0, 0)))
    assert read_footer(storage, plan, plan.chunks[0, 0], entry) is None
