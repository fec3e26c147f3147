"""Graphs on the real Triton: answers equal those of the models one by one, and steps come and go with their graph."""

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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from infra.local.triton import TritonServer
from serving.errors import EndpointFailed
from serving.model.batching import BatchingConfig
from serving.model.pin import digest_folder
from serving.model.release import Release, Scaling
from serving.targets import Address
from serving.targets.triton import TritonHost
from tasks.endpoint.deploy import make_release_to_remove
from tests.graphs import PutGraph, graph_of, raw_rows, register_chain, register_prep
from tests.serving.targets.triton_models import list_instances, random_rows, served
from tests.support import register_network

pytestmark = pytest.mark.machines


@pytest.fixture(scope="module")
def host(triton: TritonServer) -> TritonHost:
    return TritonHost(repository=triton.repository, url=triton.url, grpc=triton.grpc)


@pytest.fixture(scope="module")
def uris(registry: Path) -> tuple[str, str, str]:
    return register_chain()


@pytest.fixture(scope="module")
def chain(uris: tuple[str, str, str]) -> PutGraph:
    return graph_of(uris, "chain")


@pytest.fixture(scope="module")
def at(host: TritonHost, chain: PutGraph) -> Address:
    return host.deploy_graph(chain.graph, chain.models)


@pytest.fixture(scope="module")
def ensemble(registry: Path) -> PutGraph:
    return graph_of([register_network("graph-mean", seed=seed) for seed in range(3)], "mean", combine="mean")


def list_states(triton: TritonServer, endpoint: str) -> dict[str, str]:
    """The models of an endpoint that Triton has loaded, and the version of each."""
    listed = httpx.post(f"{triton.url}/v2/repository/index", json={"ready": True}).json()
    return {each["name"]: each["version"] for each in listed if each["name"].partition(".")[0] == endpoint}


def removable(put: PutGraph) -> Release:
    return make_release_to_remove(put.graph.endpoint, put.graph.version, put.graph.contract)


@contextmanager
def asking(put: PutGraph, address: Address) -> Generator[list[str]]:
    """Ask a graph again and again from two threads, with a pause; gives what was answered but 200."""
    stop, failed, answered = threading.Event(), list[str](), list[int]()

    def ask() -> None:
        while not stop.wait(0.05):
            answer = put.post(address, raw_rows(2))
            (answered.append(2) if answer.status_code == 200 else failed.append(answer.text))

    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            pool.submit(ask)
        try:
            yield failed
        finally:
            stop.set()
    assert answered


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st_numpy.arrays(np.float64, st.tuples(st.integers(1, 40), st.just(3)), elements=st.floats(-50, 50)),
    binary=st.booleans(),
)
def test_a_chain_answers_as_its_models_do_one_by_one(chain: PutGraph, at: Address, rows: Any, *, binary: bool) -> None:
    chain.check_answers(at, {"raw": rows}, binary=binary)


def test_the_versions_of_the_steps_are_pinned_and_their_graph_has_a_number(
    triton: TritonServer, chain: PutGraph, at: Address
) -> None:
    name = f"chain.v{chain.graph.version}"
    config = httpx.get(f"{triton.url}/v2/models/{name}/config").json()
    steps = config["ensemble_scheduling"]["step"]

    assert (name, chain.graph.version) == (at.model, at.version)
    assert [f"{name}.{number}" for number in (1, 2, 3)] == [each["model_name"] for each in steps]
    assert [int(step.version) for step in chain.graph.steps] == [each["model_version"] for each in steps]
    assert {
        name: chain.graph.version,
        **{f"{name}.{at}": step.version for at, step in enumerate(chain.graph.steps, 1)},
    } == (list_states(triton, "chain"))


def test_the_first_step_waits_for_others_and_the_later_ones_take_what_is_there(
    triton: TritonServer, chain: PutGraph, at: Address
) -> None:
    delays = [
        httpx.get(f"{triton.url}/v2/models/{at.model}.{number}/config").json()["dynamic_batching"][
            "max_queue_delay_microseconds"
        ]
        for number in (1, 2, 3)
    ]

    assert [1000, 0, 0] == delays


def test_requests_that_are_passed_together_get_their_own_answers(chain: PutGraph, at: Address) -> None:
    rows = raw_rows(48)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda row: chain.ask(at, {"raw": rows["raw"][row : row + 1]}), range(48)))
    expected = chain.predict(rows)

    np.testing.assert_allclose(
        expected["probability"], [answer["probability"][0] for answer in answers], rtol=0, atol=1e-6
    )
    assert expected["word"].tolist() == [answer["word"][0] for answer in answers]


def test_an_ensemble_answers_with_the_mean_of_its_models(
    triton: TritonServer, host: TritonHost, ensemble: PutGraph
) -> None:
    address = host.deploy_graph(ensemble.graph, ensemble.models)
    for binary in (False, True):
        ensemble.check_answers(address, random_rows(33), binary=binary)
    host.remove(removable(ensemble))
    host.remove(removable(ensemble))

    assert {} == list_states(triton, "mean")
    assert [] == list(host.repository.glob("mean*"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shape": [1, 4], "data": [0] * 4}, "raw"),
        ({"datatype": "FP32"}, "raw"),
        ({"name": "x"}, "unexpected inference input 'x'"),
    ],
)
def test_a_bad_request_is_refused_and_the_graph_keeps_serving(
    chain: PutGraph, at: Address, change: dict[str, Any], said: str
) -> None:
    good = {"name": "raw", "shape": [1, 3], "datatype": "FP64", "data": [0, 0, 0]}
    answer = httpx.post(
        f"{at.url}/v2/models/{at.model}/versions/{at.version}/infer", json={"inputs": [{**good, **change}]}
    )

    assert answer.status_code in range(400, 500)
    assert said in answer.json()["error"]
    chain.check_answers(at, raw_rows(1))


@pytest.mark.machines
def test_another_graph_is_deployed_and_the_earlier_one_removed_while_it_loses_no_request(
    triton: TritonServer, host: TritonHost, chain: PutGraph, at: Address, uris: tuple[str, str, str]
) -> None:
    other = graph_of((register_prep(scale=3.0), *uris[1:]), "chain")
    with asking(chain, at) as failed:
        other_at = host.deploy_graph(other.graph, other.models)
        other.check_answers(other_at, raw_rows(5))
        host.remove(removable(other))

    assert [] == failed
    assert chain.graph.version != other.graph.version
    assert 200 != other.post(other_at, raw_rows(1)).status_code
    assert {at.model} == {
        name.removesuffix(".1").removesuffix(".2").removesuffix(".3") for name in list_states(triton, "chain")
    }


def test_a_graph_beside_a_plain_model_of_its_endpoint_is_a_version_of_its_own(
    host: TritonHost, chain: PutGraph, at: Address
) -> None:
    plain = served(register_network("graph-plain", seed=0), "chain")
    plain_at = host.deploy(plain.release, plain.model)
    listed = host.list_endpoints()["chain"]
    answer = plain.ask(plain_at, random_rows(2))["score"]
    host.remove(plain.release)

    assert {at, plain_at} == set(listed)
    np.testing.assert_allclose(plain.predict(random_rows(2))["score"], answer, rtol=0, atol=1e-6)
    assert (at,) == host.list_endpoints()["chain"]
    chain.check_answers(at, raw_rows(2))


@pytest.mark.machines
def test_instances_and_batching_change_while_no_request_is_lost(
    triton: TritonServer, host: TritonHost, chain: PutGraph, at: Address
) -> None:
    other = graph_of(
        [step.pin.uri for step in chain.graph.steps], "chain", batching=BatchingConfig(batch_size_max=4, wait_ms_max=2)
    )
    with asking(chain, at) as failed:
        host.scale("chain", 2)
        scaled = count_instances(triton, at.model)
        again = host.deploy_graph(other.graph, other.models)
        redeployed = count_instances(triton, at.model)
        host.scale("chain", 1)

    assert [] == failed
    assert at == again
    assert [2, 2, 2] == scaled == redeployed
    assert 1 == host.count_instances("chain")
    assert {f"{at.model}.{number}" for number in (1, 2, 3)} == host.list_scaled_models("chain")
    chain.check_answers(at, raw_rows(3))


def count_instances(triton: TritonServer, model: str) -> list[int]:
    configs = [httpx.get(f"{triton.url}/v2/models/{model}.{number}/config").json() for number in (1, 2, 3)]
    return [config["instance_group"][0]["count"] for config in configs]


def test_a_graph_is_unloaded_with_its_steps_and_loaded_again(
    triton: TritonServer, host: TritonHost, chain: PutGraph, at: Address
) -> None:
    host.unload("chain")
    host.scale("chain", 2)
    host.scale("chain", 1)
    asleep = chain.post(at, raw_rows(1)).status_code
    host.load("chain")

    assert 200 != asleep
    assert 4 == len(list_states(triton, "chain"))
    chain.check_answers(at, raw_rows(1))


@pytest.mark.machines
def test_a_step_whose_process_died_is_started_again(
    triton: TritonServer, host: TritonHost, chain: PutGraph, at: Address
) -> None:
    (instance,) = list_instances(triton, f"{at.model}.2")
    os.kill(instance, signal.SIGKILL)
    dead = chain.post(at, raw_rows(1))
    restarted = host.restart_dead_instances("chain")

    assert "is not healthy" in dead.text
    assert restarted
    assert not host.restart_dead_instances("chain")
    chain.check_answers(at, raw_rows(1))


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """The files of a model that no server can load."""
    (tmp_path / "MLmodel").write_text("flavors: {}\n")
    return tmp_path


def break_last_step(put: PutGraph, folder: Path) -> PutGraph:
    last = put.graph.steps[-1]
    pinned = last.model_copy(update={"pin": last.pin.model_copy(update={"digest": digest_folder(folder)})})
    graph = put.graph.model_copy(update={"steps": (*put.graph.steps[:-1], pinned)})
    return replace(put, graph=graph, models=(*put.models[:-1], folder))


@pytest.mark.machines
def test_a_graph_with_a_step_that_does_not_load_is_refused_with_the_reason_and_leaves_nothing(
    triton: TritonServer, host: TritonHost, chain: PutGraph, broken: Path
) -> None:
    put = break_last_step(chain, broken)
    graph = put.graph.model_copy(update={"endpoint": "broken"})
    with pytest.raises(EndpointFailed, match=r"Triton must load 'broken.v(?s:.*)'broken.v\d+.3'(?s:.*)python_function"):
        host.deploy_graph(graph, put.models)

    assert {} == list_states(triton, "broken")
    assert [] == list(host.repository.glob("broken*"))


@pytest.mark.machines
def test_a_step_that_does_not_load_again_leaves_the_graph_as_it_was(
    host: TritonHost, chain: PutGraph, at: Address, broken: Path
) -> None:
    files = read_files(host.repository)
    put = break_last_step(graph_of([step.pin.uri for step in chain.graph.steps], "chain", scaling=Scaling()), broken)
    other = put.graph.without_batching()
    with asking(chain, at) as failed, pytest.raises(EndpointFailed, match=r"must load .*\.3' again .* but serves on"):
        host.deploy_graph(other, put.models)

    assert [] == failed
    assert files == read_files(host.repository)
    chain.check_answers(at, raw_rows(3))


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
