"""Iceberg tables by pyiceberg: opened through a catalog or a metadata file, read and written by the project's storages.

pyiceberg is imported here, so this module is only imported where a run has to do with an Iceberg table.
"""

from __future__ import annotations

import difflib
import io
import re
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from pyiceberg.catalog import Catalog, load_catalog
from pyiceberg.exceptions import (
    AuthorizationExpiredError,
    ForbiddenError,
    NoSuchNamespaceError,
    NoSuchTableError,
    OAuthError,
    UnauthorizedError,
)
from pyiceberg.io import FileIO, InputFile, OutputFile
from pyiceberg.table import StaticTable, Table
from pyiceberg.utils.config import Config

from serving.errors import BadInput, OvernightError, SourceFormat, StorageDenied, StorageFault, shorten_error
from tasks.storage import Entry, Storage, open_storage, split_location

if TYPE_CHECKING:
    from collections.abc import Callable

_NAME = re.compile(r"[^.\s]+(?:\.[^.\s]+){2,}")
_DENIED = (ForbiddenError, UnauthorizedError, AuthorizationExpiredError, OAuthError)
_IO = {"py-io-impl": f"{__name__}.StorageIO"}


class TableName(NamedTuple):
    """The name of a table: a catalog of pyiceberg's configuration, and the namespace and the table in it."""

    catalog: str
    identifier: tuple[str, ...]

    @property
    def title(self) -> str:
        """The name as one writes it."""
        return ".".join((self.catalog, *self.identifier))


def parse_table_name(name: str) -> TableName:
    """Read CATALOG.NAMESPACE.TABLE. Raises BadInput where it is none."""
    if not _NAME.fullmatch(name):
        message = (
            f"The name of an Iceberg table must be CATALOG.NAMESPACE.TABLE, got {name!r}. The catalog is one of "
            "pyiceberg's configuration: ~/.pyiceberg.yaml, or PYICEBERG_CATALOG__<CATALOG>__URI in the environment."
        )
        raise BadInput(message)
    catalog, *identifier = name.split(".")
    return TableName(catalog, tuple(identifier))


def open_catalog(name: TableName) -> Catalog:
    """Open the catalog of a table, by what pyiceberg's configuration says of it now.

    Raises BadInput where it is not configured, StorageFault where it does not answer.
    """
    try:
        return load_catalog(name.catalog, **{**(Config().get_catalog_config(name.catalog) or {}), **_IO})  # type: ignore[arg-type]  # a configuration may hold maps
    except (ValueError, KeyError, ImportError) as error:
        message = (
            f"The catalog {name.catalog!r} must be configured for pyiceberg, got: {shorten_error(error)}. Set "
            f"PYICEBERG_CATALOG__{name.catalog.upper()}__URI, or name it in ~/.pyiceberg.yaml."
        )
        raise BadInput(message) from error
    except Exception as error:
        raise catalog_error(name, error) from error


def find_table(catalog: Catalog, name: TableName) -> Table | None:
    """Load a table as it is now; None where the catalog has none of that name. Raises StorageFault."""
    try:
        return catalog.load_table(name.identifier)
    except (NoSuchTableError, NoSuchNamespaceError):
        return None
    except OvernightError:
        raise
    except Exception as error:
        raise catalog_error(name, error) from error


def catalog_error(name: TableName, error: Exception) -> OvernightError:
    """Return the error that says what to do about one of a catalog."""
    if isinstance(error, OvernightError):
        return error
    if isinstance(error, _DENIED):
        return StorageDenied(
            f"The catalog of {name.title} must allow these credentials, got: {shorten_error(error)}. Allow them, or "
            f"correct PYICEBERG_CATALOG__{name.catalog.upper()}__CREDENTIAL, then call again."
        )
    return StorageFault(
        f"The catalog of {name.title} must answer, got: {shorten_error(error)}. Check "
        f"PYICEBERG_CATALOG__{name.catalog.upper()}__URI and its server, then call again."
    )


def describe_tables(catalog: Catalog, name: TableName) -> str:
    """Return a sentence about the names that a catalog has instead of one, as far as it tells."""
    try:
        found = [".".join((name.catalog, *each)) for each in catalog.list_tables(name.identifier[:-1])]
    except Exception:  # noqa: BLE001 - a hint only; the error that it belongs to is the one to be told
        return ""
    near = difflib.get_close_matches(name.title, found, n=3) or sorted(found)[:3]
    return f" There is {', '.join(near)}." if near else ""


def open_metadata(location: str) -> Table:
    """Open a table as one of its metadata files has it. Raises SourceFormat."""
    try:
        return StaticTable.from_metadata(location, properties=_IO)
    except OvernightError:
        raise
    except Exception as error:
        message = (
            f"{location} must be the metadata of an Iceberg table that can be read here, got: {shorten_error(error)}. "
            "Name another *.metadata.json, or the table by its catalog as iceberg:CATALOG.NAMESPACE.TABLE."
        )
        raise SourceFormat(message) from error


class StorageIO(FileIO):
    """pyiceberg's way to files, over the project's storages: the same credentials, and writes that replace nothing.

    pyiceberg makes one for each table, by the name of this class.
    """

    def __init__(self, properties: dict[str, str] | None = None) -> None:
        super().__init__(properties or {})
        self._storages: dict[str, Storage] = {}

    def new_input(self, location: str) -> InputFile:
        """Return the file of a location, to be read."""
        return _Input(location, *self._locate(location))

    def new_output(self, location: str) -> OutputFile:
        """Return the file of a location, to be created."""
        return _Output(location, *self._locate(location))

    def delete(self, location: str | InputFile | OutputFile) -> None:
        """Delete a file; one that is gone already is no error."""
        storage, path = self._locate(location if isinstance(location, str) else location.location)
        storage.delete([path])

    def _locate(self, location: str) -> tuple[Storage, str]:
        root, path = split_location(location)
        if root not in self._storages:
            self._storages[root] = open_storage(root)
        return self._storages[root], path


class _Input(InputFile):
    def __init__(self, location: str, storage: Storage, path: str) -> None:
        super().__init__(location)
        self._storage, self._path = storage, path

    def _find(self) -> Entry:
        entry = self._storage.find(self._path)
        if entry is None:
            raise FileNotFoundError(f"{self._storage.address(self._path)} is gone")  # noqa: EM102, TRY003 - pyiceberg's protocol
        return entry

    def __len__(self) -> int:
        return self._find().size

    def exists(self) -> bool:
        return self._storage.exists(self._path)

    def open(self, seekable: bool = True) -> Any:  # noqa: ARG002, FBT001, FBT002 - pyiceberg calls it so
        return self._storage.open_pinned(self._find())


class _Output(OutputFile):
    def __init__(self, location: str, storage: Storage, path: str) -> None:
        super().__init__(location)
        self._storage, self._path = storage, path

    def __len__(self) -> int:
        return len(self.to_input_file())

    def exists(self) -> bool:
        return self._storage.exists(self._path)

    def to_input_file(self) -> InputFile:
        return _Input(self.location, self._storage, self._path)

    def create(self, overwrite: bool = False) -> Any:  # noqa: ARG002, FBT001, FBT002 - pyiceberg calls it so
        return _NewObject(lambda data: self._storage.put_new(self._path, data), self.location)


class _NewObject(io.BytesIO):
    """What is written becomes an object when it is closed, whole and once."""

    def __init__(self, put: Callable[[bytes], bool], location: str) -> None:
        super().__init__()
        self._put, self._location = put, location

    def close(self) -> None:
        if self.closed:
            return
        data = self.getvalue()
        super().close()
        if not self._put(data):
            raise FileExistsError(f"{self._location} is there already")  # noqa: EM102, TRY003 - pyiceberg's protocol

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            # What was written before the error is not a whole manifest, and must not be stored.
            super().close()
        self.close()
