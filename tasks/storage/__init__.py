"""Where bytes live: a local folder or an S3 prefix, written create-only and read as pinned.

`put_new` is the only write. An object that exists is whole and stays: its existence is a commit.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from serving.errors import BadInput
from tasks.storage.base import Entry, Storage, copy_pinned
from tasks.storage.local import LocalStorage
from tasks.storage.s3 import S3Storage, s3_options

__all__ = ["Entry", "LocalStorage", "S3Storage", "Storage", "copy_pinned", "open_storage", "s3_options"]


def open_storage(url: str) -> Storage:
    """Open a local folder (a path or file://) or an S3 prefix (s3://bucket/prefix).

    On S3 the endpoint comes from the environment (AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL) and the
    credentials from the boto3 chain. Raises BadInput for any other scheme.
    """
    parts = urlsplit(url)
    if parts.scheme == "s3":
        return S3Storage(url)
    if parts.scheme in ("", "file"):
        return LocalStorage(Path(unquote(parts.path) if parts.scheme else url).expanduser().absolute())
    message = f"An address must be a path, file:// or s3://bucket/prefix, got {url!r}."
    raise BadInput(message)
