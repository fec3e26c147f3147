"""Addresses: which storage one opens, and which of its files it selects (one file, a folder, or what a glob fits)."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit

from pydantic import BeforeValidator, WithJsonSchema

from serving.errors import BadInput
from tasks.common.names import BLOCK
from tasks.storage.azure import AzureStorage, azure_options
from tasks.storage.base import Entry, Storage
from tasks.storage.gcs import GcsStorage, gcs_options
from tasks.storage.local import LocalStorage
from tasks.storage.s3 import S3Storage, s3_options

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_openers: dict[str, Callable[[str], Storage]] = {
    "s3": S3Storage,
    "gs": GcsStorage,
    **dict.fromkeys(("az", "abfss", "abfs"), AzureStorage),
}
# As Hadoop's file systems are called, which writers of tables use.
_SCHEMES_OF_HADOOP = {"s3a": "s3", "s3n": "s3"}
# The signature of a SAS token.
_SIGNED = re.compile("[?&]sig=")
_FILE_URL = re.compile(r"file:(?://(?:localhost)?)?(/(?!/).*)", re.DOTALL)
_WILD = re.compile(r"[*?\[]")


def _to_text(given: Any) -> Any:
    """Return a path as its text, and those of a list as theirs, in a tuple."""
    if isinstance(given, list | tuple):
        return tuple(_to_text(each) for each in given)
    return os.fspath(given) if isinstance(given, os.PathLike) else given


# SourceAddress as a person gives them, which are texts once they are checked. Forms ask for one text.
Address = Annotated[str | Path, BeforeValidator(_to_text), WithJsonSchema({"type": "string"})]
SourceAddress = Annotated[
    str | Path | Sequence[str | Path], BeforeValidator(_to_text), WithJsonSchema({"type": "string"})
]


def as_texts(given: str | Path | Sequence[str | Path]) -> str | tuple[str, ...]:
    """Return an address as its text, and several as theirs."""
    return str(given) if isinstance(given, str | Path) else tuple(map(str, given))


def open_storage(url: str) -> Storage:
    """Open a local folder (a path or file://), or a prefix of S3, Google Cloud Storage or Azure Blob Storage.

    Those are s3://bucket/prefix, gs://bucket/prefix and az://container/prefix, or abfss://container@account.dfs....
    Endpoints and credentials come from the environment and from what each cloud's own tools look at; see the modules.

    Raises:
        BadInput: Any other scheme that is not registered, the name of a block, control characters, credentials in the
            address.
        StorageDenied: There are no credentials.
    """
    if _CONTROL.search(unquote(url) if url.startswith("file:") else url):
        message = f"An address must hold no control characters, such as tabs and newlines, got {url!r}. Rename it."
        raise BadInput(message)
    if url.startswith(BLOCK):
        message = (
            "An address must be of files, since batch_inference alone takes blocks, as its model, source and "
            f"destination; got {url}. Give the block's address, and its credentials in the environment. "
            f"A folder of that name is ./{url}."
        )
        raise BadInput(message)
    _must_hold_no_credentials(url)
    scheme, separator, _ = url.partition("://")
    if separator and scheme in _openers:
        return _openers[scheme](url)
    if file := _FILE_URL.fullmatch(url):
        return LocalStorage(Path(unquote(file[1])))
    if url and not url.startswith("file:") and "://" not in url:
        return LocalStorage(Path(url).expanduser().absolute())
    message = (
        "An address must be a path, file:///path or s3://bucket/prefix, gs://bucket/prefix or az://container/prefix, "
        f"got {url!r}."
    )
    raise BadInput(message)


def _must_hold_no_credentials(url: str) -> None:
    if url.startswith(("s3://", "gs://")) and "@" in urlsplit(url).netloc:
        kind, way = (
            ("An S3 address", "as boto3 takes them: a role, a profile or the environment")
            if url.startswith("s3://")
            else ("A gs:// address", "by GOOGLE_APPLICATION_CREDENTIALS")
        )
        message = f"{kind} must hold no credentials, got {url}. Give them {way}."
        raise BadInput(message)
    if url.startswith(("az://", "abfss://", "abfs://")) and (_SIGNED.search(url) or ":" in urlsplit(url).netloc):
        got = "a signature" if _SIGNED.search(url) else "a colon"
        message = (
            f"An address of Azure must hold no credentials, got one with {got}. Give them in the environment, such as "
            "AZURE_STORAGE_SAS_TOKEN."
        )
        raise BadInput(message)


def reader_options(storage: Storage) -> dict[str, str] | None:
    """Return where a storage is, as polars and Delta take it, and no credentials; None for a local folder."""
    if isinstance(storage, S3Storage):
        return s3_options()
    if isinstance(storage, GcsStorage):
        return gcs_options()
    return azure_options(storage) if isinstance(storage, AzureStorage) else None


def split_location(location: str) -> tuple[str, str]:
    """Cut the location of a file, as the metadata of a table has it, into an address to open and the path below that.

    What is opened is a bucket, or / for a local file. Locations are taken literally: nothing in them is an escape.
    """
    scheme, separator, rest = location.partition("://")
    if not separator or scheme == "file":
        return "/", (rest if separator else location.removeprefix("file:")).lstrip("/")
    bucket, _, path = rest.partition("/")
    return f"{_SCHEMES_OF_HADOOP.get(scheme, scheme)}://{bucket}", path.rstrip("/")


def join_location(root: str, path: str) -> str:
    """Put the two parts of a location together again."""
    return f"{root.rstrip('/')}/{path}".rstrip("/") or "/"


def register_scheme(scheme: str, opener: Callable[[str], Storage]) -> None:
    """Have open_storage open addresses that begin with `scheme://` by a storage of one's own, in this process.

    Args:
        scheme: The scheme alone, such as "memory". The last opener that is registered for it stands.
        opener: Is given the whole address.
    """
    _openers[scheme] = opener


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The entries that an address selects below a root, and the globs that selected them, one a level.

    `listed` holds the entries that were passed over too; of a local folder, down to the level of the last glob.
    """

    storage: Storage
    globs: tuple[str, ...]
    entries: list[Entry]
    listed: list[Entry]

    def would_select(self, other: Storage, path: str) -> bool:
        """Whether the same address would select that path of another storage too, if there were such a file."""
        root, target = (
            os.path.realpath(storage.url) if isinstance(storage, LocalStorage) else storage.url
            for storage in (self.storage, other)
        )
        root = root.rstrip("/") + "/"
        return f"{target}/".startswith(root) and _matches(f"{target}/{path}".removeprefix(root).split("/"), self.globs)


def select(address: str) -> Selection:
    """List the files that an address selects; an empty selection where there are none.

    A folder is everything below it. In a glob * stays within a folder, ** does not, and a slash at its
    end makes it name folders. Names that begin with `_` or `.` are passed over, unless the glob has them so.
    """
    root, globs = _split_at_glob(address)
    storage = open_storage(root)
    # An object store is listed to its end whatever the depth.
    entries = storage.entries(depth=len(globs) if "**" not in globs and isinstance(storage, LocalStorage) else None)
    if not entries and globs == ("**",):
        return _select_one_file(storage)
    fitting = [entry for entry in entries if _matches(entry.path.split("/"), globs)]
    return Selection(storage=storage, globs=globs, entries=fitting, listed=entries)


def join_selections(selections: Sequence[Selection]) -> Selection:
    """Return several selections of one store as one, below the folder that they share; a file counts once.

    Raises BadInput where they lie in different stores.
    """
    scheme, sep, _ = selections[0].storage.url.rpartition("://")
    if any(each.storage.url.rpartition("://")[0] != scheme for each in selections):
        message = f"All files of a source must lie in one store, got {sorted({e.storage.url for e in selections})}."
        raise BadInput(message)
    folders = [each.storage.url.removeprefix(f"{scheme}{sep}").strip("/").split("/") for each in selections]
    shared = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, zip(*folders, strict=False))]
    if sep and not shared:
        message = f"All files of a source must lie in one bucket, got {sorted({folder[0] for folder in folders})}."
        raise BadInput(message)
    below = {id(each): "/".join(folder[len(shared) :]) for each, folder in zip(selections, folders, strict=True)}

    def rebase(each: Selection, entry: Entry) -> Entry:
        return replace(entry, path=f"{below[id(each)]}/{entry.path}".lstrip("/"))

    entries = {path.path: path for each in selections for path in (rebase(each, entry) for entry in each.entries)}
    root = f"{scheme}{sep}{'/'.join(shared)}" if sep else f"/{'/'.join(shared)}"
    found = [entries[path] for path in sorted(entries)]
    return Selection(storage=open_storage(root), globs=(), entries=found, listed=found)


def _split_at_glob(address: str) -> tuple[str, tuple[str, ...]]:
    """Cut an address into the folder above its first wildcard, and a glob for each level below that."""
    # A name that exists is meant as it stands, brackets and all.
    if not _WILD.search(address) or Path(address).expanduser().exists():
        return address, ("**",)
    parts = address.split("/")
    at = next(index for index, part in enumerate(parts) if _WILD.search(part))
    root = "/".join(parts[:at]) or ("/" if address.startswith("/") else ".")
    return root, tuple(part or "**" for part in parts[at:])


def _matches(names: Sequence[str], globs: Sequence[str]) -> bool:
    """Whether a path fits the globs level by level, where ** stands for any number of folders."""
    if not globs or not names:
        return not names and all(part == "**" for part in globs)
    seen = not _is_hidden(names[0]) or _is_hidden(globs[0])
    if globs[0] == "**":
        return _matches(names, globs[1:]) or (seen and _matches(names[1:], globs))
    return seen and fnmatch.fnmatchcase(names[0], globs[0]) and _matches(names[1:], globs[1:])


def _is_hidden(name: str) -> bool:
    # As Spark has it: `_date=2024-01-01` is a partition, `_SUCCESS` is not data.
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


def _select_one_file(storage: Storage) -> Selection:
    """Read an address as one file, which is below the folder above it."""
    above, _, name = storage.url.rpartition("/")
    found = None
    if name and not above.endswith(":/"):
        storage = open_storage(above or "/")
        found = storage.find(name)
    one = [] if found is None else [found]
    return Selection(storage=storage, globs=(), entries=one, listed=one)
