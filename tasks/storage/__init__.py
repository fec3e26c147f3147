"""Where bytes live: a local folder or an S3 prefix, written create-only and read as pinned.

`put_new` is the only write. An object that exists is whole and stays: its existence is a commit.
"""

from tasks.storage.addresses import Selection, open_storage, register_scheme, select
from tasks.storage.base import Entry, Storage, check_create_only, copy_pinned
from tasks.storage.local import LocalStorage, local_errors
from tasks.storage.s3 import S3Storage, s3_options

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
