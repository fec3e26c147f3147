"""KServe's real Python server with three releases side by side."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest

from infra.local.controller import local_controller
from serving.targets import Address
from serving.targets.folder import FolderHost
from serving.targets.kserve import KServe
from tests.serving.targets.folder_servers import (
    BAD_REQUESTS,
    Served,
    ask,
    deploy_all,
    document,
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
    return [release_of(register_network("on-kserve", seed=seed), "scores") for seed in (0, 1)]


@pytest.fixture(scope="module")
def serving(mlp: list[Served], minilm: str, tmp_path_factory: pytest.TempPathFactory) -> Generator[Serving]:
    """Both of them and MiniLM, each under KServe's server, as a controller runs them."""
    target = KServe(python=python_of("kserve"))
    with local_controller(tmp_path_factory.mktemp("kserve")) as controller:
        host = FolderHost(folder=controller.folder, target=target)
        served = [*mlp, release_of(minilm, "glosses")]
        yield Serving(host=host, served=served, addresses=deploy_all(host, served))


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("count", [1, 50])
def test_each_of_two_versions_answers_as_its_model_predicts(serving: Serving, version: int, count: int) -> None:
    inputs = rows(count, seed=count)
    answer = ask(serving.addresses[version], serving.served[version][0], inputs)

    np.testing.assert_allclose(
        expected_of(serving.served[version], inputs)["score"], answer["score"], rtol=0, atol=1e-6
    )


def test_texts_travel_as_bytes_and_come_back_as_their_embeddings(serving: Serving, glosses: list[str]) -> None:
    texts = np.array([*glosses[:5], "naïve café ☕"], dtype=object)
    (value,) = serving.served[2][0].contract.inputs
    answer = ask(serving.addresses[2], serving.served[2][0], {value.name: texts})

    for name, expected in expected_of(serving.served[2], {value.name: texts}).items():
        np.testing.assert_allclose(expected, answer[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("what", BAD_REQUESTS)
def test_a_bad_request_is_refused_with_what_is_wrong(serving: Serving, what: str) -> None:
    body, words = BAD_REQUESTS[what]
    answer = post(serving.addresses[0], body if isinstance(body, bytes) else json.dumps(body).encode())

    assert answer.status_code in range(400, 500), answer.text
    assert words in answer.text
    log = serving.host.folder / serving.served[0][0].endpoint / serving.served[0][0].version / "server.log"
    assert "InvalidInput" not in log.read_text()


def test_a_model_that_is_not_there_is_not_found(serving: Serving) -> None:
    assert 404 == post(serving.addresses[0], json.dumps(document()).encode(), model="nobody").status_code


def test_its_metadata_names_the_tensors_of_the_model(serving: Serving) -> None:
    address = serving.addresses[0]
    told = httpx.get(f"{address.url}/v2/models/{address.model}", trust_env=False).json()

    assert [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}] == told["inputs"]
    assert [{"name": "score", "datatype": "FP32", "shape": [-1, 1]}] == told["outputs"]


def test_a_server_listens_on_loopback_alone(serving: Serving) -> None:
    status = serving.host.status(serving.served[0][0])

    assert status is not None
    assert 1 == len(hosts := listening(status.pid))
    assert {"127.0.0.1"} == set(hosts)


def test_a_killed_server_comes_back_at_its_address_while_another_serves(serving: Serving) -> None:
    first, second = serving.addresses[:2]
    before = serving.host.status(serving.served[0][0])
    assert before is not None
    assert before.pid is not None
    os.kill(before.pid, signal.SIGKILL)

    ask(second, serving.served[1][0], rows(1))
    deadline = time.monotonic() + 120
    while (status := serving.host.status(serving.served[0][0])) is None or status.pid in (None, before.pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)

    assert (2, first.url) == (status.starts, status.url)
    ask(first, serving.served[0][0], rows(1))


def test_one_that_is_removed_leaves_the_others_serving(serving: Serving) -> None:
    serving.host.remove(serving.served[0][0])
    serving.host.remove(serving.served[0][0])

    with pytest.raises(httpx.TransportError):
        post(serving.addresses[0], b"{}")
    ask(serving.addresses[1], serving.served[1][0], rows(3))
