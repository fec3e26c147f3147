"""BentoML's real server with two versions side by side, and a Bento that is built and served."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from infra.local.controller import local_controller
from infra.local.loopback import ask as ask_port
from infra.local.ports import free_ports
from infra.local.process import ServerCommand, ServerProcess, base_environment
from infra.processes import family
from serving.targets import Address
from serving.targets.bentoml import BentoML
from serving.targets.folder import FolderHost
from tasks.endpoint.closed_loop import closed_loop
from tasks.endpoint.samples import Sample
from tests.serving.targets.folder_servers import (
    BAD_REQUESTS,
    BATCHING,
    Served,
    ask,
    deploy_all,
    expected_of,
    listening,
    post,
    python_of,
    release_of,
    rows,
)
from tests.support import register_network

# The first run makes the environment of the server, which takes minutes.
pytestmark = [pytest.mark.timeout(1200), pytest.mark.machines]


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    host: FolderHost
    served: list[Served]
    addresses: list[Address]


@pytest.fixture(scope="module")
def mlp(registry: Path) -> list[Served]:
    """Two versions of one network."""
    return [release_of(register_network("on-bentoml", seed=seed), "scores", batching=BATCHING) for seed in (0, 1)]


@pytest.fixture(scope="module")
def target() -> BentoML:
    return BentoML(python=python_of("bentoml"))


@pytest.fixture(scope="module")
def serving(mlp: list[Served], target: BentoML, tmp_path_factory: pytest.TempPathFactory) -> Generator[Serving]:
    folder = tmp_path_factory.mktemp("bentoml")
    with local_controller(folder):
        host = FolderHost(folder=folder, target=target)
        yield Serving(host=host, served=mlp, addresses=deploy_all(host, mlp))


def score(served: Served, count: int, seed: int = 0) -> Any:
    return expected_of(served, rows(count, seed))["score"]


def test_many_at_a_time_are_all_answered_for_as_long_as_they_ask(serving: Serving) -> None:
    # More than the 100 after which BentoML would renew its connections under them.
    release, sample = serving.served[0][0], Sample(inputs=rows(64), outputs={}, rows=64)
    answers, deadline = 0, time.monotonic() + 240
    while answers <= 300:
        assert time.monotonic() < deadline, answers
        # What is broken off is raised.
        answers += closed_loop(serving.addresses[0], release.contract, sample, callers=16, seconds=4.0).answers


@pytest.mark.parametrize("count", [1, 7, 300])
def test_every_version_answers_as_its_model_predicts(serving: Serving, count: int) -> None:
    for served, address in zip(serving.served, serving.addresses, strict=True):
        answered = ask(address, served[0], rows(count))["score"]

        np.testing.assert_allclose(answered, score(served, count), rtol=0, atol=1e-6)


def test_requests_at_once_each_get_their_own_scores(serving: Serving) -> None:
    served, address = serving.served[0], serving.addresses[0]
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda seed: ask(address, served[0], rows(2, seed))["score"], range(48)))

    for seed, answered in enumerate(answers):
        np.testing.assert_allclose(answered, score(served, 2, seed), rtol=0, atol=1e-6)


def test_requests_that_come_as_the_models_process_closes_its_idle_connections_are_answered(serving: Serving) -> None:
    # After 5 s of silence it closes them, whatever its client does.
    served, address = serving.served[0], serving.addresses[0]
    with ThreadPoolExecutor(16) as threads:
        for idle_s in (0.0, 4.98, 5.0, 5.02):
            time.sleep(idle_s)
            answers = list(threads.map(lambda seed: ask(address, served[0], rows(2, seed))["score"], range(16)))

            assert all(answer.shape == answers[0].shape for answer in answers)


@pytest.mark.parametrize("bad", BAD_REQUESTS)
def test_a_bad_request_is_refused_with_a_reason(serving: Serving, bad: str) -> None:
    body, told = BAD_REQUESTS[bad]
    content = body if isinstance(body, bytes) else _json(body)
    answer = post(serving.addresses[0], content)

    assert 400 <= answer.status_code < 500
    assert ["error"] == list(answer.json())
    assert told in answer.json()["error"]


def _json(body: Any) -> bytes:
    import orjson

    return orjson.dumps(body)


def test_a_model_that_is_not_there_is_404(serving: Serving) -> None:
    answer = post(serving.addresses[0], b"{}", model="other")

    assert 404 == answer.status_code
    assert "'other'" in answer.json()["error"]


def test_it_listens_on_loopback_alone_and_knows_no_pickles_from_outside(serving: Serving) -> None:
    status = serving.host.status(serving.served[0][0])
    assert status is not None
    assert status.pid is not None
    where = [host for pid in family(status.pid) for host in listening(pid)]
    pickled = {"Content-Type": "application/vnd.bentoml+pickle"}
    answer = httpx.post(f"{serving.addresses[0].url}/predict_each", content=b"x", headers=pickled)

    assert {"127.0.0.1"} == set(where)
    assert 404 == answer.status_code


def test_a_server_that_is_killed_is_started_again_where_it_was(serving: Serving) -> None:
    served, address = serving.served[1], serving.addresses[1]
    before = serving.host.status(served[0])
    assert before is not None
    assert before.pid is not None
    os.kill(before.pid, signal.SIGKILL)
    deadline = time.monotonic() + 120
    while (now := serving.host.status(served[0])) is None or now.starts == before.starts or now.state != "ready":
        assert time.monotonic() < deadline, "the server must be back"
        time.sleep(0.1)

    assert address.url == now.url
    np.testing.assert_allclose(ask(address, served[0], rows(3))["score"], score(served, 3), rtol=0, atol=1e-6)


def test_a_bento_is_built_from_the_folder_and_served(target: BentoML, mlp: list[Served], tmp_path: Path) -> None:
    from serving.targets.written import write_folder

    folder = tmp_path / "release"
    write_folder(target.render(*mlp[0]), folder)
    (port,) = free_ports(1)
    environment = {
        **base_environment(),
        "PYTHONPATH": "",
        "BENTOML_HOME": str(tmp_path / "home"),
        "BENTOML_DO_NOT_TRACK": "True",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    built = subprocess.run(
        [target.python, "-m", "bentoml", "build", "--output", "tag", str(folder)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert 0 == built.returncode, built.stderr
    tag = built.stdout.strip().splitlines()[-1].removeprefix("__tag__:")
    command = ServerCommand(
        argv=(str(target.python), "-m", "bentoml", "serve", tag, "--host", "127.0.0.1", "--port", str(port)),
        environment=environment,
        folder=tmp_path,
        log_path=tmp_path / "serve.log",
        ready=lambda: ask_port("GET", port, "/v2/models/scores/ready").ok,
        ready_s_max=120,
    )
    with ServerProcess(command):
        address = Address(url=f"http://127.0.0.1:{port}", model="scores", version=None)
        answered = ask(address, mlp[0][0], rows(3))["score"]

    assert tag.startswith("scores:")
    np.testing.assert_allclose(answered, score(mlp[0], 3), rtol=0, atol=1e-6)


# The last of those that ask the servers: it takes one of them down.
def test_one_that_goes_leaves_the_other(serving: Serving, mlp: list[Served]) -> None:
    serving.host.remove(mlp[1][0])
    serving.host.remove(mlp[1][0])

    with pytest.raises(httpx.ConnectError):
        post(serving.addresses[1], b"{}")
    np.testing.assert_allclose(
        ask(serving.addresses[0], mlp[0][0], rows(3))["score"], score(mlp[0], 3), rtol=0, atol=1e-6
    )
