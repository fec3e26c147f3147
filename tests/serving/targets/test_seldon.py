"""What a cluster with Seldon Core 2 is given, held against a schema of the fields that are used."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from serving.model.batching import BatchingConfig
from serving.model.release import Scaling
from serving.targets.seldon import Seldon, make_model_settings
from tests.serving.targets.manifests import KUBERNETES_NAME, NEW, QUANTITY, STABLE, closed


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


def test_the_model_has_the_releases_files_and_its_replicas() -> None:
    release = STABLE.model_copy(update={"scaling": Scaling(replicas_min=0, replicas_max=4)})
    manifest = yaml.safe_load(SELDON.render(release, Path("model")).files["model.yaml"])
    jsonschema.validate(manifest, MODEL)
    spec = manifest["spec"]

    assert f"scores-v{release.version}" == manifest["metadata"]["name"]
    assert (1, 0, 4) == (spec["replicas"], spec["minReplicas"], spec["maxReplicas"])
    assert f"s3://lake/endpoints/scores/{release.version}" == spec["storageUri"]


def test_an_experiment_splits_by_weights_and_mirrors() -> None:
    split = SELDON.render_experiment(STABLE, {STABLE: 90, NEW: 10}, shadow=NEW)
    jsonschema.validate(split, EXPERIMENT)

    names = [f"scores-v{STABLE.version}", f"scores-v{NEW.version}"]
    assert names[0] == split["spec"]["default"]
    assert list(zip(names, (90, 10), strict=True)) == [
        (each["name"], each["weight"]) for each in split["spec"]["candidates"]
    ]
    assert {"name": names[1], "percent": 100} == split["spec"]["mirror"]


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
