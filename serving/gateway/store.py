"""The gateway's folder: a lock, and one file for each route. Also writes private files atomically."""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from serving.errors import EndpointFailed
from serving.gateway.route import SavedEndpoint

_LOCK, _SUPERVISOR_LOCK = "gateway.lock", "supervisor.lock"
_LOCK_POLL_S = 0.05
_ROUTES = "routes"


class Store:
    """The folder of one gateway, as its control plane uses it.

    Args:
        folder: The folder, which is created where it is missing.
        lock_s_max: Seconds to wait for an earlier control plane that is ending.

    Raises:
        EndpointFailed: where another gateway uses the folder, or a file cannot be read.
    """

    def __init__(self, folder: Path, *, lock_s_max: float = 0.0) -> None:
        self.folder = folder
        self._routes = folder / _ROUTES
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        make_private_folder(self._routes)
        self._lock = _lock(folder, _LOCK, lock_s_max)

    def __enter__(self) -> Self:
        """Return the store."""
        return self

    def __exit__(self, *error: object) -> None:
        """Release the lock of the folder."""
        os.close(self._lock)

    def load_all(self) -> dict[str, SavedEndpoint]:
        """Return every route by the name of its endpoint."""
        return {path.stem: _read_route(path) for path in sorted(self._routes.glob("*.json"))}

    def put(self, endpoint: str, saved: SavedEndpoint) -> None:
        """Write a route durably: after a power cut a gateway finds the old file or the new one."""
        write_atomically(self._routes / f"{endpoint}.json", saved.model_dump_json(indent=1).encode())

    def delete(self, endpoint: str) -> None:
        """Delete a route. Idempotent."""
        (self._routes / f"{endpoint}.json").unlink(missing_ok=True)
        _fsync_folder(self._routes)


@contextmanager
def lock_folder(folder: Path) -> Generator[None]:
    """Hold a gateway's folder, which it creates, for the supervisor. Raises EndpointFailed where another one has it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = _lock(folder, _SUPERVISOR_LOCK, 0.0)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(folder: Path, name: str, seconds_max: float) -> int:
    descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + seconds_max
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(_LOCK_POLL_S)
                continue
            os.close(descriptor)
            message = f"Only one gateway may use a folder, got a second for {folder}. Stop the first, or pass --folder."
            raise EndpointFailed(message) from None
        return descriptor


def _read_route(path: Path) -> SavedEndpoint:
    try:
        return SavedEndpoint.model_validate_json(path.read_bytes())
    except ValidationError as error:
        message = f"{path} must hold a route, got: {error}. Correct the file, or delete it and put the route again."
        raise EndpointFailed(message) from None


def make_private_folder(folder: Path) -> None:
    """Create a folder that only its owner can read; restrict it to the owner where it exists."""
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_mode & 0o077:
        folder.chmod(0o700)


def write_atomically(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Write a file completely, or not at all."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    _fsync_folder(path.parent)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
