"""A rendered release as a folder that is whole once it is there."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from serving.errors import EndpointFailed
from serving.targets import Rendered


def write_folder(rendered: Rendered, folder: Path) -> None:
    """Put what a target rendered into a folder, which appears at once or not at all; an older one is replaced.

    Raises EndpointFailed where it can't be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Named with a dot: nobody who looks for releases takes a half of one for one.
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder.parent) as beside:
            part = Path(beside) / folder.name
            _fill(rendered, part)
            if folder.exists():
                folder.rename(Path(beside) / "before")
            part.rename(folder)
    except OSError as error:
        message = f"A release must be written to {folder}, got: {error}. Make room or give access, then call again."
        raise EndpointFailed(message) from error


def remove_folder(folder: Path) -> None:
    """Remove a folder that may be gone already."""
    shutil.rmtree(folder, ignore_errors=True)


def _fill(rendered: Rendered, folder: Path) -> None:
    folder.mkdir(mode=0o755)
    for name, tree in rendered.trees.items():
        shutil.copytree(tree, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, content in rendered.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
