"""What a local folder adds: durability, and errors that say what to do next."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from serving.errors import BadInput, DestinationUnusable, SourceChanged, StorageDenied, StorageFault, StorageFull
from tasks.storage import Entry, LocalStorage

Enter = Callable[[], AbstractContextManager[None]]


@pytest.fixture
def folder(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "place")


@contextlib.contextmanager
def mounted(at: Path, *options: str) -> Generator[None]:
    """Mount a tiny file system of memory, where this user may."""
    at.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(at)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting is root's")
    try:
        yield
    finally:
        subprocess.run(["umount", str(at)], check=True)


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The fsyncs and links that are made, by the inode of the file or folder."""
    seen: list[tuple[str, int]] = []
    fsync, link = os.fsync, os.link

    def seen_fsync(descriptor: int) -> None:
        fsync(descriptor)
        seen.append(("fsync", os.fstat(descriptor).st_ino))

    def seen_link(source: Path, target: Path) -> None:
        link(source, target)
        seen.append(("link", target.stat().st_ino))

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "link", seen_link)
    return seen


def test_an_absolute_path_is_refused(folder: LocalStorage, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"1")

    with pytest.raises(BadInput, match=f"must be relative to {folder.url} .*, got '{outside}'"):
        folder.read(str(outside))
    with pytest.raises(BadInput, match="must be relative"):
        folder.delete_torn_writes("..")
    assert b"1" == outside.read_bytes()


def test_nothing_leads_out_of_the_root_of_the_file_system(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").write_bytes(b"1")

    assert b"1" == LocalStorage(Path("/")).read(f"{tmp_path}/a/../b".lstrip("/"))


def inode(path: Path) -> int:
    return path.stat().st_ino


def test_a_file_is_synced_before_it_is_linked_and_its_folder_after(
    folder: LocalStorage, order: list[tuple[str, int]]
) -> None:
    folder.root.mkdir()
    folder.put_new("a.bin", b"data")
    file = inode(folder.root / "a.bin")

    assert [("fsync", file), ("link", file), ("fsync", inode(folder.root))] == order


def test_the_parent_of_each_new_folder_is_synced(folder: LocalStorage, order: list[tuple[str, int]]) -> None:
    folder.put_new("b/c/a.bin", b"data")
    root = folder.root

    assert [root.parent, root, root / "b", root / "b/c/a.bin", root / "b/c/a.bin", root / "b/c"] == [
        next(path for path in (root.parent, *root.parent.rglob("*")) if inode(path) == at) for _, at in order
    ]
    assert ["fsync", "fsync", "fsync", "fsync", "link", "fsync"] == [what for what, _ in order]


def test_nothing_but_the_file_is_left_behind(folder: LocalStorage) -> None:
    folder.put_new("a.bin", b"data")
    folder.put_new("a.bin", b"again")

    assert ["a.bin"] == [path.name for path in folder.root.iterdir()]


def test_a_full_disk_is_storage_full_and_leaves_nothing(tmp_path: Path) -> None:
    folder = LocalStorage(tmp_path / "disk")
    with mounted(folder.root, "-o", "size=64k"):
        with pytest.raises(StorageFull, match=r"a\.bin needs space, but its disk is full"):
            folder.put_new("a.bin", bytes(1 << 20))

        assert list(folder.root.iterdir()) == []
        assert folder.put_new("a.bin", b"small")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_at_the_fsync_is_storage_full(
    folder: LocalStorage, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def full(_: int) -> None:
        raise OSError(code, os.strerror(code))

    folder.put_new("first", b"")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFull, match="the run resumes"):
        folder.put_new("a.bin", b"data")

    assert ["first"] == [path.name for path in folder.root.iterdir()]


def test_a_read_only_disk_is_storage_denied(tmp_path: Path) -> None:
    folder = LocalStorage(tmp_path / "disk")
    with mounted(folder.root, "-o", "ro"), pytest.raises(StorageDenied, match="Read-only file system"):
        folder.put_new("a.bin", b"data")


def test_a_folder_of_another_user_is_storage_denied(public_folder: Path, unprivileged: Enter) -> None:
    storage = LocalStorage(public_folder)
    storage.put_new("secret/a.bin", b"data")
    entry = storage.entries()[0]
    (public_folder / "secret/a.bin").chmod(0o000)
    (public_folder / "secret").chmod(0o555)
    public_folder.chmod(0o555)
    with unprivileged():
        for refused in (
            lambda: storage.put_new("b.bin", b"data"),
            lambda: storage.put_new("new/b.bin", b"data"),
            lambda: storage.put_new("secret/b.bin", b"data"),
            lambda: storage.read("secret/a.bin"),
            lambda: storage.open_pinned(entry),
            lambda: storage.delete(["secret/a.bin"]),
            lambda: storage.set_aside(entry),
        ):
            with pytest.raises(StorageDenied, match=r"must be accessible, got: .*Permission denied"):
                refused()
    public_folder.chmod(0o755)
    (public_folder / "secret").chmod(0o755)


def test_a_folder_that_cannot_be_listed_is_an_error_and_not_passed_over(
    public_folder: Path, unprivileged: Enter
) -> None:
    storage = LocalStorage(public_folder)
    storage.put_new("open/a.bin", b"data")
    storage.put_new("shut/a.bin", b"data")
    (public_folder / "shut").chmod(0o000)
    with unprivileged():
        for refused in (storage.entries, lambda: storage.find("shut/a.bin"), lambda: storage.exists("shut/a.bin")):
            with pytest.raises(StorageDenied):
                refused()
    (public_folder / "shut").chmod(0o755)


@pytest.mark.parametrize("path", ["file/a.bin", "file/deeper/a.bin"])
def test_a_file_where_a_folder_must_be_is_destination_unusable(folder: LocalStorage, path: str) -> None:
    folder.put_new("file", b"data")
    with pytest.raises(DestinationUnusable, match="must be a place for files below folders"):
        folder.put_new(path, b"data")
    with pytest.raises(DestinationUnusable):
        LocalStorage(folder.root / "file").put_new("a", b"")


def test_a_folder_where_a_file_must_be_is_destination_unusable(folder: LocalStorage) -> None:
    folder.put_new("a/b", b"data")
    with pytest.raises(DestinationUnusable, match="Is a directory"):
        folder.read("a")


def test_a_file_system_without_hard_links_is_destination_unusable(
    folder: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(DestinationUnusable, match="must be on a file system that has hard links"):
        folder.put_new("a.bin", b"data")

    assert list(folder.root.iterdir()) == []


def test_any_other_failure_of_the_disk_is_a_storage_fault(
    folder: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    folder.root.mkdir()
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(StorageFault, match=r"a\.bin must be usable, got: .*Input/output error"):
        folder.put_new("a.bin", b"data")


def sweep_before_linking(
    folder: LocalStorage, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], object]
) -> None:
    link = os.link

    def swept(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        meanwhile()
        folder.delete_torn_writes("run=a")
        link(source, target)

    monkeypatch.setattr(os, "link", swept)


def test_a_write_that_a_publisher_swept_away_finds_the_part_that_stands(
    folder: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep_before_linking(folder, monkeypatch, lambda: folder.put_new("run=a/part", b"first"))

    assert not folder.put_new("run=a/part", b"second")
    assert folder.read("run=a/part") == b"first"


def test_a_write_that_was_swept_away_for_nothing_is_a_storage_fault(
    folder: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep_before_linking(folder, monkeypatch, lambda: None)
    with pytest.raises(StorageFault, match="Call again"):
        folder.put_new("run=a/part", b"data")


@pytest.mark.parametrize("synced", [2, 3])
def test_a_folder_that_is_swept_while_it_is_made_for_a_write_is_made_again(
    folder: LocalStorage, monkeypatch: pytest.MonkeyPatch, synced: int
) -> None:
    """Each new folder's parent is synced: the root's first, then the root, then run=a."""
    fsync, calls = os.fsync, 0

    def sync_and_sweep(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        fsync(descriptor)
        if calls == synced:
            folder.delete_torn_writes("run=a")

    monkeypatch.setattr(os, "fsync", sync_and_sweep)

    assert folder.put_new("run=a/worker=1/part", b"data")
    assert b"data" == folder.read("run=a/worker=1/part")
    assert synced < calls


def test_a_file_in_the_place_of_a_folder_is_told_as_such(folder: LocalStorage) -> None:
    folder.put_new("run=a", b"no folder")
    with pytest.raises(DestinationUnusable, match=r"run=a/part must be a place for files below folders"):
        folder.put_new("run=a/part", b"data")


def test_a_sweep_takes_unfinished_writes_and_empty_folders_alone(folder: LocalStorage) -> None:
    for path in ("run=a/part", "run=a/notes.tmp", "run=ab/.part.0.tmp"):
        folder.put_new(path, b"x")
    (folder.root / "run=a/.part.0123.tmp").write_bytes(b"torn")
    (folder.root / "run=a/empty/empty").mkdir(parents=True)
    folder.delete_torn_writes("run=a")

    assert ["run=a", "run=a/notes.tmp", "run=a/part", "run=ab", "run=ab/.part.0.tmp"] == sorted(
        str(path.relative_to(folder.root)) for path in folder.root.rglob("*")
    )


def test_unfinished_writes_are_not_listed(folder: LocalStorage) -> None:
    folder.put_new("notes.tmp", b"x")
    (folder.root / ".part.0123.tmp").write_bytes(b"torn")

    assert ["notes.tmp"] == [entry.path for entry in folder.entries()]


def test_links_are_followed(folder: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a").write_bytes(b"12")
    folder.root.mkdir()
    (folder.root / "folder").symlink_to(tmp_path / "elsewhere")
    (folder.root / "file").symlink_to(tmp_path / "elsewhere/a")

    assert [("file", 2), ("folder/a", 2)] == [(entry.path, entry.size) for entry in folder.entries()]


def test_a_link_that_leads_nowhere_is_an_error_by_name(folder: LocalStorage) -> None:
    folder.put_new("a", b"x")
    (folder.root / "gone.parquet").symlink_to("nowhere")
    with pytest.raises(StorageFault, match=r"gone\.parquet must be a file, got a link that leads nowhere"):
        folder.entries()


def test_a_circle_of_links_is_an_error(folder: LocalStorage) -> None:
    folder.put_new("a/x", b"x")
    (folder.root / "a/again").symlink_to(folder.root)
    with pytest.raises(
        BadInput, match=r"must not lead back to a folder that it lies in, .* got .*a/again, which leads"
    ):
        folder.entries()


def test_links_that_lead_to_each_other_are_an_error(folder: LocalStorage) -> None:
    for one, other in (("a", "b"), ("b", "a")):
        folder.put_new(f"{one}/x", b"x")
        (folder.root / one / "other").symlink_to(folder.root / other)
    with pytest.raises(BadInput, match="must not lead back"):
        folder.entries()

    assert ["a/x"] == [entry.path for entry in folder.entries("a", depth=1)]


def test_a_link_to_a_folder_above_is_an_error(folder: LocalStorage) -> None:
    folder.put_new("x", b"x")
    (folder.root / "up").symlink_to(folder.root.parent)
    with pytest.raises(BadInput, match="must not lead back"):
        folder.entries()


def test_a_link_to_itself_is_an_error_by_name(folder: LocalStorage) -> None:
    folder.put_new("x", b"x")
    (folder.root / "self.parquet").symlink_to("self.parquet")
    for refused in (folder.entries, lambda: folder.find("self.parquet")):
        with pytest.raises(BadInput, match=r"self\.parquet must lead to a file or folder, got a link that leads back"):
            refused()


def test_one_folder_under_two_names_is_listed_under_both(folder: LocalStorage) -> None:
    folder.put_new("a/x", b"x")
    (folder.root / "b").symlink_to("a")

    assert ["a/x", "b/x"] == [entry.path for entry in folder.entries()]


@pytest.mark.parametrize("swap", ["in place", "by another file", "by a hard link"])
def test_a_pinned_file_rewritten_with_its_size_and_time_is_source_changed(folder: LocalStorage, swap: str) -> None:
    folder.put_new("a", b"old")
    (entry,) = folder.pin(folder.entries())
    before = (folder.root / "a").stat()
    if swap == "in place":
        (folder.root / "a").write_bytes(b"new")
    else:
        (folder.root / "b").write_bytes(b"new")
        os.utime(folder.root / "b", ns=(before.st_atime_ns, before.st_mtime_ns))
        if swap == "by a hard link":
            os.link(folder.root / "b", folder.root / "c")
        (folder.root / "b").rename(folder.root / "a")
    os.utime(folder.root / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
    now = (folder.root / "a").stat()

    assert (before.st_size, before.st_mtime_ns) == (now.st_size, now.st_mtime_ns)
    with pytest.raises(SourceChanged, match=r"changed at \d+ ns, inode \d+\), got 3 bytes, modified at"):
        folder.check_unchanged(entry)


def test_a_pinned_file_that_was_taken_away_and_put_back_is_source_changed(folder: LocalStorage) -> None:
    folder.put_new("a", b"old")
    (entry,) = folder.pin(folder.entries())
    (folder.root / "a").rename(folder.root / "b")
    (folder.root / "b").rename(folder.root / "a")
    with pytest.raises(SourceChanged):
        folder.check_unchanged(entry)


def test_a_pinned_file_that_is_only_read_stays_the_same(folder: LocalStorage) -> None:
    folder.put_new("a", b"old")
    (entry,) = folder.pin(folder.entries())
    (folder.root / "a").read_bytes()
    (folder.root / "beside").write_bytes(b"x")
    (folder.root / "a").stat()
    folder.check_unchanged(entry)

    assert [entry] == folder.pin([entry])


@pytest.mark.parametrize(("kind", "marks"), [("ext4", 3), ("fuse.gcsfuse", 2), ("fuseblk", 2), ("9p", 2)])
def test_inodes_that_a_mount_gives_out_anew_are_not_pinned(folder: LocalStorage, kind: str, marks: int) -> None:
    folder.put_new("a", b"old")
    device = (folder.root / "a").stat().st_dev
    mount = f"36 35 {os.major(device)}:{os.minor(device)} / {folder.root} rw,relatime master:1 - {kind} somewhere rw\n"
    (entry,) = folder.pin(folder.entries(), lambda _: mount.encode())
    folder.check_unchanged(entry)

    assert marks == len(entry.tag.split("/"))


def test_files_are_pinned_where_the_system_does_not_list_its_mounts(folder: LocalStorage) -> None:
    def read(path: Path) -> bytes:
        raise FileNotFoundError(path)

    folder.put_new("a", b"old")
    (entry,) = folder.pin(folder.entries(), read)

    assert 3 == len(entry.tag.split("/"))


def test_a_file_that_goes_as_it_is_pinned_is_source_changed(folder: LocalStorage) -> None:
    folder.put_new("a", b"old")
    entries = folder.entries()
    (folder.root / "a").unlink()
    with pytest.raises(SourceChanged, match="is gone"):
        folder.pin(entries)


def test_a_tag_of_an_earlier_version_holds_what_it_says(folder: LocalStorage) -> None:
    folder.put_new("a", b"old")
    (listed,) = folder.entries()
    (folder.root / "a").chmod(0o600)
    folder.check_unchanged(listed)
    os.utime(folder.root / "a", ns=(1, 1))
    with pytest.raises(SourceChanged, match=r"\(3 bytes, modified at \d+ ns\), got 3 bytes, modified at 1 ns\."):
        folder.check_unchanged(listed)


def test_a_file_is_the_same_to_those_who_list_it_before_and_after_its_temporary_name_goes(
    folder: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    unlink = Path.unlink

    def slow(self: Path, missing_ok: bool = False) -> None:  # noqa: FBT001, FBT002 - as Path has it
        # Another worker lists the part that is in place already, while its temporary name still stands.
        seen.extend(folder.entries())
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", slow)
    folder.put_new("run=a/part", b"data")
    (entry,) = seen

    assert [entry] == folder.entries()
    folder.check_unchanged(entry)
    with folder.open_pinned(entry) as stream:
        assert b"data" == stream.read()
    assert folder.set_aside(entry) is not None


def test_a_file_that_is_moved_while_it_is_listed_is_passed_over(
    folder: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.put_new("a/1", b"x")
    folder.put_new("a/2", b"x")
    walk = os.walk

    def late(*given: object, **named: object) -> Generator[object]:
        for found in walk(*given, **named):  # type: ignore[call-overload]
            (folder.root / "a/2").unlink(missing_ok=True)
            yield found

    monkeypatch.setattr(os, "walk", late)

    assert ["a/1"] == [entry.path for entry in folder.entries("a")]


def test_a_file_is_opened_by_read_and_not_mapped(folder: LocalStorage) -> None:
    folder.put_new("a", b"0123456789")
    with folder.open_pinned(folder.entries()[0]) as stream:
        (folder.root / "a").write_bytes(b"01")

        # A mapped file that is cut short would end the process here.
        assert stream.read() == b"01"


def test_a_file_that_goes_as_it_is_opened_is_gone_by_name(
    folder: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.put_new("a", b"0123456789")
    check_unchanged = LocalStorage.check_unchanged

    def late(self: LocalStorage, entry: Entry) -> None:
        # Another worker sets the file aside between the look and the opening.
        check_unchanged(self, entry)
        self.set_aside(entry)

    monkeypatch.setattr(LocalStorage, "check_unchanged", late)

    with pytest.raises(SourceChanged, match="a must be there for the whole run, but is gone"):
        folder.open_pinned(folder.entries()[0])


def test_the_folder_of_deleted_files_goes_once_it_is_empty_and_no_other_does(folder: LocalStorage) -> None:
    for path in ("a/1", "a/2", "b/1", "c/d/1", "alone"):
        assert folder.put_new(path, b"x")
    (folder.root / "b" / ".2.0.tmp").write_bytes(b"a write that goes on")
    folder.delete(["a/1", "b/1", "c/d/1", "alone", "gone/1"])
    left = {path.relative_to(folder.root).as_posix() for path in folder.root.rglob("*")}
    folder.delete(["a/2"])

    assert left == {"a", "a/2", "b", "b/.2.0.tmp", "c"}
    assert not (folder.root / "a").exists()
    assert folder.put_new("a/1", b"x")
