"""What a cluster with Seldon Core 2 is given, held against a schema of the fields that are used."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
import yaml

from infra.local.process import ServerCommand, base_environment, send_request, start_on_free_ports
from serving.model.batching import BatchingConfig
from serving.model.contract import Contract, Input, Output
from serving.model.graph import Combine, Graph
from serving.model.release import Scaling
from serving.targets.seldon import SeldonTarget, make_mean_settings, make_model_settings
from tests.servers import python_or_skip
from tests.serving.targets.manifests import KUBERNETES_NAME, NEW, QUANTITY, STABLE, closed
from tests.serving.toys import column


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
            "resourceType": {"enum": ["model", "pipeline"]},
            "mirror": closed(
                {"name": KUBERNETES_NAME, "percent": {"type": "integer", "maximum": 100}}, "name", "percent"
            ),
        },
        "candidates",
    ),
)
NAMES = {"type": "array", "items": {"type": "string", "pattern": r"^\S+$"}, "minItems": 1}
JOIN = {"enum": ["inner", "outer", "any"]}
TENSOR_MAP = {"type": "object", "additionalProperties": {"type": "string"}}
PIPELINE = manifest_of(
    "Pipeline",
    closed(
        {
            "steps": {
                "type": "array",
                "minItems": 1,
                "items": closed(
                    {
                        "name": KUBERNETES_NAME,
                        **dict.fromkeys(("inputs", "triggers"), NAMES),
                        **dict.fromkeys(("inputsJoinType", "triggersJoinType"), JOIN),
                        "joinWindowMs": REPLICAS,
                        "tensorMap": TENSOR_MAP,
                        "batch": closed({"size": REPLICAS, "windowMs": REPLICAS, "rolling": {"type": "boolean"}}),
                    },
                    "name",
                ),
            },
            "output": closed(
                {"steps": NAMES, "stepsJoin": JOIN, "joinWindowMs": REPLICAS, "tensorMap": TENSOR_MAP}, "steps"
            ),
        },
        "steps",
    ),
)
SELDON = SeldonTarget(python=Path("python"), storage_uri="s3://lake/endpoints")


def test_the_model_has_the_releases_files_and_its_replicas() -> None:
    release = STABLE.model_copy(update={"scaling": Scaling(replicas_min=0, replicas_max=4)})
    manifest = yaml.safe_load(SELDON.render(release, Path("model")).files["model.yaml"])
    jsonschema.validate(manifest, MODEL)
    spec = manifest["spec"]

    assert f"scores-v{release.version}" == manifest["metadata"]["name"]
    assert (1, 0, 4) == (spec["replicas"], spec["minReplicas"], spec["maxReplicas"])
    assert f"s3://lake/endpoints/scores/{release.version}" == spec["storageUri"]


def test_an_experiment_splits_by_weights_and_mirrors() -> None:
    shadow = NEW.model_copy(update={"pin": NEW.pin.model_copy(update={"version": "3"})})
    split = SELDON.render_experiment(STABLE, {STABLE: 90, NEW: 10}, shadow=shadow)
    jsonschema.validate(split, EXPERIMENT)

    names = [f"scores-v{STABLE.version}", f"scores-v{NEW.version}"]
    assert names[0] == split["spec"]["default"]
    assert list(zip(names, (90, 10), strict=True)) == [
        (each["name"], each["weight"]) for each in split["spec"]["candidates"]
    ]
    assert {"name": "scores-v3", "percent": 100} == split["spec"]["mirror"]


def test_a_shadow_of_an_experiment_is_none_of_its_candidates() -> None:
    with pytest.raises(ValueError, match="A shadow must have no weight, but version 2 has 10"):
        SELDON.render_experiment(STABLE, {STABLE: 90, NEW: 10}, shadow=NEW)


def test_an_experiment_over_graphs_is_one_over_pipelines() -> None:
    first, second = chained(), chained().model_copy(update={"version": "987654321"})
    split = SELDON.render_experiment(first, {first: 90, second: 10})
    jsonschema.validate(split, EXPERIMENT)

    assert "pipeline" == split["spec"]["resourceType"]
    assert ["scores-v123456789", "scores-v987654321"] == [each["name"] for each in split["spec"]["candidates"]]


@pytest.mark.parametrize("weights", [{}, {"new": 1}, {"stable": 0}, {"stable": -1, "new": 2}])
def test_an_experiment_weighs_its_default(weights: dict[str, int]) -> None:
    releases = {"stable": STABLE, "new": NEW}
    with pytest.raises(ValueError, match="must be among the weights, some above 0"):
        SELDON.render_experiment(releases["stable"], {releases[name]: weight for name, weight in weights.items()})


@pytest.mark.parametrize(("right", "wrong"), [("storageUri", "storageURI"), ("minReplicas", "min_replicas")])
def test_a_typo_in_the_manifest_is_caught(right: str, wrong: str) -> None:
    manifest = json.dumps(SELDON.render_model(STABLE)).replace(f'"{right}"', f'"{wrong}"')

    with pytest.raises(jsonschema.ValidationError, match=re.escape(wrong)):
        jsonschema.validate(json.loads(manifest), MODEL)


def test_the_batching_is_mlservers_adaptive_batching() -> None:
    def batching(config: BatchingConfig) -> tuple[int, float]:
        settings = make_model_settings(STABLE.model_copy(update={"batching": config}))
        return settings["max_batch_size"], settings["max_batch_time"]

    assert (0, 0.0) == batching(BatchingConfig())
    assert (32, 0.002) == batching(BatchingConfig(batch_size_max=32, wait_ms_max=2))
    # MLServer takes no wait for no batches.
    assert (32, 0.0001) == batching(BatchingConfig(batch_size_max=32))


def chained(combine: Combine = "chain") -> Graph:
    """A graph of two steps: the second one takes the score of the first, or both take x."""
    score = Input(name="score", dtype="float32", shape=(1,), columns=(column("float32", "score"),))
    after = Contract(inputs=(score,), outputs=(Output(name="label", dtype="str"),))
    steps = (STABLE, NEW.model_copy(update={"contract": after}) if combine == "chain" else NEW)
    return Graph(endpoint="scores", version="123456789", combine=combine, steps=steps)


@pytest.mark.parametrize(
    ("combine", "parts", "inputs"),
    [
        ("chain", ["1", "2"], [None, ["scores-v123456789-1"]]),
        ("mean", ["1", "2", "mean"], [None, None, ["scores-v123456789-1", "scores-v123456789-2"]]),
    ],
)
def test_a_graph_is_a_pipeline_and_a_model_for_each_of_its_parts(
    combine: Combine, parts: list[str], inputs: list[list[str] | None]
) -> None:
    rendered = SELDON.render_graph(chained(combine), [Path("one"), Path("two")])
    pipeline = yaml.safe_load(rendered.files["pipeline.yaml"])
    models = [yaml.safe_load(rendered.files[f"{part}/model.yaml"]) for part in parts]
    jsonschema.validate(pipeline, PIPELINE)
    for part, model in zip(parts, models, strict=True):
        jsonschema.validate(model, MODEL)
        assert f"s3://lake/endpoints/scores/123456789/{part}" == model["spec"]["storageUri"]
        assert f"{part}/model-settings.json" in rendered.files
        assert f"{part}/runtime.py" in rendered.files
    names = [model["metadata"]["name"] for model in models]

    assert [f"scores-v123456789-{part}" for part in parts] == names
    assert names == [step["name"] for step in pipeline["spec"]["steps"]]
    assert inputs == [step.get("inputs") for step in pipeline["spec"]["steps"]]
    assert [names[-1]] == pipeline["spec"]["output"]["steps"]
    assert {"1/model": Path("one"), "2/model": Path("two")} == rendered.trees


def test_the_mean_gets_the_outputs_of_each_model_under_names_of_its_own() -> None:
    pipeline = SELDON.render_pipeline(chained("mean"))
    settings = make_mean_settings(chained("mean"))
    tensors = {f"scores-v123456789-{number}.outputs.score": f"{number}.score" for number in (1, 2)}

    assert tensors == pipeline["spec"]["steps"][-1]["tensorMap"]
    assert [*tensors.values()] == [each["name"] for each in settings["inputs"]]
    assert ["score"] == [each["name"] for each in settings["outputs"]]


@pytest.mark.parametrize(("right", "wrong"), [("inputs", "input"), ("output", "outputs")])
def test_a_typo_in_the_pipeline_is_caught(right: str, wrong: str) -> None:
    manifest = json.dumps(SELDON.render_pipeline(chained())).replace(f'"{right}"', f'"{wrong}"')

    with pytest.raises(jsonschema.ValidationError, match=re.escape(wrong)):
        jsonschema.validate(json.loads(manifest), PIPELINE)


@pytest.mark.machines
@pytest.mark.timeout(1200)
def test_the_mean_under_the_real_mlserver_is_that_of_the_models_outputs(tmp_path: Path) -> None:
    python = python_or_skip("mlserver")
    for name, content in SELDON.render_graph(chained("mean"), [Path("one"), Path("two")]).files.items():
        if name.startswith("mean/"):
            (tmp_path / name.removeprefix("mean/")).write_bytes(content)
    random = np.random.default_rng(0)
    given = {f"{number}.score": random.standard_normal((5, 1)).astype(np.float32) for number in (1, 2)}
    inputs = [
        {"name": name, "shape": [5, 1], "datatype": "FP32", "data": value.ravel().tolist()}
        for name, value in given.items()
    ]

    def make_command(ports: Sequence[int]) -> ServerCommand:
        names = ("HTTP", "GRPC", "METRICS")
        return ServerCommand(
            argv=(str(python), "-c", "from mlserver.cli import main; main()", "start", "."),
            environment={
                **base_environment(),
                "MLSERVER_HOST": "127.0.0.1",
                "MLSERVER_PARALLEL_WORKERS": "0",
                **{f"MLSERVER_{name}_PORT": str(port) for name, port in zip(names, ports, strict=True)},
            },
            folder=tmp_path,
            log_path=tmp_path / "log",
            ready=lambda: send_request("GET", ports[0], "/v2/models/mean/ready").ok,
            ready_s_max=300.0,
        )

    process, ports = start_on_free_ports(3, make_command)
    with process:
        answer = httpx.post(f"http://127.0.0.1:{ports[0]}/v2/models/mean/infer", json={"inputs": inputs}, timeout=60)
    (output,) = answer.json()["outputs"]

    assert ("score", [5, 1], "FP32") == (output["name"], output["shape"], output["datatype"])
    np.testing.assert_allclose(np.mean([*given.values()], axis=0).ravel(), output["data"], rtol=0, atol=1e-6)
