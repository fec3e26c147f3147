"""A prefix of Google Cloud Storage as storage."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from obstore.store import GCSStore

from serving.errors import BadInput, StorageDenied
from tasks.storage.objects import ObjectStorage, split_bucket

_CREDENTIALS = (
    *("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH"),
    *("GOOGLE_SERVICE_ACCOUNT_KEY", "GOOGLE_BEARER_TOKEN", "GOOGLE_SKIP_SIGNATURE"),
)
_LOGIN = Path(".config/gcloud/application_default_credentials.json")
_HINT = (
    "They are those of GOOGLE_APPLICATION_CREDENTIALS (the path of a key file), of `gcloud auth application-default "
    "login`, or of the machine's service account."
)


class GcsStorage(ObjectStorage):
    """A prefix of Google Cloud Storage, written with x-goog-if-generation-match: 0 and read with If-Match."""

    scheme: ClassVar[str] = "gs"
    credentials_hint: ClassVar[str] = _HINT

    def _open_store(self) -> Any:
        bucket, prefix = split_bucket(self.url)
        if not bucket:
            message = f"An address of Google Cloud Storage must be gs://bucket/prefix, got {self.url!r}."
            raise BadInput(message)
        _check_credentials(self.url)
        return GCSStore(bucket, prefix=prefix or None, client_options={"allow_http": _allows_http()})


def gcs_options() -> dict[str, str]:
    """Return what polars and Delta need beside the environment, which they read as this storage does."""
    return {"allow_http": "true"} if _allows_http() else {}


def _allows_http() -> bool:
    return os.environ.get("GOOGLE_BASE_URL", "").startswith("http://")


def _check_credentials(url: str) -> None:
    """Raise StorageDenied where nothing could give credentials; a machine's own are asked for by obstore."""
    known = any(os.environ.get(name) for name in _CREDENTIALS) or (Path.home() / _LOGIN).exists()
    if not known and os.environ.get("OVERNIGHT_METADATA_URL") == "off":
        message = (
            f"{url} needs Google credentials, and there are none; OVERNIGHT_METADATA_URL=off leaves the machine's own "
            f"out. {_HINT}"
        )
        raise StorageDenied(message)
