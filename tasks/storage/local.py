"""A local folder as storage."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Generator
from pathlib import Path

import pyarrow as pa

from serving.errors import DestinationUnusable, SourceChanged, StorageDenied, StorageFault, StorageFull
from serving.machine import cores
from tasks.storage.base import Entry


class LocalStorage:
    """A folder. Writes are fsynced, linked into place without replacing, and the folder is fsynced."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    @property
    def reads_at_once(self) -> int:
        """One for each core: a read keeps a core busy."""
        return cores()

    def put_new(self, path: str, data: bytes | memoryview) -> bool:
        """Create a file durably: fsync, link without replace, fsync the folder."""
        target = self.root / path
        with local_errors(target):
            _make_folders(target.parent)
            if target.exists():
                return False
            temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
            try:
                _write_synced(temporary, data)
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
        with local_errors(self.root / path):
            try:
                return (self.root / path).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def exists(self, path: str) -> bool:
        """Whether a file stands under that name."""
        return self.find(path) is not None

    def find(self, path: str) -> Entry | None:
        """Return the file of that name, None where there is none."""
        with local_errors(self.root / path):
            try:
                status = (self.root / path).stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
        if not stat.S_ISREG(status.st_mode):
            return None
        return Entry(path=path, size=status.st_size, tag=str(status.st_mtime_ns))

    def entries(self, prefix: str = "", depth: int | None = None) -> list[Entry]:
        """Return every file below a prefix, sorted by path; unfinished writes are left out, links are followed."""
        root = str(self.root).rstrip("/") + "/"
        found = []
        with local_errors(self.root / prefix):
            for path in _files_below(f"{root}{prefix}".rstrip("/") or "/", depth):
                entry = self.find(path.removeprefix(root))
                if entry is not None:
                    found.append(entry)
                elif os.path.lexists(path):
                    message = f"{path} must be a file, got a link that leads nowhere, or a device. Mend or remove it."
                    raise StorageFault(message)
        return sorted(found, key=lambda entry: entry.path)

    def open_pinned(self, entry: Entry) -> pa.NativeFile:
        """Open a file whose size and modification time are the entry's.

        Read by read(2), not by memory map: a file cut short while it is mapped ends the process.
        """
        self.hold(entry)
        path = self.root / entry.path
        with local_errors(path):
            try:
                return pa.OSFile(str(path), "rb")
            except FileNotFoundError as error:
                raise _gone(path) from error

    def hold(self, entry: Entry) -> None:
        """Raise SourceChanged where the file's size or modification time is not the entry's."""
        now = self.find(entry.path)
        if now == entry:
            return
        path = self.root / entry.path
        if now is None:
            raise _gone(path)
        message = (
            f"{path} must be the file that the plan was made for ({entry.size} bytes, modified at {entry.tag} ns), "
            f"got {now.size} bytes, modified at {now.tag} ns. Put the old file back and call again, "
            "or start a new run over the new data."
        )
        raise SourceChanged(message)

    def set_aside(self, entry: Entry) -> str | None:
        """Rename a file to a name that starts with a dot; None where it is another by now."""
        source = self.root / entry.path
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
        """Delete files; one that is gone already is no error."""
        for path in paths:
            with local_errors(self.root / path):
                (self.root / path).unlink(missing_ok=True)

    def sweep(self, prefix: str) -> None:
        """Delete unfinished writes below a prefix, and the empty folders that deleting has left."""
        with local_errors(self.root / prefix):
            for folder, _, names in os.walk(self.root / prefix, topdown=False):
                for name in names:
                    if _is_unfinished(name):
                        (Path(folder) / name).unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    Path(folder).rmdir()

    def address(self, path: str) -> str:
        """Return the absolute path."""
        return str(self.root / path)


def _gone(path: Path) -> SourceChanged:
    return SourceChanged(f"{path} must be there for the whole run, but is gone. Put it back, or start a new run.")


def _write_synced(path: Path, data: bytes | memoryview) -> None:
    with path.open("xb") as stream:
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
        yield from (os.path.join(at, name) for name in names if not _is_unfinished(name))  # noqa: PTH118 - ten thousand Path objects are slow


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
        if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
            message = f"{path} must be a place for files below folders, got: {error.strerror}. Choose another path."
            raise DestinationUnusable(message) from error
        message = f"{path} must be usable, got: {error}. Call again once it is: the run resumes."
        raise StorageFault(message) from error
