"""Addresses: which storage they open, and which files they select there, on a local disk and on S3."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving.errors import BadInput
from tasks.storage import (
    LocalStorage,
    Storage,
    join_location,
    open_storage,
    register_scheme,
    select,
    split_location,
)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("/data/x", "/data/x"),
        ("/data/x/", "/data/x"),
        ("/data//x/.", "/data/x"),
        ("/a b/100%25/h#i?j", "/a b/100%25/h#i?j"),
        ("file:///data/a%20b", "/data/a b"),
        ("file:///data/h%23i/", "/data/h#i"),
        ("file://localhost/data", "/data"),
        ("file:/data", "/data"),
        ("/", "/"),
    ],
)
def test_a_path_or_file_url_opens_a_local_folder(address: str, expected: str) -> None:
    storage = open_storage(address)

    assert isinstance(storage, LocalStorage)
    assert expected == storage.url


def test_a_relative_path_lies_below_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert open_storage("data/x").url == str(tmp_path / "data/x")
    assert open_storage(".").url == str(tmp_path)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    assert open_storage("~/data").url == str(tmp_path / "data")


@pytest.mark.parametrize("address", ["block:scores", "block:lake/scores"])
def test_a_block_is_no_folder_of_that_name(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(BadInput, match=f"batch_inference alone takes blocks.*got {address}. Give the block's address"):
        open_storage(address)
    assert str(tmp_path / address) == open_storage(f"./{address}").url


@pytest.mark.parametrize(
    "address", ["", "gcs://bucket/x", "https://host/x", "s3a://bucket/x", "file://host/x", "file:relative", "S3://b"]
)
def test_any_other_address_is_bad_input(address: str) -> None:
    with pytest.raises(BadInput, match=r"must be a path, file:///path or s3://bucket/prefix, gs://.* or az://.*, got "):
        open_storage(address)


@pytest.mark.parametrize("address", ["s3://", "s3:///prefix"])
def test_an_s3_address_names_a_bucket(address: str) -> None:
    with pytest.raises(BadInput, match="must be s3://bucket/prefix"):
        open_storage(address)


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize("address", ["s3://lake/a", "s3://lake/a/", "s3://lake/a//"])
def test_slashes_at_the_end_of_an_s3_address_make_no_difference(address: str) -> None:
    assert open_storage(address).url == "s3://lake/a"


@pytest.mark.parametrize("mark", ["\n", "\t", "\r", "\x00", "\x1f", "\x7f"])
@pytest.mark.parametrize("address", ["/a/b{}c", "s3://lake/b{}c", "relative{}", "file:///a/b{}"])
def test_an_address_with_a_control_character_is_bad_input(address: str, mark: str) -> None:
    with pytest.raises(BadInput, match="must hold no control characters, such as tabs and newlines, got "):
        open_storage(address.format(mark))


def test_a_file_url_with_an_escaped_control_character_is_bad_input() -> None:
    with pytest.raises(BadInput, match="must hold no control characters"):
        open_storage("file:///a/b%0Ac")


def test_a_registered_scheme_opens_a_storage_of_ones_own(tmp_path: Path) -> None:
    register_scheme("memory-of-a-test", lambda url: LocalStorage(tmp_path / url.removeprefix("memory-of-a-test://")))

    assert str(tmp_path / "a/b") == open_storage("memory-of-a-test://a/b").url
    with pytest.raises(BadInput, match="An address must be"):
        open_storage("another-scheme://a/b")


FILES = [
    "a.csv",
    "b.csv",
    "c.txt",
    "sub/d.csv",
    "sub/deep/e.csv",
    "date=2024-01-01/f.csv",
    "date=2024-01-02/f.csv",
    "_SUCCESS",
    ".hidden.csv",
    "_temporary/g.csv",
    ".git/h.csv",
    "_date=2024/i.csv",
]


@pytest.fixture
def filled(storage: Storage) -> Storage:
    for path in FILES:
        storage.put_new(path, path.encode())
    return storage


def selected(address: str) -> list[str]:
    return [entry.path for entry in select(address).entries]


SEEN = [
    "_date=2024/i.csv",
    "a.csv",
    "b.csv",
    "c.txt",
    "date=2024-01-01/f.csv",
    "date=2024-01-02/f.csv",
    "sub/d.csv",
    "sub/deep/e.csv",
]


@pytest.mark.parametrize("end", ["", "/", "/**"])
def test_a_folder_is_everything_below_it_that_is_not_hidden(filled: Storage, end: str) -> None:
    assert SEEN == selected(f"{filled.url}{end}")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.csv", ["a.csv", "b.csv"]),
        ("?.csv", ["a.csv", "b.csv"]),
        ("[ax].csv", ["a.csv"]),
        ("[!a].csv", ["b.csv"]),
        ("[a-b].*", ["a.csv", "b.csv"]),
        ("*/*.csv", ["_date=2024/i.csv", "date=2024-01-01/f.csv", "date=2024-01-02/f.csv", "sub/d.csv"]),
        ("sub/**", ["d.csv", "deep/e.csv"]),
        ("**/*.csv", [path for path in SEEN if path.endswith(".csv")]),
        ("**/e.csv", ["sub/deep/e.csv"]),
        ("**/deep/**", ["sub/deep/e.csv"]),
        ("s*/**/e.csv", ["sub/deep/e.csv"]),
        ("s*/**/d.csv", ["sub/d.csv"]),
        ("date=2024-01-0[2-9]/f.csv", ["date=2024-01-02/f.csv"]),
        ("date=2024*/", ["date=2024-01-01/f.csv", "date=2024-01-02/f.csv"]),
        ("date=2024*", []),
        ("_temp*/*.csv", ["_temporary/g.csv"]),
        (".*.csv", [".hidden.csv"]),
        ("*/none", []),
    ],
)
def test_a_glob_is_what_fits_it_level_by_level(filled: Storage, pattern: str, expected: list[str]) -> None:
    assert expected == selected(f"{filled.url}/{pattern}")


@pytest.mark.parametrize("path", ["a.csv", "sub/deep/e.csv", ".hidden.csv", "_temporary/g.csv"])
def test_a_file_is_itself_below_its_folder_hidden_or_not(filled: Storage, path: str) -> None:
    found = select(f"{filled.url}/{path}")

    assert [path.rpartition("/")[2]] == [entry.path for entry in found.entries]
    assert f"{filled.url}/{path}".rpartition("/")[0] == found.storage.url
    assert found.storage.read(found.entries[0].path) == path.encode()


@pytest.mark.parametrize("path", ["none", "none/*.csv", "a.csv/*", "a.csv/none", "su"])
def test_what_is_not_there_selects_nothing(filled: Storage, path: str) -> None:
    assert selected(f"{filled.url}/{path}") == []


def test_a_wildcard_may_be_the_first_of_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.csv").write_bytes(b"")
    (tmp_path / "b.csv").write_bytes(b"")
    monkeypatch.chdir(tmp_path)

    assert ["b.csv"] == selected("*.csv")
    assert ["a.csv"] == selected("sub/*.csv")
    assert ["b.csv", "sub/a.csv"] == selected(".")


def test_a_glob_may_be_a_file_url(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b/c.csv").write_bytes(b"")

    assert ["c.csv"] == selected(f"file://{tmp_path}/a%20b/*.csv")


@pytest.mark.parametrize("name", ["data[1].csv", "what?.csv", "[set]/x.csv"])
def test_a_local_name_that_exists_is_meant_as_it_stands(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "data1.csv").write_bytes(b"")

    assert [name.rpartition("/")[2]] == selected(f"{tmp_path}/{name}")


def test_brackets_make_a_wildcard_a_plain_letter(filled: Storage) -> None:
    filled.put_new("x[1]*.csv", b"")

    assert ["x[1]*.csv"] == selected(f"{filled.url}/x[[]1][*].csv")


def test_a_glob_looks_no_deeper_than_it_has_levels(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "x.csv").write_bytes(b"")
    # A link that leads nowhere would be an error, if it were looked at.
    (tmp_path / "a/broken").symlink_to("nowhere")

    assert ["x.csv"] == selected(f"{tmp_path}/*.csv")


@pytest.mark.parametrize(
    ("pattern", "below", "expected"),
    [
        ("", "", True),
        ("", "scores", True),
        ("", "deep/scores", True),
        ("", "../beside", False),
        ("", "_scores", False),
        ("*", "", False),
        ("*.csv", "", False),
        ("*/*", "", True),
        ("*/*.csv", "", False),
        ("**/*.parquet", "scores", True),
        ("sub/*", "sub", False),
        ("sub/**", "sub/x", True),
        ("sub/**", "subx", False),
        ("a.csv", "", False),
    ],
)
def test_a_selection_knows_whether_it_would_take_a_part(
    filled: Storage,
    pattern: str,
    below: str,
    expected: bool,  # noqa: FBT001
) -> None:
    found = select(f"{filled.url}/{pattern}".rstrip("/"))
    target = f"{filled.url}/{below}".rstrip("/").replace(f"{filled.url}/../", f"{filled.url.rpartition('/')[0]}/")

    assert expected == found.would_select(open_storage(target), "run=0/part-00000-0000.parquet")


def test_a_link_does_not_hide_that_a_destination_lies_inside(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.csv").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    found = select(str(tmp_path / "data"))

    assert found.would_select(open_storage(str(tmp_path / "link/scores")), "part.parquet")
    assert found.would_select(open_storage(str(tmp_path / "data/../data/scores")), "part.parquet")
    assert not found.would_select(open_storage(str(tmp_path / "database")), "part.parquet")


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("s3://lake/a/b.parquet", ("s3://lake", "a/b.parquet")),
        ("s3a://lake/city=New%20York/b", ("s3://lake", "city=New%20York/b")),
        ("gs://lake/a/", ("gs://lake", "a")),
        ("abfss://lake@someone.dfs.core.windows.net/a", ("abfss://lake@someone.dfs.core.windows.net", "a")),
        ("/data/a b/c", ("/", "data/a b/c")),
        ("file:/data/a%20b", ("/", "data/a%20b")),
        ("file:///data/a", ("/", "data/a")),
        ("s3://lake", ("s3://lake", "")),
    ],
)
def test_a_location_is_a_bucket_and_a_literal_path_below_it(location: str, expected: tuple[str, str]) -> None:
    assert expected == split_location(location)
    assert split_location(join_location(*expected)) == expected
