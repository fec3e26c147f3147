"""A real Prefect server with everything deployed, and real workers: started once for all tests of this folder."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from deployments.automations import make_automations
from infra.local.prefect_server import PrefectServer, PrefectWorker, prefect_worker
from tests.leftovers import keep_running
from tests.servers import use_prefect
from tests.support import write_customers

ATTEMPTS_MAX = 2
# The least that a heartbeat of 30 s allows on a machine that is busy; ten is the least that Prefect takes.
SILENT_SECONDS, SETTLE_SECONDS = 45.0, 10.0

AUTOMATIONS = make_automations(silent_seconds=SILENT_SECONDS, settle_seconds=SETTLE_SECONDS, attempts_max=ATTEMPTS_MAX)

StartWorkers = Callable[..., list[PrefectWorker]]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, prefect_templates: Path) -> Generator[PrefectServer]:
    """A real Prefect server that this process and its children talk to, with nothing deployed yet."""
    with use_prefect(tmp_path_factory.mktemp("prefect"), prefect_templates) as server:
        yield server


@pytest.fixture(scope="session")
def deployed(server: PrefectServer) -> PrefectServer:
    """The server with this project's pools, deployments and automations; these wait for as little as they can."""
    from deployments.apply import deploy

    asyncio.run(deploy(automations=AUTOMATIONS))
    return server


@contextmanager
def keep_workers(server: PrefectServer, folder: Path) -> Generator[StartWorkers]:
    """Yield what starts workers of some names for a pool, at once; all are stopped at the end."""
    environment = {"MLFLOW_TRACKING_URI": os.environ["MLFLOW_TRACKING_URI"], "MLFLOW_DISABLE_TELEMETRY": "true"}
    with ExitStack() as stack:

        def start(pool: str, *names: str, heartbeat_seconds: float = 10) -> list[PrefectWorker]:
            # A worker that is silent for three heartbeats is taken for gone: a busy machine keeps one waiting for some.
            given = environment | {"PREFECT_WORKER_HEARTBEAT_SECONDS": str(heartbeat_seconds)}

            def one(name: str) -> PrefectWorker:
                return prefect_worker(server, pool, folder / name, environment=given)

            with keep_running(), ThreadPoolExecutor() as threads:
                return [stack.enter_context(worker) for worker in threads.map(one, names)]

        yield start


@pytest.fixture(scope="module")
def start_workers(
    deployed: PrefectServer, registry: Path, tmp_path_factory: pytest.TempPathFactory
) -> Generator[StartWorkers]:
    """Start workers for a pool; they are stopped with the module, since each asks the server every two seconds."""
    with keep_workers(deployed, tmp_path_factory.mktemp("workers")) as start:
        yield start


@pytest.fixture(scope="session")
def two_workers(
    deployed: PrefectServer, registry: Path, tmp_path_factory: pytest.TempPathFactory
) -> Generator[list[PrefectWorker]]:
    """Two workers of the pool of machines that are there anyway."""
    with keep_workers(deployed, tmp_path_factory.mktemp("workers")) as start:
        yield start("overnight", "one", "two")


# From the model's own process up to the one that all of those come from, and to its parent.
_KILL_FLOW = """
        import os, pathlib
        at = os.getpid()
        while b"process_program" in pathlib.Path(f"/proc/{at}/cmdline").read_bytes():
            at = int(pathlib.Path(f"/proc/{at}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(at, 9)
"""


@pytest.fixture(scope="session")
def poison(registry: Path) -> str:
    """A registered model that kills the process of its flow, as the system does where memory is short."""
    from tests.support import register_script

    return register_script("poison", _KILL_FLOW.strip())


@pytest.fixture(scope="session")
def customers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 10,000 customers."""
    return write_customers(tmp_path_factory.mktemp("data") / "customers", rows=10_000, files=2, rows_per_group=5_000)
