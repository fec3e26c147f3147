"""Workers on this machine come and go as a night asks for them, against a real Prefect server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Generator, Mapping
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.settings import PREFECT_API_URL, temporary_settings

from infra.local.prefect_server import PrefectServer
from infra.local.workers import LocalWorkers, MachineKind, open_capacity
from tests.child_environment import add_project
from tests.eventually import eventually

POOLS: Mapping[MachineKind, str] = {"spot": "local-spot", "on-demand": "local-on-demand"}


@pytest.fixture
def workers(prefect: PrefectServer, tmp_path: Path) -> Generator[LocalWorkers]:
    """No worker yet, of two pools that there are."""
    with temporary_settings({PREFECT_API_URL: prefect.api_url}), get_client(sync_client=True) as client:
        for pool in POOLS.values():
            if pool not in {each.name for each in client.read_work_pools()}:
                client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
    made = LocalWorkers(pools=POOLS, folder=tmp_path, environment=prefect.environment, grace_s=5)
    yield made
    made.close()


def list_workers(prefect: PrefectServer, pool: str) -> set[str]:
    with temporary_settings({PREFECT_API_URL: prefect.api_url}), get_client(sync_client=True) as client:
        return {worker.name for worker in client.read_workers_for_work_pool(pool)}


@pytest.mark.machines
def test_workers_of_both_pools_start_and_end(workers: LocalWorkers, prefect: PrefectServer, tmp_path: Path) -> None:
    workers.set_workers("spot", 2)
    workers.set_workers("on-demand", 1)
    eventually(lambda: len(list_workers(prefect, "local-spot")), lambda count: count == 2, seconds=120)
    eventually(lambda: len(list_workers(prefect, "local-on-demand")), lambda count: count == 1, seconds=120)
    busy = min(list_workers(prefect, "local-spot"))
    workers.set_workers("spot", 1, busy=frozenset({busy}))

    assert (1, 1) == (workers.count_workers("spot"), workers.count_workers("on-demand"))
    assert workers.find_problem("spot") is None

    workers.close()

    assert (0, 0) == (workers.count_workers("spot"), workers.count_workers("on-demand"))
    for log in tmp_path.glob("*.log"):
        assert "Ending: 0 flow runs have 5 s to drain." in log.read_text()


def test_a_worker_that_ends_by_itself_is_told_and_started_again(workers: LocalWorkers) -> None:
    workers.pools = {**POOLS, "spot": "no-such-pool"}
    workers.set_workers("spot", 1)
    eventually(lambda: workers.count_workers("spot") == 0, seconds=120)
    problem = workers.find_problem("spot")
    workers.set_workers("spot", 1)

    assert problem is not None
    assert problem.endswith("ended by itself with 1.")
    assert 1 == workers.count_workers("spot")


@pytest.mark.machines
def test_workers_end_where_the_process_that_started_them_is_killed(
    workers: LocalWorkers, prefect: PrefectServer, tmp_path: Path
) -> None:
    code = (
        "import os, pathlib, sys; from infra.local.workers import LocalWorkers;"
        "made = LocalWorkers(pools={'spot': 'local-spot', 'on-demand': 'local-on-demand'},"
        " folder=pathlib.Path(sys.argv[1]), grace_s=5); made.set_workers('spot', 1);"
        "print(made._workers['spot'][0].process.pid, flush=True); os.read(0, 1); os.kill(os.getpid(), 9)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**add_project(), **prefect.environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as night:
        assert night.stdout
        assert night.stdin
        worker = int(night.stdout.readline())
        eventually(lambda: any("started!" in log.read_text() for log in tmp_path.glob("*.log")), seconds=120)
        night.stdin.write("x")
        night.stdin.flush()
        night.wait()
        eventually(lambda: not Path(f"/proc/{worker}/exe").exists(), seconds=120)

    assert any("Ending: 0 flow runs" in log.read_text() for log in tmp_path.glob("*.log"))


def test_workers_need_a_server_that_outlives_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)

    with pytest.raises(RuntimeError, match=r"`overnight local up prefect`, and set PREFECT_API_URL"):
        open_capacity({}, owner="n", release="0.1.0", pools=POOLS, workers=1)
