"""A local folder as storage."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from serving.errors import BadInput, DestinationUnusable, SourceChanged, StorageDenied, StorageFault, StorageFull
from serving.machine import count_cores
from tasks.storage.base import Entry, leads_up, make_outside_error

# The clock that file systems take their times from may tick this seldom.
_TICK_NS = 20_000_000
# These may give a file another number at each mount.
_UNSTEADY_INODES = ("fuse", "fuseblk", "9p")
_SWEPT_MAX = 20


class LocalStorage:
    """A folder. Writes are fsynced, linked into place without replacing, and the folder is fsynced."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    @property
    def reads_at_once(self) -> int:
        """One for each core: a read keeps a core busy."""
        return count_cores()

    def locate(self, path: str) -> Path:
        """Return where a path lies on this machine. Raises BadInput where that is outside of the root.

        Only the path itself is looked at: links below the root are followed. Nothing is outside of /.
        """
        if (path.startswith("/") or leads_up(path)) and self.url != "/":
            raise make_outside_error(self.url, path)
        return self.root / path

    def put_new(self, path: str, data: bytes | memoryview) -> bool:
        """Create a file durably: fsync, link without replace, fsync the folder."""
        target = self.locate(path)
        with local_errors(target):
            if target.exists():
                return False
            temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
            try:
                with _create_with_folders(temporary) as stream:
                    _write_synced(stream, data)
                _link(temporary, target)
            except FileExistsError:
                return False
            except FileNotFoundError:
                # Another worker has published the run and swept this unfinished write: it came too late.
                if target.exists():
                    return False
                raise
            finally:
                with contextlib.suppress(FileNotFoundError):
                    temporary.unlink()
            _sync_folder(target.parent)
        return True

    def read(self, path: str) -> bytes | None:
        """Return the bytes of a file, None where there is none."""
        file = self.locate(path)
        with local_errors(file):
            try:
                return file.read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def exists(self, path: str) -> bool:
        """Whether a file stands under that name."""
        return self.find(path) is not None

    def find(self, path: str) -> Entry | None:
        """Return the file of that name, None where there is none."""
        status = self._status(path)
        return None if status is None else Entry(path=path, size=status.st_size, tag=str(status.st_mtime_ns))

    def _status(self, path: str) -> os.stat_result | None:
        file = self.locate(path)
        with local_errors(file):
            try:
                status = file.stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
        return status if stat.S_ISREG(status.st_mode) else None

    def pin(self, entries: Sequence[Entry], read: Callable[[Path], bytes] = Path.read_bytes) -> list[Entry]:
        """Return the entries of files that others may rewrite, each tied to its time of change and inode too.

        A modification time can be set, so a file rewritten in place may have its old one; a time of change can't.
        Files that this storage writes itself must not be pinned so: the time of change of a file that was linked into
        place changes once more when its temporary name goes. The inode is left out on file systems that number files
        again at each mount. Raises SourceChanged where a file is gone meanwhile.
        """
        kinds, pinned, newest = _kinds_of_mounts(read), [], 0
        for entry in entries:
            status = self._status(entry.path)
            if status is None:
                raise _missing_file_error(self.locate(entry.path))
            marks = _marks(status)
            if kinds.get(status.st_dev, "").split(".")[0] in _UNSTEADY_INODES:
                marks = marks[:-1]
            pinned.append(replace(entry, size=status.st_size, tag="/".join(marks)))
            newest = max(newest, status.st_ctime_ns)
        # What is written from now on must have a later time of change than what is pinned.
        time.sleep(min(max(newest + _TICK_NS - time.time_ns(), 0), _TICK_NS) / 1e9)
        return pinned

    def entries(self, prefix: str = "", depth: int | None = None) -> list[Entry]:
        """Return every file below a prefix, sorted by path; unfinished writes are left out, links are followed."""
        root = str(self.root).rstrip("/") + "/"
        found = []
        with local_errors(self.locate(prefix)):
            for path in _files_below(f"{root}{prefix}".rstrip("/") or "/", depth):
                entry = self.find(path.removeprefix(root))
                if entry is not None:
                    found.append(entry)
                elif os.path.lexists(path):
                    message = f"{path} must be a file, got a link that leads nowhere, or a device. Repair or remove it."
                    raise StorageFault(message)
        return sorted(found, key=lambda entry: entry.path)

    def entries_after(self, folder: str, name: str, count: int) -> list[Entry]:
        """Return the first files right in a folder whose names come after this one, sorted by path, at most `count`."""
        top = self.locate(folder)
        with local_errors(top):
            try:
                names = sorted(path.name for path in top.iterdir() if path.name > name)
            except FileNotFoundError:
                return []
            found = (self.find(f"{folder}/{each}") for each in names if not _is_unfinished(each))
            return list(itertools.islice((entry for entry in found if entry is not None), count))

    def open_pinned(self, entry: Entry) -> pa.NativeFile:
        """Open a file that is the entry's by all that its tag holds.

        Read by read(2), not by memory map: a file cut short while it is mapped ends the process.
        """
        self.check_unchanged(entry)
        path = self.locate(entry.path)
        with local_errors(path):
            try:
                return pa.OSFile(str(path), "rb")
            except FileNotFoundError as error:
                raise _missing_file_error(path) from error

    def check_unchanged(self, entry: Entry) -> None:
        """Raise SourceChanged where the file's size, or what its tag holds, is not the entry's."""
        status = self._status(entry.path)
        path = self.locate(entry.path)
        if status is None:
            raise _missing_file_error(path)
        held = entry.tag.split("/")
        marks = _marks(status)[: len(held)]
        if status.st_size == entry.size and marks == held:
            return
        message = (
            f"{path} must be the file that the plan was made for ({entry.size} bytes, {_describe_marks(held)}), "
            f"got {status.st_size} bytes, {_describe_marks(marks)}. Put the old file back and call again, "
            "or start a new run over the data as it is."
        )
        raise SourceChanged(message)

    def set_aside(self, entry: Entry) -> str | None:
        """Rename a file to a name that starts with a dot; None where it is another by now."""
        source = self.locate(entry.path)
        aside = source.parent / f".{source.name}.{uuid.uuid4().hex[:8]}.aside"
        if self.find(entry.path) != entry:
            return None
        with local_errors(source):
            try:
                source.rename(aside)
            except FileNotFoundError:
                return None
            _sync_folder(source.parent)
        return aside.relative_to(self.root).as_posix()

    def delete(self, paths: list[str]) -> None:
        """Delete files, and the folder of each that is empty then; one that is gone already is no error."""
        for path in paths:
            file = self.locate(path)
            with local_errors(file):
                file.unlink(missing_ok=True)
            if file.parent != self.root:
                with contextlib.suppress(OSError):
                    file.parent.rmdir()

    def torn_writes(self, prefix: str) -> list[Entry]:
        """Return the unfinished writes below a prefix, sorted by path; links to folders are not followed."""
        found = []
        with local_errors(self.locate(prefix)):
            for folder, _, names in os.walk(self.locate(prefix)):
                paths = (
                    (Path(folder) / name).relative_to(self.root).as_posix() for name in names if _is_unfinished(name)
                )
                found += [entry for path in paths if (entry := self.find(path)) is not None]
        return sorted(found, key=lambda entry: entry.path)

    def delete_torn_writes(self, prefix: str) -> None:
        """Delete unfinished writes below a prefix, and the empty folders that deleting has left."""
        top = self.locate(prefix)
        with local_errors(top):
            for folder, _, names in os.walk(top, topdown=False):
                for name in names:
                    if _is_unfinished(name):
                        (Path(folder) / name).unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    Path(folder).rmdir()

    def address(self, path: str) -> str:
        """Return the absolute path."""
        return str(self.locate(path))


def _marks(status: os.stat_result) -> list[str]:
    """Return what tells a file from another of its name and size; a tag holds the first, two, or all three."""
    return [str(status.st_mtime_ns), str(status.st_ctime_ns), str(status.st_ino)]


def _describe_marks(marks: Sequence[str]) -> str:
    said = ("modified at {} ns", "changed at {} ns", "inode {}")
    return ", ".join(words.format(mark) for words, mark in zip(said, marks, strict=False))


def _kinds_of_mounts(read: Callable[[Path], bytes]) -> dict[int, str]:
    """Return the kind of file system of each mounted device; nothing where the system does not say."""
    try:
        lines = read(Path("/proc/self/mountinfo")).decode(errors="replace").splitlines()
    except OSError:
        return {}
    kinds = {}
    for fields in (line.split(" ") for line in lines):
        major, _, minor = fields[2].partition(":")
        kinds[os.makedev(int(major), int(minor))] = fields[fields.index("-") + 1]
    return kinds


def _missing_file_error(path: Path) -> SourceChanged:
    return SourceChanged(f"{path} must be there for the whole run, but is gone. Put it back, or start a new run.")


def _create_with_folders(path: Path) -> BinaryIO:
    """Create a file and the folders above it, which a sweep takes away as long as they are empty."""
    for _ in range(_SWEPT_MAX):
        # Where mkdir finds a folder that is gone at its second look, it says that a file is in the way.
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            _make_folders(path.parent)
            return path.open("xb")
    _make_folders(path.parent)
    return path.open("xb")


def _write_synced(stream: BinaryIO, data: bytes | memoryview) -> None:
    stream.write(data)
    stream.flush()
    os.fsync(stream.fileno())


def _link(temporary: Path, target: Path) -> None:
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        message = (
            f"{target.parent} must be on a file system that has hard links, since a file is linked into place to "
            f"create it once; got: {error.strerror}. Choose another destination."
        )
        raise DestinationUnusable(message) from error


def _is_unfinished(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def _files_below(folder: str, depth: int | None) -> Generator[str]:
    """Yield the path of every file below a folder; none where there is no such folder."""

    def raise_unless_gone(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    # Without an error handler a folder that can't be listed would be passed over, and its rows with it.
    for at, folders, names in os.walk(folder, onerror=raise_unless_gone, followlinks=True):
        below = at.removeprefix(folder).strip("/")
        if depth is not None and (below.count("/") + 2 if below else 1) >= depth:
            folders.clear()
        for name in folders:
            _must_not_lead_back(folder, at, name)
        yield from (os.path.join(at, name) for name in names if not _is_unfinished(name))  # noqa: PTH118 - ten thousand Path objects are slow


def _must_not_lead_back(folder: str, at: str, name: str) -> None:
    """Raise BadInput where a link below a folder leads to a folder that the way to it passes through."""
    link = os.path.join(at, name)  # noqa: PTH118 - as above
    if not os.path.islink(link):  # noqa: PTH114 - as above
        return
    way = [Path(at), *Path(at).parents]
    passed = way[: way.index(Path(folder)) + 1]
    if any(os.path.samefile(link, above) for above in passed):  # noqa: PTH121 - as above
        message = (
            f"A link below {folder} must not lead back to a folder that it lies in, or the folder would have no end; "
            f"got {link}, which leads to {os.path.realpath(link)}. Remove the link, or name the files by a glob."
        )
        raise BadInput(message)


def _make_folders(folder: Path) -> None:
    """Create missing folders and fsync each one's parent, so that a new path survives a power cut."""
    missing = [folder, *folder.parents]
    for path in reversed(missing[: next((at for at, path in enumerate(missing) if path.is_dir()), len(missing))]):
        path.mkdir(exist_ok=True)
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def local_errors(path: Path) -> Generator[None]:
    """Turn an OSError about a path into the error that says what to do next."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"{path} needs space, but its disk is full. Free some, then call again: the run resumes."
            raise StorageFull(message) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            message = f"{path} must be accessible, got: {error.strerror}. Allow it for this user, then call again."
            raise StorageDenied(message) from error
        if error.errno == errno.ELOOP:
            message = f"{path} must lead to a file or folder, got a link that leads back to itself. Remove the link."
            raise BadInput(message) from error
        if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
            message = f"{path} must be a place for files below folders, got: {error.strerror}. Choose another path."
            raise DestinationUnusable(message) from error
        message = f"{path} must be usable, got: {error}. Call again once it is: the run resumes."
        raise StorageFault(message) from error
