"""Reading chunks in blocks: the rows of the dataset, each with its place, decoded once."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import SourceChanged, SourceCorrupt, SourceFormat
from tasks.batch.chunk_layout import BLOCK_BYTES, Chunk, Piece, cut_chunks
from tasks.batch.chunk_reader import Reader, block_rows, open_reader, read_ahead
from tasks.batch.dataset import SOURCE_FILE, SOURCE_ROW, open_dataset
from tasks.batch.options import BatchOptions
from tasks.batch.source import pin_source
from tasks.storage import open_storage
from tests.eventually import eventually
from tests.tasks.batch.small import a_plan, numbers, parquet, put, read_keys


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Rows of each row group of each file, and how they are read."""

    files: list[list[int]]
    rows_per_chunk: int
    batch_size: int
    block: int
    order: list[int] = field(default_factory=list)


LAYOUTS = st.builds(
    Layout,
    files=st.lists(st.lists(st.integers(0, 25), min_size=1, max_size=3), min_size=1, max_size=4).filter(
        lambda files: any(any(groups) for groups in files)
    ),
    rows_per_chunk=st.integers(1, 40),
    batch_size=st.integers(1, 9),
    block=st.integers(1, 30),
    order=st.lists(st.integers(0, 1000), min_size=1, max_size=12),
)


def a_table(start: int, stop: int) -> pa.Table:
    """Return rows of every shape: numbers, text with nulls, a dictionary, lists, structs, tensors."""
    rows = np.arange(start, stop)
    words = [None if at % 5 == 0 else f"word {at % 7}" for at in rows]
    tensors = np.repeat(rows.astype(np.float32), 6).reshape(len(rows), 2, 3)
    return pa.table(
        {
            "id": rows,
            "word": pa.array(words, pa.large_string()),
            "kind": pa.array(words, pa.string()).dictionary_encode(),
            "list": pa.array([list(range(at % 4)) for at in rows], pa.list_(pa.int16())),
            "struct": pa.array(
                [{"x": at, "y": [str(at)]} for at in rows], pa.struct({"x": pa.int64(), "y": pa.list_(pa.string())})
            ),
            "tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(tensors)
            if len(rows)
            else pa.array([], pa.fixed_shape_tensor(pa.float32(), [2, 3])),
        }
    )


COLUMNS = tuple(a_table(0, 1).column_names)


def write(folder: Path, files: Sequence[Sequence[int]]) -> list[dict[str, object]]:
    """Write files with these row groups; return every row with its file and place."""
    expected, start = [], 0
    for at, groups in enumerate(files):
        name, stop = f"{at}.parquet", start + sum(groups)
        # Each file has its columns in another order.
        order = [*COLUMNS[at % 6 :], *COLUMNS[: at % 6]]
        table = a_table(start, stop)
        with pq.ParquetWriter(folder / name, table.select(order).schema) as writer:
            offset = 0
            for rows in groups:
                writer.write_table(table.select(order).slice(offset, rows), row_group_size=max(rows, 1))
                offset += rows
        expected += [row | {SOURCE_FILE: name, SOURCE_ROW: place} for place, row in enumerate(table.to_pylist())]
        start = stop
    return expected


def a_reader(folder: Path | str, block: int, columns: Sequence[str] = COLUMNS) -> tuple[Reader, list[Chunk]]:
    """Return a reader over a folder, and its chunks of ten rows."""
    dataset = open_dataset(pin_source(str(folder), "/out"), columns, ())
    return Reader(dataset.snapshot, columns, {}, block), cut_chunks(dataset.snapshot.files, 10, 2)


@given(layout=LAYOUTS)
@settings(max_examples=60)
def test_the_blocks_of_all_chunks_are_the_rows_of_the_dataset(layout: Layout) -> None:
    with tempfile.TemporaryDirectory() as folder:
        expected = write(Path(folder), layout.files)
        dataset = open_dataset(pin_source(folder, "/out"), COLUMNS, ())
        reader = Reader(dataset.snapshot, COLUMNS, {}, layout.block)
        found: list[dict[str, object]] = []
        for chunk in cut_chunks(dataset.snapshot.files, layout.rows_per_chunk, layout.batch_size):
            tables = list(reader.blocks(chunk))

            assert [layout.block] * (len(tables) - 1) == [table.num_rows for table in tables[:-1]]
            assert 0 < tables[-1].num_rows <= layout.block
            assert chunk.rows == sum(table.num_rows for table in tables)
            found += pa.concat_tables(tables).to_pylist()

    assert expected == found


def test_large_rows_are_decoded_a_few_at_once_and_come_in_whole_blocks(tmp_path: Path) -> None:
    rows, size = 100, 1 << 20
    table = pa.table({"id": np.arange(rows), "text": [f"{at:0{size}d}" for at in range(rows)]})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd")
    dataset = open_dataset(pin_source(str(tmp_path), "/out"), ["id", "text"], ())
    reader = Reader(dataset.snapshot, ["id", "text"], {}, 60)
    (chunk,) = cut_chunks(dataset.snapshot.files, rows, 1)
    decoded = max(batch.num_rows for batch in reader.read(chunk.pieces[0]))
    blocks = list(reader.blocks(chunk))

    assert BLOCK_BYTES // size - 1 <= decoded <= BLOCK_BYTES // size
    assert [60, 40] == [block.num_rows for block in blocks]
    assert table == pa.concat_tables(blocks).select(table.column_names).combine_chunks()


@given(layout=LAYOUTS)
@settings(max_examples=40)
def test_chunks_may_be_read_in_any_order_and_again(layout: Layout) -> None:
    with tempfile.TemporaryDirectory() as folder:
        expected = write(Path(folder), layout.files)
        dataset = open_dataset(pin_source(folder, "/out"), COLUMNS, ())
        chunks = cut_chunks(dataset.snapshot.files, layout.rows_per_chunk, layout.batch_size)
        starts = np.cumsum([0, *(chunk.rows for chunk in chunks)]).tolist()
        reader = Reader(dataset.snapshot, COLUMNS, {}, layout.block)
        for at in (number % len(chunks) for number in layout.order):
            found = pa.concat_tables(reader.blocks(chunks[at])).to_pylist()

            assert expected[starts[at] : starts[at + 1]] == found


def read_all(reader: Reader, chunks: Sequence[Chunk]) -> list[pa.Table]:
    return [table for chunk in chunks for table in reader.blocks(chunk)]


class Counting:
    """Counts the rows that Parquet files decode."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows = 0
        real = pq.ParquetFile.iter_batches

        def counted(file: pq.ParquetFile, **given: object) -> Iterator[pa.RecordBatch]:
            for batch in real(file, **given):
                self.rows += batch.num_rows
                yield batch

        monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)


@pytest.mark.parametrize(
    ("block", "before", "read", "rows_decoded"),
    [(3, (), range(10), 100), (3, (), (2, 5, 9), 100), (5, (4,), (1,), 20)],
    ids=["once for many chunks", "on after a jump forwards", "again after a jump backwards"],
)
def test_a_row_group_is_decoded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    block: int,
    before: Sequence[int],
    read: Sequence[int],
    rows_decoded: int,
) -> None:
    put(str(tmp_path), {"a.parquet": numbers(0, 100)})
    reader, chunks = a_reader(tmp_path, block, ("id",))
    read_all(reader, [chunks[at] for at in before])
    decoded = Counting(monkeypatch)
    found = [pa.concat_tables(reader.blocks(chunks[at])) for at in read]
    expected = [list(range(at * 10, at * 10 + 10)) for at in read]

    assert 10 == len(chunks)
    assert expected == [table["id"].to_pylist() for table in found] == [t[SOURCE_ROW].to_pylist() for t in found]
    assert rows_decoded == decoded.rows


def test_a_chunk_that_was_left_in_the_middle_does_not_disturb_the_next(tmp_path: Path) -> None:
    put(str(tmp_path), {"a.parquet": numbers(0, 100)})
    reader, chunks = a_reader(tmp_path, 3, ("id",))
    next(reader.blocks(chunks[0]))

    assert list(range(10)) == pa.concat_tables(reader.blocks(chunks[0]))["id"].to_pylist()
    assert list(range(10, 20)) == pa.concat_tables(reader.blocks(chunks[1]))["id"].to_pylist()


def test_a_dataset_on_s3_has_the_same_rows(place: str, tmp_path: Path) -> None:
    expected = write(tmp_path, [[7, 8], [3], [0, 12]])
    put(place, {path.name: path.read_bytes() for path in tmp_path.glob("*.parquet")})
    reader, chunks = a_reader(place, 4)

    assert expected == [row for chunk in chunks for table in reader.blocks(chunk) for row in table.to_pylist()]


def test_partitions_have_their_values_and_nulls(place: str) -> None:
    put(
        f"{place}/in",
        {
            "year=2024/city=New%20York/a.parquet": numbers(0, 2),
            "year=02024/city=__HIVE_DEFAULT_PARTITION__/a.parquet": numbers(2, 3),
        },
    )
    plan = a_plan(f"{place}/in", f"{place}/out", BatchOptions(rows_per_chunk=10, key_columns=("year", "city", "id")))
    found = [table for chunk in plan.chunks.values() for table in open_reader(plan).blocks(chunk)]

    assert [("02024", None, 2), ("2024", "New York", 0), ("2024", "New York", 1)] == [
        (row["year"], row["city"], row["id"]) for row in pa.concat_tables(found).to_pylist()
    ]


def test_rows_need_no_column_of_the_file(tmp_path: Path) -> None:
    put(str(tmp_path), {"p=1/a.parquet": numbers(0, 5)})
    dataset = open_dataset(pin_source(str(tmp_path), "/out"), ["p"], ())
    reader = Reader(dataset.snapshot, ["p"], {"p": "string"}, 3)
    tables = list(reader.blocks(cut_chunks(dataset.snapshot.files, 10, 2)[0]))

    assert ["1"] * 5 == pa.concat_tables(tables)["p"].to_pylist()
    assert [0, 1, 2, 3, 4] == pa.concat_tables(tables)[SOURCE_ROW].to_pylist()


def write_int96(folder: Path, times: list[dt.datetime | int], unit: str) -> None:
    folder.mkdir()
    table = numbers(0, len(times)).append_column("at", pa.array(times, pa.timestamp(unit)))
    pq.write_table(table, folder / "a.parquet", use_deprecated_int96_timestamps=True, row_group_size=2)


def test_times_in_int96_are_those_that_were_written_whatever_the_year(tmp_path: Path) -> None:
    times = [dt.datetime(*day) for day in ((9999, 12, 31, 23, 59, 59, 999_999), (1, 1, 1), (2026, 1, 2, 3, 4, 5, 6))]  # noqa: DTZ001 - as they are written
    write_int96(tmp_path / "in", [*times, times[0]], "us")
    plan = a_plan(f"{tmp_path}/in", f"{tmp_path}/out", BatchOptions(rows_per_chunk=2, key_columns=("at",)))
    keys = pa.concat_tables(read_keys(plan, chunk) for chunk in plan.chunks)

    assert [*times, times[0]] == keys["at"].to_pylist()


@pytest.mark.parametrize("nanoseconds", [1_577_836_801_000_000_001, 1, -1, 2**63 - 1])
def test_times_in_int96_that_are_finer_than_they_can_be_read_are_refused(tmp_path: Path, nanoseconds: int) -> None:
    write_int96(tmp_path / "in", [0, 1_000, nanoseconds, 0], "ns")
    plan = a_plan(f"{tmp_path}/in", f"{tmp_path}/out", BatchOptions(rows_per_chunk=4, key_columns=("at",)))

    told = r"a\.parquet must hold whole microseconds in column 'at', as times in INT96"
    with pytest.raises(SourceFormat, match=told):
        list(open_reader(plan).blocks(next(iter(plan.chunks.values()))))


def test_files_that_differ_in_nothing_but_nulls_allowed_are_joined(tmp_path: Path) -> None:
    strict = pa.schema([pa.field("id", pa.int64(), nullable=False, metadata={"from": "elsewhere"})])
    put(str(tmp_path), {"a.parquet": {"id": [0, 1]}, "b.parquet": pa.table({"id": [2]}, schema=strict)})
    reader, chunks = a_reader(tmp_path, 5, ("id",))

    assert [[0, 1, 2]] == [table["id"].to_pylist() for table in reader.blocks(chunks[0])]


@pytest.mark.parametrize("dots", [("a", "a.b"), ("a.b",), ("a",)])
def test_names_with_dots_are_names(tmp_path: Path, dots: tuple[str, ...]) -> None:
    put(str(tmp_path), {"x.parquet": {"a": [1], "a.b": [2], "s": [{"a": 3}]}})
    reader, chunks = a_reader(tmp_path, 5, dots)
    (table,) = reader.blocks(chunks[0])

    assert {"a": 1, "a.b": 2} | table.to_pylist()[0] == table.to_pylist()[0] | {"a": 1, "a.b": 2}
    assert {*dots, SOURCE_FILE, SOURCE_ROW} == set(table.column_names)


@pytest.mark.parametrize("checksums", [False, True])
def test_a_corrupt_page_is_source_corrupt_by_name(place: str, checksums: bool) -> None:  # noqa: FBT001
    data = bytearray(parquet(numbers(0, 5000), compression="zstd", write_page_checksum=checksums, use_dictionary=False))
    page = pq.ParquetFile(pa.BufferReader(bytes(data))).metadata.row_group(0).column(0).data_page_offset
    # Without a checksum only what does not decode can be told: the page's header.
    at = page + 300 if checksums else page
    data[at : at + 8] = bytes(0xFF ^ byte for byte in data[at : at + 8])
    put(place, {"good.parquet": numbers(0, 5), "sub/bad.parquet": bytes(data)})
    reader, chunks = a_reader(place, 100, ("id",))
    with pytest.raises(SourceCorrupt, match=r"sub/bad\.parquet must be readable, got: .*Repair or remove the file"):
        read_all(reader, chunks)


def test_a_flipped_bit_that_decodes_is_found_by_its_checksum(tmp_path: Path) -> None:
    data = bytearray(parquet(numbers(0, 100), compression="none", use_dictionary=False, write_page_checksum=True))
    column = pq.ParquetFile(pa.BufferReader(bytes(data))).metadata.row_group(0).column(0)
    data[column.data_page_offset + column.total_compressed_size - 9] ^= 1
    put(str(tmp_path), {"a.parquet": bytes(data)})
    reader, chunks = a_reader(tmp_path, 100, ("id",))
    with pytest.raises(SourceCorrupt, match=r"a\.parquet must be readable, got: .*CRC"):
        list(reader.blocks(chunks[0]))


def test_a_row_group_shorter_than_the_plan_says_is_source_corrupt(tmp_path: Path) -> None:
    put(str(tmp_path), {"a.parquet": numbers(0, 5)})
    reader, _ = a_reader(tmp_path, 10, ("id",))
    with pytest.raises(SourceCorrupt, match="row group 0 must hold 4 more rows"):
        list(reader.blocks(Chunk(pieces=(Piece(file=0, row_group=0, row_start=0, row_stop=9),))))


def test_a_local_file_that_is_written_to_while_it_is_read_is_source_changed(tmp_path: Path) -> None:
    put(str(tmp_path), {"a.parquet": numbers(0, 20)})
    reader, chunks = a_reader(tmp_path, 5, ("id",))
    blocks = reader.blocks(chunks[0])
    next(blocks)
    os.utime(tmp_path / "a.parquet", ns=(1, 1))
    with pytest.raises(SourceChanged, match=r"a\.parquet must be the file that the plan was made for"):
        list(blocks)


@pytest.mark.parametrize("block", [1, 2, 5, 10, 100])
def test_a_chunk_never_has_all_its_rows_before_its_file_was_held_once_more(tmp_path: Path, block: int) -> None:
    put(str(tmp_path), {"a.parquet": numbers(0, 20)})
    reader, chunks = a_reader(tmp_path, block, ("id",))
    rows = 0
    real = reader._storage.check_unchanged

    def changed(_: object) -> None:
        os.utime(tmp_path / "a.parquet", ns=(1, 1))
        real(reader._snapshot.files[0].entry)

    # The file changes after its last row was read, and before it is held for the last time.
    list(reader.blocks(chunks[0]))
    reader._storage.check_unchanged = changed  # type: ignore[method-assign]
    blocks = reader.blocks(chunks[1])
    with contextlib.suppress(SourceChanged):
        for table in blocks:
            rows += table.num_rows

    assert rows < chunks[1].rows
    assert next(blocks, None) is None


@pytest.mark.parametrize("data", [b"", b"x" * 50_000, parquet(numbers(0, 5))], ids=["cut", "garbage", "another"])
def test_bytes_that_make_no_sense_since_they_changed_are_source_changed(tmp_path: Path, data: bytes) -> None:
    table = pa.table({"id": np.random.default_rng(0).integers(0, 1 << 60, 50_000)})
    put(str(tmp_path), {"a.parquet": parquet(table, data_page_size=4096, use_dictionary=False)})
    reader, chunks = a_reader(tmp_path, 5, ("id",))
    next(reader.blocks(chunks[0]))
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(SourceChanged, match=r"a\.parquet"):
        read_all(reader, chunks)


@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_an_object_that_is_replaced_between_two_chunks_is_source_changed(place: str, change: str) -> None:
    table = pa.table({"id": np.random.default_rng(0).integers(0, 1 << 60, 50_000)})
    put(place, {"a.parquet": parquet(table, row_group_size=25_000)})
    dataset = open_dataset(pin_source(place, "/out"), ["id"], ())
    reader = Reader(dataset.snapshot, ["id"], {}, 1000)
    first, second = cut_chunks(dataset.snapshot.files, 25_000, 1000)
    list(reader.blocks(first))
    open_storage(place).delete(["a.parquet"])
    if change == "replaced":
        put(place, {"a.parquet": parquet(table, row_group_size=25_000, compression="none")})
    with pytest.raises(SourceChanged, match=r"a\.parquet"):
        list(reader.blocks(second))


@pytest.mark.parametrize(
    ("batch_size", "row_bytes", "expected"),
    [(1024, 8, 1024 * 1024), (1024, 8192, 1024), (1024, 1 << 30, 1024), (1, 0, 8 << 20), (1000, 100, 83_000)],
)
def test_a_block_is_whole_batches_near_eight_mebibytes(batch_size: int, row_bytes: float, expected: int) -> None:
    assert expected == block_rows(batch_size, row_bytes)


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def test_ahead_gives_every_item_in_order() -> None:
    assert list(range(1000)) == list(read_ahead(range(1000), 3))
    assert list(read_ahead([], 3)) == []
    assert [None, None] == list(read_ahead([None, None], 1))
    assert readers() == []


def test_ahead_passes_an_error_on_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        message = "made by the reader"
        raise SourceChanged(message)

    stream = read_ahead(items(), 3)

    assert next(stream) == 1
    with pytest.raises(SourceChanged, match="made by the reader"):
        next(stream)
    assert readers() == []


def test_a_consumer_that_stops_early_leaves_no_thread_and_closes_the_items() -> None:
    closed = threading.Event()

    def items() -> Generator[int]:
        try:
            yield from range(1000)
        finally:
            closed.set()

    with closing(read_ahead(items(), 2)) as stream:
        assert next(stream) == 0
        assert len(readers()) == 1

    assert readers() == []
    assert closed.is_set()


def test_a_consumer_that_never_starts_starts_no_thread() -> None:
    read_ahead(range(3), 2).close()

    assert readers() == []


def test_a_consumer_that_raises_leaves_no_thread() -> None:
    def divide() -> None:
        with closing(read_ahead(range(100), 2)) as stream:
            for item in stream:
                assert 1 // item

    with pytest.raises(ZeroDivisionError):
        divide()

    assert readers() == []


@pytest.mark.parametrize("depth", [1, 4])
def test_ahead_makes_no_more_than_its_depth_and_the_one_in_hand(depth: int) -> None:
    made = []

    def items() -> Iterator[int]:
        for at in range(100):
            made.append(at)
            yield at

    with closing(read_ahead(items(), depth)) as stream:
        for _ in range(5):
            next(stream)
        eventually(lambda: len(made) > 5 + depth)
        # Long enough for one more, if there were to be one.
        time.sleep(0.1)

        assert 5 + depth + 1 == len(made)


def test_the_items_are_made_in_another_thread_while_one_is_worked_on() -> None:
    made_by = set()

    def items() -> Iterator[int]:
        for at in range(3):
            made_by.add(threading.current_thread().name)
            yield at

    list(read_ahead(items(), 1))

    assert made_by == {"read-ahead"}


def test_ahead_by_nothing_makes_each_item_when_it_is_asked_for() -> None:
    made: list[int] = []
    items = read_ahead((made.append(at) or at for at in range(3)), 0)

    assert [0, [0]] == [next(items), list(made)]
    assert not readers()
    assert [1, 2] == list(items)
