"""What an address selects: one file, everything below a folder, or what a glob fits."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.storage.base import Entry, Storage
from tasks.storage.local import LocalStorage

_WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The entries that an address selects below a root, and the globs that selected them, one a level.

    `listed` holds the entries that were passed over too; of a local folder, down to the level of the last glob.
    """

    storage: Storage
    globs: tuple[str, ...]
    entries: list[Entry]
    listed: list[Entry]

    def takes_from(self, other: Storage, path: str) -> bool:
        """Whether the same address would select that path of another storage too, if there were such a file."""
        root, target = (
            os.path.realpath(storage.url) if isinstance(storage, LocalStorage) else storage.url
            for storage in (self.storage, other)
        )
        root = root.rstrip("/") + "/"
        return f"{target}/".startswith(root) and _fits(f"{target}/{path}".removeprefix(root).split("/"), self.globs)


def select(address: str, open_at: Callable[[str], Storage]) -> Selection:
    """List what an address selects; nothing where there is nothing.

    A folder is everything below it. In a glob * stays within a folder, ** does not, and a slash at its
    end makes it name folders. Names that begin with `_` or `.` are passed over, unless the glob has them so.
    """
    root, globs = _split(address)
    storage = open_at(root)
    # S3 is listed to its end whatever the depth.
    entries = storage.entries(depth=len(globs) if "**" not in globs and isinstance(storage, LocalStorage) else None)
    if not entries and globs == ("**",):
        return _one_file(storage, open_at)
    fitting = [entry for entry in entries if _fits(entry.path.split("/"), globs)]
    return Selection(storage=storage, globs=globs, entries=fitting, listed=entries)


def _split(address: str) -> tuple[str, tuple[str, ...]]:
    """Cut an address into the folder above its first wildcard, and a glob for each level below that."""
    # A name that exists is meant as it stands, brackets and all.
    if not _WILD.search(address) or Path(address).expanduser().exists():
        return address, ("**",)
    parts = address.split("/")
    at = next(index for index, part in enumerate(parts) if _WILD.search(part))
    root = "/".join(parts[:at]) or ("/" if address.startswith("/") else ".")
    return root, tuple(part or "**" for part in parts[at:])


def _fits(names: Sequence[str], globs: Sequence[str]) -> bool:
    """Whether a path fits the globs level by level, where ** stands for any number of folders."""
    if not globs or not names:
        return not names and all(part == "**" for part in globs)
    seen = not _hidden(names[0]) or _hidden(globs[0])
    if globs[0] == "**":
        return _fits(names, globs[1:]) or (seen and _fits(names[1:], globs))
    return seen and fnmatch.fnmatchcase(names[0], globs[0]) and _fits(names[1:], globs[1:])


def _hidden(name: str) -> bool:
    # As Spark has it: `_date=2024-01-01` is a partition, `_SUCCESS` is not data.
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


def _one_file(storage: Storage, open_at: Callable[[str], Storage]) -> Selection:
    """Read an address as one file, which is below the folder above it."""
    above, _, name = storage.url.rpartition("/")
    found = None
    if name and above != "s3:/":
        storage = open_at(above or "/")
        found = storage.find(name)
    one = [] if found is None else [found]
    return Selection(storage=storage, globs=(), entries=one, listed=one)
