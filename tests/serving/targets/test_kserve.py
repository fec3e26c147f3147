"""What a cluster with KServe is given for a release, held against a schema of the fields that are used."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from serving.model.release import Scaling
from serving.targets.kserve import KServeCanary, KServeTarget, Resources
from tests.serving.targets.manifests import NEW, STABLE, check


def test_the_service_has_tritons_runtime_the_releases_files_its_replicas_and_no_batcher() -> None:
    release = STABLE.model_copy(update={"scaling": Scaling(replicas_min=0, replicas_max=4)})
    target = KServeTarget(
        python=Path("python"), storage_uri="s3://lake/endpoints", resources=Resources(cpu="2", gpus=1)
    )
    files = target.render(release, Path("model")).files
    predictor = check(yaml.safe_load(files["inferenceservice.yaml"]))["spec"]["predictor"]

    assert (0, 4) == (predictor["minReplicas"], predictor["maxReplicas"])
    assert f"s3://lake/endpoints/scores/{release.version}" == predictor["model"]["storageUri"]
    assert "kserve-tritonserver" == predictor["model"]["runtime"]
    assert {"cpu": "2", "memory": "2Gi", "nvidia.com/gpu": "1"} == predictor["model"]["resources"]["limits"]
    assert b"batcher" not in files["inferenceservice.yaml"]


def test_a_canary_is_named_in_the_list_of_newer_clusters() -> None:
    target = KServeTarget(python=Path("python"))
    spec = check(target.render_inference_service(STABLE, KServeCanary(release=NEW, percent=10)))["spec"]

    assert STABLE.version == spec["predictor"]["model"]["storageUri"].rsplit("/", 1)[1]
    assert [(10, f"v{NEW.version}")] == [(each["trafficPercent"], each["predictor"]["name"]) for each in spec["canary"]]
    assert NEW.version == spec["canary"][0]["predictor"]["model"]["storageUri"].rsplit("/", 1)[1]


def test_a_canary_is_the_next_revision_on_older_clusters() -> None:
    target = KServeTarget(python=Path("python"), canary_as="percent")
    spec = check(target.render_inference_service(STABLE, KServeCanary(release=NEW, percent=10)))["spec"]

    assert {"predictor"} == set(spec)
    assert 10 == spec["predictor"]["canaryTrafficPercent"]
    assert NEW.version == spec["predictor"]["model"]["storageUri"].rsplit("/", 1)[1]


def test_a_canary_gets_a_share() -> None:
    with pytest.raises(ValueError, match="0 to 100 percent of the traffic, got 101"):
        KServeCanary(release=STABLE, percent=101)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("minReplicas", "minReplica"), ("storageUri", "storageURI"), ("modelFormat", "model_format"), ("cpu", "cpus")],
)
def test_a_typo_in_the_manifest_is_caught(right: str, wrong: str) -> None:
    manifest = json.dumps(KServeTarget(python=Path("python")).render_inference_service(STABLE))
    assert right in manifest

    with pytest.raises(jsonschema.ValidationError, match=re.escape(wrong)):
        check(json.loads(manifest.replace(f'"{right}"', f'"{wrong}"')))


def test_a_canary_has_what_kserves_webhook_asks_for() -> None:
    scaled = {
        release.version: release.model_copy(update={"scaling": Scaling(replicas_min=least, replicas_max=8)})
        for release, least in ((STABLE, 2), (NEW, 4))
    }
    target = KServeTarget(python=Path("python"))
    service = check(
        target.render_inference_service(scaled[STABLE.version], KServeCanary(release=scaled[NEW.version], percent=10))
    )
    predictor = service["spec"]["canary"][0]["predictor"]

    assert {"serving.kserve.io/deploymentMode": "Standard"} == service["metadata"]["annotations"]
    # A canary does not scale, and has no more replicas than the version beside it.
    assert "maxReplicas" not in predictor
    assert 2 == predictor["minReplicas"]
    assert (2, 8) == tuple(service["spec"]["predictor"][name] for name in ("minReplicas", "maxReplicas"))
