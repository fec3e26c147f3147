"""Strict JSON schemas of the fields that rendered manifests have, and releases to render.

The schemas say what an API server holds a manifest against: types, bounds, patterns, and the rules that tie fields to
each other. They were written after the resource definitions of

- Gateway API 1.6.1, standard channel (github.com/kubernetes-sigs/gateway-api): HTTPRoute, GRPCRoute; as 1.2.1 has them;
- Envoy Gateway 1.9.0 (github.com/envoyproxy/gateway): SecurityPolicy, BackendTrafficPolicy; 1.5 has them, too;
- Seldon Core 2.10.2 (github.com/SeldonIO/seldon-core, operator/config/crd): Model, Experiment, and the rules of its
  scheduler;
- KServe 0.20.0 (github.com/kserve/kserve, config/crd/full): InferenceService, and the rules of its webhook.

Where OVERNIGHT_CRDS names a folder with the definitions themselves (`kubectl get crd -o yaml`, or the files of those
projects), manifests are held against the whole of them as well.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from serving.model.pin import ModelPin
from serving.model.release import Release
from serving.targets.kubernetes_cluster import Manifest
from tests.serving.toys import matrix

STABLE, NEW = (
    Release(
        endpoint="scores",
        pin=ModelPin(name="scores", version=version, model_id=None, source="", digest=version * 64),
        contract=matrix(3),
    )
    for version in "12"
)
KUBERNETES_NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}
# Names of Services, and of what becomes one: they begin with a letter.
SERVICE_NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$"}
QUANTITY = {"type": "string", "pattern": r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti|k|M|G|T)?$"}
DURATION = {"type": "string", "pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
PORT = {"type": "integer", "minimum": 1, "maximum": 65_535}
WEIGHT = {"type": "integer", "minimum": 0, "maximum": 1_000_000}
COUNT = {"type": "integer", "minimum": 0, "maximum": 4_294_967_295}
PERCENT = {"type": "integer", "minimum": 0, "maximum": 100}
REPLICAS = {"type": "integer", "minimum": 0}
TOKEN = {"type": "string", "pattern": r"^[A-Za-z0-9!#$%&'*+\-.^_`|~]+$", "maxLength": 256}
PATH = {
    "type": "string",
    "pattern": r"^(?!.*(//|/\.\.?(/|$)|%2[fF]|#))/[-A-Za-z0-9/._~!$&'()*+,;=:@%]*$",
    "maxLength": 1024,
}


def closed(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    """An object that may have these properties and no other."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def closed_whole(**properties: Any) -> dict[str, Any]:
    """An object that must have these properties, and may have no other."""
    return closed(properties, *properties)


def array(items: dict[str, Any], length_min: int = 1, length_max: int = 16) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": length_min, "maxItems": length_max}


def quantities() -> dict[str, Any]:
    """What a container may use."""
    return closed(dict.fromkeys(("cpu", "memory", "nvidia.com/gpu"), QUANTITY), "cpu", "memory")


def manifest_of(version: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    labels = {"type": "object", "additionalProperties": {"type": "string", "maxLength": 63}}
    metadata = {
        "name": KUBERNETES_NAME,
        "namespace": KUBERNETES_NAME,
        "labels": labels,
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    }
    return closed_whole(
        apiVersion={"const": version}, kind={"const": kind}, metadata=closed(metadata, "name"), spec=spec
    )


BACKEND = {"name": SERVICE_NAME, "port": PORT}
WEIGHTED = closed({**BACKEND, "weight": WEIGHT}, "name", "port")
MIRROR = closed_whole(type={"const": "RequestMirror"}, requestMirror=closed_whole(backendRef=closed_whole(**BACKEND)))
REWRITE = closed_whole(
    type={"const": "URLRewrite"},
    urlRewrite=closed_whole(path=closed_whole(type={"const": "ReplaceFullPath"}, replaceFullPath=PATH)),
)
SET_HEADERS = closed_whole(
    type={"const": "RequestHeaderModifier"},
    requestHeaderModifier=closed_whole(set=array(closed_whole(name=TOKEN, value={"type": "string", "minLength": 1}))),
)
# No filter twice in a rule. A backend has no filters: Envoy Gateway refuses a path rewritten for one of several.
FILTERS = {**array({"oneOf": [MIRROR, REWRITE, SET_HEADERS]}), "uniqueItems": True}
PARENTS = array(
    closed(dict.fromkeys(("name", "namespace", "sectionName"), KUBERNETES_NAME), "name"),
    length_max=32,
)
HTTP_MATCH = closed_whole(
    path=closed_whole(type={"const": "Exact"}, value=PATH), method={"enum": ["GET", "HEAD", "POST"]}
)
GRPC_MATCH = closed_whole(
    method=closed_whole(
        type={"const": "Exact"},
        service={"type": "string", "pattern": r"^[a-zA-Z_]\w*(\.[a-zA-Z_]\w*)*$"},
        method={"type": "string", "pattern": r"^[A-Za-z_]\w*$"},
    ),
    headers=array(closed_whole(type={"const": "Exact"}, name=TOKEN, value={"type": "string", "minLength": 1})),
)
HTTP_RULE = closed(
    {
        "matches": array(HTTP_MATCH, length_max=64),
        "filters": FILTERS,
        "backendRefs": array(WEIGHTED),
        "timeouts": closed_whole(request=DURATION),
    },
    *("matches", "backendRefs"),
)
GRPC_RULE = closed(
    {
        "matches": array(GRPC_MATCH, length_max=64),
        "filters": array(MIRROR, length_max=1),
        "backendRefs": array(WEIGHTED),
    },
    *("matches", "backendRefs"),
)
TARGETS = array(
    closed_whole(
        group={"const": "gateway.networking.k8s.io"}, kind={"enum": ["HTTPRoute", "GRPCRoute"]}, name=KUBERNETES_NAME
    ),
    length_max=64,
)
API_KEYS = closed_whole(
    credentialRefs=array(closed_whole(name=KUBERNETES_NAME)),
    extractFrom=array(closed_whole(headers=array(TOKEN))),
    sanitize={"type": "boolean"},
)
RATE = closed_whole(requests=COUNT, unit={"enum": ["Second", "Minute", "Hour", "Day"]})
BREAKER = closed(
    dict.fromkeys(("maxConnections", "maxParallelRequests", "maxPendingRequests", "maxParallelRetries"), COUNT)
)
# Triggers by which nothing is sent twice.
RETRY = closed_whole(
    numRetries={"type": "integer", "minimum": 0},
    retryOn=closed_whole(triggers=array({"enum": ["connect-failure", "refused-stream", "reset-before-request"]})),
)
TRAFFIC = closed(
    {
        "targetRefs": TARGETS,
        "requestBuffer": closed_whole(limit={"type": "string", "pattern": "^[1-9]+[0-9]*([EPTGMK]i|[EPTGMk])?$"}),
        "circuitBreaker": BREAKER,
        "retry": RETRY,
        "rateLimit": closed_whole(
            type={"const": "Local"}, local=closed_whole(rules=array(closed_whole(limit=RATE), length_max=1))
        ),
        "timeout": closed_whole(http=closed(dict.fromkeys(("requestTimeout", "connectionIdleTimeout"), DURATION))),
    },
    "targetRefs",
)
EXPERIMENT = closed(
    {
        "default": SERVICE_NAME,
        "candidates": array(closed_whole(name=SERVICE_NAME, weight=WEIGHT), length_max=32),
        "mirror": closed_whole(name=SERVICE_NAME, percent=PERCENT),
    },
    "candidates",
)
MODEL = closed(
    {
        "storageUri": {"type": "string", "pattern": r"^\w+://\S+$"},
        "requirements": array({"type": "string"}),
        "memory": QUANTITY,
        **dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), REPLICAS),
        "server": KUBERNETES_NAME,
    },
    "storageUri",
)
PREDICTOR = {
    "name": KUBERNETES_NAME,
    "minReplicas": REPLICAS,
    "maxReplicas": {"type": "integer", "minimum": 1},
    "canaryTrafficPercent": PERCENT,
    "model": closed(
        {
            "name": KUBERNETES_NAME,
            "modelFormat": closed({"name": {"const": "triton"}, "version": {"type": "string"}}, "name"),
            "runtime": KUBERNETES_NAME,
            "protocolVersion": {"const": "v2"},
            "storageUri": {"type": "string", "pattern": r"^(s3|gs|pvc|https?)://\S+$"},
            "resources": closed({"requests": quantities(), "limits": quantities()}, "requests", "limits"),
        },
        *("modelFormat", "protocolVersion", "storageUri"),
    ),
}
# A canary has a name, and no maxReplicas.
CANARY_PREDICTOR = closed(
    {
        "name": KUBERNETES_NAME,
        "minReplicas": REPLICAS,
        "model": PREDICTOR["model"] | {"required": ["name", "modelFormat"]},
    },
    *("name", "model"),
)
INFERENCE_SERVICE = closed(
    {
        "predictor": closed(PREDICTOR, "model"),
        "canary": array(closed_whole(predictor=CANARY_PREDICTOR, trafficPercent=PERCENT), length_max=32),
    },
    "predictor",
)
GATEWAY_API, ENVOY_GATEWAY = "gateway.networking.k8s.io/v1", "gateway.envoyproxy.io/v1alpha1"
SELDON, KSERVE = "mlops.seldon.io/v1alpha1", "serving.kserve.io/v1beta1"
SCHEMAS = {
    kind: manifest_of(version, kind, spec)
    for version, kind, spec in (
        (GATEWAY_API, "HTTPRoute", closed_whole(parentRefs=PARENTS, rules=array(HTTP_RULE))),
        (GATEWAY_API, "GRPCRoute", closed_whole(parentRefs=PARENTS, rules=array(GRPC_RULE))),
        (ENVOY_GATEWAY, "SecurityPolicy", closed_whole(targetRefs=TARGETS, apiKeyAuth=API_KEYS)),
        (ENVOY_GATEWAY, "BackendTrafficPolicy", TRAFFIC),
        (SELDON, "Experiment", EXPERIMENT),
        (SELDON, "Model", MODEL),
        (KSERVE, "InferenceService", INFERENCE_SERVICE),
    )
}

VALIDATORS = {kind: jsonschema.Draft202012Validator(schema) for kind, schema in SCHEMAS.items()}


def check(manifest: Manifest) -> Manifest:
    """Hold a manifest against the schema of its kind, and against the whole definition where it is at hand."""
    VALIDATORS[manifest["kind"]].validate(manifest)
    whole = read_definitions(os.environ.get("OVERNIGHT_CRDS", "")).get((manifest["apiVersion"], manifest["kind"]))
    if whole is not None:
        whole.validate(manifest)
    if manifest["kind"] == "InferenceService":
        check_canaries(manifest)
    if manifest["kind"] == "Experiment":
        names = [each["name"] for each in (*manifest["spec"]["candidates"], manifest["spec"].get("mirror")) if each]
        assert len(set(names)) == len(names), "Seldon refuses a model that is twice in an experiment"
    return manifest


def check_canaries(service: Manifest) -> None:
    """Hold an InferenceService against the rules of KServe's webhook about canaries."""
    canaries, stable = service["spec"].get("canary", []), service["spec"]["predictor"]
    names = [each["predictor"]["name"] for each in canaries]
    if canaries:
        assert "Standard" == service["metadata"]["annotations"]["serving.kserve.io/deploymentMode"]
        assert len({*names, stable["name"]}) == len(names) + 1
        assert sum(each["trafficPercent"] for each in canaries) <= 100
        assert max(each["predictor"]["minReplicas"] for each in canaries) <= stable["minReplicas"]


def check_all(manifests: Iterable[Manifest]) -> dict[str, list[Manifest]]:
    """Hold manifests against their schemas and each other, and return them by their kind."""
    found: dict[str, list[Manifest]] = {}
    for each in manifests:
        found.setdefault(each["kind"], []).append(check(each))
    names = [(each["kind"], each["metadata"]["name"]) for listed in found.values() for each in listed]
    assert len(set(names)) == len(names), "no two manifests are of one name"
    return found


@functools.cache
def read_definitions(folder: str) -> dict[tuple[str, str], jsonschema.Draft202012Validator]:
    """Return validators of every definition in a folder, by its version and kind; unknown fields are errors."""
    found: dict[tuple[str, str], jsonschema.Draft202012Validator] = {}
    for document in read_documents(Path(folder)) if folder else ():
        spec = document["spec"]
        for version in spec["versions"]:
            schema = close_objects(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object"}
            validator = jsonschema.Draft202012Validator(schema)
            found[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = validator
    return found


def read_documents(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.yaml")):
        with path.open() as file:
            for document in yaml.load_all(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
                for each in (document or {}).get("items", [document]):
                    if each and each.get("kind") == "CustomResourceDefinition":
                        yield each


def close_objects(schema: Any) -> Any:
    """Return a schema in which objects take no fields but their properties, as the API server reads it."""
    if isinstance(schema, list):
        return [close_objects(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {name: close_objects(value) for name, value in schema.items()}
    is_open = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not is_open:
        inner["additionalProperties"] = False
    return inner
