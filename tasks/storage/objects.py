"""A prefix of an object store as storage, whichever cloud it is of: created once, and read as pinned."""

from __future__ import annotations

import contextlib
import io
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Sequence
from typing import Any, ClassVar

import obstore
import pyarrow as pa
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from serving.errors import BadInput, OvernightError, SourceChanged, StorageDenied, StorageFault, StorageFull
from tasks.storage.base import Entry, leads_up, make_outside_error

# Footers of a hundred thousand parts are read before a large run is published: at 30 ms each, in a minute.
READS_AT_ONCE = 64
_DENIED = re.compile(
    "AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken|InvalidToken|Access Denied|"
    "AuthenticationFailed|AuthorizationFailure|AuthorizationPermissionMismatch|InvalidAuthenticationInfo|"
    r"PERMISSION_DENIED|AuthenticationRequired|InvalidSecurity|status: 40[13]\b"
)
_FULL = re.compile("QuotaExceeded|AccountStorageCapacityExceeded|XMinioStorageFull|InsufficientStorage|<Code>.*Quota")
_NO_BUCKET = re.compile("NoSuchBucket|ContainerNotFound|The specified bucket does not exist")
# As obstore's client says it of a name that it can't ask for.
_UNFIT_NAME = re.compile(r'invalid path: .*?[Pp]ath "(.*?)"', re.DOTALL)


class ObjectStorage(ABC):
    """A prefix of a bucket, by obstore: written create-only and read with If-Match.

    A cloud of its own opens the bucket, and says which settings are to be looked at where it denies something.
    """

    scheme: ClassVar[str]
    bucket_word: ClassVar[str] = "bucket"
    """What the cloud calls a bucket."""

    credentials_hint: ClassVar[str]
    """Which settings have the credentials, in a sentence."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        with self._errors(self.url):
            self._store = self._open_store()

    @abstractmethod
    def _open_store(self) -> Any:
        """Return the store of obstore for the prefix. Raises BadInput, StorageDenied."""

    @property
    def reads_at_once(self) -> int:
        """Many: a read mostly waits."""
        return READS_AT_ONCE

    def put_new(self, path: str, data: bytes | memoryview) -> bool:
        """Create an object on the condition that there is none of its name; False where one stands already."""
        with self._errors(self.address(path)):
            try:
                obstore.put(self._store, path, bytes(data), mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
        return True

    def read(self, path: str) -> bytes | None:
        """Return the bytes of an object, None where there is none."""
        with self._errors(self.address(path)):
            try:
                return bytes(obstore.get(self._store, path).bytes())
            except FileNotFoundError:
                return None

    def exists(self, path: str) -> bool:
        """Whether an object stands under that name."""
        return self.find(path) is not None

    def find(self, path: str) -> Entry | None:
        """Return the object of that name, None where there is none."""
        with self._errors(self.address(path)):
            try:
                return self._entry(obstore.head(self._store, path))
            except FileNotFoundError:
                return None

    def _entry(self, meta: Any) -> Entry:
        return Entry(path=meta["path"], size=meta["size"], tag=str(meta["e_tag"]))

    def entries(self, prefix: str = "", depth: int | None = None) -> list[Entry]:
        """Return every object below a prefix, sorted by path; the marks that consoles make of folders are left out."""
        base = prefix.rstrip("/")
        with self._errors(self.address(prefix)):
            pages: Iterable[Sequence[Any]] = (
                [obstore.list_with_delimiter(self._store, base or None)["objects"]]
                if depth == 1
                else obstore.list(self._store, base or None, chunk_size=1000)
            )
            found = [self._entry(meta) for page in pages for meta in page]
        levels = len(base.split("/")) if base else 0
        near = [entry for entry in found if depth is None or entry.path.count("/") < levels + depth]
        for entry in near:
            # What XML can't hold is listed as a replacement character, and there is nothing of that name.
            if "\ufffd" in entry.path and not self.exists(entry.path):
                raise _unfit_name(self.address(prefix), entry.path)
        # An empty object "sales/" is listed as "sales", and there is none of that name.
        return sorted((entry for entry in near if entry.size or self.exists(entry.path)), key=lambda entry: entry.path)

    def entries_after(self, folder: str, name: str, count: int) -> list[Entry]:
        """Return the first objects right in a folder whose names come after this one, sorted by path, at most `count`.

        It lists what is below folders of the folder too, and leaves it out; in Azure it lists from the start.
        """
        found: list[Entry] = []
        with self._errors(self.address(folder)):
            for page in obstore.list(self._store, folder, offset=f"{folder}/{name}", chunk_size=count):
                found += [entry for entry in map(self._entry, page) if entry.path.rpartition("/")[0] == folder]
                if len(found) >= count:
                    break
        return found[:count]

    def open_pinned(self, entry: Entry) -> pa.NativeFile:
        """Open an object; every read sends If-Match with the entry's ETag, and holds the answer's against it."""
        return pa.PythonFile(_PinnedObject(self, entry), mode="r")

    def read_range(self, entry: Entry, start: int, stop: int) -> bytes:
        """Return bytes of an object. Raises SourceChanged where it is gone, or another by now."""
        options: Any = {"if_match": entry.tag, "range": (start, stop)}
        address = self.address(entry.path)
        with self._errors(address):
            try:
                found = obstore.get(self._store, entry.path, options=options)
                # Not every server that speaks S3 heeds If-Match.
                if str(found.meta["e_tag"]) != entry.tag:
                    raise _make_changed_error(address)
                return bytes(found.bytes())
            except (FileNotFoundError, PreconditionError) as error:
                # Azure answers that the condition does not hold of an object that is gone, too.
                if isinstance(error, PreconditionError) and self.exists(entry.path):
                    raise
                message = f"{address} must be there for the whole run, but is gone. Put it back, or start a new run."
                raise SourceChanged(message) from None

    def check_unchanged(self, entry: Entry) -> None:  # noqa: B027 - there is nothing to do in any cloud
        """Nothing to do: every read was held against the ETag as it was made."""

    def set_aside(self, entry: Entry) -> str | None:
        """Copy an object to a name that starts with a dot, then delete it; None where it is another by now."""
        folder, _, name = entry.path.rpartition("/")
        aside = f"{folder}/.{name}.{uuid.uuid4().hex[:8]}.aside".lstrip("/")
        if self.find(entry.path) != entry:
            return None
        with self._errors(self.address(entry.path)):
            try:
                obstore.copy(self._store, entry.path, aside)
            except FileNotFoundError:
                return None
            obstore.delete(self._store, entry.path)
        return aside

    def delete(self, paths: list[str]) -> None:
        """Delete objects; one that is gone already is no error."""
        for path in paths:
            with self._errors(self.address(path)), contextlib.suppress(FileNotFoundError):
                obstore.delete(self._store, path)

    def torn_writes(self, prefix: str) -> list[Entry]:  # noqa: ARG002 - it is the same below every prefix
        """Return none: an object that was not put whole is not there."""
        return []

    def delete_torn_writes(self, prefix: str) -> None:  # noqa: B027 - there is nothing to do in any cloud
        """Nothing to do: an object that was not put whole is not there."""

    def address(self, path: str) -> str:
        """Return the full address of an object. Raises BadInput where that is outside of the prefix."""
        if leads_up(path):
            raise make_outside_error(self.url, path)
        return f"{self.url}/{path}" if path else self.url

    @contextlib.contextmanager
    def _errors(self, address: str) -> Generator[None]:
        try:
            yield
        except PreconditionError:
            raise _make_changed_error(address) from None
        except (BaseError, FileNotFoundError, ValueError) as error:
            if isinstance(error, OvernightError):
                raise
            raise self._name_error(address, error) from error

    def _name_error(self, address: str, error: Exception) -> OvernightError:
        if unfit := _UNFIT_NAME.search(str(error)):
            return _unfit_name(address, unfit[1])
        got = _describe_error(error)
        if _NO_BUCKET.search(str(error)):
            return BadInput(
                f"The {self.bucket_word} of {address} must exist, got: {got} Create it, or correct the address."
            )
        if _FULL.search(str(error)):
            return StorageFull(f"{address} needs space, got: {got} Raise the quota, then call again: the run resumes.")
        if isinstance(error, PermissionDeniedError | UnauthenticatedError) or _DENIED.search(str(error)):
            return StorageDenied(
                f"{address} must be allowed to these credentials, got: {got} Allow it, then call again. "
                f"{self.credentials_hint}"
            )
        return StorageFault(f"{address} must answer, got: {got} Call again once it does: the run resumes.")


class _PinnedObject(io.RawIOBase):
    """An object as a file: every range is asked for with If-Match."""

    def __init__(self, storage: ObjectStorage, entry: Entry) -> None:
        super().__init__()
        self._storage, self._pinned = storage, entry
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._pinned.size}[whence]
        self._at = base + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = self._pinned.size - self._at
        wanted = left if size is None or size < 0 else min(size, left)
        if wanted <= 0:
            return b""
        data = self._storage.read_range(self._pinned, self._at, self._at + wanted)
        self._at += len(data)
        return data


def _make_changed_error(address: str) -> SourceChanged:
    return SourceChanged(
        f"{address} must be the object that the plan was made for, but its ETag is another by now. Put the old object "
        "back and call again, or start a new run over the new data."
    )


def _unfit_name(address: str, name: str) -> BadInput:
    return BadInput(
        f"The name of every object below {address} must have no control characters, such as tabs and newlines, and no "
        f"empty part between two slashes, got {name!r}. Rename it."
    )


def _describe_error(error: Exception) -> str:
    """Return what a store says in its XML, or the first line of an error that has none."""
    if found := re.search(r"<Code>(.*?)</Code>(?:\s*<Message>(.*?)</Message>)?", str(error), re.DOTALL):
        return f"{found[1]}: {' '.join((found[2] or '').split())[:300].rstrip('.')}."
    return (str(error).splitlines() or [type(error).__name__])[0][:300].rstrip(". ") + "."


def split_bucket(url: str) -> tuple[str, str]:
    """Cut SCHEME://BUCKET/PREFIX into the bucket and the prefix, without slashes at its ends."""
    bucket, _, prefix = url.partition("://")[2].partition("/")
    return bucket, prefix.strip("/")
