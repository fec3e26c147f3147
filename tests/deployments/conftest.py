"""A real Prefect server with everything deployed, and real workers: started once for all tests of this folder."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from deployments.automations import make_automations
from infra.local.prefect_server import PrefectServer, PrefectWorker, prefect_worker
from tests.servers import use_prefect
from tests.support import write_customers

ATTEMPTS_MAX = 2
# The least that a heartbeat of 30 s allows on a machine that is busy; ten is the least that Prefect takes.
SILENT_SECONDS, SETTLE_SECONDS = 45.0, 10.0

AUTOMATIONS = make_automations(silent_seconds=SILENT_SECONDS, settle_seconds=SETTLE_SECONDS, attempts_max=ATTEMPTS_MAX)

StartWorkers = Callable[..., list[PrefectWorker]]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[PrefectServer]:
    """A real Prefect server that this process and its children talk to, with nothing deployed yet."""
    with use_prefect(tmp_path_factory.mktemp("prefect")) as server:
        yield server


@pytest.fixture(scope="session")
def deployed(server: PrefectServer) -> PrefectServer:
    """The server with this project's pools, deployments and automations; these wait for as little as they can."""
    from deployments.apply import deploy

    asyncio.run(deploy(automations=AUTOMATIONS))
    return server


@pytest.fixture(scope="session")
def start_workers(
    deployed: PrefectServer, registry: Path, tmp_path_factory: pytest.TempPathFactory
) -> Generator[StartWorkers]:
    """Start workers of these names for a pool, at once; all are stopped at the end."""
    environment = {
        "MLFLOW_TRACKING_URI": os.environ["MLFLOW_TRACKING_URI"],
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # A machine that is gone is seen to be after three.
        "PREFECT_WORKER_HEARTBEAT_SECONDS": "2",
    }
    folder = tmp_path_factory.mktemp("workers")
    with ExitStack() as stack:

        def start(pool: str, *names: str) -> list[PrefectWorker]:
            def one(name: str) -> PrefectWorker:
                return prefect_worker(deployed, pool, folder / name, environment=environment)

            with ThreadPoolExecutor() as threads:
                return [stack.enter_context(worker) for worker in threads.map(one, names)]

        yield start


@pytest.fixture(scope="session")
def two_workers(start_workers: StartWorkers) -> list[PrefectWorker]:
    """Two workers of the pool of machines that are there anyway."""
    return start_workers("overnight", "one", "two")


@pytest.fixture(scope="session")
def poison(registry: Path) -> str:
    """A registered model that kills its process, as one does that takes more memory than there is."""
    from tests.support import register_script

    return register_script("poison", "__import__('os').kill(__import__('os').getpid(), 9)")


@pytest.fixture(scope="session")
def customers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 10,000 customers."""
    return write_customers(tmp_path_factory.mktemp("data") / "customers", rows=10_000, files=2, rows_per_group=5_000)
