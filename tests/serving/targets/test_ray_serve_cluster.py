"""Releases on a real Ray cluster with Serve: side by side, replaced, refused, killed, down to zero and back."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from infra.local.process import hold_ports
from infra.worker import list_process_tree
from serving.errors import EndpointFailed
from serving.model.batching import BatchingConfig
from serving.model.pin import digest_folder
from serving.model.release import Release, Scaling
from serving.targets import Address
from serving.targets.ray_serve import RayServeHost, RayServeTarget, make_application_name
from tests.eventually import eventually
from tests.ray_cluster import RayCluster, ray_cluster
from tests.releases import TOLERANCE, Put, document, infer, model_url, release_of, rows
from tests.support import register_mlp, register_network, register_slow

pytest.importorskip("ray", reason="Ray is an extra: pip install 'overnight[ray]'")

# A cluster, and each replica on it, takes seconds to start, and many of them where others use the machine too.
pytestmark = [pytest.mark.timeout(1500), pytest.mark.machines]

FEATURES = 8
BATCHING = BatchingConfig(batch_size_max=16, wait_ms_max=2)
_START_S_MAX = 600.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Generator[RayCluster]:
    with ray_cluster(tmp_path_factory.mktemp("ray")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def host(cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> RayServeHost:
    folder = tmp_path_factory.mktemp("releases")
    return RayServeHost(
        dashboard_url=cluster.dashboard_url,
        serve_url=cluster.serve_url,
        folder=folder,
        target=RayServeTarget(folder=str(folder), keep_warm_seconds=3),
        token=cluster.token,
        ready_seconds_max=_START_S_MAX,
    )


@pytest.fixture(scope="module")
def mlp(registry: Path) -> Put:
    return release_of(register_mlp("ray-mlp", tuple(f"f{at}" for at in range(FEATURES))), "mlp", batching=BATCHING)


@pytest.fixture(scope="module")
def sleeper(mlp: Put) -> Put:
    scaling = Scaling(replicas_min=0, replicas_max=1)
    return replace(mlp, release=mlp.release.model_copy(update={"endpoint": "sleeper", "scaling": scaling}))


@pytest.fixture(scope="module")
def versions(registry: Path) -> list[Put]:
    return [release_of(register_network("ray-versions", seed=seed), "versions") for seed in (0, 1)]


@pytest.fixture(scope="module")
def busy(registry: Path) -> Put:
    """A model that takes its time, and whose queue is short."""
    return release_of(register_slow("ray-busy", ["a"], seconds=0.3), "busy")


@pytest.fixture(scope="module")
def addresses(host: RayServeHost, mlp: Put, sleeper: Put, versions: list[Put], busy: Put) -> dict[str, Address]:
    """Where the releases answer, by their applications: all were deployed at once."""
    puts = [mlp, sleeper, *versions, busy]
    hosts = [*[host] * (len(puts) - 1), replace(host, target=replace(host.target, queue_max=2))]
    with ThreadPoolExecutor(len(puts)) as pool:
        addresses = list(pool.map(lambda host, put: host.deploy(put.release, put.model), hosts, puts))
    return {make_application_name(put.release): address for put, address in zip(puts, addresses, strict=True)}


@pytest.fixture(scope="module")
def address(addresses: dict[str, Address]) -> Address:
    return addresses["mlp-1"]


@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
@pytest.mark.parametrize("count", [1, 50])
def test_answers_are_those_of_the_model(mlp: Put, address: Address, count: int, *, binary: bool) -> None:
    x_NF = rows(count, FEATURES)

    np.testing.assert_allclose(
        infer(address, mlp, x_NF, binary=binary), mlp.predict(x_NF), rtol=0, atol=TOLERANCE, strict=True
    )


def test_requests_at_once_each_get_their_own_scores(mlp: Put, address: Address) -> None:
    x_NF = rows(64, FEATURES)
    with ThreadPoolExecutor(16) as pool:
        scores = list(pool.map(lambda at: infer(address, mlp, x_NF[at : at + 1]), range(64)))

    np.testing.assert_allclose(np.concatenate(scores), mlp.predict(x_NF), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/infer", b"{", 400),
        ("/infer", document(1, FEATURES, datatype="INT32"), 400),
        ("/infer", document(1, FEATURES + 1), 400),
        ("/infer", document(1, FEATURES, name="y"), 400),
        ("s/7/infer", document(1, FEATURES), 404),
    ],
    ids=["no JSON", "datatype", "shape", "name", "version"],
)
def test_a_bad_request_is_refused_with_a_reason(address: Address, path: str, body: Any, status: int) -> None:
    content = {"content": body} if isinstance(body, bytes) else {"json": body}
    url = model_url(address) + path if path == "/infer" else f"{address.url}/v2/models/mlp/versions/7/infer"
    answer = httpx.post(url, **content)

    assert status == answer.status_code
    assert ["error"] == list(answer.json())


def test_two_versions_serve_side_by_side_and_removing_one_leaves_the_other(
    host: RayServeHost, versions: list[Put], addresses: dict[str, Address]
) -> None:
    x_NF, first, second = rows(4, 3), addresses["versions-1"], addresses["versions-2"]
    both = [infer(at, put, x_NF) for at, put in zip((first, second), versions, strict=True)]
    host.remove(versions[0].release)
    host.remove(versions[0].release)
    gone = httpx.get(f"{model_url(first)}/ready")
    left = infer(second, versions[1], x_NF)

    for put, scores in zip(versions, both, strict=True):
        np.testing.assert_allclose(scores, put.predict(x_NF), rtol=0, atol=TOLERANCE)
    assert not np.allclose(*both)
    assert 404 == gone.status_code
    np.testing.assert_array_equal(left, both[1])
    assert [] == list(host.folder.glob("versions-1.*"))


@contextmanager
def asking(address: Address) -> Generator[list[str]]:
    """Ask an endpoint all the while; gives what was answered but 200."""
    stop, failed, served = threading.Event(), [], []

    def ask() -> None:
        with httpx.Client(timeout=_START_S_MAX) as client:
            while not stop.is_set():
                answer = client.post(f"{model_url(address)}/infer", json=document(1, FEATURES))
                (served if answer.status_code == 200 else failed).append(answer.text)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield failed
    finally:
        stop.set()
        thread.join()
    assert served


def test_a_release_is_replaced_while_it_serves(host: RayServeHost, mlp: Put, address: Address) -> None:
    other = mlp.release.model_copy(update={"batching": BatchingConfig(batch_size_max=32, wait_ms_max=1)})
    with asking(address) as failed:
        again = host.deploy(other, mlp.model)
    (folder,) = host.folder.glob("mlp-*")

    assert address == again
    assert '"batch_size_max": 32' in (folder / "release.json").read_text()
    assert [] == failed


def test_requests_beyond_the_queue_are_answered_429(busy: Put, addresses: dict[str, Address]) -> None:
    x = {"name": "a", "shape": [1, 1], "datatype": "FP32", "data": [1.0]}
    url = f"{model_url(addresses['busy-1'])}/infer"
    # One client, since making 32 of them may take longer than the requests that are to be there at once.
    with httpx.Client(timeout=_START_S_MAX) as client, ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda _: client.post(url, json={"inputs": [x]}), range(32)))
    refused = [answer for answer in answers if answer.status_code != 200]

    assert {429} == {answer.status_code for answer in refused}
    assert {"1"} == {answer.headers["Retry-After"] for answer in refused}
    assert len(refused) < 32


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """The files of a model that no server can load."""
    (tmp_path / "MLmodel").write_text("flavors: {}\n")
    return tmp_path


def pinned_to(folder: Path, release: Release) -> Release:
    """Return a release whose model is what a folder holds: files that are others are refused before they are loaded."""
    return release.model_copy(update={"pin": release.pin.model_copy(update={"digest": digest_folder(folder)})})


def test_a_model_that_does_not_load_is_refused_with_the_reason_and_the_others_keep_serving(
    host: RayServeHost, mlp: Put, address: Address, broken: Path
) -> None:
    release = pinned_to(broken, mlp.release.model_copy(update={"endpoint": "broken"}))

    with pytest.raises(EndpointFailed, match=r"broken-1 must start on Ray, got DEPLOY_FAILED: (?s:.*)python_function"):
        host.deploy(release, broken)
    assert [] == list(host.folder.glob("broken-*"))
    check_scores(mlp, address)


def test_a_release_whose_replacement_does_not_load_keeps_serving(
    host: RayServeHost, mlp: Put, address: Address, broken: Path
) -> None:
    before = set(host.folder.glob("mlp-*"))
    release = pinned_to(broken, mlp.release.model_copy(update={"batching": BatchingConfig(batch_size_max=4)}))
    with asking(address) as failed, pytest.raises(EndpointFailed, match="mlp-1 must start on Ray"):
        host.deploy(release, broken)

    assert [] == failed
    assert before == set(host.folder.glob("mlp-*"))
    check_scores(mlp, address)


def test_a_replica_that_is_killed_is_started_again(
    cluster: RayCluster, host: RayServeHost, mlp: Put, address: Address
) -> None:
    replica = replica_pid(cluster, "mlp")
    os.kill(replica, signal.SIGKILL)
    eventually(lambda: replica_pid(cluster, "mlp") not in (0, replica), seconds=_START_S_MAX)
    eventually(lambda: is_ready(address), seconds=_START_S_MAX)
    check_scores(mlp, address)


def test_a_release_goes_to_zero_and_the_next_request_starts_it_again(
    cluster: RayCluster, sleeper: Put, addresses: dict[str, Address]
) -> None:
    eventually(lambda: replica_pid(cluster, "sleeper") == 0, seconds=_START_S_MAX)
    x_NF = rows(2, FEATURES)
    scores = infer(addresses["sleeper-1"], sleeper, x_NF)

    assert replica_pid(cluster, "sleeper") > 0
    np.testing.assert_allclose(scores, sleeper.predict(x_NF), rtol=0, atol=TOLERANCE)


def test_a_cluster_that_does_not_answer_or_is_not_ours_is_named(host: RayServeHost, mlp: Put, tmp_path: Path) -> None:
    stranger = replace(host, token="0" * 64, folder=tmp_path)

    with hold_ports(1) as (port,):
        unreachable = replace(host, dashboard_url=f"http://127.0.0.1:{port}", folder=tmp_path)
        with pytest.raises(EndpointFailed, match=f"must answer at http://127.0.0.1:{port}.*Start the cluster"):
            unreachable.deploy(mlp.release, mlp.model)
    with pytest.raises(EndpointFailed, match=r"got 40[13].*Pass the cluster's token"):
        stranger.deploy(mlp.release, mlp.model)
    assert host.token not in repr(host)
    assert [] == list(tmp_path.iterdir())


def check_scores(put: Put, address: Address) -> None:
    x_NF = rows(3, FEATURES)
    np.testing.assert_allclose(infer(address, put, x_NF), put.predict(x_NF), rtol=0, atol=TOLERANCE)


def is_ready(address: Address) -> bool:
    """Whether it answers that it is ready; Ray may hold a request for as long as it has no replica."""
    try:
        return httpx.get(f"{model_url(address)}/ready").is_success
    except httpx.TransportError:
        return False


def replica_pid(cluster: RayCluster, endpoint: str) -> int:
    """The process of an endpoint's replica, 0 where there is none: Ray titles it by its deployment."""
    for pid in list_process_tree(cluster.process.pid):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if title.startswith("ray::ServeReplica:") and f":{endpoint}-" in title:
            return pid
    return 0
