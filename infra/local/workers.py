"""Workers of two Prefect work pools, as processes of this machine: as many as a night asks for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from infra.worker import GRACE_S, kill_process_tree

MachineKind = Literal["spot", "on-demand"]

# Above the grace that a worker gives its flow runs, so that it can end them and itself.
_MARGIN_S = 15.0
_POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A worker's process; its flow runs drain once it is told to end."""

    name: str
    process: subprocess.Popen[bytes]

    @property
    def runs(self) -> bool:
        """Whether its process runs."""
        return self.process.poll() is None


def open_capacity(
    options: Mapping[str, object],
    *,
    owner: str,
    release: str,
    pools: Mapping[MachineKind, str],
    workers: int,
) -> LocalWorkers:
    """Return the workers of this machine, none of which runs yet; they have its release and any number of them.

    Raises RuntimeError where the Prefect server that workers would ask is not named.
    """
    del options, release, workers
    if not os.environ.get("PREFECT_API_URL"):
        message = (
            "Workers on this machine need a Prefect server of their own process, got none: a temporary one serves one "
            "process. Start one by `overnight local up prefect`, and set PREFECT_API_URL."
        )
        raise RuntimeError(message)
    return LocalWorkers(pools=pools, owner=owner)


@dataclass(slots=True, kw_only=True)
class LocalWorkers:
    """Workers as processes of this machine; satisfies the Protocol Capacity of tasks.spot.

    `folder` gets a log of each worker, where it is given. The workers have this process's environment, with
    `environment` added.
    """

    pools: Mapping[MachineKind, str]
    owner: str = ""
    folder: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    grace_s: float = GRACE_S
    _workers: dict[MachineKind, list[Worker]] = field(default_factory=lambda: {"spot": [], "on-demand": []})
    _ending: list[Worker] = field(default_factory=list)
    _problems: dict[MachineKind, str] = field(default_factory=dict)

    def set_workers(self, kind: MachineKind, count: int, busy: frozenset[str] = frozenset()) -> None:
        """Start or end workers of a kind until there are `count`. Those that are `busy` end last, and drain."""
        living = self._find_living(kind)
        for worker in sorted(living, key=lambda each: each.name in busy)[: max(len(living) - count, 0)]:
            self._end(kind, worker)
        for _ in range(count - len(living)):
            self._workers[kind].append(self._start(kind))

    def count_workers(self, kind: MachineKind) -> int:
        """Return how many workers of a kind run."""
        return len(self._find_living(kind))

    def find_problem(self, kind: MachineKind) -> str | None:
        """Return how the last worker of the kind that ended by itself did so, None where none has."""
        self._find_living(kind)
        return self._problems.get(kind)

    def close(self) -> None:
        """End every worker, and return when all are gone: those that have not drained in time are killed."""
        for kind, workers in self._workers.items():
            for worker in list(workers):
                self._end(kind, worker)
        until = time.monotonic() + self.grace_s + _MARGIN_S
        while any(worker.runs for worker in self._ending) and time.monotonic() < until:
            time.sleep(_POLL_S)
        for worker in self._ending:
            if worker.runs:
                kill_process_tree(worker.process.pid)
            worker.process.wait()
        self._ending.clear()

    def _find_living(self, kind: MachineKind) -> list[Worker]:
        for worker in list(self._workers[kind]):
            if not worker.runs:
                self._workers[kind].remove(worker)
                self._problems[kind] = f"The worker {worker.name} ended by itself with {worker.process.returncode}."
        return self._workers[kind]

    def _start(self, kind: MachineKind) -> Worker:
        name = f"local-{kind}-{uuid.uuid4().hex[:8]}"
        command = (sys.executable, "-m", "infra.worker", "--pool", self.pools[kind], "--name", name)
        log = (self.folder / f"{name}.log").open("wb") if self.folder else subprocess.DEVNULL
        process = subprocess.Popen(
            # Where the night is killed, its workers drain and end too.
            [*command, "--grace", str(self.grace_s), "--parent", str(os.getpid())],
            env={**os.environ, **self.environment},
            stdout=log,
            stderr=subprocess.STDOUT,
            # Ctrl-C in a terminal goes to every process of its group; the night ends its workers itself.
            start_new_session=True,
        )
        if not isinstance(log, int):
            log.close()
        return Worker(name=name, process=process)

    def _end(self, kind: MachineKind, worker: Worker) -> None:
        self._workers[kind].remove(worker)
        self._ending.append(worker)
        with suppress(ProcessLookupError):
            worker.process.send_signal(signal.SIGTERM)
