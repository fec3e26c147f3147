from pathlib import Path

import httpx
import pytest

from infra.local.prefect_server import PrefectServer
from infra.local.prefect_worker import prefect_worker
from infra.local.process import ServerFailed
from infra.processes import family


@pytest.fixture(scope="module")
def pool(prefect: PrefectServer) -> str:
    created = httpx.post(f"{prefect.api_url}/work_pools/", json={"name": "here", "type": "process"})
    created.raise_for_status()
    return "here"


def test_a_worker_asks_for_work_and_nothing_of_it_is_left_when_it_is_stopped(
    prefect: PrefectServer, pool: str, tmp_path: Path
) -> None:
    with prefect_worker(prefect, pool, tmp_path / "one") as worker:
        pids = family(worker.process.pid)
        online = httpx.post(f"{prefect.api_url}/work_pools/{pool}/workers/filter", json={}).json()

        assert "one" in {each["name"] for each in online}

    assert set() == set(family(1)) & set(pids)


def test_a_worker_that_is_killed_leaves_nothing_either(prefect: PrefectServer, pool: str, tmp_path: Path) -> None:
    worker = prefect_worker(prefect, pool, tmp_path / "two")
    pids = family(worker.process.pid)
    worker.kill()

    assert 2 <= len(pids)
    assert set() == set(family(1)) & set(pids)


def test_a_missing_work_pool_is_named(prefect: PrefectServer, tmp_path: Path) -> None:
    with pytest.raises(ServerFailed, match="no-such-pool"):
        prefect_worker(prefect, "no-such-pool", tmp_path / "three")
