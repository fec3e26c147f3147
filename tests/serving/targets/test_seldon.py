"""Seldon: its manifests, and the real MLServer with four releases side by side."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
import yaml
from mlflow.types import ColSpec, Schema

from infra.local.controller import local_controller
from serving.release import Dial, Scaling
from serving.targets import Address
from serving.targets.folder import FolderHost
from serving.targets.seldon import Seldon, model_settings
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
from tests.serving.targets.manifests import KUBERNETES_NAME, QUANTITY, closed
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
    return [release_of(first, "scores"), release_of(second, "scores", dial=BATCHING)]


@pytest.fixture(scope="module")
def partial(log_code: Callable[..., str]) -> Served:
    """A model that has no finite answer where a is 1, in batches; it also tells the rows of its pass."""
    answer = "pd.DataFrame({'double': np.where(x['a'] == 1, np.nan, x['a'] * 2), 'together': float(len(x))})"
    outputs = Schema([ColSpec("double", "double"), ColSpec("double", "together")])
    uri = log_code("partial", answer, Schema([ColSpec("double", "a")]), outputs)
    return release_of(uri, "partial", dial=BATCHING)


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


def test_requests_are_collected_into_passes_of_at_most_the_dials_rows(serving: Serving) -> None:
    bodies = [double(float(at + 2), rows=1 + at % 3) for at in range(48)]
    with ThreadPoolExecutor(48) as threads:
        answers = list(threads.map(lambda body: post(serving.addresses[3], body).json(), bodies))
    together = {row for answer in answers for row in output(answer, "together")}

    assert 1 < max(together) <= BATCHING.batch_size_max
    assert [[2.0 * (at + 2)] * (1 + at % 3) for at in range(48)] == [output(answer, "double") for answer in answers]


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


def manifest_of(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    return closed(
        {
            "apiVersion": {"const": "mlops.seldon.io/v1alpha1"},
            "kind": {"const": kind},
            "metadata": closed({"name": KUBERNETES_NAME, "namespace": KUBERNETES_NAME}, "name"),
            "spec": spec,
        },
        *("apiVersion", "kind", "metadata", "spec"),
    )


REPLICAS = {"type": "integer", "minimum": 0}
MODEL = manifest_of(
    "Model",
    closed(
        {
            "storageUri": {"type": "string", "pattern": r"^\w+://\S+$"},
            "requirements": {"type": "array", "items": {"type": "string"}, "minItems": 1},
            "memory": QUANTITY,
            **dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), REPLICAS),
            "server": KUBERNETES_NAME,
        },
        "storageUri",
    ),
)
EXPERIMENT = manifest_of(
    "Experiment",
    closed(
        {
            "default": KUBERNETES_NAME,
            "candidates": {
                "type": "array",
                "minItems": 1,
                "items": closed({"name": KUBERNETES_NAME, "weight": REPLICAS}, "name", "weight"),
            },
            "mirror": closed(
                {"name": KUBERNETES_NAME, "percent": {"type": "integer", "maximum": 100}}, "name", "percent"
            ),
        },
        "candidates",
    ),
)
SELDON = Seldon(python=Path("python"), storage_uri="s3://lake/endpoints")


def test_the_model_has_the_releases_files_and_its_replicas(mlp: list[Served]) -> None:
    release = mlp[0][0].model_copy(update={"scaling": Scaling(replicas_min=0, replicas_max=4)})
    manifest = yaml.safe_load(SELDON.render(release, mlp[0][1]).files["model.yaml"])
    jsonschema.validate(manifest, MODEL)
    spec = manifest["spec"]

    assert f"scores-v{release.version}" == manifest["metadata"]["name"]
    assert (1, 0, 4) == (spec["replicas"], spec["minReplicas"], spec["maxReplicas"])
    assert f"s3://lake/endpoints/scores/{release.version}" == spec["storageUri"]


def test_an_experiment_splits_by_weights_and_mirrors(mlp: list[Served]) -> None:
    (stable, _), (new, _) = mlp
    split = SELDON.experiment(stable, {stable: 90, new: 10}, shadow=new)
    jsonschema.validate(split, EXPERIMENT)

    names = [f"scores-v{stable.version}", f"scores-v{new.version}"]
    assert names[0] == split["spec"]["default"]
    assert list(zip(names, (90, 10), strict=True)) == [
        (each["name"], each["weight"]) for each in split["spec"]["candidates"]
    ]
    assert {"name": names[1], "percent": 100} == split["spec"]["mirror"]


@pytest.mark.parametrize("weights", [{}, {"new": 1}, {"stable": 0}, {"stable": -1, "new": 2}])
def test_an_experiment_weighs_its_default(mlp: list[Served], weights: dict[str, int]) -> None:
    releases = {"stable": mlp[0][0], "new": mlp[1][0]}
    with pytest.raises(ValueError, match="must be among the weights, some above 0"):
        SELDON.experiment(releases["stable"], {releases[name]: weight for name, weight in weights.items()})


@pytest.mark.parametrize(("right", "wrong"), [("storageUri", "storageURI"), ("minReplicas", "min_replicas")])
def test_a_typo_in_the_manifest_is_caught(mlp: list[Served], right: str, wrong: str) -> None:
    manifest = json.dumps(SELDON.model(mlp[0][0])).replace(f'"{right}"', f'"{wrong}"')

    with pytest.raises(jsonschema.ValidationError, match=re.escape(wrong)):
        jsonschema.validate(json.loads(manifest), MODEL)


def test_the_dial_is_mlservers_adaptive_batching(mlp: list[Served]) -> None:
    def batching(dial: Dial) -> tuple[int, float]:
        settings = model_settings(mlp[0][0].model_copy(update={"dial": dial}))
        return settings["max_batch_size"], settings["max_batch_time"]

    assert (0, 0.0) == batching(Dial())
    assert (32, 0.002) == batching(Dial(batch_size_max=32, wait_ms_max=2))
    # MLServer takes no wait for no batches.
    assert (32, 0.0001) == batching(Dial(batch_size_max=32))
