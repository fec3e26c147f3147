"""A rendered release as a folder that is whole once it is there."""

from __future__ import annotations

import errno
import shutil
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from serving.errors import EndpointFailed
from serving.targets import Rendered

_ATTEMPTS_MAX = 100
_PAUSE_S = 0.02


def write_folder(rendered: Rendered, folder: Path) -> None:
    """Put what a target rendered into a folder, which appears at once or not at all; an older one is replaced.

    Others may write into the same parent meanwhile, and remove it while it is empty. Raises EndpointFailed where the
    folder can't be written.
    """
    try:
        with _staging_folder(folder.parent) as staging:
            part = staging / "new"
            _fill(rendered, part)
            _replace_folder(part, folder, staging)
    except OSError as error:
        message = f"A release must be written to {folder}, got: {error}. Make room or give access, then call again."
        raise EndpointFailed(message) from error


def remove_folder(folder: Path) -> None:
    """Remove a folder that may be gone already, or into which its controller still writes a last status."""
    for _ in range(_ATTEMPTS_MAX):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(_PAUSE_S)


@contextmanager
def _staging_folder(parent: Path) -> Generator[Path]:
    """Make a folder below a parent, which is made too and stays as long as this one is in it."""
    for attempt in range(_ATTEMPTS_MAX):
        try:
            parent.mkdir(parents=True, exist_ok=True)
            # Named with a dot: nobody who looks for releases takes a half of one for one.
            staging = tempfile.TemporaryDirectory(prefix=".writing-", dir=parent)
            break
        except (FileNotFoundError, FileExistsError):
            # Whoever removed the last release in the parent may have removed the parent in between. mkdir says that it
            # exists where it is gone by the time of its second look.
            if attempt == _ATTEMPTS_MAX - 1:
                raise
    with staging as path:
        yield Path(path)


def _replace_folder(new: Path, folder: Path, staging: Path) -> None:
    """Rename a folder into its place, and whatever is there into `staging`."""
    while True:
        with suppress(FileNotFoundError):
            folder.rename(tempfile.mkdtemp(prefix="before-", dir=staging))
        try:
            new.rename(folder)
        except OSError as error:
            # Another one was written there meanwhile: the last to come stays.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return


def _fill(rendered: Rendered, folder: Path) -> None:
    folder.mkdir(mode=0o755)
    for name, tree in rendered.trees.items():
        shutil.copytree(tree, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, content in rendered.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
