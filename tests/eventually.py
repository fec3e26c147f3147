"""The one way in which tests wait: for a condition, never for a time."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any, TypeVar

Seen = TypeVar("Seen")
# How long a process gets to start and do its work: it imports for half a minute on a machine that others use as well.
PROCESS_SECONDS = 240.0


def eventually(
    look: Callable[[], Seen],
    holds: Callable[[Seen], object] = bool,
    *,
    process: subprocess.Popen[Any] | None = None,
    seconds: float | None = None,
    pause_max: float = 0.1,
) -> Seen:
    """Look until what is seen holds, and return it; fail with what was seen last.

    It has a minute, and four where a process has to start and bring it about, whose end is a failure at once. Only
    whole runs on machines and clusters that start need other seconds, and longer pauses where a look costs a server.
    """
    limit = seconds or (60.0 if process is None else PROCESS_SECONDS)
    until, pause = time.monotonic() + limit, 0.005
    while True:
        has_ended = process is not None and process.poll() is not None
        is_late = time.monotonic() > until
        if holds(seen := look()):
            return seen
        assert not has_ended, f"the process ended before it held; last seen: {seen!r}"
        assert not is_late, f"it did not hold within {limit:g} s; last seen: {seen!r}"
        time.sleep(pause)
        pause = min(2 * pause, pause_max)
