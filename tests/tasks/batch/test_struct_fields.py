"""Fields of structs are columns, whatever the format: as polars reads them, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import polars as pl
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake
from hypothesis import given, settings

from serving.errors import SchemaMismatch, SourceCorrupt
from serving.model.contract import Contract
from tasks.batch.chunk_layout import list_row_groups
from tasks.batch.chunk_reader import Reader
from tasks.batch.dataset import open_dataset
from tasks.batch.json_lines import parse_fields
from tasks.batch.manifest import open_predictions
from tasks.batch.options import BatchOptions
from tasks.batch.publish import audit_parts, publish
from tasks.batch.resolve import find_run
from tasks.batch.run_records import confirm_plan
from tasks.batch.run_request import make_request
from tasks.batch.source import pin_source
from tasks.storage import open_storage
from tests.simulation.data import CONTRACT, ToyResolved, load_toy
from tests.tasks.batch.iceberg_tables import configure, open_lake
from tests.tasks.batch.small import a_contract, put
from tests.tasks.batch.test_reuse import OPTIONS, score_plan

VERSION = 2
NESTED = OPTIONS.model_copy(update={"key_columns": ("customer.id",)})


def name_inputs(a: str, b: str) -> Contract:
    """Return the contract of the toy model over two columns."""
    (given_x,) = CONTRACT.inputs
    columns = tuple(each.model_copy(update={"name": name}) for each, name in zip(given_x.columns, (a, b), strict=True))
    return CONTRACT.model_copy(update={"inputs": (given_x.model_copy(update={"columns": columns}),)})


INPUTS = name_inputs("customer.a", "customer.home.b")


def score(source: str, destination: Path, options: BatchOptions = NESTED, contract: Contract = INPUTS) -> pl.DataFrame:
    """Score a source as a call does, and return the published table."""
    resolved: Any = ToyResolved(VERSION)
    load: Any = load_toy
    storage = open_storage(str(destination))
    request = make_request(resolved, contract, source, str(destination), options)
    plan = find_run(request, storage, f"flow-{request.key}", load=load).plan
    score_plan(plan, storage)
    publish(storage, confirm_plan(storage, plan), audit_parts(storage, plan))
    return open_predictions(str(destination), plan.run).collect()


def answer(frame: pl.DataFrame) -> list[tuple[object, ...]]:
    """Return the key of each row and what the toy model makes of it, in the order of the keys."""
    customer = pl.col("customer").struct
    y = customer.field("a").cast(pl.Float64) * VERSION + customer.field("home").struct.field("b").cast(pl.Float64)
    return frame.select(id=customer.field("id").cast(pl.String), y=y).sort("id", "y").rows()


def found(table: pl.DataFrame) -> list[tuple[object, ...]]:
    return table.select(id=pl.col("customer.id").cast(pl.String), y="y").sort("id", "y").rows()


NUMBERS = st.none() | st.integers(0, 100)
CUSTOMERS = st.fixed_dictionaries(
    {"id": NUMBERS, "a": NUMBERS, "home": st.none() | st.fixed_dictionaries({"b": NUMBERS, "city": st.just("Bern")})}
)
ROWS = st.lists(st.none() | CUSTOMERS, min_size=1, max_size=9)
# What no line of JSON has is no column.
WHOLE = {"id": 101, "a": 1, "home": {"b": 2, "city": "Bern"}}


def a_type(ids: pa.DataType, numbers: pa.DataType) -> pa.StructType:
    home = pa.struct([("city", pa.string()), ("b", numbers)])
    return pa.struct([("home", home), ("id", ids), ("a", numbers), ("orders", pa.list_(pa.struct([("n", pa.int8())])))])


def write_source(folder: Path, kind: str, parts: list[list[Any]], draw: st.DataObject) -> str:
    """Write the customers of each part to a file, or append them to a table; return the address."""
    for at, rows in enumerate(parts):
        ids, numbers = (
            draw.draw(st.sampled_from(some)) for some in ([pa.int32(), pa.int64()], [pa.int8(), pa.int16()])
        )
        given_type = a_type(pa.int64(), pa.int16()) if kind == "delta" else a_type(ids, numbers)
        table = pa.table({"day": pa.array(["monday"] * len(rows)), "customer": pa.array(rows, given_type)})
        path = folder / f"{at}.{kind}"
        if kind == "delta":
            write_deltalake(str(folder), table, mode="append")
        elif kind == "jsonl":
            path.write_text("".join(f"{json.dumps(each)}\n" for each in table.to_pylist()))
        elif kind == "parquet":
            pq.write_table(table, path, row_group_size=4)
        else:
            pa.feather.write_feather(table, path, chunksize=4)
    return str(folder)


@settings(max_examples=10)
@given(parts=st.lists(ROWS, min_size=1, max_size=3), draw=st.data())
@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl", "delta"])
def test_fields_of_structs_are_scored_as_polars_reads_them(
    kind: str, parts: list[list[Any]], draw: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place, parts = tmp_path_factory.mktemp("nested"), [[WHOLE], *parts]
    (place / "in").mkdir()
    source = write_source(place / "in", kind, parts, draw)
    rows = pa.table({"customer": pa.array([row for part in parts for row in part], a_type(pa.int64(), pa.int16()))})

    assert answer(pl.DataFrame(rows)) == found(score(source, place / "out"))


def customers(start: int, stop: int) -> pa.Table:
    """Return rows of one struct."""
    rows = [{"id": at, "a": at % 50, "home": {"b": at}, "orders": [{"n": 1}]} for at in range(start, stop)]
    return pa.table({"customer": pa.array(rows, a_type(pa.int64(), pa.int16()))})


@pytest.mark.parametrize("output", ["delta", "iceberg"])
def test_rows_are_put_into_a_table_by_a_key_that_is_a_field(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, str(tmp_path))
    lake = open_lake(str(tmp_path))
    into: dict[str, object] = {"output": output, f"{output}_mode": "upsert"}
    into |= {"iceberg_table": "lake.sales.scores"} if output == "iceberg" else {}
    for name, rows in (("first", customers(0, 11)), ("second", customers(6, 20))):
        put(str(tmp_path / name), {"a.parquet": rows})
        score(str(tmp_path / name), tmp_path / "out", NESTED.model_copy(update=into))
    if output == "iceberg":
        held = pl.DataFrame(lake.load_table("sales.scores").scan().to_arrow())
    else:
        held = pl.read_delta(str(tmp_path / "out"))

    assert answer(pl.DataFrame(customers(0, 20))) == found(held)


@pytest.mark.parametrize(
    ("format_read", "names"),
    [
        ("parquet", ("customer.id", "customer.a", "customer.home.b")),
        ("iceberg", ("buyer.id", "buyer.a", "buyer.home.beta")),
    ],
)
def test_fields_of_an_iceberg_table_are_found_by_their_ids(
    format_read: str, names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, str(tmp_path))
    table = open_lake(str(tmp_path)).create_table("sales.customers", customers(0, 1).schema)
    rows = pa.concat_tables([customers(0, 5), pa.table({"customer": pa.nulls(1, customers(0, 1).schema.types[0])})])
    table.append(rows)
    if format_read == "iceberg":
        with table.update_schema() as update:
            update.rename_column(("customer", "home", "b"), "beta").rename_column("customer", "buyer")
    options = OPTIONS.model_copy(update={"key_columns": names[:1]})
    held = score("iceberg:lake.sales.customers", tmp_path / "out", options, name_inputs(*names[1:]))
    pinned = pin_source("iceberg:lake.sales.customers", "/elsewhere", names)

    assert answer(pl.DataFrame(rows)) == found(held.rename({names[0]: "customer.id"}))
    assert format_read == pinned.format


def read(folder: Path, *columns: str, **options: Any) -> pa.Table:
    """Read columns of all rows as a run does."""
    dataset = open_dataset(pin_source(str(folder), "/elsewhere", columns), columns, (), **options)
    reader = Reader(dataset.snapshot, columns, dataset.partitions, 100, places=False)
    return pa.concat_tables(table for each in list_row_groups(dataset.snapshot.files) for table in reader.read(each))


def test_of_a_struct_only_the_leaf_that_is_asked_for_is_decoded(tmp_path: Path) -> None:
    table = pa.table({"s": [{"asked": at, "beside": "x" * 99} for at in range(9)]})
    pq.write_table(table, tmp_path / "a.parquet", compression="none", use_dictionary=False, write_page_checksum=True)
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data.replace(b"x" * 99, b"y" * 99))
    with pytest.raises(SourceCorrupt, match="CRC"):
        read(tmp_path, "s.beside")

    assert list(range(9)) == read(tmp_path, "s.asked")["s.asked"].to_pylist()


def test_a_column_or_a_partition_of_the_very_name_goes_before_a_field(tmp_path: Path) -> None:
    table = pa.table({"s": [{"a": 1, "b": 1, "c": 1}], "s.a": [2]})
    put(str(tmp_path / "in"), {"s.b=3/a.parquet": table})
    line = json.dumps({"s": {"a": 1, "b": 1}, "s.a": 2})
    (tmp_path / "a.jsonl").write_text(f'{line}\n{{"s": {{"a": 4.10, "b": [5.0]}}}}\n{{"s.a": null, "s": {{"a": 6}}}}')
    frame = parse_fields((tmp_path / "a.jsonl").read_bytes(), dict.fromkeys(["s.a", "s.b"], pl.String()))

    assert {"s.a": [2], "s.b": ["3"], "s.c": [1]} == read(tmp_path / "in", "s.a", "s.b", "s.c").to_pydict()
    assert [("2", "1"), ("4.10", "[5.0]"), (None, None)] == frame.rows()


def test_files_that_hold_a_field_in_other_types_or_not_give_it_one_type(tmp_path: Path) -> None:
    small, large = ({"s": pa.array([{"a": 1}, None], pa.struct([("a", kind)]))} for kind in (pa.int32(), pa.int64()))
    put(str(tmp_path), {"a.parquet": small, "b.parquet": {"s": [{"b": "x"}]}, "c.parquet": large})
    with pytest.raises(SchemaMismatch, match=r"column 's\.a': int32 in a\.parquet, missing in b\.parquet"):
        read(tmp_path, "s.a")

    assert pa.table({"s.a": pa.array([1, None, None, 1, None], pa.int64())}) == read(tmp_path, "s.a", nullable=["s.a"])


FOUND = r"Columns found: s\.age \(float\), s\.home\.zip \(string\), orders \(list<.*>\)\."


@pytest.mark.parametrize(
    ("asked", "key", "told"),
    [
        ("s.agee", "s.age", rf"column 's\.agee' \(float32\) is missing; did you mean 's\.age'\?\n{FOUND}"),
        ("s", "s.age", r"'s' must be float32, got a struct; name one of its fields: s\.age, s\.home\.zip\n"),
        ("s.home", "s.age", r"'s\.home' must be float32, got a struct; name one of its fields: s\.home\.zip\n"),
        ("orders", "s.age", r"column 'orders' must be float32, got list<.*struct<n: int64>>; cast it in the table"),
        ("orders.n", "s.age", r"column 'orders\.n' \(float32\) is missing"),
        ("s.age", "s.agee", r"got \['s\.agee'\]; did you mean 's\.age'\? Columns found: \['s', 's\.age', "),
    ],
)
def test_what_is_no_field_is_refused_with_those_that_there_are(asked: str, key: str, told: str, tmp_path: Path) -> None:
    struct = pa.struct([("age", pa.float32()), ("home", pa.struct([("zip", pa.string())]))])
    rows = {"s": pa.array([{"age": 1, "home": {"zip": "3000"}}], struct), "orders": [[{"n": 1}]]}
    put(str(tmp_path / "in"), {"a.parquet": rows})
    with pytest.raises(SchemaMismatch, match=told):
        score(
            str(tmp_path / "in"),
            tmp_path / "out",
            OPTIONS.model_copy(update={"key_columns": (key,)}),
            a_contract(asked),
        )
