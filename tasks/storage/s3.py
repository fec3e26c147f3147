"""An S3 prefix as storage."""

from __future__ import annotations

import contextlib
import io
import os
import re
import uuid
from collections.abc import Generator, Iterable, Sequence
from typing import Any

import obstore
import pyarrow as pa
from boto3 import Session
from botocore.exceptions import BotoCoreError
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import S3Store

from serving.errors import BadInput, OvernightError, SourceChanged, StorageDenied, StorageFault
from tasks.storage.base import Entry

_READS_AT_ONCE = 16
_DENIED = re.compile("AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken|InvalidToken|Access Denied")
# As obstore's client says it of a name that it can't ask for.
_UNFIT_NAME = re.compile(r'invalid path: .*?[Pp]ath "(.*?)"', re.DOTALL)


class S3Storage:
    """An S3 prefix, written with If-None-Match and read with If-Match."""

    def __init__(self, url: str) -> None:
        self.url = "s3://" + url.removeprefix("s3://").rstrip("/")
        with _s3_errors(self.url):
            self._store = _s3_store(self.url)

    @property
    def reads_at_once(self) -> int:
        """Many: a read mostly waits."""
        return _READS_AT_ONCE

    def put_new(self, path: str, data: bytes | memoryview) -> bool:
        """Create an object with If-None-Match: *; False where one stands already."""
        with _s3_errors(self.address(path)):
            try:
                obstore.put(self._store, path, bytes(data), mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
        return True

    def read(self, path: str) -> bytes | None:
        """Return the bytes of an object, None where there is none."""
        with _s3_errors(self.address(path)):
            try:
                return bytes(obstore.get(self._store, path).bytes())
            except FileNotFoundError:
                return None

    def exists(self, path: str) -> bool:
        """Whether an object stands under that name."""
        return self.find(path) is not None

    def find(self, path: str) -> Entry | None:
        """Return the object of that name, None where there is none."""
        with _s3_errors(self.address(path)):
            try:
                return _s3_entry(obstore.head(self._store, path))
            except FileNotFoundError:
                return None

    def entries(self, prefix: str = "", depth: int | None = None) -> list[Entry]:
        """Return every object below a prefix, sorted by path; the marks that consoles make of folders are left out."""
        base = prefix.rstrip("/")
        with _s3_errors(self.address(prefix)):
            found = [_s3_entry(meta) for page in self._pages(base or None, depth) for meta in page]
        levels = len(base.split("/")) if base else 0
        near = [entry for entry in found if depth is None or entry.path.count("/") < levels + depth]
        for entry in near:
            # What XML can't hold is listed as a replacement character, and there is nothing of that name.
            if "\ufffd" in entry.path and not self.exists(entry.path):
                raise _unfit_name(self.address(prefix), entry.path)
        # An empty object "sales/" is listed as "sales", and there is none of that name.
        return sorted((entry for entry in near if entry.size or self.exists(entry.path)), key=lambda entry: entry.path)

    def _pages(self, base: str | None, depth: int | None) -> Iterable[Sequence[Any]]:
        if depth == 1:
            return [obstore.list_with_delimiter(self._store, base)["objects"]]
        return obstore.list(self._store, base, chunk_size=1000)

    def open_pinned(self, entry: Entry) -> pa.NativeFile:
        """Open an object; every read sends If-Match with the entry's ETag."""
        return pa.PythonFile(_PinnedObject(self._store, entry, self.address(entry.path)), mode="r")

    def check_unchanged(self, entry: Entry) -> None:
        """Nothing to do: every read was held against the ETag as it was made."""

    def set_aside(self, entry: Entry) -> str | None:
        """Copy an object to a name that starts with a dot, then delete it; None where it is another by now."""
        folder, _, name = entry.path.rpartition("/")
        aside = f"{folder}/.{name}.{uuid.uuid4().hex[:8]}.aside".lstrip("/")
        if self.find(entry.path) != entry:
            return None
        with _s3_errors(self.address(entry.path)):
            try:
                obstore.copy(self._store, entry.path, aside)
            except FileNotFoundError:
                return None
            obstore.delete(self._store, entry.path)
        return aside

    def delete(self, paths: list[str]) -> None:
        """Delete objects; one that is gone already is no error."""
        with _s3_errors(self.url):
            for path in paths:
                with contextlib.suppress(FileNotFoundError):
                    obstore.delete(self._store, path)

    def delete_torn_writes(self, prefix: str) -> None:
        """Nothing to do: an S3 object that was not put whole is not there."""

    def address(self, path: str) -> str:
        """Return the s3:// address."""
        return f"{self.url}/{path}" if path else self.url


def _s3_store(url: str) -> Any:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if not bucket:
        message = f"An S3 address must be s3://bucket/prefix, got {url!r}."
        raise BadInput(message)
    session = _session(url)
    endpoint = s3_endpoint()
    options: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
    return S3Store(
        bucket,
        prefix=prefix.strip("/") or None,
        region=session.region_name or "us-east-1",
        credential_provider=Boto3CredentialProvider(session),
        client_options={"allow_http": bool(endpoint and endpoint.startswith("http://"))},
        **options,
    )


def _session(url: str) -> Session:
    try:
        session = Session()
        found = session.get_credentials()
    except BotoCoreError as error:
        message = f"{url} needs AWS credentials, and the boto3 chain fails: {error}. Mend the profile or the role."
        raise StorageDenied(message) from error
    if found is None:
        message = (
            f"{url} needs AWS credentials, and the boto3 chain finds none. Set AWS_ACCESS_KEY_ID, a profile or a role."
        )
        raise StorageDenied(message)
    return session


def s3_endpoint() -> str | None:
    """Return the S3 endpoint that the environment names, None for AWS itself."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
    if endpoint and not endpoint.startswith(("http://", "https://")):
        message = f"The S3 endpoint in AWS_ENDPOINT_URL must start with http:// or https://, got {endpoint!r}."
        raise BadInput(message)
    return endpoint


def s3_options() -> dict[str, str]:
    """Return where S3 is, as polars and Delta take it; no credentials, which they ask boto3 for."""
    options = {"aws_region": Session().region_name or "us-east-1"}
    if endpoint := s3_endpoint():
        options |= {"aws_endpoint_url": endpoint, "aws_allow_http": str(endpoint.startswith("http://")).lower()}
    return options


def _s3_entry(meta: Any) -> Entry:
    return Entry(path=meta["path"], size=meta["size"], tag=str(meta["e_tag"]))


class _PinnedObject(io.RawIOBase):
    """An S3 object as a file: every range is asked for with If-Match."""

    def __init__(self, store: Any, entry: Entry, address: str) -> None:
        super().__init__()
        self._store, self._pinned, self._address = store, entry, address
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
        options: Any = {"if_match": self._pinned.tag, "range": (self._at, self._at + wanted)}
        with _s3_errors(self._address):
            try:
                data = bytes(obstore.get(self._store, self._pinned.path, options=options).bytes())
            except FileNotFoundError:
                message = (
                    f"{self._address} must be there for the whole run, but is gone. Put it back, or start a new run."
                )
                raise SourceChanged(message) from None
        self._at += len(data)
        return data


@contextlib.contextmanager
def _s3_errors(address: str) -> Generator[None]:
    try:
        yield
    except PreconditionError:
        message = (
            f"{address} must be the object that the plan was made for, but its ETag is another by now. "
            "Put the old object back and call again, or start a new run over the new data."
        )
        raise SourceChanged(message) from None
    except (BaseError, FileNotFoundError) as error:
        raise _named(address, error) from error


def _named(address: str, error: Exception) -> OvernightError:
    if unfit := _UNFIT_NAME.search(str(error)):
        return _unfit_name(address, unfit[1])
    got = _describe_error(error)
    if "NoSuchBucket" in got:
        return BadInput(f"The bucket of {address} must exist, got: {got} Create it, or correct the address.")
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or _DENIED.search(got):
        return StorageDenied(f"{address} must be allowed to these credentials, got: {got} Allow it, then call again.")
    return StorageFault(f"{address} must answer, got: {got} Call again once it does: the run resumes.")


def _unfit_name(address: str, name: str) -> BadInput:
    return BadInput(
        f"The name of every object below {address} must have no control characters, such as tabs and newlines, and no "
        f"empty part between two slashes, got {name!r}. Rename it."
    )


def _describe_error(error: Exception) -> str:
    """Return what S3 says in its XML, or the first line of an error that has none."""
    if found := re.search(r"<Code>(.*?)</Code>(?:\s*<Message>(.*?)</Message>)?", str(error), re.DOTALL):
        return f"{found[1]}: {(found[2] or '').rstrip('.')}."
    return (str(error).splitlines() or [type(error).__name__])[0][:300].rstrip(". ") + "."
