"""A real Ray cluster, started once and then stopped."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from infra.local.process import send_request
from infra.worker import list_process_tree
from tests.child_environment import add_project
from tests.eventually import eventually
from tests.ray_cluster import RayCluster, ray_cluster

pytest.importorskip("ray", reason="Ray is an extra: pip install 'overnight[ray]'")

pytestmark = pytest.mark.machines

API = "/api/serve/applications/"


def listening(pids: set[int]) -> set[str]:
    """The addresses on which these processes listen, as the kernel writes them."""
    inodes = set()
    for pid in pids:
        try:
            links = [link.readlink() for link in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        inodes |= {str(link).removeprefix("socket:[").removesuffix("]") for link in links}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


def answers(cluster: RayCluster, token: str) -> int:
    return send_request(
        "GET", int(cluster.dashboard_url.rsplit(":", 1)[1]), API, {"Authorization": f"Bearer {token}"}
    ).status


def alive(pids: set[int]) -> set[int]:
    """The processes that are still there, but those that only wait to be asked how they ended."""
    found = set()
    for pid in pids:
        try:
            state = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            found.add(pid)
    return found


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="Linux lists its sockets and processes there")
def test_a_cluster_is_on_loopback_for_those_with_its_token_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with ray_cluster(tmp_path) as cluster:
        pids = set(list_process_tree(cluster.process.pid))
        where = listening(pids)
        statuses = answers(cluster, cluster.token), answers(cluster, "0" * 64)
        session = cluster._session
        told = cluster.process.log_text()
        cluster.stop()
        cluster.stop()

    # 127.0.0.1, and the same written as an address of six.
    assert {"0100007F", "0000000000000000FFFF00000100007F"} >= where
    assert 200 == statuses[0]
    assert statuses[1] in (401, 403)
    assert set() == alive(pids)
    assert not session.exists()
    assert cluster.token not in repr(cluster)
    assert cluster.token not in told


_STARTER = """
import sys, time
from pathlib import Path
from tests.ray_cluster import ray_cluster

cluster = ray_cluster(Path(sys.argv[1]))
print(cluster.process.pid, cluster._session, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="Linux lists its processes there")
def test_a_cluster_whose_starter_is_killed_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _STARTER, str(tmp_path / "cluster")]
    with subprocess.Popen(command, env=add_project(), stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        pid, session = starter.stdout.readline().split()
        pids = set(list_process_tree(int(pid)))
        starter.kill()
    eventually(lambda: alive(pids), lambda left: not left, seconds=180)
    shutil.rmtree(session)

    assert len(pids) > 5
