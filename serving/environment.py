"""Environment variables that hold for a while: what some libraries read in place of an argument."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def variable(name: str, value: str) -> Generator[None]:
    """Set an environment variable while the block runs, and put back what was there."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before
