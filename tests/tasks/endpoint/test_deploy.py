"""What a target's cluster is given of a route; tests/flows/test_endpoint_rollout.py has when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from serving.errors import BadInput
from serving.gateway.route import Route, Shadow
from serving.model.release import Release
from serving.targets import ReleaseFiles
from serving.targets.folder import write_folder
from tasks.endpoint.deploy import make_release_to_remove, render_rollout, write_rollout
from tasks.endpoint.targets import AnyTarget, Triton
from tests.serving.targets.manifests import check_all
from tests.serving.toys import matrix
from tests.tasks.endpoint.values import route, served

CLUSTER = {"gateway": "public", "namespace": "models", "storage_uri": "s3://lake/endpoints"}
CURRENT = route(served("1", 90), served("2", 10))
KINDS = {
    "bentoml": {"HTTPRoute", "BackendTrafficPolicy"},
    "kserve": {"HTTPRoute", "BackendTrafficPolicy", "InferenceService"},
    "seldon": {"HTTPRoute", "BackendTrafficPolicy", "Model", "Experiment"},
}


def target_of(kind: str, folder: Path, cluster: dict[str, Any] | None = CLUSTER) -> AnyTarget:
    given = {"kind": kind, "folder": str(folder), "python": "python", "cluster": cluster}
    adapter: TypeAdapter[AnyTarget] = TypeAdapter(AnyTarget)
    return adapter.validate_python(given)


def release(version: str) -> Release:
    return make_release_to_remove("churn", version, matrix(4))


def put_releases(folder: Path, *versions: str) -> None:
    for version in versions:
        files = {"release.json": release(version).model_dump_json().encode()}
        write_folder(ReleaseFiles(files=files), folder / "churn" / version)


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_writes_what_serves_on_its_cluster_and_what_divides_the_requests(kind: str, tmp_path: Path) -> None:
    put_releases(tmp_path, "1", "2")
    write_rollout(target_of(kind, tmp_path), "churn", CURRENT)
    written = (tmp_path / "churn/kubernetes/rollout.yaml").read_bytes()
    found = check_all(yaml.safe_load_all(written))

    assert KINDS[kind] == set(found)
    assert {"models"} == {each["metadata"]["namespace"] for listed in found.values() for each in listed}
    assert kind == "bentoml" or b"s3://lake/endpoints/churn/2" in written


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_without_a_cluster_and_one_without_a_folder_write_nothing(kind: str, tmp_path: Path) -> None:
    put_releases(tmp_path, "1", "2")
    write_rollout(target_of(kind, tmp_path, None), "churn", CURRENT)
    write_rollout(Triton(repository=str(tmp_path)), "churn", CURRENT)

    assert [] == list(tmp_path.rglob("rollout.yaml"))


def test_a_release_that_is_not_there_yet_is_rendered_with_those_that_are(tmp_path: Path) -> None:
    put_releases(tmp_path, "1")
    rendered = render_rollout(target_of("seldon", tmp_path), "churn", CURRENT, release("2"))

    assert rendered is not None
    models = [each for each in yaml.safe_load_all(rendered) if each["kind"] == "Model"]
    assert ["churn-v1", "churn-v2"] == [each["metadata"]["name"] for each in models]


@pytest.mark.parametrize("shared", [CURRENT, route(served("1"), served("2", 1), shadow=Shadow(version="1"))])
def test_versions_that_share_requests_must_be_on_one_target(shared: Route, tmp_path: Path) -> None:
    put_releases(tmp_path, "2")

    with pytest.raises(
        BadInput, match=r"but version 1 of churn is on another target. Roll the new one out all at once"
    ):
        render_rollout(target_of("kserve", tmp_path), "churn", shared)


def test_a_version_that_is_left_on_another_target_without_requests_is_none_of_the_clusters(tmp_path: Path) -> None:
    put_releases(tmp_path, "2")
    rendered = render_rollout(target_of("kserve", tmp_path), "churn", route(served("1"), served("2", 100)))

    assert rendered is not None
    assert b"v1" not in rendered.replace(b"/v1", b"")


@pytest.mark.parametrize(
    ("cluster", "words"),
    [({}, "gateway"), ({"gateway": "Public"}, "gateway"), ({"gateway": "a", "storage_uri": "lake"}, "storage_uri")],
)
def test_a_cluster_with_a_name_that_kubernetes_has_not_is_refused(cluster: dict[str, str], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        target_of("kserve", Path("folder"), cluster)
