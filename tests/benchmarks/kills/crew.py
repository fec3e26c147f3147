"""Workers on one run as real processes, started again at once when they are killed, and what became of each."""

from __future__ import annotations

import math
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.kills.board import Board
from tests.benchmarks.kills.command import with_board
from tests.benchmarks.kills.killer import Killer, Seen

_LOOK_SECONDS = 0.001
_ERROR_CHARACTERS = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What one process came to: times in seconds of the monotonic clock, None where it did not come there."""

    worker: int
    started: float
    begun: float | None
    publishing: float | None
    ended: float
    rows: int
    parts: int
    aim: str | None
    phases: tuple[str, ...]

    @property
    def killed(self) -> bool:
        """Whether it was killed, rather than came to its end."""
        return self.aim is not None

    @property
    def clock_start(self) -> float:
        """When it began to work: at its first scored batch, or to publish where nothing was left to score."""
        found = [at for at in (self.begun, self.publishing) if at is not None]
        return min(found, default=self.ended)

    @property
    def startup_seconds(self) -> float:
        """From its start until it began to work."""
        return self.clock_start - self.started

    @property
    def working_seconds(self) -> float:
        """From its first scored batch until it ended or was killed."""
        return self.ended - self.clock_start

    @property
    def published_seconds(self) -> float:
        """From the begin of publishing to the end."""
        return 0.0 if self.publishing is None else self.ended - self.publishing


class _Process:
    def __init__(self, command: Sequence[str], folder: Path, worker: int, number: int) -> None:
        self.worker, self.number = worker, number
        board = folder / f"{number:03d}.board"
        self.board = Board(board)
        self._log = folder / f"{number:03d}.log"
        with self._log.open("wb") as log:
            self.started = time.monotonic()
            self.process = subprocess.Popen(with_board(command, board), stdout=log, stderr=log)

    def seen(self, now: float) -> Seen:
        return Seen(
            number=self.number,
            since_start=now - self.started,
            since_begun=None if (at := self._at("begun")) is None else now - at,
            since_publishing=None if (at := self._at("publishing")) is None else now - at,
            writes=self.board["parts"] if self.board["write"] else None,
        )

    def kill(self, aim: str) -> Attempt:
        """Kill it with SIGKILL, and return it with what it was at when it died; it may have ended before."""
        ended = min(self._at("done") or math.inf, time.monotonic())
        self.process.kill()
        if self.process.wait() == -signal.SIGKILL:
            return self._attempt(ended, aim)
        found = self.ended()
        assert found is not None
        return found

    def ended(self) -> Attempt | None:
        """Return it where it has come to its end, None where it still runs; raises RuntimeError where it failed."""
        code = self.process.poll()
        if code is None:
            return None
        done = self._at("done")
        if code or done is None:
            message = f"A worker must end with 0, got {code}: {self._log.read_text()[-_ERROR_CHARACTERS:]}"
            raise RuntimeError(message)
        return self._attempt(done, None)

    def _at(self, name: str) -> float | None:
        return self.board[name] / 1e9 or None

    def _attempt(self, ended: float, aim: str | None) -> Attempt:
        begun, publishing = self._at("begun"), self._at("publishing")
        return Attempt(
            worker=self.worker,
            started=self.started,
            begun=begun,
            publishing=publishing,
            ended=ended,
            rows=self.board["rows"],
            parts=self.board["parts"],
            aim=aim,
            phases=self._phases(),
        )

    def _phases(self) -> tuple[str, ...]:
        """Return what it was at, of each thread: all of what follows the last chunk is publishing."""
        if self._at("done"):
            return ("ending",)
        if self._at("publishing"):
            return tuple(dict.fromkeys((*self.board.phases(), "publish")))
        return self.board.phases() or (("between",) if self._at("begun") else ("startup",))


def run_workers(
    command: Sequence[str],
    folder: Path,
    *,
    workers: int,
    killer: Killer | None = None,
    seconds_max: float,
    after_kill: Callable[[], None] = lambda: None,
) -> list[Attempt]:
    """Run one command in several processes at once until each has come to its end, and return every attempt.

    `command` is PYTHON -m MODULE and what follows the board; logs and boards are in `folder`, alone. A worker
    that is killed starts again at once.
    Raises RuntimeError where one fails by itself, or time runs out.
    """
    # A board of an earlier run would tell of that.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    attempts: list[Attempt] = []
    running = {worker: _Process(command, folder, worker, worker) for worker in range(workers)}
    started = workers
    until = time.monotonic() + seconds_max
    try:
        while running:
            for process in list(running.values()):
                if attempt := process.ended():
                    attempts.append(attempt)
                    del running[process.worker]
            now = time.monotonic()
            seen = {worker: process.seen(now) for worker, process in running.items()}
            strike = killer.strike(now, _worked(now, attempts, seen), seen) if killer else None
            if strike:
                attempts.append(running.pop(strike.worker).kill(strike.aim))
                if attempts[-1].killed:
                    after_kill()
                    running[strike.worker] = _Process(command, folder, strike.worker, started)
                    started += 1
            if now > until:
                message = (
                    f"Workers must come to an end within {seconds_max:.0f} s, got {sorted(running)} still running."
                )
                raise RuntimeError(message)
            time.sleep(_LOOK_SECONDS)
    finally:
        for process in running.values():
            process.process.kill()
            process.process.wait()
    return attempts


def _worked(now: float, attempts: Sequence[Attempt], seen: dict[int, Seen]) -> float:
    ended = sum(attempt.working_seconds for attempt in attempts)
    return ended + sum(max(one.since_begun or 0.0, one.since_publishing or 0.0) for one in seen.values())
