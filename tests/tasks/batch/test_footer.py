"""What a footer says that rows take is what they take once they are decoded."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.batch.dataset import Snapshot, open_dataset
from tasks.batch.footer import GroupBytes
from tasks.batch.source import pin_source
from tests.benchmarks import memory
from tests.tasks.batch.small import parquet, put

RANDOM = np.random.default_rng(0)


def hexes(rows: int, size: int) -> list[str]:
    return [RANDOM.bytes(size // 2).hex() for _ in range(rows)]


COLUMNS = {
    "numbers": pa.array(RANDOM.random(20_000, dtype=np.float32)),
    "few numbers": pa.array(np.arange(20_000) % 3),
    "booleans": pa.array(np.arange(20_000) % 2 == 0),
    "times": pa.array(np.arange(20_000), pa.timestamp("ns", "UTC")),
    "decimals": pa.array(range(20_000), pa.decimal128(9, 2)),
    "short texts, each another": pa.array(hexes(20_000, 16)),
    "short texts, the same": pa.array(["Rome", "Oslo", "Bern"] * 7000),
    "long texts, each another": pa.array(hexes(300, 20_000)),
    "long texts, the same": pa.array(hexes(3, 20_000) * 200),
    "texts of the length at which ends are cut": pa.array(["x" * 64, "y" * 300] * 3000),
    "bytes, the same": pa.array([bytes(50_000)] * 500),
    "dictionaries": pa.array(["x" * 500, "y" * 500] * 3000),
    "lists": pa.array([[float(at)] * (at % 20) for at in range(5000)]),
    "lists of texts, the same": pa.array([["abc" * 30] * 3] * 3000),
    "lists of one size": pa.FixedSizeListArray.from_arrays(pa.array(RANDOM.random(80_000, dtype=np.float32)), 8),
    "tensors": pa.FixedShapeTensorArray.from_numpy_ndarray(RANDOM.random((2000, 4, 4), dtype=np.float32)),
    "structs": pa.array([{"id": at, "name": "x" * 90} for at in range(3000)]),
    "nulls among numbers": pa.array([None, 1.5] * 5000),
    "nulls among texts": pa.array([None, "x" * 100] * 5000),
    "long texts between short ends": pa.array(["a", "m" * 5000, "z"] * 700),
    "bytes between short ends": pa.array([b"a", bytes(5000), b"z"] * 700),
    "texts of which few are long": pa.array(["a", *["b"] * 98, "m" * 500, "z"] * 70),
    "nulls, then long texts between short ends": pa.array([None] * 500 + ["a", "m" * 900, "z"] * 700),
    "lists of long texts between short ends": pa.array([["a", "m" * 300], ["z"]] * 3000),
    "structs of long texts between short ends": pa.array([{"x": "a"}, {"x": "m" * 300}, {"x": "z"}] * 3000),
    "maps of long texts between short ends": pa.array(
        [[("a", "a"), ("b", "m" * 300)], [("c", "z")]] * 3000, pa.map_(pa.string(), pa.string())
    ),
    "lists of decimals, the same": pa.array([[Decimal("1.25")] * 4] * 3000, pa.list_(pa.decimal128(9, 2))),
}
# Types that polars does not write as they are.
NOT_OF_POLARS = {"tensors", "dictionaries"}


def open_column(folder: Path, data: bytes) -> GroupBytes:
    """Return what the footer of a file says of its column, as a key."""
    (file,) = open_files(folder, {"a.parquet": data}, ["a column"], ["a column"]).files
    ((sizes, _),) = file.sized_groups
    return sizes


def open_files(folder: Path, files: dict[str, bytes | pa.Table], columns: list[str], keys: list[str]) -> Snapshot:
    """Write files, and return them with what their footers say."""
    return open_dataset(pin_source(put(str(folder), files), "/out"), columns, keys).snapshot


def by_polars(table: pa.Table) -> bytes:
    """Return a table as written by a writer that does not tell how long the texts are together."""
    sink = io.BytesIO()
    pl.from_arrow(table).write_parquet(sink)  # type: ignore[union-attr]  # a table becomes a data frame
    return sink.getvalue()


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("dictionary", [True, False], ids=["in a dictionary", "plain"])
def test_a_column_takes_what_its_footer_says_within_a_fifth(tmp_path: Path, name: str, dictionary: bool) -> None:  # noqa: FBT001
    table = pa.table({"a column": COLUMNS[name], "other": pa.nulls(len(COLUMNS[name]), pa.int64())})
    sizes = open_column(tmp_path, parquet(table, use_dictionary=dictionary))

    assert table["a column"].nbytes == pytest.approx(sizes.decoded, rel=0.2)
    assert sizes.keys == sizes.decoded


@pytest.mark.parametrize("name", sorted(COLUMNS.keys() - NOT_OF_POLARS))
def test_a_column_whose_footer_does_not_tell_its_texts_takes_no_more_than_stated(tmp_path: Path, name: str) -> None:
    table = pa.table({"a column": COLUMNS[name]})
    data = by_polars(table)
    taken = pq.read_table(io.BytesIO(data))["a column"].nbytes
    sizes = open_column(tmp_path, data)

    assert taken <= 1.2 * sizes.decoded
    assert sizes.decoded <= 1.2 * taken or "short" in name


@pytest.mark.parametrize("name", ["long texts between short ends", "texts of which few are long"])
@pytest.mark.parametrize("encoding", ["PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
def test_texts_in_any_encoding_take_what_their_footer_says(tmp_path: Path, name: str, encoding: str) -> None:
    table = pa.table({"a column": COLUMNS[name]})
    sizes = open_column(tmp_path, parquet(table, use_dictionary=False, column_encoding=encoding))

    assert table["a column"].nbytes == pytest.approx(sizes.decoded, rel=0.2)


def test_texts_are_told_whatever_else_a_footer_holds(tmp_path: Path) -> None:
    texts = {name: COLUMNS["long texts between short ends"].slice(at) for at, name in enumerate("cba")}
    table = pa.table({name: column.slice(0, 2000) for name, column in texts.items()} | {"ä": ["€" * 40] * 2000})
    options = {"write_page_index": True, "row_group_size": 700, "bloom_filter_options": {"a": True}}
    data = parquet(table, write_statistics=["b", "ä"], **options)
    (file,) = open_files(tmp_path, {"a.parquet": data}, ["a", "ä"], ["b", "c"]).files
    groups = [table.slice(at, 700) for at in (0, 700, 1400)]

    assert [each.decoded for each in file.group_bytes] == pytest.approx([group.nbytes for group in groups], rel=0.01)


def test_texts_all_null_take_nothing_and_unused_columns_do_not_count(tmp_path: Path) -> None:
    table = pa.table({"a": pa.nulls(10, pa.string()), "b": ["x" * 1000] * 10})
    (file,) = open_files(tmp_path, {"a.parquet": table}, ["a"], []).files

    assert file.group_bytes[0].decoded < 100
    assert file.group_bytes[0].keys == 0


def test_every_row_group_of_every_file_has_its_own_bytes(tmp_path: Path) -> None:
    small, large = pa.table({"k": ["x"] * 4096}), pa.table({"k": hexes(64, 10_000)})
    both = parquet(pa.concat_tables([small, large]), row_group_size=4096)
    files = open_files(tmp_path, {"a.parquet": both, "b.parquet": large}, [], ["k"]).files
    found = [[round(sizes.keys / rows, -2) for sizes, rows in file.sized_groups] for file in files]

    assert [[0, 10_000], [10_000]] == found


def test_columns_in_another_order_are_found_by_name(tmp_path: Path) -> None:
    columns = {"a": np.arange(100, dtype=np.float32), "k": ["x" * 50] * 100, "z": [[1.0, 2.0]] * 100}
    files = {"a.parquet": pa.table(columns), "b.parquet": pa.table(dict(reversed(columns.items())))}
    first, second = open_files(tmp_path, files, ["a", "z"], ["k"]).files

    assert first.group_bytes == second.group_bytes


def test_bytes_of_row_groups_come_back_from_json(tmp_path: Path) -> None:
    snapshot = open_files(tmp_path, {"a.parquet": pa.table({"k": ["x"] * 5})}, [], ["k"])
    back = type(snapshot).model_validate_json(snapshot.model_dump_json())

    assert snapshot == back
    assert isinstance(back.files[0].group_bytes[0], GroupBytes)


FLIPPED = {
    "numbers": pa.table({"a": np.arange(50, dtype=np.float32), "k": np.arange(50)}),
    "texts": pa.table({"a": np.arange(50, dtype=np.float32), "k": ["Rome", "Oslo"] * 25}),
    "lists": pa.table({"a": [["x"] * (at % 3) for at in range(50)], "k": np.arange(50)}),
}
# A process of its own: what pyarrow makes of a footer may end it.
FLIP_EVERY_BIT = """
import json, resource, sys
from pathlib import Path
from serving.errors import SourceCorrupt
from tasks.batch.chunk_layout import Piece
from tasks.batch.chunk_reader import Reader
from tasks.batch.dataset import Snapshot, SourceFile, open_dataset

path = Path(sys.argv[1])
whole = path.read_bytes()
footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for bit in range(8 * footer, 8 * len(whole)) if sys.argv[2] == "footer" else range(8 * footer):
    data = bytearray(whole)
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    file = SourceFile(path=path.name, size=len(data), tag=str(path.stat().st_mtime_ns))
    print(bit, file=sys.stderr)
    try:
        dataset = open_dataset(Snapshot(root=str(path.parent), format="parquet", files=(file,)), ["a"], ["k"])
        (pinned,) = dataset.snapshot.files
        pieces = [Piece(file=0, row_group=at, row_start=0, row_stop=n) for at, n in enumerate(pinned.row_groups)]
        # A column whose name has the wrong bit is one that the dataset lacks, which a plan tells.
        reader = Reader(dataset.snapshot, [name for name in ("a", "k") if name in dataset.schema.names], {}, 16)
        found = sum(table.num_rows for piece in pieces for table in reader.read(piece))
    except SourceCorrupt as error:
        found = str(error).partition(" must be readable, got: ")[0]
    # Pages without a checksum may give other values.
    print(json.dumps(found))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("place", ["footer", pytest.param("pages", marks=pytest.mark.machines)])
@pytest.mark.parametrize("name", FLIPPED)
def test_any_flipped_bit_is_source_corrupt_by_name_or_leaves_the_rows(tmp_path: Path, name: str, place: str) -> None:
    file = tmp_path / f"{name}.parquet"
    whole = parquet(FLIPPED[name], store_schema=False, row_group_size=40)
    in_footer = 8 * (8 + int.from_bytes(whole[-8:-4], "little"))
    file.write_bytes(whole)
    command = [sys.executable, "-c", FLIP_EVERY_BIT, str(file), place]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    *told, kilobytes = map(json.loads, done.stdout.splitlines())

    assert done.returncode == 0, done.stderr[-300:]
    assert len(told) == (in_footer if place == "footer" else 8 * len(whole) - in_footer)
    assert {50, str(file)} == set(told)
    assert place == "pages" or told.count(str(file)) > len(told) / 3
    assert kilobytes < 200 << 10


@pytest.mark.machines
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("shape", ["large_at_the_end", "repeated", "between_short_ends", "wide"])
def test_a_run_takes_no_more_memory_than_it_states(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SCALE", 0.2)
    found = memory.measure_shape(shape)

    assert found["used_mb"] <= 1.2 * found["stated_mb"]
