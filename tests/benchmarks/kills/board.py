"""A board that a process writes on and another reads, also after the first was killed: a shared file mapping.

What a killed process was at, and how far it had come, stands there to the microsecond: the kernel keeps the
pages of a mapped file whatever happens to those who wrote them.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

PHASES = ("read", "forward", "write", "publish")
# When the first batch, publishing and the last call's return came (ns of the monotonic clock), what was done,
# and how many threads are in each phase now.
_FIELDS = ("begun", "publishing", "done", "rows", "parts", *PHASES)


class Board:
    """Numbers under names; many threads may write, and another process may read at any time."""

    def __init__(self, path: Path) -> None:
        with path.open("a+b") as file:
            file.truncate(8 * len(_FIELDS))
            self._map = mmap.mmap(file.fileno(), 8 * len(_FIELDS))
        self._numbers = memoryview(self._map).cast("q")
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> int:
        return self._numbers[_FIELDS.index(name)]

    def add(self, name: str, count: int) -> None:
        """Add to a number."""
        with self._lock:
            self._numbers[_FIELDS.index(name)] += count

    def mark(self, name: str) -> None:
        """Note the time of something, the first time that it happens."""
        with self._lock:
            at = _FIELDS.index(name)
            self._numbers[at] = self._numbers[at] or time.monotonic_ns()

    @contextmanager
    def within(self, phase: str) -> Generator[None]:
        """Count this thread among those in a phase while the block runs."""
        self.add(phase, 1)
        try:
            yield
        finally:
            self.add(phase, -1)

    def phases(self) -> tuple[str, ...]:
        """Return the phases that some thread is in."""
        return tuple(phase for phase in PHASES if self[phase])
