"""Which environments of models are kept, what uses them, and the removal of those that nothing has used for long.

A process that takes an environment holds a shared lock on the file `.<name>.use` beside it until it ends, however it
ends. The file's time is that of the last use, and its lines are the models that the environment was used for. Only who
gets that lock alone may remove an environment.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field

from serving.errors import EnvironmentUnusable, shorten_error
from serving.model.contract import Frozen

MARKER = "environment.json"
# An environment that is being made or removed, or was when its process was killed.
UNFINISHED = ".unfinished-"
NAME_LENGTH = 16
_NAME = re.compile(rf"(?:{re.escape(UNFINISHED)})?(?P<name>[0-9a-f]{{{NAME_LENGTH}}})(?:-.*)?")
_LINES_BYTES_MAX = 1 << 20


class KeptEnvironment(Frozen):
    """An environment that is kept, or what a killed process left of one."""

    name: str = Field(description="The name of its folder, a digest of what it is made from.")
    python: str | None = Field(description="The version of Python that was asked for; null where it is unfinished.")
    packages: int = Field(description="How many packages it has.")
    bytes: int = Field(description="Sizes of its files; those that uv's cache has too count in full.")
    models: tuple[str, ...] = Field(description="The models that it was used for, with their digests, the first first.")
    last_used: datetime = Field(description="When a process began to use it last.")
    is_in_use: bool = Field(description="Whether a process of this machine uses it now.")


def hold_environment(place: Path, model: str | None = None) -> None:
    """Have an environment count as in use until this process ends, and note which model it is used for.

    Where the folder takes no locks or can't be written, as on a disk that is mounted to be read, nothing is held.

    Args:
        place: The folder of the environment, which may not be there yet. The folder around it must be.
        model: The model, with its digest.
    """
    path = _find_use_file(place)
    with suppress(OSError):
        if place not in _held or not _is_file_of(_held[place], path):
            _held[place] = _lock_shared(path)
        descriptor = _held[place]
        os.utime(descriptor)
        if model is not None and model not in _read_models(path):
            os.write(descriptor, f"{model}\n".encode())


# The descriptors of the locks of this process. A copy of the process has them too, and holds the same locks.
_held: dict[Path, int] = {}


def _find_use_file(place: Path) -> Path:
    return place.parent / f".{place.name}.use"


def _lock_shared(path: Path) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except PermissionError:
            # Of another user: a lock needs no more than reading.
            descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if _is_file_of(descriptor, path):
                return descriptor
        except OSError:
            os.close(descriptor)
            raise
        # The environment was removed meanwhile, and this file with it.
        os.close(descriptor)


def _is_file_of(descriptor: int, path: Path) -> bool:
    try:
        found = path.stat()
    except OSError:
        return False
    opened = os.fstat(descriptor)
    return (opened.st_dev, opened.st_ino) == (found.st_dev, found.st_ino)


def _read_models(path: Path) -> tuple[str, ...]:
    try:
        with path.open(errors="replace") as file:
            return tuple(dict.fromkeys(file.read(_LINES_BYTES_MAX).splitlines()))
    except OSError:
        return ()


def list_environments(folder: Path) -> list[KeptEnvironment]:
    """Return the environments of a folder, the one that was used last first; none where there is no such folder.

    Raises EnvironmentUnusable where the folder can't be read.
    """
    with _explain_errors(folder):
        kept = [_describe(folder / name) for name in _list_names(folder)]
    return sorted(kept, key=lambda each: (each.last_used, each.name), reverse=True)


def remove_environments(folder: Path, *, unused_since: datetime, delete: bool) -> list[KeptEnvironment]:
    """Return the environments that nothing uses and nothing has used since a time, and remove them.

    One that is in use stays, whatever its time: each is removed under a lock that no process that uses it leaves free.
    A model whose environment was removed has it made again.

    Args:
        folder: Where they are kept.
        unused_since: The time, with its zone.
        delete: Whether to remove them; else they are only returned.

    Raises:
        EnvironmentUnusable: The folder can't be read or written.
    """
    chosen = [each for each in list_environments(folder) if not each.is_in_use and each.last_used < unused_since]
    if not delete:
        return chosen
    with _explain_errors(folder):
        return [each for each in chosen if _remove(folder / each.name, unused_since)]


def _list_names(folder: Path) -> list[str]:
    """Return the names of environments that have a folder of their own there, finished or not."""
    if not folder.is_dir():
        return []
    found = (_NAME.fullmatch(path.name) for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    return sorted({match["name"] for match in found if match})


def _list_folders(place: Path) -> list[Path]:
    return [*([place] if place.is_dir() else []), *place.parent.glob(f"{UNFINISHED}{place.name}-*")]


def _describe(place: Path) -> KeptEnvironment:
    marker = _read_marker(place)
    return KeptEnvironment(
        name=place.name,
        python=marker.get("python"),
        packages=len(marker.get("packages", ())),
        bytes=sum(_count_bytes(each) for each in _list_folders(place)),
        models=_read_models(_find_use_file(place)),
        last_used=_find_last_use(place),
        is_in_use=_is_in_use(place),
    )


def _read_marker(place: Path) -> dict[str, Any]:
    try:
        found = json.loads((place / MARKER).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _find_last_use(place: Path) -> datetime:
    """Return when it was last used: by its own file, and without one, as earlier releases left it, by what is there."""
    times = []
    for path in (_find_use_file(place), *_list_folders(place)):
        with suppress(OSError):
            times.append(path.stat().st_mtime)
    return datetime.fromtimestamp(max(times, default=0.0), UTC)


def _count_bytes(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += (Path(parent) / name).lstat().st_size
    return total


def _is_in_use(place: Path) -> bool:
    try:
        descriptor = os.open(_find_use_file(place), os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _try_lock_alone(descriptor)
    finally:
        os.close(descriptor)


def _try_lock_alone(descriptor: int) -> bool:
    """Lock a file of uses, until it is closed, where nobody else has it locked; return whether that was so."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove(place: Path, unused_since: datetime) -> bool:
    """Remove an environment that nobody uses; return whether it was."""
    path = _find_use_file(place)
    # Without one, as earlier releases left it, no process that uses this release has taken it.
    is_noted = path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _try_lock_alone(descriptor) or not _is_file_of(descriptor, path):
            return False
        if is_noted and _find_last_use(place) >= unused_since:
            return False
        # Under another name at once: nobody finds half of it.
        aside = Path(tempfile.mkdtemp(prefix=f"{UNFINISHED}{place.name}-", dir=place.parent))
        if place.exists():
            place.rename(aside / "removed")
        for each in _list_folders(place):
            shutil.rmtree(each)
        (place.parent / f".{place.name}.lock").unlink(missing_ok=True)
        path.unlink()
    finally:
        os.close(descriptor)
    return True


@contextmanager
def _explain_errors(folder: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        message = (
            f"Environments of models must be readable and writable in {folder}, got {type(error).__name__}: "
            f"{shorten_error(error)}. Allow it, or name another folder by the environment variable "
            "OVERNIGHT_ENVIRONMENTS."
        )
        raise EnvironmentUnusable(message) from error
