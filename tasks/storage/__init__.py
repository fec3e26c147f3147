"""Where bytes live: a local folder, or a prefix of S3, Google Cloud Storage or Azure Blob Storage.

All are written create-only and read as pinned.

`put_new` is the only write. An object that exists is whole and stays: its existence is a commit.
"""

from tasks.storage.addresses import (
    Address,
    Selection,
    SourceAddress,
    as_texts,
    join_location,
    join_selections,
    open_storage,
    reader_options,
    register_scheme,
    select,
    split_location,
)
from tasks.storage.azure import AzureStorage
from tasks.storage.base import Entry, Storage, check_create_only, copy_pinned
from tasks.storage.gcs import GcsStorage
from tasks.storage.local import LocalStorage, local_errors
from tasks.storage.s3 import S3Storage, s3_options

__all__ = [
    "Address",
    "AzureStorage",
    "Entry",
    "GcsStorage",
    "LocalStorage",
    "S3Storage",
    "Selection",
    "SourceAddress",
    "Storage",
    "as_texts",
    "check_create_only",
    "copy_pinned",
    "join_location",
    "join_selections",
    "local_errors",
    "open_storage",
    "reader_options",
    "register_scheme",
    "s3_options",
    "select",
    "split_location",
]
