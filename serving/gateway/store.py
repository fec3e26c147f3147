"""What the gateway keeps: the routes, one file each, and whose folder it is."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from serving.errors import EndpointFailed, Unanswered
from serving.gateway.state import Kept

_LOCK = "gateway.lock"
_ROUTES = "routes"


class Store:
    """The folder of one gateway. Raises EndpointFailed where another gateway has it, or a file can't be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._routes = folder / _ROUTES
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        make_private_folder(self._routes)
        self._lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            message = f"A folder must have one gateway, got a second for {folder}. Stop the first, or pass --folder."
            raise EndpointFailed(message) from None

    def __enter__(self) -> Self:
        """Return the store."""
        return self

    def __exit__(self, *error: object) -> None:
        """Give the folder back."""
        os.close(self._lock)

    def load(self) -> dict[str, Kept]:
        """Return every route by the name of its endpoint."""
        return {path.stem: _read(path) for path in sorted(self._routes.glob("*.json"))}

    def put(self, endpoint: str, kept: Kept) -> None:
        """Write a route durably: a reader, or a gateway that starts after a power cut, sees the old or the new."""
        write_atomically(self._routes / f"{endpoint}.json", kept.model_dump_json(indent=1).encode())

    def delete(self, endpoint: str) -> None:
        """Delete a route. Idempotent."""
        (self._routes / f"{endpoint}.json").unlink(missing_ok=True)
        _sync(self._routes)


def _read(path: Path) -> Kept:
    try:
        return Kept.model_validate_json(path.read_bytes())
    except ValidationError as error:
        message = f"{path} must hold a route, got: {error}. Put it right, or delete it and put the route again."
        raise EndpointFailed(message) from None


@contextmanager
def told_to_whoever_asks() -> Iterator[None]:
    """Have what can't be written be told. Raises Unanswered, with 503."""
    try:
        yield
    except OSError as error:
        got = error.strerror or type(error).__name__
        message = f"The gateway must be able to write, got: {got}. Make room or give it access, then send this again."
        raise Unanswered(message) from error


def make_private_folder(folder: Path) -> None:
    """Make a folder that its owner alone may look into; one that is there becomes such."""
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_mode & 0o077:
        folder.chmod(0o700)


def write_atomically(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Write a file in full, or not at all."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
