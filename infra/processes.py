"""The processes under a process: found by their parents' ids, to be told something together."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_POLL_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process of this machine; `ended` is one that only waits for its parent to ask how."""

    pid: int
    parent: int
    ended: bool


def children(pid: int) -> list[int]:
    """Return the processes that `pid` has started and that still run."""
    return [process.pid for process in _processes() if process.parent == pid and not process.ended]


def family(pid: int) -> list[int]:
    """Return `pid` and all that run below it, parents first."""
    processes = [process for process in _processes() if not process.ended]
    found = [pid]
    for parent in found:
        found += [process.pid for process in processes if process.parent == parent]
    return found


def signal_all(pids: Sequence[int], number: signal.Signals) -> None:
    """Send a signal to each, in order; one that is gone already is passed over."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_family(pid: int) -> None:
    """End `pid` and all below it with SIGKILL, as the loss of their machine would; return when they are gone.

    Parents go first, so that none lives to tell of its child's death.
    """
    # Stopped, none of them starts another one that the list lacks.
    signal_all(family(pid), signal.SIGSTOP)
    pids = family(pid)
    signal_all(pids, signal.SIGKILL)
    while any(process.pid in pids and not process.ended for process in _processes()):
        time.sleep(_POLL_S)


def _processes() -> Iterator[Process]:
    if not _PROC.is_dir():
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True)  # noqa: S607 - the system's own
        for pid, parent, state in (line.split()[:3] for line in listed.stdout.splitlines()):
            yield Process(pid=int(pid), parent=int(parent), ended=state.startswith("Z"))
        return
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            # A process may end between the listing and the look.
            with suppress(OSError):
                # The name comes second, in parentheses, and may itself hold spaces and parentheses.
                state, parent, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
                yield Process(pid=int(entry.name), parent=int(parent), ended=state == "Z")
