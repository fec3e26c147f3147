"""A prefix of Azure Blob Storage as storage."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import Any, ClassVar

from obstore.store import AzureStore

from serving.errors import BadInput, StorageDenied
from tasks.storage.base import Entry
from tasks.storage.objects import ObjectStorage, split_bucket

_CREDENTIALS = (
    *("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_MASTER_KEY", "AZURE_STORAGE_SAS_KEY"),
    *("AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_TOKEN", "AZURE_STORAGE_CLIENT_ID", "AZURE_CLIENT_ID"),
    *("AZURE_FEDERATED_TOKEN_FILE", "AZURE_USE_AZURE_CLI", "AZURE_SKIP_SIGNATURE", "AZURE_STORAGE_USE_EMULATOR"),
    *("AZURE_MSI_ENDPOINT", "AZURE_IDENTITY_ENDPOINT"),
)
_ACCOUNT = re.compile(r"(?P<container>[^@:]+)@(?P<account>[a-z0-9]+)\.(?:dfs|blob)\.(?:core|fabric)\.[a-z.]+")
_HINT = (
    "They are those of AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN, AZURE_CLIENT_ID with AZURE_CLIENT_SECRET "
    "and AZURE_TENANT_ID, or of the machine's identity, which needs the role Storage Blob Data Contributor."
)


class AzureStorage(ObjectStorage):
    """A prefix of a container, written with If-None-Match and read with If-Match."""

    scheme: ClassVar[str] = "az"
    bucket_word: ClassVar[str] = "container"
    credentials_hint: ClassVar[str] = _HINT

    def _open_store(self) -> Any:
        container, prefix = split_bucket(self.url)
        account = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME")
        if "@" in container:
            named = _ACCOUNT.fullmatch(container)
            container, account = (named["container"], named["account"]) if named else ("", None)
        if not container:
            message = (
                "An address of Azure must be az://container/prefix, or abfss://container@account.dfs.core.windows.net/"
                f"prefix, and hold no credentials, got {self.url!r}."
            )
            raise BadInput(message)
        if not account and not os.environ.get("AZURE_STORAGE_USE_EMULATOR"):
            message = (
                f"{self.url} must be in a storage account, got none. Set AZURE_STORAGE_ACCOUNT_NAME, or name it as "
                f"abfss://{container}@ACCOUNT.dfs.core.windows.net/{prefix}."
            )
            raise BadInput(message)
        _check_credentials(self.url)
        options: dict[str, Any] = {"account_name": account} if account else {}
        return AzureStore(container, prefix=prefix or None, client_options={"allow_http": _allows_http()}, **options)

    def _entry(self, meta: Any) -> Entry:
        entry = super()._entry(meta)
        # A listing has ETags without the quotes that are part of them everywhere else.
        return entry if entry.tag.startswith(('"', "W/")) else replace(entry, tag=f'"{entry.tag}"')


def azure_options(storage: AzureStorage) -> dict[str, str]:
    """Return what polars and Delta need beside the environment, which they read as this storage does."""
    named = _ACCOUNT.fullmatch(split_bucket(storage.url)[0])
    options = {"account_name": named["account"]} if named else {}
    return options | ({"allow_http": "true"} if _allows_http() else {})


def _allows_http() -> bool:
    endpoint = os.environ.get("AZURE_STORAGE_ENDPOINT") or os.environ.get("AZURE_ENDPOINT") or ""
    return endpoint.startswith("http://") or bool(os.environ.get("AZURE_STORAGE_USE_EMULATOR"))


def _check_credentials(url: str) -> None:
    """Raise StorageDenied where nothing could give credentials; a machine's own are asked for by obstore."""
    known = any(os.environ.get(name) for name in _CREDENTIALS)
    if not known and os.environ.get("OVERNIGHT_METADATA_URL") == "off":
        message = (
            f"{url} needs Azure credentials, and there are none; OVERNIGHT_METADATA_URL=off leaves the machine's own "
            f"out. {_HINT}"
        )
        raise StorageDenied(message)
