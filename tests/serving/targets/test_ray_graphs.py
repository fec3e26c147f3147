"""Graphs on Ray Serve: what Ray is given, held against its own schema, and their answers on a real cluster."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from serving.errors import EndpointFailed
from serving.model.graph import Graph
from serving.model.pin import digest_folder
from serving.model.release import Release, Scaling
from serving.targets import Address
from serving.targets.ray_serve import RayServeHost, RayServeTarget, make_application_name
from tasks.endpoint.deploy import make_release_to_remove
from tests.eventually import eventually
from tests.graphs import PutGraph, graph_of, raw_rows, register_chain
from tests.ray_cluster import ray_cluster
from tests.releases import model_url
from tests.serving.targets.test_ray_serve import RAY_SERVICE, SCALINGS, check_serve_config
from tests.support import register_network

pytest.importorskip("ray", reason="Ray is an extra: pip install 'overnight[ray]'")

TARGET = RayServeTarget(folder="/releases", image="registry.example/overnight:1")


@pytest.fixture(scope="module")
def chain(registry: Path) -> PutGraph:
    return graph_of(register_chain(), "chain")


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_a_graph_is_what_ray_and_kuberay_take(chain: PutGraph, scaling: Scaling) -> None:
    files = TARGET.render_graph(chain.graph.with_scaling(scaling), chain.models).files
    config = yaml.safe_load(files["serve.yaml"])
    check_serve_config(config)
    manifest = yaml.safe_load(files["rayservice.yaml"])
    RAY_SERVICE.validate(manifest)
    check_serve_config(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    (worker,) = manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (application,) = config["applications"]

    assert ["Step1", "Step2", "Step3", "Composition"] == [each["name"] for each in application["deployments"]]
    assert [1, 1, 1, 0] == [each["ray_actor_options"]["num_cpus"] for each in application["deployments"]]
    assert 3 * scaling.replicas_max == worker["maxReplicas"]


def test_the_folder_holds_the_graph_and_each_step_below_its_number(chain: PutGraph) -> None:
    rendered = TARGET.render_graph(chain.graph, chain.models)

    assert chain.graph == Graph.model_validate_json(rendered.files["release.json"])
    assert {f"{number}/model": model for number, model in enumerate(chain.models, start=1)} == rendered.trees
    assert "serving/model/graph.py" in rendered.files
    for number, step in enumerate(chain.graph.steps, start=1):
        assert step == Release.model_validate_json(rendered.files[f"{number}/release.json"])


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Generator[RayServeHost]:
    with ray_cluster(tmp_path_factory.mktemp("ray")) as cluster:
        folder = tmp_path_factory.mktemp("releases")
        yield RayServeHost(
            dashboard_url=cluster.dashboard_url,
            serve_url=cluster.serve_url,
            folder=folder,
            target=RayServeTarget(folder=str(folder), keep_warm_seconds=3),
            token=cluster.token,
            ready_seconds_max=600.0,
        )


@pytest.fixture(scope="module")
def at(host: RayServeHost, chain: PutGraph) -> Address:
    return host.deploy_graph(chain.graph, chain.models)


@pytest.mark.timeout(1500)
@pytest.mark.machines
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st_numpy.arrays(np.float64, st.tuples(st.integers(1, 40), st.just(3)), elements=st.floats(-50, 50)),
    binary=st.booleans(),
)
def test_a_chain_answers_as_its_models_do_one_by_one(chain: PutGraph, at: Address, rows: Any, *, binary: bool) -> None:
    chain.check_answers(at, {"raw": rows}, binary=binary)


@pytest.mark.timeout(1500)
@pytest.mark.machines
def test_requests_at_once_each_get_their_own_answers(chain: PutGraph, at: Address) -> None:
    rows = raw_rows(32)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda row: chain.ask(at, {"raw": rows["raw"][row : row + 1]}), range(32)))
    expected = chain.predict(rows)

    np.testing.assert_allclose(
        expected["probability"], [answer["probability"][0] for answer in answers], rtol=0, atol=1e-6
    )


@pytest.mark.timeout(1500)
@pytest.mark.machines
def test_a_bad_request_is_refused_and_the_graph_keeps_serving(chain: PutGraph, at: Address) -> None:
    x = {"name": "x", "shape": [1, 3], "datatype": "FP64", "data": [0, 0, 0]}
    answer = httpx.post(f"{model_url(at)}/infer", json={"inputs": [x]})

    assert 400 == answer.status_code
    assert "raw" in answer.json()["error"]
    chain.check_answers(at, raw_rows(2))


@pytest.mark.timeout(1500)
@pytest.mark.machines
def test_an_ensemble_answers_with_the_mean_and_is_removed_while_another_graph_serves(
    registry: Path, host: RayServeHost, chain: PutGraph, at: Address
) -> None:
    put = graph_of([register_network("graph-mean", seed=seed) for seed in range(2)], "mean", combine="mean")
    address = host.deploy_graph(put.graph, put.models)
    x = np.random.default_rng(0).standard_normal((33, 3), dtype=np.float32)
    put.check_answers(address, {"x": x})
    host.remove(make_release_to_remove("mean", put.graph.version, put.graph.contract))

    assert 404 == httpx.get(f"{model_url(address)}/ready").status_code
    assert [] == list(host.folder.glob("mean-*"))
    chain.check_answers(at, raw_rows(2))


@pytest.mark.timeout(1500)
@pytest.mark.machines
def test_a_graph_with_a_step_that_does_not_load_is_refused_with_the_reason(
    host: RayServeHost, chain: PutGraph, at: Address, tmp_path: Path
) -> None:
    (tmp_path / "MLmodel").write_text("flavors: {}\n")
    last = chain.graph.steps[-1]
    pinned = last.model_copy(update={"pin": last.pin.model_copy(update={"digest": digest_folder(tmp_path)})})
    graph = chain.graph.model_copy(update={"endpoint": "broken", "steps": (*chain.graph.steps[:-1], pinned)})
    put = replace(chain, graph=graph, models=(*chain.models[:-1], tmp_path))
    with pytest.raises(EndpointFailed, match=r"broken-\d+ must start on Ray, got (?s:.*)python_function"):
        host.deploy_graph(put.graph, put.models)

    assert [] == list(host.folder.glob("broken-*"))
    chain.check_answers(at, raw_rows(2))


@pytest.mark.timeout(1500)
@pytest.mark.machines
def test_a_graph_goes_to_zero_and_the_next_request_starts_it_again(host: RayServeHost, chain: PutGraph) -> None:
    graph = chain.graph.with_scaling(Scaling(replicas_min=0, replicas_max=1)).model_copy(update={"endpoint": "sleeper"})
    put = replace(chain, graph=graph)
    address = host.deploy_graph(put.graph, put.models)
    eventually(lambda: count_replicas(host, make_application_name(graph)), lambda count: count == 0, seconds=600)

    put.check_answers(address, raw_rows(2))


def count_replicas(host: RayServeHost, application: str) -> int:
    headers = {"Authorization": f"Bearer {host.token}"}
    status = httpx.get(f"{host.dashboard_url}/api/serve/applications/", headers=headers, timeout=60).json()
    return sum(len(each["replicas"]) for each in status["applications"][application]["deployments"].values())
