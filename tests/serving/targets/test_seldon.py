"""The real MLServer, Seldon's, with four releases side by side."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from mlflow.types import ColSpec, Schema

from infra.local.controller import local_controller
from serving.targets import Address
from serving.targets.folder import FolderHost
from serving.targets.seldon import Seldon
from tests.serving.targets.folder_servers import (
    BAD_REQUESTS,
    BATCHING,
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
    """Two versions of one network; the second collects requests into batches."""
    first, second = (register_network("on-mlserver", seed=seed) for seed in (0, 1))
    return [release_of(first, "scores"), release_of(second, "scores", batching=BATCHING)]


@pytest.fixture(scope="module")
def partial(log_code: Callable[..., str]) -> Served:
    """A model that has no finite answer where a is 1, in batches; it also tells the rows of its pass."""
    answer = "pd.DataFrame({'double': np.where(x['a'] == 1, np.nan, x['a'] * 2), 'together': float(len(x))})"
    outputs = Schema([ColSpec("double", "double"), ColSpec("double", "together")])
    uri = log_code("partial", answer, Schema([ColSpec("double", "a")]), outputs)
    return release_of(uri, "partial", batching=BATCHING)


def double(value: float, rows: int = 1) -> bytes:
    """A request to it."""
    tensor = {"name": "a", "shape": [rows, 1], "datatype": "FP64", "data": [value] * rows}
    return json.dumps({"inputs": [tensor]}).encode()


def output(answer: dict[str, Any], name: str) -> list[float]:
    (data,) = (each["data"] for each in answer["outputs"] if each["name"] == name)
    return data


@pytest.fixture(scope="module")
def serving(
    mlp: list[Served], minilm: str, partial: Served, tmp_path_factory: pytest.TempPathFactory
) -> Generator[Serving]:
    """All of them and MiniLM, each under MLServer, as a controller runs them."""
    target = Seldon(python=python_of("mlserver"))
    with local_controller(tmp_path_factory.mktemp("mlserver")) as controller:
        host = FolderHost(folder=controller.folder, target=target)
        served = [*mlp, release_of(minilm, "glosses"), partial]
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
    answer = post(serving.addresses[1], body if isinstance(body, bytes) else json.dumps(body).encode())

    assert answer.status_code in range(400, 500), answer.text
    assert words in answer.text


def test_a_model_that_is_not_there_is_not_found(serving: Serving) -> None:
    assert 404 == post(serving.addresses[0], json.dumps(document()).encode(), model="nobody").status_code


def test_requests_that_are_collected_get_their_own_answers_and_bad_ones_among_them_spoil_none(serving: Serving) -> None:
    address, (release, _) = serving.addresses[1], serving.served[1]
    bodies = [json.dumps(document(shape=[1, 4], data=[0.0] * 4)).encode(), b"{}"]
    several = [rows(1 + seed % 3, seed=seed) for seed in range(48)]
    with ThreadPoolExecutor(48) as threads:
        bad = [threads.submit(post, address, bodies[at % 2]) for at in range(16)]
        answers = list(threads.map(lambda inputs: ask(address, release, inputs), several))

    assert {400, 422} == {each.result().status_code for each in bad}
    for inputs, answer in zip(several, answers, strict=True):
        expected = expected_of(serving.served[1], inputs)["score"]
        np.testing.assert_allclose(expected, answer["score"], rtol=0, atol=1e-6)


def test_requests_are_collected_into_passes_of_at_most_the_batching_rows(serving: Serving) -> None:
    # As many requests as the batching has rows have six times its rows; one has more than it alone.
    bodies = [double(float(at + 2), rows=5 + at % 3) for at in range(47)] + [double(49.0, rows=40)]
    with ThreadPoolExecutor(48) as threads:
        answers = list(threads.map(lambda body: post(serving.addresses[3], body).json(), bodies))
    together = {row for answer in answers[:-1] for row in output(answer, "together")}

    assert 7 < max(together) <= BATCHING.batch_size_max
    assert {40} == set(output(answers[-1], "together"))
    expected = [[2.0 * (at + 2)] * (5 + at % 3) for at in range(47)] + [[98.0] * 40]
    assert expected == [output(answer, "double") for answer in answers]


def test_a_row_without_an_answer_fails_its_own_request_alone(serving: Serving) -> None:
    address = serving.addresses[3]
    bodies = [double(float(at)) for at in range(16)]
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda body: post(address, body), bodies))

    assert [500 if at == 1 else 200 for at in range(16)] == [each.status_code for each in answers]
    assert "The model must predict every row" in answers[1].json()["error"]
    assert [2.0 * at for at in range(16) if at != 1] == [
        output(each.json(), "double")[0] for each in answers if each.status_code == 200
    ]


def test_a_server_listens_on_loopback_alone(serving: Serving) -> None:
    status = serving.host.status(serving.served[0][0])

    assert status is not None
    assert 3 == len(hosts := listening(status.pid))
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
