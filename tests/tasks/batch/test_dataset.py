"""Listing a source, and reading its footers, on a local disk and on S3."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pyarrow as pa
import pytest

from serving.errors import (
    BadInput,
    SchemaMismatch,
    SourceChanged,
    SourceCorrupt,
    SourceEmpty,
    SourceFormat,
    SourceNotFound,
    StorageDenied,
)
from tasks.batch.dataset import Dataset, map_parallel, open_dataset
from tasks.batch.hive_partitions import parse_hive_values
from tasks.batch.source import pin_source
from tasks.storage import open_storage
from tests.tasks.batch.small import numbers, parquet, put

ELSEWHERE = "/elsewhere"


def opened(source: str, columns: tuple[str, ...] = ("a",), keys: tuple[str, ...] = ()) -> Dataset:
    return open_dataset(pin_source(source, ELSEWHERE), columns, keys)


def paths(source: str) -> list[str]:
    return [file.path for file in pin_source(source, ELSEWHERE).files]


def test_one_file_is_a_dataset(place: str) -> None:
    put(place, {"sub/a b.parquet": numbers(0, 7), "sub/other.parquet": numbers(0, 9)})
    dataset = opened(f"{place}/sub/a b.parquet")

    assert ["a b.parquet"] == [file.path for file in dataset.snapshot.files]
    assert f"{place}/sub" == dataset.snapshot.root
    assert dataset.rows == 7


def test_a_folder_is_every_file_below_it_in_the_order_of_their_paths(place: str) -> None:
    put(place, {"b.parquet": numbers(0, 2), "a/c.pq": numbers(2, 5), "a/B.PARQUET": numbers(5, 9)})
    dataset = opened(place)

    assert [("a/B.PARQUET", (4,)), ("a/c.pq", (3,)), ("b.parquet", (2,))] == [
        (file.path, file.row_groups) for file in dataset.snapshot.files
    ]
    assert dataset.rows == 9
    assert dataset.snapshot == opened(f"{place}/").snapshot


def test_a_snapshot_pins_size_and_tag(place: str) -> None:
    put(place, {"a.parquet": numbers(0, 2)})
    (file,) = pin_source(place, ELSEWHERE).files

    (listed,) = open_storage(place).entries()

    assert (listed.path, listed.size) == (file.path, file.size)
    assert listed.tag == file.tag.split("/")[0]
    assert len(file.tag.split("/")) == (1 if place.startswith("s3") else 3)
    assert pin_source(place, ELSEWHERE) == pin_source(place, ELSEWHERE)


def test_a_glob_chooses_files(place: str) -> None:
    put(place, {f"{name}.parquet": numbers(0, 1) for name in ("a1", "a2", "b1", "deep/a3")} | {"x.csv": b"a\n1\n"})

    assert ["a1.parquet", "a2.parquet"] == paths(f"{place}/a?.parquet")
    assert ["a1.parquet", "a2.parquet", "b1.parquet"] == paths(f"{place}/*.parquet")
    assert ["a1.parquet", "a2.parquet", "b1.parquet", "deep/a3.parquet"] == paths(f"{place}/**/*.parquet")
    assert ["a2.parquet"] == paths(f"{place}/[a-b][!1].parquet")


def test_row_groups_are_read_from_the_footers(place: str) -> None:
    put(place, {"a.parquet": parquet(numbers(0, 10), row_group_size=4)})

    assert [(4, 4, 2)] == [file.row_groups for file in opened(place).snapshot.files]


def test_files_of_no_rows_among_others_stay_and_need_no_columns(place: str) -> None:
    put(
        place, {"a.parquet": {"other": pa.array([], pa.int8())}, "b.parquet": numbers(0, 3), "c.parquet": numbers(0, 0)}
    )
    dataset = opened(place)

    assert [0, 3, 0] == [sum(file.row_groups) for file in dataset.snapshot.files]
    assert numbers(0, 0).schema == dataset.schema


def test_no_rows_at_all_is_source_empty(place: str) -> None:
    put(place, {"a.parquet": numbers(0, 0), "b.parquet": numbers(0, 0)})
    with pytest.raises(SourceEmpty, match="must hold at least one row, got none in 2 files below"):
        opened(place)


def test_hidden_files_are_passed_over(place: str) -> None:
    put(place, {"_SUCCESS": b"", ".a.crc": b"x", "_logs/0.json": b"{}", "a.parquet": numbers(0, 1)})

    assert ["a.parquet"] == paths(place)


@pytest.mark.parametrize("path", ["none", "none.parquet", "none/*.parquet", "hidden"])
def test_a_source_without_files_is_source_not_found(place: str, path: str) -> None:
    put(place, {"a.parquet": numbers(0, 1), "hidden/_b.parquet": numbers(0, 1)})
    with pytest.raises(SourceNotFound, match=f"must name at least one file, got none at .*{path[:4]}"):
        pin_source(f"{place}/{path}", ELSEWHERE)


def test_an_empty_folder_is_source_not_found(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound, match="got none at"):
        pin_source(str(tmp_path), ELSEWHERE)


@pytest.mark.parametrize(
    ("name", "told"),
    [("b.csv", r"csv: 1, e\.g\. b\.csv"), ("README.md", r"unknown: 1, e\.g\. README\.md"), ("b", r"unknown: 1")],
)
def test_files_of_two_formats_or_none_are_told_apart(place: str, name: str, told: str) -> None:
    put(place, {"a.parquet": numbers(0, 1), name: b"a\n1\n"})
    with pytest.raises(SourceFormat, match=rf"must be of one format out of .*{told}"):
        pin_source(place, ELSEWHERE)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("x.csv", "csv"), ("x.jsonl", "jsonl"), ("x.ndjson", "jsonl"), ("x.arrow", "arrow"), ("x.FEATHER", "arrow")],
)
def test_the_ending_says_the_format(tmp_path: Path, name: str, expected: str) -> None:
    put(str(tmp_path), {name: b"x"})

    assert expected == pin_source(str(tmp_path), ELSEWHERE).format


@pytest.mark.parametrize("inside", ["", "/scores", "/deep/scores"])
def test_a_destination_inside_the_source_is_refused(place: str, inside: str) -> None:
    put(place, {"a.parquet": numbers(0, 1)})
    for source in (place, f"{place}/", f"{place}/**", f"{place}/**/*.parquet"):
        with pytest.raises(BadInput, match="The destination must lie outside the source"):
            pin_source(source, f"{place}{inside}")


def test_a_destination_beside_what_a_glob_or_file_names_is_fine(place: str) -> None:
    put(place, {"a.parquet": numbers(0, 1)})
    for source in (f"{place}/*.parquet", f"{place}/a.parquet"):
        assert ["a.parquet"] == [file.path for file in pin_source(source, f"{place}/scores").files]
    assert ["a.parquet"] == [file.path for file in pin_source(place, f"{place}-scores").files]


def test_a_source_inside_the_destination_is_fine(place: str) -> None:
    put(f"{place}/in", {"a.parquet": numbers(0, 1)})

    assert len(pin_source(f"{place}/in", place).files) == 1


def test_relative_paths_and_file_urls_are_the_same_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "some data"
    put(str(folder), {"a.parquet": numbers(0, 1)})
    monkeypatch.chdir(tmp_path)
    expected = pin_source(str(folder), ELSEWHERE)

    assert str(folder) == expected.root
    for source in ("some data", "./some data/", f"file://{tmp_path}/some%20data", f"{folder}//"):
        assert expected == pin_source(source, ELSEWHERE)


def test_hive_partitions_are_columns(place: str) -> None:
    names = ("year=2024/city=New%20York/a", "year=0025/city=100%25/b", "year=-1/city=__HIVE_DEFAULT_PARTITION__/c")
    put(place, {f"{name}.parquet": numbers(at, at + 1) for at, name in enumerate(names)})
    dataset = opened(place, ("a", "year"), ("city",))

    assert {"year", "city"} == set(dataset.hive)
    assert (pa.string(), pa.string()) == tuple(dataset.schema.field(name).type for name in ("year", "city"))


NULL = "__HIVE_DEFAULT_PARTITION__"


@pytest.mark.parametrize("value", ["1", "007", "-0", "1.5", "1e3", "9" * 20, "", " 1", "\u0661", NULL])
def test_a_partition_is_text_whatever_is_written_in_it(tmp_path: Path, value: str) -> None:
    put(str(tmp_path), {f"p={value}/a.parquet": numbers(0, 1)})

    assert opened(str(tmp_path)).schema.field("p").type == pa.string()


def test_a_column_of_the_file_goes_before_a_partition_of_its_name(place: str) -> None:
    put(place, {"id=7/x.parquet": numbers(0, 3), "id=8/x.parquet": numbers(3, 4), "x.parquet": numbers(4, 5)})
    dataset = opened(place, ("id",))

    assert dataset.hive == ()
    assert numbers(0, 0).schema == dataset.schema


def test_a_partition_that_some_files_lack_is_told_by_file_where_it_is_used(place: str) -> None:
    put(place, {"p=1/a.parquet": numbers(0, 1), "x.parquet": numbers(0, 1)})
    with pytest.raises(SchemaMismatch, match=r"of each partition that is used, got: 'p' is missing in x\.parquet"):
        opened(place, ("a", "p"))

    assert opened(place).hive == ()


def test_a_partition_that_the_first_file_lacks_is_told_too(tmp_path: Path) -> None:
    put(str(tmp_path), {"a.parquet": numbers(0, 1), "p=1/a.parquet": numbers(0, 1)})
    with pytest.raises(SchemaMismatch, match=r"'p' is missing in a\.parquet"):
        opened(str(tmp_path), (), ("p",))


def test_hive_values_whose_escapes_are_no_utf_8_stay_as_they_are_written() -> None:
    found = [parse_hive_values(f"store={value}/a.parquet")["store"] for value in ("%E4", "%E5", "50%", "%FFx%20y")]

    assert ["%E4", "%E5", "50%", "%FFx%20y"] == found


def test_hive_values_are_decoded() -> None:
    assert parse_hive_values("a=1/b=x%2Fy%3D/=3/c/d=/e=%C3%BC/f=1.parquet") == {
        "a": "1",
        "b": "x/y=",
        "d": "",
        "e": "ü",
    }


def whole() -> bytes:
    return parquet(numbers(0, 100))


@pytest.mark.parametrize(
    "data",
    [b"", b"PAR1", whole()[:-1], whole()[: len(whole()) // 2], b"PAR1" + b"x" * 99 + b"PAR1", b"not parquet at all"],
    ids=["no bytes", "four bytes", "a byte short", "half", "no footer", "text"],
)
def test_a_broken_footer_is_source_corrupt_by_name(place: str, data: bytes) -> None:
    put(place, {"a.parquet": numbers(0, 1), "sub/broken.parquet": data})
    with pytest.raises(SourceCorrupt, match=r"sub/broken\.parquet must be readable, got: .*Repair or remove the file"):
        opened(place)


def test_flipped_bytes_in_a_footer_are_source_corrupt_by_name(tmp_path: Path) -> None:
    data = bytearray(whole())
    data[-60:-30] = bytes(0xFF ^ byte for byte in data[-60:-30])
    put(str(tmp_path), {"a.parquet": bytes(data)})
    with pytest.raises(SourceCorrupt, match=r"a\.parquet must be readable"):
        opened(str(tmp_path))


def test_a_file_that_changed_since_the_snapshot_is_source_changed(place: str) -> None:
    put(place, {"a.parquet": numbers(0, 1)})
    snapshot = pin_source(place, ELSEWHERE)
    open_storage(place).delete(["a.parquet"])
    put(place, {"a.parquet": numbers(0, 2)})
    with pytest.raises(SourceChanged, match=r"a\.parquet"):
        open_dataset(snapshot, ("a",), ())


def test_a_file_that_may_not_be_read_is_denied_and_not_called_corrupt(
    public_folder: Path, unprivileged: Callable[[], AbstractContextManager[None]]
) -> None:
    put(str(public_folder), {"a.parquet": numbers(0, 1)})
    (public_folder / "a.parquet").chmod(0o000)
    with unprivileged(), pytest.raises(StorageDenied, match=r"a\.parquet must be accessible"):
        opened(str(public_folder))


def test_a_thousand_files_keep_their_order(tmp_path: Path) -> None:
    data = parquet(numbers(0, 3))
    for at in range(1000):
        folder = tmp_path / f"p={at % 10}"
        folder.mkdir(exist_ok=True)
        (folder / f"{at:04d}.parquet").write_bytes(data)
    dataset = opened(str(tmp_path))

    assert dataset.rows == 3000
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.parquet")) == [
        file.path for file in dataset.snapshot.files
    ]


@pytest.mark.parametrize("items", [0, 1, 2, 7, 100])
@pytest.mark.parametrize("address", ["/a-folder", "s3://a-bucket/"])
@pytest.mark.usefixtures("s3")
def test_in_parallel_keeps_the_order_and_raises_what_is_raised(address: str, items: int) -> None:
    storage = open_storage(address)

    assert list(range(items)) == map_parallel(storage, lambda at: at, range(items))
    with pytest.raises(ZeroDivisionError):
        map_parallel(storage, lambda at: 1 // at, [1, 0])


def test_a_name_that_is_not_utf8_is_told(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff.parquet")).write_bytes(parquet(numbers(0, 1)))
    with pytest.raises(BadInput, match="UTF-8"):
        pin_source(str(tmp_path), ELSEWHERE)
