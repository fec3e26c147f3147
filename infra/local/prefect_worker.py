"""A real Prefect process worker that takes flow runs from a pool of a local server.

Measured with Prefect 3.9 on two cores: it polls 4 s after its start.
"""

import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from infra.local.prefect_server import PrefectServer
from infra.local.process import Running, ServerCommand, ServerProcess, base_environment
from infra.processes import kill_family
from infra.worker import GRACE_S

_READY_S_MAX = 120.0
_MARGIN_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefectWorker(Running):
    """A running worker; a context manager that stops it, and a machine that may be lost."""

    process: ServerProcess

    def stop(self) -> None:
        """Tell it to end, and return when it is gone: its runs drain and are to be run again. Idempotent."""
        self.process.stop()

    def kill(self) -> None:
        """End it and every run that it has started with SIGKILL, all at once, as when a machine vanishes."""
        with suppress(ProcessLookupError):
            kill_family(self.process.pid)
        self.process.stop()


def prefect_worker(
    server: PrefectServer, pool: str, folder: Path, *, environment: Mapping[str, str] | None = None, limit: int = 1
) -> PrefectWorker:
    """Start a worker for a pool of `server`, and return once it asks for work; its log is in `folder`.

    `environment` is what its flow runs find beside the server's. Raises ServerFailed, also where there is no
    such pool.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    log_path = folder / "worker.log"
    before = _size(log_path)
    command = ServerCommand(
        argv=(sys.executable, "-m", "infra.worker", "--pool", pool, "--name", folder.name, "--limit", str(limit)),
        environment={
            **base_environment(),
            **server.environment,
            # Flow runs are asked for every two seconds instead of ten.
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "PREFECT_LOGGING_COLORS": "false",
            "PYTHONUNBUFFERED": "1",
            **(environment or {}),
        },
        folder=folder,
        log_path=log_path,
        ready=lambda: (
            _size(log_path) > before and "started!" in log_path.read_bytes()[before:].decode(errors="replace")
        ),
        ready_s_max=_READY_S_MAX,
        grace_s=GRACE_S + _MARGIN_S,
    )
    return PrefectWorker(process=ServerProcess(command))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
