"""What storage promises wherever the bytes lie, held on a local disk and on the real S3 server."""

from __future__ import annotations

import io
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from serving.errors import BadInput, SourceChanged
from tasks.storage import Entry, Storage, check_create_only, copy_pinned, open_storage

NAMES = [
    "plain.txt",
    "a b/c d.txt",
    "trailing space /x.txt",
    "ümläut/日本/é.txt",
    "decomposed/e\u0301.txt",
    "p%20q/100%.txt",
    "%2F/%.txt",
    "year=2024/city=New%20York/x.txt",
    "plus+and&/a=b&c.txt",
    "hash#mark/what?.txt",
    "[set]/star*.txt",
    "~tilde/'quoted\".txt",
    "dots/..a/b..c/.hidden.txt",
]


def overwrite(storage: Storage, path: str, data: bytes) -> None:
    storage.delete([path])
    assert storage.put_new(path, data)


def entry_of(storage: Storage, path: str) -> Entry:
    found = storage.find(path)
    assert found is not None
    return found


def test_an_object_is_created_once_and_its_first_bytes_stand(storage: Storage) -> None:
    assert storage.put_new("a/b.bin", b"first")
    assert not storage.put_new("a/b.bin", b"second")

    assert storage.read("a/b.bin") == b"first"


def test_a_store_that_creates_objects_once_is_found_to(storage: Storage) -> None:
    for _ in range(3):
        check_create_only(storage)

    assert ["_overnight/create-only.json"] == [entry.path for entry in storage.entries()]


def test_a_memoryview_is_written_as_its_bytes(storage: Storage) -> None:
    storage.put_new("b.bin", memoryview(b"0123456789")[2:5])

    assert storage.read("b.bin") == b"234"


def test_an_empty_object_is_an_object(storage: Storage) -> None:
    assert storage.put_new("empty", b"")

    assert storage.read("empty") == b""
    assert [("empty", 0)] == [(entry.path, entry.size) for entry in storage.entries()]


def test_of_twenty_racing_threads_one_creates_the_object_and_its_bytes_stand(storage: Storage) -> None:
    barrier = threading.Barrier(20)

    def race(at: int) -> bool:
        barrier.wait()
        return storage.put_new("new/folder/one.bin", f"writer {at}".encode() * 1000)

    with ThreadPoolExecutor(20) as pool:
        won = list(pool.map(race, range(20)))

    assert sum(won) == 1
    assert storage.read("new/folder/one.bin") == f"writer {won.index(True)}".encode() * 1000
    assert ["new/folder/one.bin"] == [entry.path for entry in storage.entries()]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_comes_back_as_it_was_given(storage: Storage, name: str) -> None:
    assert storage.put_new(name, name.encode())
    (entry,) = storage.entries()
    with storage.open_pinned(entry) as stream:
        pinned = stream.read()

    assert name == entry.path
    assert entry == storage.find(name)
    assert storage.exists(name)
    assert name.encode() == storage.read(name) == pinned
    assert not storage.put_new(name, b"again")
    assert storage.address(name) == f"{storage.url}/{name}"


@pytest.mark.parametrize("path", ["../beside", "a/../../beside", "a/..", ".."])
def test_a_path_that_leads_out_of_the_root_is_refused(storage: Storage, path: str) -> None:
    inner = open_storage(f"{storage.url}/inner")
    assert storage.put_new("beside", b"not inner's")
    before = storage.entries()

    for refused in (
        lambda: inner.put_new(path, b"1"),
        lambda: inner.read(path),
        lambda: inner.exists(path),
        lambda: inner.find(path),
        lambda: inner.entries(path),
        lambda: inner.entries_after(path, "", 1),
        lambda: inner.delete([path]),
        lambda: inner.set_aside(Entry(path=path, size=1, tag="1")),
        lambda: inner.open_pinned(Entry(path=path, size=11, tag="1")).read(),
        lambda: inner.address(path),
    ):
        with pytest.raises(BadInput, match="must"):
            refused()
    with pytest.raises(BadInput, match=r"must be relative to .*/inner and have no part '\.\.', got "):
        inner.read(path)

    assert before == storage.entries()


@pytest.mark.parametrize("name", ["a b", "ümläut", "p%20q", "k=v", "hash#mark", "what?", "[set]"])
def test_a_root_may_have_any_name(storage: Storage, name: str) -> None:
    inner = open_storage(f"{storage.url}/{name}")
    inner.put_new("x", b"1")

    assert [f"{name}/x"] == [entry.path for entry in storage.entries()]
    assert inner.read("x") == b"1"


def test_what_is_not_there_is_none_and_no_error(storage: Storage) -> None:
    assert storage.read("none") is None
    assert storage.find("none/at/all") is None
    assert not storage.exists("none")
    assert storage.entries() == []
    assert storage.entries("none/at/all") == []
    storage.delete(["none"])
    storage.delete_torn_writes("none")


def test_a_name_below_an_object_is_not_there(storage: Storage) -> None:
    storage.put_new("a", b"1")

    assert storage.read("a/b") is None
    assert not storage.exists("a/b")
    assert storage.entries("a/b") == storage.entries("a") == []


def test_a_folder_is_no_object(storage: Storage) -> None:
    storage.put_new("a/b", b"1")

    assert storage.find("a") is None
    assert not storage.exists("a")


def test_entries_are_sorted_and_lie_below_the_prefix_alone(storage: Storage) -> None:
    for path in ("run=a/2", "run=a/10", "run=ab/1", "run=a/deep/er/1", "run"):
        storage.put_new(path, path.encode())

    assert ["run=a/10", "run=a/2", "run=a/deep/er/1"] == [entry.path for entry in storage.entries("run=a")]
    assert storage.entries("run=a") == storage.entries("run=a/")
    assert len(storage.entries()) == 5
    assert [7] == [entry.size for entry in storage.entries("run=a") if entry.path == "run=a/2"]


def test_entries_reach_as_many_levels_down_as_asked(storage: Storage) -> None:
    for path in ("1", "a/2", "a/b/3", "a/b/c/4"):
        storage.put_new(path, b"x")

    assert ["1"] == [entry.path for entry in storage.entries(depth=1)]
    assert ["1", "a/2"] == [entry.path for entry in storage.entries(depth=2)]
    assert ["a/2"] == [entry.path for entry in storage.entries("a", depth=1)]
    assert ["a/2", "a/b/3"] == [entry.path for entry in storage.entries("a", depth=2)]
    assert len(storage.entries(depth=9)) == 4


@pytest.mark.parametrize("data", [b"other bytes, and more", b"old bytez"], ids=["longer", "as long"])
def test_an_object_that_was_written_anew_is_source_changed_by_name(storage: Storage, data: bytes) -> None:
    storage.put_new("data.bin", b"old bytes")
    entry = entry_of(storage, "data.bin")
    # A clock tick of the file system apart, as files of two nights are.
    threading.Event().wait(0.02)
    overwrite(storage, "data.bin", data)

    with pytest.raises(SourceChanged, match=r"data\.bin must be the (file|object) that the plan was made for"):
        storage.open_pinned(entry).read()


def test_an_object_that_is_gone_is_source_changed_by_name(storage: Storage) -> None:
    storage.put_new("data.bin", b"old bytes")
    entry = entry_of(storage, "data.bin")
    storage.delete(["data.bin"])

    with pytest.raises(SourceChanged, match=r"data\.bin must be there for the whole run, but is gone"):
        storage.open_pinned(entry).read()


def test_an_object_is_set_aside_under_a_name_that_starts_with_a_dot(storage: Storage) -> None:
    storage.put_new("run=a/part-1.parquet", b"torn")
    aside = storage.set_aside(entry_of(storage, "run=a/part-1.parquet"))

    assert aside is not None
    assert aside.startswith("run=a/.part-1.parquet.")
    assert [aside] == [entry.path for entry in storage.entries()]
    assert storage.read(aside) == b"torn"
    assert storage.put_new("run=a/part-1.parquet", b"whole")


def test_an_object_at_the_root_is_set_aside_too(storage: Storage) -> None:
    storage.put_new("part", b"torn")
    aside = storage.set_aside(entry_of(storage, "part"))

    assert aside is not None
    assert aside.startswith(".part.")


def test_an_object_that_another_worker_wrote_anew_is_not_set_aside(storage: Storage) -> None:
    storage.put_new("part", b"torn")
    entry = entry_of(storage, "part")
    overwrite(storage, "part", b"whole again")

    assert storage.set_aside(entry) is None
    assert storage.read("part") == b"whole again"
    storage.delete(["part"])
    assert storage.set_aside(entry) is None


def test_deleting_deletes_what_is_named(storage: Storage) -> None:
    for path in ("a/1", "a/2", "b"):
        storage.put_new(path, b"x")
    storage.delete(["a/1", "b", "none"])

    assert ["a/2"] == [entry.path for entry in storage.entries()]


def test_a_sweep_leaves_whole_objects(storage: Storage) -> None:
    storage.put_new("run=a/part", b"x")
    storage.delete_torn_writes("run=a")
    storage.delete_torn_writes("")

    assert ["run=a/part"] == [entry.path for entry in storage.entries()]


def test_a_copy_is_made_in_blocks_and_reports_each(storage: Storage) -> None:
    data = bytes(range(256)) * 40_000
    storage.put_new("data.bin", data)
    sink, seen = io.BytesIO(), []
    copy_pinned(storage, entry_of(storage, "data.bin"), sink, seen.append)

    assert data == sink.getvalue()
    assert [8 << 20, len(data) - (8 << 20)] == seen


def test_objects_after_a_name_are_listed_in_order_and_no_more_than_asked_for(storage: Storage) -> None:
    for name in ("a", "b/x", "c", "d", "deep/c", ".d"):
        storage.put_new(f"run=1/{name}", b"x")
    storage.put_new("run=10/z", b"x")

    def list_after(name: str, count: int) -> list[str]:
        return [entry.path for entry in storage.entries_after("run=1", name, count)]

    assert ["run=1/.d", "run=1/a", "run=1/c", "run=1/d"] == list_after("", 10)
    assert ["run=1/c", "run=1/d"] == list_after("a", 10)
    assert ["run=1/c"] == list_after("a", 1)
    assert ["run=1/c"] == list_after("b", 1)
    assert [] == list_after("d", 10)
    assert [] == storage.entries_after("run=2", "", 10)
    assert storage.find("run=1/c") == storage.entries_after("run=1", "a", 1)[0]
