"""A fresh place to write to, on a local disk and on the real S3 server."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tasks.storage import Storage, open_storage

_NOBODY = 65534


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty folder, or of an empty prefix."""
    if request.param == "local":
        return str(tmp_path / "place")
    request.getfixturevalue("s3")
    return f"s3://lake/{uuid.uuid4().hex}"


@pytest.fixture
def storage(place: str) -> Storage:
    return open_storage(place)


@pytest.fixture
def local(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "place"))


@pytest.fixture
def public_folder() -> Generator[Path]:
    """A folder that every user may list, below folders that every user may list."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def unprivileged() -> Callable[[], AbstractContextManager[None]]:
    """Enter a block as a user whom permissions hold for, which they do not for root."""

    @contextmanager
    def enter() -> Generator[None]:
        before = os.geteuid()
        if before != 0:
            yield
            return
        os.seteuid(_NOBODY)
        try:
            yield
        finally:
            os.seteuid(before)

    return enter
