"""What must hold of manifests before a cluster gets them: names, images that are pinned, and no secret in the text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Document = dict[str, Any]

# No registry has this host: https://www.rfc-editor.org/rfc/rfc2606
IMAGE_NOT_SET = "set-image.invalid/"
# What others build, of which a tag may be another image tomorrow.
THIRD_PARTY = ("mlflow", "postgres", "prefect", "prefect-worker")

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
# Kinds whose name becomes a part of a DNS name. Of the others it is a whole one.
_LABEL_KINDS = ("Namespace", "Service", "InferenceService", "RayCluster", "RayService")
_IMAGE = re.compile(
    r"(?P<name>[a-z0-9]+([._-]+[a-z0-9]+)*(:\d{1,5}(?=/))?(/[a-z0-9]+([._-]+[a-z0-9]+)*)*)"
    r"(:(?P<tag>\w[\w.-]{0,127}))?(@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_SECRET_NAME = re.compile(r"(PASSWORD|PASSWD|TOKEN|AUTH_STRING|API_KEYS?|ADMIN_KEY|ACCESS_KEY|PRIVATE_KEY|SECRET)$")
_CREDENTIALS_IN_URL = re.compile(r"\w+://[^\s/:@]*:[^\s/@]+@")
_PEM = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----")
_SHOWN_MAX = 6
_VOLUMES = (
    ("configMap", "ConfigMap", "name"),
    ("secret", "Secret", "secretName"),
    ("persistentVolumeClaim", "PersistentVolumeClaim", "claimName"),
)
_WHOLE = (("secretRef", "Secret"), ("configMapRef", "ConfigMap"))
_SINGLE = (("secretKeyRef", "Secret"), ("configMapKeyRef", "ConfigMap"))


class ManifestRefused(ValueError):
    """Manifests that a cluster must not get, or a call that asks for such; the message says what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An image by its name and what pins it."""

    name: str
    tag: str | None
    digest: str | None


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Reference:
    """What a manifest refers to by its name, in its own namespace; `keys` are those that it reads, none means all."""

    kind: Literal["ConfigMap", "PersistentVolumeClaim", "Secret", "ServiceAccount"]
    namespace: str
    name: str
    keys: tuple[str, ...] = ()
    is_optional: bool = False


def parse_image(image: str, *, of: str) -> Image:
    """Return the parts of an image. Raises ManifestRefused for one that is not pinned.

    Args:
        image: The image, as NAME:TAG or NAME@sha256:DIGEST.
        of: Which image of the manifests it is; those of third parties must have a digest.
    """
    found = _IMAGE.fullmatch(image)
    if found is None:
        shown = _CREDENTIALS_IN_URL.sub("***@", image)
        message = f"An image must be NAME:TAG or NAME@sha256:DIGEST, got {shown!r} for {of}. Correct it."
        raise ManifestRefused(message)
    parsed = Image(name=found["name"], tag=found["tag"], digest=found["digest"])
    if parsed.digest is None and parsed.tag in (None, "latest"):
        message = (
            f"An image must have a tag that stays, or a digest, got {image!r} for {of}. Name the release: "
            f"{parsed.name}:TAG, or {parsed.name}@sha256:DIGEST."
        )
        raise ManifestRefused(message)
    if parsed.digest is None and of in THIRD_PARTY:
        message = (
            f"The image of {of} must be pinned by its digest, since others build it, got {image!r}. `docker buildx "
            f"imagetools inspect {image}` prints the digest: {parsed.name}@sha256:DIGEST."
        )
        raise ManifestRefused(message)
    return parsed


def check_documents(documents: Sequence[Document]) -> None:
    """Raise ManifestRefused for manifests that a cluster would refuse, or must not hold; the message names them all."""
    faults = [fault for document in documents for fault in _find_faults(document)]
    seen: set[str] = set()
    for document in documents:
        name = describe_document(document)
        if name in seen:
            faults.append(f"{name} is there twice")
        seen.add(name)
    if faults:
        left = len(faults) - _SHOWN_MAX
        listed = "".join(f"\n  {fault}" for fault in faults[:_SHOWN_MAX]) + (f"\n  and {left} more" if left > 0 else "")
        message = f"Manifests must have valid names, pinned images and no secret in them, got:{listed}\nCorrect these."
        raise ManifestRefused(message)


def describe_document(document: Mapping[str, Any]) -> str:
    """Return kind, namespace and name of a manifest, as messages say them."""
    metadata = document.get("metadata") or {}
    namespace = f"{metadata['namespace']}/" if metadata.get("namespace") else ""
    return f"{document.get('kind')} {namespace}{metadata.get('name')}"


def _find_faults(document: Document) -> Iterator[str]:
    if not {"apiVersion", "kind", "metadata"} <= document.keys():
        yield f"{str(document)[:60]!r} has no apiVersion, kind and metadata"
        return
    name, metadata = describe_document(document), document["metadata"] or {}
    pattern = _LABEL if document["kind"] in _LABEL_KINDS else _SUBDOMAIN
    if not pattern.fullmatch(str(metadata.get("name", ""))):
        yield f"{name} must have a name of lowercase letters, digits and hyphens, at most 63"
    if not _LABEL.fullmatch(str(metadata.get("namespace", "default"))):
        yield f"{name} must have a namespace of lowercase letters, digits and hyphens, at most 63"
    if document["kind"] == "Secret":
        yield f"{name} is a Secret: make it on the cluster, and have the manifests refer to it"
    yield from (f"{name}: {fault}" for fault in _find_secrets(document))
    for container in iter_containers(document):
        try:
            parse_image(str(container.get("image", "")), of=str(container.get("name")))
        except ManifestRefused as refused:
            yield f"{name}: {refused}"


def _find_secrets(value: Any, path: str = "") -> Iterator[str]:
    """Yield the places of a manifest that hold what looks like a secret, never the secret itself."""
    if isinstance(value, str):
        if _CREDENTIALS_IN_URL.search(value) or _PEM.search(value):
            yield f"{path.lstrip('.')} holds a password or a key: take it from a Secret by secretKeyRef"
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from _find_secrets(each, f"{path}[{index}]")
    elif isinstance(value, dict):
        named = value.get("name")
        if isinstance(named, str) and _SECRET_NAME.search(named) and value.get("value"):
            yield f"{named} has its value in the text: take it from a Secret by secretKeyRef"
        for key, each in value.items():
            if _SECRET_NAME.search(str(key)) and isinstance(each, str) and each:
                yield f"{path.lstrip('.')}.{key} has its value in the text: keep it in a Secret"
            else:
                yield from _find_secrets(each, f"{path}.{key}")


def iter_pods(document: Any) -> Iterator[dict[str, Any]]:
    """Yield the pod specs of a manifest of any kind: whatever has containers."""
    if isinstance(document, list):
        for each in document:
            yield from iter_pods(each)
    elif isinstance(document, dict):
        if isinstance(document.get("containers"), list):
            yield document
            return
        for each in document.values():
            yield from iter_pods(each)


def iter_containers(document: Any) -> Iterator[dict[str, Any]]:
    """Yield the containers of a manifest, those that run first among them."""
    for pod in iter_pods(document):
        yield from (*pod.get("initContainers", ()), *pod["containers"])


def list_references(documents: Iterable[Document]) -> list[Reference]:
    """Return what pods, Gateways and their policies refer to by name, each once, sorted."""
    found: dict[tuple[str, str, str], list[Reference]] = {}
    for document in documents:
        namespace = str(document["metadata"].get("namespace", "default"))
        references = [each for pod in iter_pods(document) for each in _iter_references(pod, namespace)]
        for each in (*references, *_iter_gateway_references(document, namespace)):
            found.setdefault((each.kind, each.namespace, each.name), []).append(each)
    return sorted(
        Reference(
            kind=each[0].kind,
            namespace=namespace,
            name=name,
            keys=tuple(sorted({key for reference in each for key in reference.keys})),
            is_optional=all(reference.is_optional for reference in each),
        )
        for (_, namespace, name), each in found.items()
    )


def _iter_references(pod: Mapping[str, Any], namespace: str) -> Iterator[Reference]:
    if account := pod.get("serviceAccountName"):
        yield Reference(kind="ServiceAccount", namespace=namespace, name=account)
    for volume in pod.get("volumes", ()):
        for source, kind, key in _VOLUMES:
            if source in volume:
                yield _make_reference(kind, namespace, {"name": volume[source][key]}, ())
    for container in (*pod.get("initContainers", ()), *pod["containers"]):
        whole = [(source.get(field), kind) for source in container.get("envFrom", ()) for field, kind in _WHOLE]
        yield from (_make_reference(kind, namespace, named, ()) for named, kind in whole if named)
        sources = [variable["valueFrom"] for variable in container.get("env") or () if "valueFrom" in variable]
        single = [(source.get(field), kind) for source in sources for field, kind in _SINGLE]
        yield from (_make_reference(kind, namespace, named, (named["key"],)) for named, kind in single if named)


def _iter_gateway_references(document: Document, namespace: str) -> Iterator[Reference]:
    """Yield the certificates of a Gateway, and the keys of a SecurityPolicy."""
    spec = document.get("spec") or {}
    named: list[dict[str, Any]] = []
    if document["kind"] == "Gateway":
        named = [each for listener in spec["listeners"] for each in listener.get("tls", {}).get("certificateRefs", ())]
    elif document["kind"] == "SecurityPolicy":
        named = (spec.get("apiKeyAuth") or {}).get("credentialRefs", [])
    yield from (_make_reference("Secret", namespace, each, ()) for each in named)


def _make_reference(kind: Any, namespace: str, named: Mapping[str, Any], keys: tuple[str, ...]) -> Reference:
    is_optional = bool(named.get("optional"))
    return Reference(kind=kind, namespace=namespace, name=named["name"], keys=keys, is_optional=is_optional)
