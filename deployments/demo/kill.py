"""Kill a scoring process in the middle of its run, and hold what is left against an undisturbed run."""

import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

KILLS = 2
_PATIENCE_SECONDS = 120.0
_LOOK_SECONDS = 0.002


def killed_run(
    command: Sequence[str], destination: Path, run: str, parts: int, say: Callable[[str], None]
) -> list[int]:
    """Start the command, kill it with SIGKILL each time another third of its parts is there, then let it end.

    Returns how many parts stood after each kill. Raises RuntimeError where a process ended before
    its kill, or the last one failed.
    """
    folder = destination / f"run={run}"
    standing = []
    for kill in range(1, KILLS + 1):
        say(f"Scoring again, into another folder, until about part {parts * kill // (KILLS + 1)} of {parts}")
        _kill_at(command, folder, parts * kill // (KILLS + 1))
        standing.append(len(list(folder.glob("part-*.parquet"))))
        say(f"Killed with SIGKILL: {standing[-1]} parts are there")
    say("Calling it once more: it resumes")
    subprocess.run(command, check=True, timeout=_PATIENCE_SECONDS)
    return standing


def _kill_at(command: Sequence[str], folder: Path, parts: int) -> None:
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + _PATIENCE_SECONDS
        try:
            while len(list(folder.glob("part-*.parquet"))) < parts:
                if process.poll() is not None or time.monotonic() > until:
                    message = f"The run must be alive until part {parts}, but it ended with {process.poll()}."
                    raise RuntimeError(message)
                time.sleep(_LOOK_SECONDS)
        finally:
            process.kill()
    if process.returncode != -signal.SIGKILL:
        message = f"The run must end by SIGKILL, but it ended with {process.returncode} before."
        raise RuntimeError(message)


def compare(undisturbed: Path, killed: Path, run: str) -> int:
    """Return how many parts of one run are the same bytes in both folders; raises ValueError for strangers."""
    names = {path.name for path in (undisturbed / f"run={run}").iterdir()}
    others = {path.name for path in (killed / f"run={run}").iterdir()}
    if names != others:
        message = f"Both runs must hold the same files, but these differ: {sorted(names ^ others)[:10]}."
        raise ValueError(message)
    return sum(
        (undisturbed / f"run={run}" / name).read_bytes() == (killed / f"run={run}" / name).read_bytes()
        for name in names
    )
