"""Strict JSON schemas of the kinds of other projects that the manifests of a cluster have.

They say of the fields that are used what an API server holds a manifest against, and were written after the resource
definitions of

- KubeRay 1.7.0 (github.com/ray-project/kuberay, helm-chart/kuberay-operator/crds, Apache-2.0): RayCluster, RayService;
- Gateway API 1.6.1, standard channel (github.com/kubernetes-sigs/gateway-api, Apache-2.0): Gateway, GatewayClass.

tests/serving/targets/manifests.py has the others. Where OVERNIGHT_CRDS names a folder with the definitions themselves,
manifests are held against the whole of them as well. Pods inside of them are held against Kubernetes' own schema.
"""

from __future__ import annotations

import os
from typing import Any

import jsonschema
import kubernetes_validate

from infra.kubernetes.checks import Document, iter_pods
from tests.serving.targets.manifests import (
    KUBERNETES_NAME,
    PORT,
    QUANTITY,
    REPLICAS,
    SERVICE_NAME,
    VALIDATORS,
    array,
    check,
    closed,
    closed_whole,
    manifest_of,
    read_definitions,
)

KUBERNETES = "1.37.0"
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
AMOUNTS = closed(
    {"requests": closed_whole(cpu=QUANTITY, memory=QUANTITY), "limits": closed_whole(cpu=QUANTITY, memory=QUANTITY)},
    *("requests", "limits"),
)
# What is inside is a pod.
POD = closed({"metadata": {"type": "object"}, "spec": {"type": "object"}}, "spec")
HEAD = closed({"rayStartParams": TEXTS, "template": POD}, "template")
WORKERS = closed(
    {
        "groupName": {"type": "string", "minLength": 1},
        **dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), REPLICAS),
        "rayStartParams": TEXTS,
        "template": POD,
    },
    *("groupName", "minReplicas", "maxReplicas", "template"),
)
RAY_CLUSTER = closed(
    {
        "rayVersion": {"type": "string"},
        "enableInTreeAutoscaling": {"type": "boolean"},
        "authOptions": closed_whole(mode={"enum": ["disabled", "token"]}),
        "autoscalerOptions": closed(
            {"idleTimeoutSeconds": REPLICAS, "resources": AMOUNTS, "securityContext": {"type": "object"}}
        ),
        "headGroupSpec": HEAD,
        "workerGroupSpecs": array(WORKERS),
    },
    "headGroupSpec",
)
LISTENER = closed_whole(
    name=KUBERNETES_NAME,
    protocol={"enum": ["HTTP", "HTTPS", "TLS", "TCP", "UDP"]},
    port=PORT,
    tls=closed_whole(
        mode={"enum": ["Terminate", "Passthrough"]},
        certificateRefs=array(closed_whole(kind={"const": "Secret"}, name=KUBERNETES_NAME), length_max=64),
    ),
    allowedRoutes=closed_whole(
        namespaces=closed_whole(**{"from": {"enum": ["All", "Selector", "Same"]}}, selector={"type": "object"})
    ),
)
GATEWAY_API, KUBERAY = "gateway.networking.k8s.io/v1", "ray.io/v1"
SCHEMAS = {
    kind: jsonschema.Draft202012Validator(manifest_of(version, kind, spec))
    for version, kind, spec in (
        (KUBERAY, "RayCluster", RAY_CLUSTER),
        (KUBERAY, "RayService", closed_whole(serveConfigV2={"type": "string"}, rayClusterConfig=RAY_CLUSTER)),
        (
            GATEWAY_API,
            "Gateway",
            closed_whole(gatewayClassName=SERVICE_NAME, listeners=array(LISTENER, length_max=64)),
        ),
        (
            GATEWAY_API,
            "GatewayClass",
            closed_whole(
                controllerName={"type": "string", "pattern": r"^[a-z0-9.-]+/[A-Za-z0-9/\-._~%!$&'()*+,;=:]+$"}
            ),
        ),
    )
}


def check_against_schema(document: Document) -> None:
    """Hold a manifest against the schema of its kind, strictly: a field that the kind does not have is an error."""
    kind = document["kind"]
    if kind in VALIDATORS:
        check(document)
    elif kind in SCHEMAS:
        SCHEMAS[kind].validate(document)
        whole = read_definitions(os.environ.get("OVERNIGHT_CRDS", "")).get((document["apiVersion"], kind))
        if whole is not None:
            whole.validate(document)
        for pod in iter_pods(document):
            check_pod(pod)
    else:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def check_pod(spec: dict[str, Any]) -> None:
    """Hold the spec of a pod against Kubernetes' own schema."""
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "any"}, "spec": spec}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)
