"""A model version pinned by the digest of its files, and whether these are still as they were.

Needs no MLflow: what reads the record of a run names its model by this.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

from serving.errors import ModelUnfit
from serving.model.contract import Frozen

_BLOCK = 1 << 20
# Where MLflow notes the name and version that a local model was loaded by.
_LOADED_AS = "registered_model_meta"
# The clock of a file system may tick only this often.
_TICK_NS = 20_000_000

# Path, size, time of modification and time of change of each file of a folder. No program can set the last.
FileStates = tuple[tuple[str, int, int, int], ...]


class ModelPin(Frozen):
    """One version of a registered model, pinned by the digest of its files."""

    name: str
    version: str
    model_id: str | None
    source: str
    digest: str

    @property
    def uri(self) -> str:
        """The address of the version, which no alias changes."""
        return f"models:/{self.name}/{self.version}"


def digest_folder(folder: Path) -> str:
    """Return the SHA-256 over the relative names and bytes of every file below a folder.

    Files that appear when a model is used do not count: Python's bytecode caches, and the file in which MLflow notes
    the name and version that a local model was loaded by.
    """
    total = hashlib.sha256()
    for file in sorted(_iter_files(folder)):
        inner = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK):
                inner.update(block)
        total.update(f"{file.relative_to(folder).as_posix()}\0{inner.hexdigest()}\n".encode())
    return total.hexdigest()


@functools.lru_cache(maxsize=16)
def digest_files(folder: Path, files: FileStates) -> str:  # noqa: ARG001 - the key of what is kept
    """Return the digest of a folder as `digest_folder` does, once for each state of its files.

    Args:
        folder: The folder.
        files: The state that its files have, read before.
    """
    return digest_folder(folder)


def read_file_states(folder: Path) -> FileStates:
    """Return the state of every file in the digest of a folder; writing to one later changes its state.

    Waits until the clock of the file system has ticked. Raises ModelUnfit where a subfolder is a link, since the files
    behind it are not in the digest.
    """
    states = []
    for file in sorted(_iter_files(folder)):
        status = file.stat()
        states.append((str(file.relative_to(folder)), status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    newest = max((changed for *_, changed in states), default=0)
    time.sleep(min(max(newest + _TICK_NS - time.time_ns(), 0), _TICK_NS) / 1e9)
    return tuple(states)


def check_files_unchanged(pin: ModelPin, folder: Path, files: FileStates) -> None:
    """Raise ModelUnfit where a file of a model has changed since it was hashed."""
    try:
        now = read_file_states(folder)
    except FileNotFoundError as error:
        now = ((str(error.filename), 0, 0, 0),)
    if now == files:
        return
    changed = sorted({path for path, *_ in set(now) ^ set(files)})
    message = (
        f"The files of {pin.uri} must stay as they were when they were hashed (digest {pin.digest[:12]}), for as long "
        f"as they are read, but {len(changed)} in {folder} were changed, the first {changed[0]}. Put them back and "
        "call again; a new version belongs in the registry under a number of its own."
    )
    raise ModelUnfit(message)


def _iter_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if "__pycache__" in path.parts or path == folder / _LOADED_AS:
            continue
        if path.is_file():
            yield path
        elif path.is_symlink() and path.is_dir():
            message = (
                "A model's folder must hold no link to a folder, since what that holds would not be in the digest; got "
                f"{path}. Log the model with the files themselves."
            )
            raise ModelUnfit(message)
