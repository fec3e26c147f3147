"""The Gateway API and Envoy Gateway: the gateway's route as manifests for the Envoy of a Kubernetes cluster.

The Gateway API (v1) has the weights, the paths, the mirror of a shadow and the time limit. Envoy Gateway's policies
have the keys, by the name of their Secret, and the limits. A `Route` has more than an Envoy can do:
`render_gateway_api` refuses by name what it cannot render.

Nothing on the cluster judges a canary. The user who renders the manifests does: the next step of a rollout is the
manifests of the next route.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from serving.errors import BadInput
from serving.gateway.route import Limits, Route, ServedVersion
from serving.targets.kubernetes_cluster import Cluster, Manifest, make_metadata, make_version_name

GATEWAY_API, ENVOY_GATEWAY = "gateway.networking.k8s.io", "gateway.envoyproxy.io"
# The metadata by which a gRPC caller names the endpoint, and a version where it wants one: as at the gateway, since
# Envoy does not look for a model's name inside of a message.
GRPC_ENDPOINT, GRPC_VERSION = "overnight-endpoint", "overnight-version"
GRPC_SERVICE = "inference.GRPCInferenceService"
WEIGHTS_SUM = 1_000_000
_BACKENDS_MAX = 16
_PORT = 80
# Servers close idle connections after 5 s (uvicorn) or later; a request on a closed one would be lost.
_IDLE = "4s"
_SERVICE_URL = re.compile(
    r"http://(?P<name>[a-z]([a-z0-9-]{0,61}[a-z0-9])?)\.(?P<namespace>[a-z0-9-]+)\.svc(\.[a-z0-9.-]+)?"
    r"(:(?P<port>\d{1,5}))?(?P<path>/\S*)?"
)


def render_gateway_api(endpoint: str, route: Route, cluster: Cluster) -> tuple[Manifest, ...]:
    """Return a route for the Gateway API and Envoy Gateway, for versions that are Services of the cluster.

    The HTTPRoute of the endpoint's name divides the requests that name no version. Each other version has an HTTPRoute
    of its own, by which requests name it; a shadow has none.

    Args:
        endpoint: The endpoint's name.
        route: The route; its versions are at URLs like http://SERVICE.NAMESPACE.svc:PORT, see `place_versions`.
        cluster: The names of the cluster.

    Returns:
        HTTPRoutes, GRPCRoutes where the versions have gRPC addresses, a SecurityPolicy where the route has keys, and
        a BackendTrafficPolicy.

    Raises:
        BadInput: The route has what an Envoy cannot do; the message names it.
    """
    refuse_what_envoy_cannot(endpoint, route)
    has_grpc = any(served.grpc for served in route.versions if served.weight)
    if has_grpc and (None in (cluster.listener, cluster.grpc_listener) or cluster.listener == cluster.grpc_listener):
        message = (
            f"HTTP and gRPC must have a listener of the Gateway each, since the Gateway API takes routes of one kind "
            f"for a listener, but {endpoint} has gRPC addresses, and the cluster the listeners {cluster.listener} and "
            f"{cluster.grpc_listener}. Set listener and grpc_listener."
        )
        raise BadInput(message)
    shadow = _find_shadow(route)
    named = [served for served in route.versions if served is not shadow]
    routes = [_render_split(endpoint, route, cluster), *(_render_version(endpoint, route, cluster, v) for v in named)]
    if has_grpc:
        routes.append(_render_grpc_split(endpoint, route, cluster))
        routes += [_render_grpc_version(endpoint, cluster, served) for served in named if served.grpc]
    return (*routes, *render_policies(endpoint, route, cluster, routes))


def spread_weights(weights: Sequence[float]) -> list[int]:
    """Return weights as whole numbers: as they are where they are whole, else as shares of a million.

    Promises: a weight above 0 stays above 0, a weight of 0 stays 0. Shares of a million sum to exactly that, and each
    is within one of its exact share, or of 1 where that is less. At least one weight must be above 0.
    """
    nearest = [round(weight) for weight in weights]
    if all(abs(weight - whole) < 1e-9 * max(1, whole) for weight, whole in zip(weights, nearest, strict=True)) and all(
        whole > 0 or weight == 0 for weight, whole in zip(weights, nearest, strict=True)
    ):
        return nearest
    total = sum(weights)
    exact = [weight / total * WEIGHTS_SUM for weight in weights]
    shares = [max(1, int(share)) if weight > 0 else 0 for weight, share in zip(weights, exact, strict=True)]
    # What rounding left over goes to the largest remainders; what it took too much comes from the largest shares.
    order = sorted(range(len(shares)), key=lambda index: shares[index] - exact[index])
    for index in order[: max(0, WEIGHTS_SUM - sum(shares))]:
        shares[index] += 1 if exact[index] > 0 else 0
    shares[shares.index(max(shares))] += WEIGHTS_SUM - sum(shares)
    return shares


def make_http_route(
    name: str, endpoint: str, cluster: Cluster, path: str, upstream: str, rule: Mapping[str, Any]
) -> Manifest:
    """Return an HTTPRoute of one model's paths: inferences, its metadata, and whether it is ready; and no others.

    Args:
        name: The name of the HTTPRoute.
        endpoint: The endpoint's name.
        cluster: The names of the cluster.
        path: The path that callers ask, without /infer and /ready.
        upstream: The path that the servers are asked, likewise.
        rule: What the rule of inferences holds beside its matches: backendRefs, filters, timeouts. The others have no
            mirror.
    """
    described = {**rule, "filters": [each for each in rule["filters"] if each["type"] != "RequestMirror"]}
    # A path that is rewritten needs a rule of its own.
    tails: list[tuple[str, ...]] = [("", "/ready")] if path == upstream else [("",), ("/ready",)]
    rules = [
        {
            "matches": [{"path": {"type": "Exact", "value": path + tail}, "method": method} for tail in together],
            **content,
            "filters": [*_rewrite_path(path + together[0], upstream + together[0]), *content["filters"]],
        }
        for method, together, content in (("POST", ("/infer",), rule), *(("GET", each, described) for each in tails))
    ]
    return _make_route("HTTPRoute", name, endpoint, cluster, cluster.listener, rules)


def _make_route(
    kind: str, name: str, endpoint: str, cluster: Cluster, listener: str | None, rules: Sequence[Manifest]
) -> Manifest:
    """Return a route of the Gateway API, at a listener of the cluster's gateway, without what is empty in its rules."""
    gateway = {"name": cluster.gateway, "namespace": cluster.gateway_namespace, "sectionName": listener}
    return {
        "apiVersion": f"{GATEWAY_API}/v1",
        "kind": kind,
        "metadata": make_metadata(name, endpoint, cluster.namespace),
        "spec": {
            "parentRefs": [{field: value for field, value in gateway.items() if value is not None}],
            "rules": [{field: value for field, value in rule.items() if value != []} for rule in rules],
        },
    }


def render_policies(
    endpoint: str, route: Route, cluster: Cluster, routes: Iterable[Mapping[str, Any]]
) -> tuple[Manifest, ...]:
    """Return Envoy Gateway's policies for some routes of an endpoint: who may ask, and how much.

    Raises BadInput where the rate is no whole number of requests a second, minute or hour.
    """
    targets = [{"group": GATEWAY_API, "kind": each["kind"], "name": each["metadata"]["name"]} for each in routes]
    traffic = _render_limits(route.limits)
    if any(each["kind"] == "GRPCRoute" for each in targets):
        # The GRPCRoute itself has no field for it.
        traffic["timeout"]["http"]["requestTimeout"] = format_duration(route.limits.timeout_s)
    access = {
        "apiKeyAuth": {
            "credentialRefs": [{"name": cluster.secret or f"{endpoint}-keys"}],
            "extractFrom": [{"headers": ["Authorization"]}],
            # The model server does not get the key.
            "sanitize": True,
        }
    }
    return tuple(
        {
            "apiVersion": f"{ENVOY_GATEWAY}/v1alpha1",
            "kind": kind,
            "metadata": make_metadata(endpoint, endpoint, cluster.namespace),
            "spec": {"targetRefs": targets, **spec},
        }
        for kind, spec in (("SecurityPolicy", access if route.keys else {}), ("BackendTrafficPolicy", traffic))
        if spec
    )


def format_duration(seconds: float) -> str:
    """Return a duration as the Gateway API writes it, in whole milliseconds and at least one."""
    whole, milliseconds = divmod(max(1, round(seconds * 1000)), 1000)
    return (f"{whole}s" if whole else "") + (f"{milliseconds}ms" if milliseconds else "")


def make_timeouts(limits: Limits) -> Manifest:
    """Return the time limit of a request, as a rule of an HTTPRoute has it."""
    return {"request": format_duration(limits.timeout_s)}


def refuse_what_envoy_cannot(endpoint: str, route: Route) -> None:
    """Raise BadInput for what a route has and a cluster's Envoy cannot do."""
    shadow = _find_shadow(route)
    answering = [served for served in route.versions if served.weight]
    if route.sleep is not None:
        message = (
            f"An endpoint of a cluster must stay loaded, but {endpoint} has `sleep`. Leave out keep_warm: on a "
            "cluster an autoscaler counts the replicas."
        )
        raise BadInput(message)
    for served in route.versions:
        if served.speaks != "v2":
            message = (
                f"Every version on a cluster must speak v2, since Envoy translates no protocol, but version "
                f"{served.version} of {endpoint} speaks {served.speaks}. Put it on a server of V2."
            )
            raise BadInput(message)
    if shadow is not None and shadow.weight:
        message = f"A shadow must have no weight, but version {shadow.version} of {endpoint} has {shadow.weight:g}."
        raise BadInput(message)
    if len(answering) > _BACKENDS_MAX:
        message = f"At most {_BACKENDS_MAX} versions may share requests on a cluster, got {len(answering)}."
        raise BadInput(message)
    sharing = [*answering, *([shadow] if shadow else [])]
    paths = sorted({_find_upstream_path(served) for served in sharing})
    if len(paths) > 1:
        message = (
            f"Versions that share requests on a cluster must be asked by one path, since Envoy rewrites none for one "
            f"of several, got {', '.join(paths)}. Give each version of {endpoint} a server with that version alone."
        )
        raise BadInput(message)
    _refuse_mixed_grpc(endpoint, sharing)


def _refuse_mixed_grpc(endpoint: str, sharing: Sequence[ServedVersion]) -> None:
    """Raise BadInput where some versions take gRPC and others do not, or under another name than the endpoint's."""
    missing = [served.version for served in sharing if served.grpc is None]
    if len(missing) < len(sharing) and missing:
        message = (
            f"Versions that share requests must all have a gRPC address or none, but version {', '.join(missing)} of "
            f"{endpoint} has none."
        )
        raise BadInput(message)
    for served in sharing:
        if served.grpc is not None and served.upstream_model != endpoint:
            message = (
                f"Over gRPC a model must be called as its endpoint, since its name is in the message, but version "
                f"{served.version} of {endpoint} is called {served.upstream_model}."
            )
            raise BadInput(message)


def _find_shadow(route: Route) -> ServedVersion | None:
    return None if route.shadow is None else route.find_version(route.shadow.version)


def _render_split(endpoint: str, route: Route, cluster: Cluster) -> Manifest:
    """Return the HTTPRoute that divides requests which name no version, and copies them to a shadow."""
    answering = [served for served in route.versions if served.weight]
    shadow = _find_shadow(route)
    weights = spread_weights([served.weight for served in answering])
    rule = {
        "filters": [] if shadow is None else [_mirror_to(_refer_to_service(shadow, cluster))],
        "backendRefs": [
            {**_refer_to_service(served, cluster), "weight": weight}
            for served, weight in zip(answering, weights, strict=True)
        ],
        "timeouts": make_timeouts(route.limits),
    }
    path = f"/v2/models/{endpoint}"
    return make_http_route(endpoint, endpoint, cluster, path, _find_upstream_path(answering[0]), rule)


def _render_version(endpoint: str, route: Route, cluster: Cluster, served: ServedVersion) -> Manifest:
    """Return the HTTPRoute of requests that name a version."""
    rule = {
        "filters": [],
        "backendRefs": [_refer_to_service(served, cluster)],
        "timeouts": make_timeouts(route.limits),
    }
    path = f"/v2/models/{endpoint}/versions/{served.version}"
    name = make_version_name(endpoint, served.version)
    return make_http_route(name, endpoint, cluster, path, _find_upstream_path(served), rule)


def _render_grpc_split(endpoint: str, route: Route, cluster: Cluster) -> Manifest:
    """Return the GRPCRoute that divides requests which name no version, and copies inferences to a shadow."""
    answering = [served for served in route.versions if served.weight]
    shadow = _find_shadow(route)
    weights = spread_weights([served.weight for served in answering])
    backends = [
        {**_refer_to_grpc(served, cluster), "weight": weight} for served, weight in zip(answering, weights, strict=True)
    ]
    filters = [] if shadow is None else [_mirror_to(_refer_to_grpc(shadow, cluster))]
    return _make_grpc_route(endpoint, endpoint, cluster, {GRPC_ENDPOINT: endpoint}, backends, filters)


def _render_grpc_version(endpoint: str, cluster: Cluster, served: ServedVersion) -> Manifest:
    """Return the GRPCRoute of requests that name a version, which has more metadata and so goes first."""
    name, metadata = (
        make_version_name(endpoint, served.version),
        {GRPC_ENDPOINT: endpoint, GRPC_VERSION: served.version},
    )
    return _make_grpc_route(name, endpoint, cluster, metadata, [_refer_to_grpc(served, cluster)], [])


def _make_grpc_route(
    name: str,
    endpoint: str,
    cluster: Cluster,
    metadata: Mapping[str, str],
    backends: Sequence[Manifest],
    filters: Sequence[Manifest],
) -> Manifest:
    """Return a GRPCRoute of one model's methods: inferences, its metadata, and whether it is ready; and no others."""
    headers = [{"type": "Exact", "name": field, "value": value} for field, value in metadata.items()]
    rules = [
        {
            "matches": [
                {"method": {"type": "Exact", "service": GRPC_SERVICE, "method": method}, "headers": headers}
                for method in methods
            ],
            "filters": list(filters) if "ModelInfer" in methods else [],
            "backendRefs": list(backends),
        }
        for methods in (("ModelInfer",), ("ModelMetadata", "ModelReady"))
    ]
    return _make_route("GRPCRoute", name, endpoint, cluster, cluster.grpc_listener, rules)


def _render_limits(limits: Limits) -> Manifest:
    # A request whose connection is being opened counts as waiting, too.
    requests_max = limits.in_flight_max + limits.queue_max
    traffic: Manifest = {
        "requestBuffer": {"limit": _format_bytes(limits.bytes_max)},
        "circuitBreaker": {
            "maxConnections": limits.in_flight_max,
            "maxParallelRequests": requests_max,
            "maxPendingRequests": requests_max,
        },
        # Only what no server has begun is sent again.
        "retry": {
            "numRetries": 1,
            "retryOn": {"triggers": ["connect-failure", "refused-stream", "reset-before-request"]},
        },
        "timeout": {"http": {"connectionIdleTimeout": _IDLE}},
    }
    if limits.requests_per_second is not None:
        traffic["rateLimit"] = {
            "type": "Local",
            "local": {"rules": [{"limit": count_rate(limits.requests_per_second)}]},
        }
    return traffic


def count_rate(requests_per_second: float) -> Manifest:
    """Return a rate as a whole number of requests in the shortest unit that allows it. Raises BadInput for others."""
    for unit, seconds in (("Second", 1), ("Minute", 60), ("Hour", 3600)):
        requests = round(requests_per_second * seconds)
        if requests and abs(requests - requests_per_second * seconds) < 1e-9 * requests:
            return {"requests": requests, "unit": unit}
    message = (
        f"The rate of an endpoint on a cluster must be a whole number of requests a second, minute or hour, got "
        f"{requests_per_second:g} a second."
    )
    raise BadInput(message)


def _format_bytes(count: int) -> str:
    for unit, size in (("Mi", 1 << 20), ("Ki", 1 << 10)):
        if count % size == 0:
            return f"{count // size}{unit}"
    return str(count)


def _refer_to_service(served: ServedVersion, cluster: Cluster) -> Manifest:
    found = _SERVICE_URL.fullmatch(served.url)
    if found is None or found["namespace"] != cluster.namespace:
        message = (
            f"A version on a cluster must be a Service of it, as http://SERVICE.{cluster.namespace}.svc:PORT, got "
            f"{served.url} for version {served.version}."
        )
        raise BadInput(message)
    return {"name": found["name"], "port": int(found["port"] or _PORT)}


def _refer_to_grpc(served: ServedVersion, cluster: Cluster) -> Manifest:
    return _refer_to_service(served.model_copy(update={"url": f"http://{served.grpc}"}), cluster)


def _find_upstream_path(served: ServedVersion) -> str:
    """Return the path of a version's model on its server."""
    found = _SERVICE_URL.fullmatch(served.url)
    base = (found["path"] or "").rstrip("/") if found else ""
    version = "" if served.upstream_version is None else f"/versions/{quote(served.upstream_version, safe='')}"
    return f"{base}/v2/models/{quote(served.upstream_model, safe='')}{version}"


def _mirror_to(backend: Manifest) -> Manifest:
    return {"type": "RequestMirror", "requestMirror": {"backendRef": backend}}


def _rewrite_path(path: str, upstream: str) -> list[Manifest]:
    if path == upstream:
        return []
    return [{"type": "URLRewrite", "urlRewrite": {"path": {"type": "ReplaceFullPath", "replaceFullPath": upstream}}}]
