"""What storage promises, wherever the bytes lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Protocol

import pyarrow as pa

from serving.errors import BadInput, DestinationUnusable


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One file or object: its path below the root, its size in bytes, and what tells it from another.

    The tag is the ETag in an object store. On a local disk it is the modification time in nanoseconds and, for the
    file of a source, the time of change and the inode: see LocalStorage.pin.
    """

    path: str
    size: int
    tag: str


class Storage(Protocol):
    """A root below which objects are listed, read, and created once."""

    url: str

    @property
    def reads_at_once(self) -> int:
        """How many objects are worth reading side by side."""
        ...

    def put_new(self, path: str, data: bytes | memoryview) -> bool:
        """Create an object durably; False where one of that name stands already, which is kept."""
        ...

    def read(self, path: str) -> bytes | None:
        """Return the bytes of an object, None where there is none."""
        ...

    def exists(self, path: str) -> bool:
        """Whether an object stands under that name."""
        ...

    def find(self, path: str) -> Entry | None:
        """Return the object of that name, None where there is none."""
        ...

    def entries(self, prefix: str = "", depth: int | None = None) -> list[Entry]:
        """Return every object below a prefix, sorted by path; at most `depth` levels down, 1 being the prefix itself.

        One that goes away meanwhile may be missing; a folder that can't be listed is an error.
        """
        ...

    def entries_after(self, folder: str, name: str, count: int) -> list[Entry]:
        """Return the first objects right in a folder whose names come after this one, sorted by path, at most `count`.

        In an object store of names that sort by their bytes it is one call for each 1,000.
        """
        ...

    def open_pinned(self, entry: Entry) -> pa.NativeFile:
        """Open an object for reading at random; raises SourceChanged where it is another by now."""
        ...

    def check_unchanged(self, entry: Entry) -> None:
        """Raise SourceChanged where the object is not the entry's any more."""
        ...

    def set_aside(self, entry: Entry) -> str | None:
        """Move an object to a name that no reader looks at; return that name, None where it is another by now."""
        ...

    def delete(self, paths: list[str]) -> None:
        """Delete objects; one that is gone already is no error."""
        ...

    def torn_writes(self, prefix: str) -> list[Entry]:
        """Return what torn writes left below a prefix, which `entries` leaves out; none in an object store."""
        ...

    def delete_torn_writes(self, prefix: str) -> None:
        """Delete what torn writes left below a prefix."""
        ...

    def address(self, path: str) -> str:
        """Return the full address of an object, as polars and Delta take it."""
        ...


def leads_up(path: str) -> bool:
    """Whether a part of a path is `..`, by which it may lead out of the root that it is relative to."""
    return ".." in path and ".." in path.split("/")


def make_outside_error(root: str, path: str) -> BadInput:
    """Return the error for a path that leads out of the root."""
    return BadInput(
        f"A path in storage must be relative to {root} and have no part '..', got {path!r}. Where a plan or a manifest "
        "has it, Overnight did not write it there: look at who may write to that folder."
    )


_PROBE = "_overnight/create-only.json"


def check_create_only(storage: Storage) -> None:
    """Find out, by two puts of one object, whether a store creates objects once; the first put ever stays there.

    Everything that Overnight promises stands on that: a store that overwrites loses rows without a word. Raises
    DestinationUnusable where the second put is taken too.
    """
    told = b'{"purpose": "shows that this store does not overwrite what is put with If-None-Match: *"}'
    if storage.put_new(_PROBE, told) and storage.put_new(_PROBE, told + b"\n"):
        message = (
            f"{storage.url} must create an object only where none of its name stands, but took a second one for "
            f"{storage.address(_PROBE)}: the store ignores `If-None-Match: *`. Nothing was scored. Use a store that "
            "honours it (AWS S3, Google Cloud Storage, Azure and SeaweedFS do), or a local disk."
        )
        raise DestinationUnusable(message)


def copy_pinned(
    storage: Storage, entry: Entry, sink: IO[bytes], report: Callable[[int], None] = lambda _: None
) -> None:
    """Copy an object to a local stream in blocks of 8 MiB, held against its pin throughout."""
    with storage.open_pinned(entry) as source:
        while block := source.read(8 << 20):
            sink.write(block)
            report(len(block))
