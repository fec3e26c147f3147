"""Addresses: which storage they open."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving.errors import BadInput
from tasks.storage import LocalStorage, open_storage, register_scheme


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


@pytest.mark.parametrize(
    "address", ["", "gs://bucket/x", "https://host/x", "s3a://bucket/x", "file://host/x", "file:relative", "S3://b"]
)
def test_any_other_address_is_bad_input(address: str) -> None:
    with pytest.raises(BadInput, match=r"must be a path, file:///path or s3://bucket/prefix, got "):
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
