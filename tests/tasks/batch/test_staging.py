"""Staging: other formats become Parquet once, and a source row is the row of the file it came from."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Generator, Iterable
from pathlib import Path

import fastavro
import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from serving.errors import SchemaMismatch, SourceChanged, SourceCorrupt, SourceEmpty, StorageFault, StorageFull
from serving.model.contract import Contract
from tasks.batch import staging
from tasks.batch.chunk_layout import cut_chunks
from tasks.batch.chunk_reader import Reader
from tasks.batch.dataset import SOURCE_FILE, SOURCE_ROW, Snapshot, open_dataset
from tasks.batch.source import pin_source
from tasks.batch.staging import stage
from tasks.storage import LocalStorage, Storage, open_storage
from tests.tasks.batch.small import a_contract, put

FOLDER = "_overnight/key"


def staged(
    source: str, destination: str, contract: Contract | None = None, keys: tuple[str, ...] = ("id",)
) -> Snapshot:
    snapshot = pin_source(source, destination)
    return stage(snapshot, open_storage(destination), FOLDER, contract or a_contract("a"), keys)


def rows(snapshot: Snapshot, *columns: str) -> list[dict[str, object]]:
    """Read every row of a snapshot through the plan's own reader."""
    dataset = open_dataset(snapshot, [], columns)
    reader = Reader(dataset.snapshot, columns, dataset.partitions, 100)
    chunks = cut_chunks(dataset.snapshot.files, 1 << 20, 4)
    tables = [table for chunk in chunks for table in reader.blocks(chunk)]
    return pa.concat_tables(tables).select([*columns, SOURCE_FILE, SOURCE_ROW]).to_pylist()


def copies(destination: str) -> list[str]:
    found = open_storage(destination).entries(f"{FOLDER}/staged")
    return [entry.path for entry in found if entry.path.endswith(".parquet")]


def csv(start: int, stop: int) -> bytes:
    return b"id,a\n" + b"".join(b"%05d,%d\n" % (at, at) for at in range(start, stop))


def jsonl(start: int, stop: int) -> bytes:
    return b"".join(json.dumps({"id": f"{at:05d}", "a": at}).encode() + b"\n" for at in range(start, stop))


def arrow(start: int, stop: int) -> bytes:
    sink = io.BytesIO()
    text = [[str(at) for at in range(start, stop)], [f"{at:05d}" for at in range(start, stop)]]
    table = pa.table({"a": text[0], "id": text[1]})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


def avro(start: int, stop: int) -> bytes:
    sink = io.BytesIO()
    fields = [{"name": name, "type": "string"} for name in ("a", "id")]
    records = [{"a": str(at), "id": f"{at:05d}"} for at in range(start, stop)]
    fastavro.writer(sink, {"type": "record", "name": "row", "fields": fields}, records)
    return sink.getvalue()


MAKERS = {"csv": csv, "jsonl": jsonl, "arrow": arrow, "avro": avro}


@pytest.mark.parametrize("kind", MAKERS)
def test_rows_keep_their_file_and_place(place: str, kind: str) -> None:
    make = MAKERS[kind]
    put(f"{place}/in", {f"x y.{kind}": make(0, 5), f"p=1/z.{kind}": make(5, 8)})
    found = rows(staged(f"{place}/in", f"{place}/out"), "id", "a")

    assert [
        *({"id": f"{at:05d}", "a": str(at), SOURCE_FILE: f"p=1/z.{kind}", SOURCE_ROW: at - 5} for at in range(5, 8)),
        *({"id": f"{at:05d}", "a": str(at), SOURCE_FILE: f"x y.{kind}", SOURCE_ROW: at} for at in range(5)),
    ] == found


def test_partitions_of_the_source_are_columns_of_its_copies(place: str) -> None:
    put(f"{place}/in", {"year=2024/city=New%20York/x.csv": csv(0, 1), "year=2025/city=Rome/x.csv": csv(1, 2)})
    found = rows(staged(f"{place}/in", f"{place}/out"), "id", "year", "city")

    assert [("00000", "2024", "New York"), ("00001", "2025", "Rome")] == [
        (row["id"], row["year"], row["city"]) for row in found
    ]


@pytest.mark.parametrize("kind", MAKERS)
def test_a_large_file_becomes_several_copies_over_which_its_rows_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    small_copies(monkeypatch)
    put(f"{tmp_path}/in", {f"x.{kind}": MAKERS[kind](0, 100), f"y.{kind}": MAKERS[kind](100, 130)})
    snapshot = staged(f"{tmp_path}/in", f"{tmp_path}/out")
    found = rows(snapshot, "id")

    assert len(snapshot.files) > 5
    assert list(range(100)) + list(range(30)) == [row[SOURCE_ROW] for row in found]
    assert [f"{at:05d}" for at in range(130)] == [row["id"] for row in found]
    assert {f"x.{kind}", f"y.{kind}"} == {file.origin for file in snapshot.files}


def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each copy one row group of eleven rows or a little more."""
    monkeypatch.setattr(staging, "_COPY_BYTES", 1)
    monkeypatch.setattr(staging, "_ROWS_PER_GROUP", 11)
    monkeypatch.setattr("tasks.batch.formats._BLOCK", 64)


def test_a_second_call_stages_nothing_again(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(f"{place}/in", {"x.csv": csv(0, 5), "y.csv": csv(5, 9)})
    first = staged(f"{place}/in", f"{place}/out")

    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(staging, "read_tables", never)

    assert first == staged(f"{place}/in", f"{place}/out")


@contextlib.contextmanager
def killed_after(count: int) -> Generator[None]:
    """Make the block fall over once so many copies are there, and the list of them is not."""
    real = staging.write_copies

    def written(tables: Iterable[pa.Table]) -> Generator[tuple[int, memoryview]]:
        for at, made in enumerate(real(tables)):
            if at == count:
                raise KeyboardInterrupt
            yield made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "write_copies", written)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_kill_between_a_copy_and_the_list_resumes(place: str, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    small_copies(monkeypatch)
    put(f"{place}/in", {"x.csv": csv(0, 100)})
    with killed_after(count):
        staged(f"{place}/in", f"{place}/out")
    left = copies(f"{place}/out")
    snapshot = staged(f"{place}/in", f"{place}/out")

    assert count == len(left)
    assert set(left) <= {file.path for file in snapshot.files}
    assert [f"{at:05d}" for at in range(100)] == [row["id"] for row in rows(snapshot, "id")]


def test_copies_that_another_version_cut_elsewhere_are_not_mixed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_copies(monkeypatch)
    put(f"{tmp_path}/in", {"x.csv": csv(0, 100)})
    with killed_after(2):
        staged(f"{tmp_path}/in", f"{tmp_path}/out")
    monkeypatch.setattr(staging, "_ROWS_PER_GROUP", 17)
    snapshot = staged(f"{tmp_path}/in", f"{tmp_path}/out")

    assert [f"{at:05d}" for at in range(100)] == [row["id"] for row in rows(snapshot, "id")]


def test_copies_of_what_a_file_was_before_are_not_taken_for_what_it_is(place: str) -> None:
    put(f"{place}/in", {"x.csv": csv(0, 5)})
    staged(f"{place}/in", f"{place}/out")
    open_storage(f"{place}/in").delete(["x.csv"])
    put(f"{place}/in", {"x.csv": csv(5, 9)})
    snapshot = staged(f"{place}/in", f"{place}/out")

    assert ["00005", "00006", "00007", "00008"] == [row["id"] for row in rows(snapshot, "id")]


def test_files_without_rows_among_others_have_no_copies(place: str) -> None:
    put(f"{place}/in", {"a.csv": b"", "b.csv": b"id,a\n", "c.csv": csv(0, 2)})

    assert ["c.csv", "c.csv"] == [row[SOURCE_FILE] for row in rows(staged(f"{place}/in", f"{place}/out"), "id")]


@pytest.mark.parametrize("files", [{"a.csv": b""}, {"a.csv": b"id,a\n", "b.csv": b""}])
def test_no_rows_at_all_is_source_empty_by_the_source(tmp_path: Path, files: dict[str, bytes]) -> None:
    put(f"{tmp_path}/in", files)
    with pytest.raises(SourceEmpty, match=rf"at least one row, got none in {len(files)} files below {tmp_path}/in"):
        staged(f"{tmp_path}/in", f"{tmp_path}/out")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("ragged.csv", b"id,a\n1,2\n1\n"),
        ("latin.csv", b"id,a\n1,\xe4\n"),
        ("bad.jsonl", b'{"id":1,"a":1}\n{"id":\n'),
        ("short.arrow", arrow(0, 100)[:-400]),
        ("text.arrow", b"this is not Arrow at all"),
    ],
)
def test_a_file_that_does_not_parse_is_source_corrupt_by_name(place: str, name: str, data: bytes) -> None:
    put(f"{place}/in", {name: data})
    with pytest.raises(SourceCorrupt, match=rf"in/{name} must be "):
        staged(f"{place}/in", f"{place}/out")


def test_json_lines_without_any_column_of_the_run_are_a_mismatch(tmp_path: Path) -> None:
    put(f"{tmp_path}/in", {"x.jsonl": b'{"other":1}\n'})
    with pytest.raises(
        SchemaMismatch, match=r"in must hold a column that the run reads, got none of \['a', 'id'\] in 1"
    ):
        staged(f"{tmp_path}/in", f"{tmp_path}/out")


def test_a_column_that_one_file_names_by_escapes_alone_is_there(place: str) -> None:
    put(f"{place}/in", {"x.jsonl": b'{"id":1}\n', "y.jsonl": b'{"id":2,"gr\\u00F6\\u00dfe":null}\n'})
    dataset = open_dataset(
        staged(f"{place}/in", f"{place}/out", a_contract("gr\u00f6\u00dfe")), ["gr\u00f6\u00dfe"], ["id"]
    )

    assert {"id", "gr\u00f6\u00dfe"} == set(dataset.schema.names)


def test_a_json_column_that_is_in_the_path_alone_is_the_partitions(place: str) -> None:
    put(f"{place}/in", {"store=007/x.jsonl": b'{"a":1}\n', "store=7/x.jsonl": b'{"a":2}\n'})
    found = rows(staged(f"{place}/in", f"{place}/out", keys=("store",)), "store", "a")

    assert [("007", "1"), ("7", "2")] == [(row["store"], row["a"]) for row in found]


def test_a_json_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(f"{tmp_path}/in", {"x.jsonl": jsonl(0, 50)})
    read: list[str] = []
    real = staging.read_tables

    def counted(raw: Path, *given: object) -> Iterable[pa.Table]:
        read.append(raw.name)
        return real(raw, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(staging, "read_tables", counted)
    monkeypatch.setattr(LocalStorage, "open_pinned", lambda *_: pytest.fail("it must not be opened a second time"))
    staged(f"{tmp_path}/in", f"{tmp_path}/out", a_contract("a", "never"))

    assert ["x.jsonl"] == read


def test_an_arrow_batch_that_is_larger_than_a_copy_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_COPY_BYTES", 100_000)
    put(f"{tmp_path}/in", {"x.arrow": wide_arrow(40, 10_000, batch_rows=40)})
    snapshot = open_dataset(staged(f"{tmp_path}/in", f"{tmp_path}/out"), ["a"], ["id"]).snapshot

    assert max(rows for file in snapshot.files for rows in file.row_groups) <= 10
    assert list(range(40)) == [row["id"] for row in rows(snapshot, "id")]


def test_a_column_that_no_json_line_has_is_missing_in_the_dataset(place: str) -> None:
    put(f"{place}/in", {"x.jsonl": b'{"id":1}\n{"id":2,"b":null}\n'})
    dataset = open_dataset(staged(f"{place}/in", f"{place}/out", a_contract("a", "b")), ["a", "b"], ["id"])

    assert {"id", "b"} == set(dataset.schema.names)


def test_a_field_that_a_whole_json_file_lacks_is_null_there(place: str) -> None:
    put(f"{place}/in", {"x.jsonl": b'{"id":1}\n', "y.jsonl": b'{"a":2}\n'})
    found = rows(staged(f"{place}/in", f"{place}/out"), "id", "a")

    assert [("1", None), (None, "2")] == [(row["id"], row["a"]) for row in found]


def test_a_file_that_lacks_a_column_is_told_by_its_name(tmp_path: Path) -> None:
    put(f"{tmp_path}/in", {"x.csv": b"id,a\n1,2\n", "y.csv": b"id\n1\n"})
    with pytest.raises(
        SchemaMismatch, match=r"y\.csv must have every column that the run reads, but \['a'\] are missing"
    ):
        staged(f"{tmp_path}/in", f"{tmp_path}/out")


def test_a_file_that_changed_since_the_snapshot_is_source_changed(place: str) -> None:
    put(f"{place}/in", {"x.csv": csv(0, 5)})
    snapshot = pin_source(f"{place}/in", f"{place}/out")
    open_storage(f"{place}/in").delete(["x.csv"])
    put(f"{place}/in", {"x.csv": csv(0, 6)})
    with pytest.raises(SourceChanged, match=r"x\.csv"):
        stage(snapshot, open_storage(f"{place}/out"), FOLDER, a_contract("a"), ("id",))


@pytest.mark.parametrize(
    ("name", "data"),
    [("x.csv", csv(0, 900)), ("x.csv", b"id,a\n1,2\n1\n"), ("x.jsonl", b'{"id":'), ("x.arrow", b"no Arrow")],
)
def test_a_local_file_that_changes_while_it_is_staged_is_source_changed_and_not_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, data: bytes
) -> None:
    put(f"{tmp_path}/in", {name: MAKERS[name.partition(".")[2]](0, 1000)})
    real = staging.read_tables

    def changed(*given: object) -> Iterable[pa.Table]:
        (tmp_path / "in" / name).write_bytes(data)
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(staging, "read_tables", changed)
    with pytest.raises(SourceChanged, match=name):
        staged(f"{tmp_path}/in", f"{tmp_path}/out")

    assert [] == [entry for entry in open_storage(f"{tmp_path}/out").entries() if "listing" in entry.path]


def test_a_full_scratch_disk_is_storage_full(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    put(f"{place}/in", {"x.csv": csv(0, 5)})
    monkeypatch.setattr(staging, "copy_pinned", full)
    if isinstance(open_storage(place), LocalStorage):
        # A local file is read where it lies.
        assert len(staged(f"{place}/in", f"{place}/out").files) == 1
        return
    with pytest.raises(StorageFull):
        staged(f"{place}/in", f"{place}/out")


@pytest.mark.parametrize("ending", [".parquet", ".json"])
def test_copies_that_a_publisher_deleted_meanwhile_are_a_storage_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    put(f"{tmp_path}/in", {"x.csv": csv(0, 5)})
    destination = open_storage(f"{tmp_path}/out")
    real = LocalStorage.put_new

    def put_new(self: LocalStorage, path: str, data: bytes | memoryview) -> bool:
        made = real(self, path, data)
        if path.endswith(".json"):
            self.delete([entry.path for entry in self.entries(FOLDER) if entry.path.endswith(ending)])
        return made

    monkeypatch.setattr(LocalStorage, "put_new", put_new)
    snapshot = pin_source(f"{tmp_path}/in", f"{tmp_path}/out")
    with pytest.raises(StorageFault, match="another worker may have published the run"):
        stage(snapshot, destination, FOLDER, a_contract("a"), ("id",))


def test_many_tiny_batches_become_few_row_groups(tmp_path: Path) -> None:
    sink = io.BytesIO()
    table = pa.table({"id": np.arange(30_000), "a": np.arange(30_000, dtype=np.float32)})
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    put(f"{tmp_path}/in", {"x.arrow": sink.getvalue()})
    (file,) = open_dataset(staged(f"{tmp_path}/in", f"{tmp_path}/out"), ["a"], ["id"]).snapshot.files

    assert file.row_groups == (30_000,)


def wide_arrow(rows: int, size: int, *, batch_rows: int) -> bytes:
    """Return an Arrow file whose column `a` holds text of twice so many bytes that does not compress."""
    sink = io.BytesIO()
    noise = np.random.default_rng(0).bytes
    table = pa.table({"id": np.arange(rows), "a": [noise(size).hex() for _ in range(rows)]})
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch_rows)
    return sink.getvalue()


def test_wide_rows_are_grouped_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_COPY_BYTES", 100_000)
    put(f"{tmp_path}/in", {"x.arrow": wide_arrow(40, 10_000, batch_rows=1)})
    snapshot = open_dataset(staged(f"{tmp_path}/in", f"{tmp_path}/out"), ["a"], ["id"]).snapshot

    assert max(rows for file in snapshot.files for rows in file.row_groups) <= 6


def test_tensor_columns_keep_their_shape(tmp_path: Path) -> None:
    sink = io.BytesIO()
    image = pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(24, dtype=np.float32).reshape(4, 2, 3))
    table = pa.table({"image": image, "id": np.arange(4)})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    put(f"{tmp_path}/in", {"x.arrow": sink.getvalue()})
    contract = a_contract(image=(2, 3))
    snapshot = staged(f"{tmp_path}/in", f"{tmp_path}/out", contract)

    assert table.schema.field("image").type == open_dataset(snapshot, ["image"], ["id"]).schema.field("image").type
    assert [row["image"] for row in table.to_pylist()] == [row["image"] for row in rows(snapshot, "image")]


def test_a_staged_copy_is_pinned_as_any_source(place: str) -> None:
    put(f"{place}/in", {"x.csv": csv(0, 5)})
    (file,) = staged(f"{place}/in", f"{place}/out").files
    storage: Storage = open_storage(f"{place}/out")

    assert storage.find(file.path) == file.entry
    with storage.open_pinned(file.entry) as stream:
        assert pq.read_metadata(stream).num_rows == 5


def test_a_worker_that_lists_copies_before_their_temporary_names_go_has_the_same_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(f"{tmp_path}/in", {"x.csv": csv(0, 5)})
    unlink, seen = Path.unlink, []

    def slow(self: Path, missing_ok: bool = False) -> None:  # noqa: FBT001, FBT002 - as Path has it
        if self.name.endswith(".tmp") and ".listing-" in self.name and not seen:
            # The list of the copies is in place, and its temporary name still stands: another worker goes ahead.
            seen.append(staged(f"{tmp_path}/in", f"{tmp_path}/out"))
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", slow)
    first = staged(f"{tmp_path}/in", f"{tmp_path}/out")

    assert [first] == seen
    assert rows(seen[0], "id") == rows(first, "id")


def test_a_local_file_rewritten_with_its_size_and_time_is_source_changed_as_it_is_staged(tmp_path: Path) -> None:
    put(f"{tmp_path}/in", {"x.csv": csv(0, 5)})
    snapshot = pin_source(f"{tmp_path}/in", f"{tmp_path}/out")
    file = tmp_path / "in/x.csv"
    before = file.stat()
    file.write_bytes(csv(5, 10))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(SourceChanged, match=r"x\.csv must be the file that the plan was made for"):
        stage(snapshot, open_storage(f"{tmp_path}/out"), FOLDER, a_contract("a"), ("id",))
    assert [] == copies(f"{tmp_path}/out")


def test_a_list_of_copies_that_is_cut_short_is_a_storage_fault_by_name(tmp_path: Path) -> None:
    source = put(f"{tmp_path}/in", {"a.csv": csv(0, 5)})
    staged(source, f"{tmp_path}/out")
    (listing,) = (tmp_path / "out" / FOLDER / "staged" / "a.csv").glob("listing-*.json")
    listing.write_bytes(listing.read_bytes()[:20])

    with pytest.raises(StorageFault, match=r"listing-.*\.json must list the copies .* delete .*staged"):
        staged(source, f"{tmp_path}/out")
