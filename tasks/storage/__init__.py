"""Where bytes live: a local folder or an S3 prefix, written create-only and read as pinned.

`put_new` is the only write. An object that exists is whole and stays: its existence is a commit.
"""

from tasks.storage.addresses import (
    Address,
    Selection,
    SourceAddress,
    as_texts,
    join_selections,
    open_storage,
    register_scheme,
    select,
)
from tasks.storage.base import Entry, Storage, check_create_only, copy_pinned
from tasks.storage.local import LocalStorage, local_errors
from tasks.storage.s3 import S3Storage, s3_options

__all__ = [
    "Address",
    "Entry",
    "LocalStorage",
    "S3Storage",
    "Selection",
    "SourceAddress",
    "Storage",
    "as_texts",
    "check_create_only",
    "copy_pinned",
    "join_selections",
    "local_errors",
    "open_storage",
    "register_scheme",
    "s3_options",
    "select",
]
