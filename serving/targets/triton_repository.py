"""The folders of a model in Triton's repository: versions that appear whole, a config that is replaced whole."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from serving.errors import EndpointFailed
from serving.model.release import RELEASE_FILE, Release
from serving.targets import Rendered
from serving.targets.triton_config import versions_of

CONFIG_FILE = "config.pbtxt"
# Triton passes over folders of a model that are no numbers.
_STAGING, _BEFORE = ".staging-", "before-"
_REPLACED_S_MAX, _POLL_S = 2.0, 0.01


@contextmanager
def replaced(folder: Path, version: str, rendered: Rendered) -> Generator[None]:
    """Put the files of a version in their place, whole; on an error what was there before comes back."""
    folder.mkdir(parents=True, exist_ok=True)
    _tidy(folder)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))
    place, before, new = folder / version, staging / f"{_BEFORE}{version}", staging / "new"
    placed = False
    try:
        _copy(rendered, f"{folder.name}/{version}/", new)
        if place.exists():
            place.rename(before)
        new.rename(place)
        placed = True
        yield
    except BaseException:
        if placed:
            shutil.rmtree(place)
        if before.exists():
            before.rename(place)
        raise
    finally:
        shutil.rmtree(staging)
        if not (folder / CONFIG_FILE).exists():
            shutil.rmtree(folder)


def read_releases(folder: Path) -> dict[str, Release]:
    """Return the releases that a model's config serves, by their version, in order.

    Another process may put or drop one meanwhile: what is returned was served at some moment. Raises EndpointFailed
    where the config names a release that is not there.
    """
    # A version that is replaced is away for as long as two renames take.
    deadline = time.monotonic() + _REPLACED_S_MAX
    while True:
        try:
            versions = versions_of((folder / CONFIG_FILE).read_text())
        except FileNotFoundError:
            return {}
        try:
            return {version: _read_release(folder / version) for version in versions}
        except FileNotFoundError as error:
            if time.monotonic() > deadline:
                message = (
                    f"{folder / CONFIG_FILE} must name releases that are there, got no {error.filename}. Put it back, "
                    "or remove the folder and deploy its releases again."
                )
                raise EndpointFailed(message) from None
        time.sleep(_POLL_S)


def _read_release(folder: Path) -> Release:
    return Release.model_validate_json((folder / RELEASE_FILE).read_text())


def write_whole(path: Path, text: str) -> None:
    """Replace a file, so that a reader finds the one before or this one."""
    with tempfile.TemporaryDirectory(prefix=_STAGING, dir=path.parent) as staging:
        file = Path(staging) / path.name
        file.write_text(text)
        file.replace(path)


def _tidy(folder: Path) -> None:
    """Put right what a process that was killed here has left: a version set aside comes back, the rest goes."""
    for staging in folder.glob(f"{_STAGING}*"):
        for before in staging.glob(f"{_BEFORE}*"):
            place = folder / before.name.removeprefix(_BEFORE)
            if not place.exists():
                before.rename(place)
        shutil.rmtree(staging)


def _copy(rendered: Rendered, prefix: str, to: Path) -> None:
    for path, content in rendered.files.items():
        if path.startswith(prefix):
            file = to / path.removeprefix(prefix)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    for path, tree in rendered.trees.items():
        shutil.copytree(tree, to / path.removeprefix(prefix), copy_function=shutil.copyfile)
