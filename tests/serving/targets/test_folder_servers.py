"""The real servers of BentoML, KServe and Seldon (MLServer), each with several releases side by side."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from mlflow.types import ColSpec, Schema

from infra.local.controller import local_controller
from infra.local.process import ServerCommand, base_environment, start_on_free_ports
from infra.local.process import send_request as ask_port
from infra.worker import list_process_tree
from serving.targets import Address, Target
from serving.targets.bentoml import BentoMLTarget
from serving.targets.folder import FolderHost, Status, write_folder
from serving.targets.kserve import KServeTarget
from serving.targets.seldon import SeldonTarget
from tasks.endpoint.load import run_closed_loop
from tasks.endpoint.resolve import Sample
from tests.eventually import eventually
from tests.servers import python_or_skip
from tests.serving.targets.folder_servers import (
    BAD_REQUESTS,
    BATCHING,
    Arrays,
    Served,
    ask,
    deploy_all,
    document,
    expected_of,
    listening,
    post,
    release_of,
    rows,
)
from tests.support import register_network

# The first run makes the environment of each server, which takes minutes.
pytestmark = [pytest.mark.timeout(1200), pytest.mark.machines]

TARGETS: dict[str, Callable[[Path], Target]] = {
    "bentoml": lambda python: BentoMLTarget(python=python),
    "kserve": lambda python: KServeTarget(python=python),
    "mlserver": lambda python: SeldonTarget(python=python),
}
# Of the two versions of one network on each server.
BATCHINGS = {"bentoml": (BATCHING, BATCHING), "kserve": (None, None), "mlserver": (None, BATCHING)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    server: str
    host: FolderHost
    served: list[Served]
    addresses: list[Address]

    def status(self, number: int) -> Status:
        status = self.host.status(self.served[number][0])
        assert status is not None
        return status

    def pid(self, number: int) -> int:
        pid = self.status(number).pid
        assert pid is not None
        return pid

    def check(self, number: int, inputs: Arrays) -> None:
        """Ask a release, and hold its answer against that of its model in this process."""
        answer = ask(self.addresses[number], self.served[number][0], inputs)
        expected = expected_of(self.served[number], inputs)

        for name, values in expected.items():
            np.testing.assert_allclose(values, answer[name], rtol=0, atol=1e-6)


def two_versions(server: str) -> list[Served]:
    """Two versions of one network."""
    return [
        release_of(
            register_network(f"on-{server}", seed=seed), "scores", **({"batching": batching} if batching else {})
        )
        for seed, batching in enumerate(BATCHINGS[server])
    ]


@pytest.fixture(scope="module", params=TARGETS)
def serving(
    request: pytest.FixtureRequest, registry: Path, tmp_path_factory: pytest.TempPathFactory
) -> Generator[Serving]:
    """Two versions of a network, MiniLM where the server takes text, and `partial` on MLServer."""
    server = request.param
    target = TARGETS[server](python_or_skip(server))
    served = two_versions(server)
    if server != "bentoml":
        served.append(release_of(request.getfixturevalue("minilm"), "glosses"))
    if server == "mlserver":
        served.append(request.getfixturevalue("partial"))
    with local_controller(tmp_path_factory.mktemp(server)) as controller:
        host = FolderHost(folder=controller.folder, target=target)
        yield Serving(server=server, host=host, served=served, addresses=deploy_all(host, served))


@pytest.fixture(scope="module")
def partial(log_code: Callable[..., str]) -> Served:
    """A model in batches without a finite answer where a is 1; its other output is the number of rows of its pass."""
    answer = "pd.DataFrame({'double': np.where(x['a'] == 1, np.nan, x['a'] * 2), 'together': float(len(x))})"
    outputs = Schema([ColSpec("double", "double"), ColSpec("double", "together")])
    uri = log_code("partial", answer, Schema([ColSpec("double", "a")]), outputs)
    return release_of(uri, "partial", batching=BATCHING)


def only(*servers: str) -> pytest.MarkDecorator:
    """Run a test on these servers alone."""
    return pytest.mark.parametrize("serving", servers, indirect=True)


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("count", [1, 7, 50, 300])
def test_each_of_two_versions_answers_as_its_model_predicts(serving: Serving, version: int, count: int) -> None:
    serving.check(version, rows(count, seed=count))


@only("kserve", "mlserver")
def test_texts_travel_as_bytes_and_come_back_as_their_embeddings(serving: Serving, glosses: list[str]) -> None:
    (value,) = serving.served[2][0].contract.inputs
    serving.check(2, {value.name: np.array([*glosses[:5], "naïve café ☕"], dtype=object)})


@pytest.mark.parametrize("what", BAD_REQUESTS)
def test_a_bad_request_is_refused_with_what_is_wrong(serving: Serving, what: str) -> None:
    body, words = BAD_REQUESTS[what]
    answer = post(serving.addresses[1], body if isinstance(body, bytes) else json.dumps(body).encode())

    assert answer.status_code in range(400, 500), answer.text
    assert words in answer.text
    assert serving.server != "bentoml" or ["error"] == list(answer.json())
    release = serving.served[1][0]
    log = serving.host.folder / release.endpoint / release.version / "server.log"
    assert "InvalidInput" not in log.read_text()


def test_a_model_that_is_not_there_is_not_found(serving: Serving) -> None:
    answer = post(serving.addresses[0], json.dumps(document()).encode(), model="nobody")

    assert 404 == answer.status_code
    assert serving.server != "bentoml" or "'nobody'" in answer.json()["error"]


def test_requests_at_once_get_their_own_answers_and_bad_ones_among_them_spoil_none(serving: Serving) -> None:
    bodies = [json.dumps(document(shape=[1, 4], data=[0.0] * 4)).encode(), b"{}"]
    with ThreadPoolExecutor(48) as threads:
        bad = [threads.submit(post, serving.addresses[1], bodies[at % 2]) for at in range(16)]
        list(threads.map(lambda seed: serving.check(1, rows(1 + seed % 3, seed=seed)), range(48)))

    assert all(each.result().status_code in range(400, 500) for each in bad)


def test_a_server_listens_on_loopback_alone(serving: Serving) -> None:
    pid = serving.pid(0)

    assert {"127.0.0.1"} == {host for member in list_process_tree(pid) for host in listening(member)}
    if serving.server != "bentoml":
        assert {"kserve": 1, "mlserver": 3}[serving.server] == len(listening(pid))


@only("bentoml")
def test_many_at_a_time_are_all_answered_for_as_long_as_they_ask(serving: Serving) -> None:
    # More than the 100 after which BentoML would renew its connections under them.
    release, sample = serving.served[0][0], Sample(inputs=rows(64), outputs={}, rows=64)
    answers = 0
    while answers <= 300:
        # A request that is broken off raises.
        answers += run_closed_loop(serving.addresses[0], release.contract, sample, callers=16, seconds=4.0).answers


@only("bentoml")
def test_requests_that_come_as_the_models_process_closes_its_idle_connections_are_answered(serving: Serving) -> None:
    # After 5 s of silence it closes them, whatever its client does.
    served, address = serving.served[0], serving.addresses[0]
    with ThreadPoolExecutor(16) as threads:
        for idle_s in (0.0, 4.98, 5.0, 5.02):
            time.sleep(idle_s)
            answers = list(threads.map(lambda seed: ask(address, served[0], rows(2, seed))["score"], range(16)))

            assert all(answer.shape == answers[0].shape for answer in answers)


@only("bentoml")
def test_bentoml_takes_no_pickles_from_outside(serving: Serving) -> None:
    pickled = {"Content-Type": "application/vnd.bentoml+pickle"}
    answer = httpx.post(f"{serving.addresses[0].url}/predict_requests", content=b"x", headers=pickled)

    assert 404 == answer.status_code


@only("kserve")
def test_its_metadata_names_the_tensors_of_the_model(serving: Serving) -> None:
    address = serving.addresses[0]
    metadata = httpx.get(f"{address.url}/v2/models/{address.model}", trust_env=False).json()

    assert [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}] == metadata["inputs"]
    assert [{"name": "score", "datatype": "FP32", "shape": [-1, 1]}] == metadata["outputs"]


def double(value: float, rows: int = 1) -> bytes:
    """A request to `partial`."""
    tensor = {"name": "a", "shape": [rows, 1], "datatype": "FP64", "data": [value] * rows}
    return json.dumps({"inputs": [tensor]}).encode()


def output(answer: dict[str, Any], name: str) -> list[float]:
    (data,) = (each["data"] for each in answer["outputs"] if each["name"] == name)
    return data


@only("mlserver")
def test_requests_are_collected_into_passes_of_at_most_the_batch_size(serving: Serving) -> None:
    # As many requests as a batch may have rows have six times its rows; one request has more than it alone.
    bodies = [double(float(at + 2), rows=5 + at % 3) for at in range(47)] + [double(49.0, rows=40)]
    with ThreadPoolExecutor(48) as threads:
        answers = list(threads.map(lambda body: post(serving.addresses[3], body).json(), bodies))
    together = {row for answer in answers[:-1] for row in output(answer, "together")}

    assert 7 < max(together) <= BATCHING.batch_size_max
    assert {40} == set(output(answers[-1], "together"))
    expected = [[2.0 * (at + 2)] * (5 + at % 3) for at in range(47)] + [[98.0] * 40]
    assert expected == [output(answer, "double") for answer in answers]


@only("mlserver")
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


def test_a_killed_server_comes_back_at_its_address_while_another_serves(serving: Serving) -> None:
    before = serving.status(0)
    os.kill(serving.pid(0), signal.SIGKILL)

    serving.check(1, rows(1))
    status = eventually(lambda: serving.status(0), lambda now: now.pid not in (None, before.pid), seconds=120)

    assert (before.starts + 1, serving.addresses[0].url) == (status.starts, status.url)
    serving.check(0, rows(3))


# The last of those that ask the servers: it takes one of them down.
def test_one_that_is_removed_leaves_the_others_serving(serving: Serving) -> None:
    serving.host.remove(serving.served[0][0])
    serving.host.remove(serving.served[0][0])

    with pytest.raises(httpx.TransportError):
        post(serving.addresses[0], b"{}")
    serving.check(1, rows(3))


def test_a_bento_is_built_from_the_folder_and_served(registry: Path, tmp_path: Path) -> None:
    target, (served, _) = BentoMLTarget(python=python_or_skip("bentoml")), two_versions("bentoml")
    folder = tmp_path / "release"
    write_folder(target.render(*served), folder)
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

    def make_command(ports: Sequence[int]) -> ServerCommand:
        return ServerCommand(
            argv=(str(target.python), "-m", "bentoml", "serve", tag, "--host", "127.0.0.1", "--port", str(ports[0])),
            environment=environment,
            folder=tmp_path,
            log_path=tmp_path / "serve.log",
            ready=lambda: ask_port("GET", ports[0], "/v2/models/scores/ready").ok,
            ready_s_max=120,
        )

    process, ports = start_on_free_ports(1, make_command)
    with process:
        address = Address(url=f"http://127.0.0.1:{ports[0]}", model="scores", version=None)
        answer = ask(address, served[0], rows(3))

    assert tag.startswith("scores:")
    np.testing.assert_allclose(expected_of(served, rows(3))["score"], answer["score"], rtol=0, atol=1e-6)
