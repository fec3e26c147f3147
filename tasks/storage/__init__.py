"""Where bytes live: a local folder or an S3 prefix, written create-only and read as pinned.

`put_new` is the only write. An object that exists is whole and stays: its existence is a commit.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from serving.errors import BadInput
from tasks.storage.base import Entry, Storage, check_create_only, copy_pinned
from tasks.storage.local import LocalStorage, local_errors
from tasks.storage.s3 import S3Storage, s3_options
from tasks.storage.select import Selection, select

__all__ = [
    "Entry",
    "LocalStorage",
    "S3Storage",
    "Selection",
    "Storage",
    "check_create_only",
    "copy_pinned",
    "local_errors",
    "open_storage",
    "register_scheme",
    "s3_options",
    "select",
]

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_openers: dict[str, Callable[[str], Storage]] = {"s3": S3Storage}
_FILE_URL = re.compile(r"file:(?://(?:localhost)?)?(/(?!/).*)", re.DOTALL)


def open_storage(url: str) -> Storage:
    """Open a local folder (a path or file://) or an S3 prefix (s3://bucket/prefix).

    On S3 the endpoint comes from the environment (AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL) and the
    credentials from the boto3 chain. Raises BadInput for any other scheme that is not registered, and for control
    characters.
    """
    if _CONTROL.search(unquote(url) if url.startswith("file:") else url):
        message = f"An address must hold no control characters, such as tabs and newlines, got {url!r}. Rename it."
        raise BadInput(message)
    if url.startswith("s3://") and "@" in urlsplit(url).netloc:
        message = (
            f"An S3 address must hold no credentials, got {url}. Give them as boto3 takes them: a role, a profile or "
            "the environment."
        )
        raise BadInput(message)
    scheme, separator, _ = url.partition("://")
    if separator and scheme in _openers:
        return _openers[scheme](url)
    if file := _FILE_URL.fullmatch(url):
        return LocalStorage(Path(unquote(file[1])))
    if url and not url.startswith("file:") and "://" not in url:
        return LocalStorage(Path(url).expanduser().absolute())
    message = f"An address must be a path, file:///path or s3://bucket/prefix, got {url!r}."
    raise BadInput(message)


def register_scheme(scheme: str, opener: Callable[[str], Storage]) -> None:
    """Have open_storage open addresses that begin with `scheme://` by a storage of one's own, in this process.

    Args:
        scheme: The scheme alone, such as "memory". The last opener that is registered for it stands.
        opener: Is given the whole address.
    """
    _openers[scheme] = opener
