"""Envoy's clusters: one for each version of an endpoint, and one for the attempts that a request may need.

A version's cluster is named after everything that shapes it: a changed version is another cluster, and the requests of
the earlier one are not cut off.
"""

from __future__ import annotations

import hashlib
import ipaddress
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

from serving.gateway.envoy.messages import CONTROL_PLANE, Json, RoutedEndpoint, render_seconds, typed
from serving.gateway.route import ServedVersion

# Servers close idle connections after 5 s (uvicorn) or later; a request on a closed one would be lost.
_UPSTREAM_IDLE_S = 4
_CONNECT_S = 5
_BODY_PROGRAM = Path(__file__).with_name("body.lua")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """Where one attempt of a request goes: a cluster, and how the model is named there."""

    cluster: str
    version: str
    path: str
    model: str
    model_version: str | None


def render_clusters(endpoints: Iterable[RoutedEndpoint], control_socket: Path, retained: Mapping[str, Json]) -> Json:
    """Return the file of clusters: those of all endpoints, and earlier ones that still answer requests."""
    clusters = {CONTROL_PLANE: _render_control_plane(control_socket), **retained}
    for endpoint in endpoints:
        clusters.update(render_endpoint_clusters(endpoint, control_socket))
    kind = "envoy.config.cluster.v3.Cluster"
    return {"resources": [typed(kind, **cluster) for _, cluster in sorted(clusters.items())]}


def render_endpoint_clusters(endpoint: RoutedEndpoint, control_socket: Path) -> dict[str, Json]:
    """Return the clusters of one endpoint by their names."""
    clusters: dict[str, Json] = {}
    if endpoint.route.shadow is not None:
        clusters[name_shadow(endpoint)] = _render_shadow(endpoint, control_socket)
    for served in endpoint.route.versions:
        if served.speaks == "v2":
            clusters[_name_cluster(endpoint, served)] = _render_http_cluster(endpoint, served)
        if served.grpc is not None:
            host, _, port = served.grpc.rpartition(":")
            cluster = _render_cluster(endpoint, served, host, int(port), is_grpc=True)
            clusters[_name_cluster(endpoint, served, is_grpc=True)] = cluster
        for is_grpc, is_chosen in itertools.product((False, True), repeat=2):
            attempts = list_attempts(endpoint, served, is_grpc=is_grpc, is_chosen=is_chosen)
            if len(attempts) > 1:
                clusters[name_fallback(attempts)] = _render_fallback(endpoint, attempts, is_grpc=is_grpc)
    return clusters


def _name_cluster(endpoint: RoutedEndpoint, served: ServedVersion, *, is_grpc: bool = False) -> str:
    limits, address = endpoint.route.limits, served.grpc if is_grpc else served.url
    shape = [
        *(address, limits.in_flight_max, limits.queue_max),
        *(_find_seconds_max(endpoint, served), _has_outlier_detection(endpoint)),
    ]
    digest = hashlib.sha256(json.dumps(shape).encode()).hexdigest()[:12]
    return f"{endpoint.name}|{served.version}|{'grpc' if is_grpc else 'http'}|{digest}"


def _find_seconds_max(endpoint: RoutedEndpoint, served: ServedVersion) -> float | None:
    """Return the seconds that one attempt may take where another may follow it, None where all share one limit."""
    timeout_s, rollout = endpoint.route.limits.timeout_s, endpoint.route.rollout
    if rollout is not None and rollout.version == served.version:
        return timeout_s / 2
    return None if endpoint.route.sleep is None else timeout_s


def _has_outlier_detection(endpoint: RoutedEndpoint) -> bool:
    """Return whether failing hosts are left out: where attempts follow each other, that would change their order."""
    return endpoint.route.rollout is None and endpoint.route.sleep is None


def _render_http_cluster(endpoint: RoutedEndpoint, served: ServedVersion) -> Json:
    parts = urlsplit(served.url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    cluster = _render_cluster(endpoint, served, host, port, is_grpc=False)
    if parts.scheme == "https":
        tls = typed("envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext", sni=host)
        tls["common_tls_context"] = {"validation_context": {"system_root_certs": {}}}
        tls["auto_sni_san_validation"] = True
        cluster["transport_socket"] = {"name": "tls", "typed_config": tls}
    return cluster


def _render_cluster(endpoint: RoutedEndpoint, served: ServedVersion, host: str, port: int, *, is_grpc: bool) -> Json:
    name = _name_cluster(endpoint, served, is_grpc=is_grpc)
    cluster: Json = {
        "name": name,
        "type": "STATIC" if _is_ip_address(host) else "STRICT_DNS",
        "connect_timeout": f"{_CONNECT_S}s",
        "load_assignment": _render_hosts(name, {"socket_address": {"address": host, "port_value": port}}),
        "circuit_breakers": _render_limits(endpoint),
        "typed_extension_protocol_options": _render_protocol(
            is_grpc=is_grpc, seconds_max=_find_seconds_max(endpoint, served)
        ),
    }
    if _has_outlier_detection(endpoint):
        # Where one host is all there is, Envoy asks it even so (its panic threshold).
        cluster["outlier_detection"] = {
            "consecutive_5xx": 5,
            "base_ejection_time": "1s",
            "max_ejection_time": "10s",
            "interval": "1s",
            "max_ejection_percent": 50,
        }
    return cluster


def _render_limits(endpoint: RoutedEndpoint) -> Json:
    """Return the limits of requests at once. One that waits for its connection to be made counts as waiting, too."""
    limits = endpoint.route.limits
    requests_max = limits.in_flight_max + limits.queue_max
    bounds = {"max_requests": requests_max, "max_pending_requests": requests_max, "max_retries": requests_max}
    return {"thresholds": [{"max_connections": limits.in_flight_max, **bounds}]}


def _render_protocol(*, is_grpc: bool = False, seconds_max: float | None = None, filters: Sequence[Json] = ()) -> Json:
    common = {"idle_timeout": render_seconds(_UPSTREAM_IDLE_S)}
    if seconds_max is not None:
        common["max_stream_duration"] = render_seconds(seconds_max)
    options = typed(
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        explicit_http_config={"http2_protocol_options" if is_grpc else "http_protocol_options": {}},
        common_http_protocol_options=common,
    )
    if filters:
        codec = typed("envoy.extensions.filters.http.upstream_codec.v3.UpstreamCodec")
        options["http_filters"] = [*filters, {"name": "codec", "typed_config": codec}]
    return {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options}


def _render_hosts(cluster: str, address: Json) -> Json:
    return {"cluster_name": cluster, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}]}


def _is_ip_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _render_control_plane(socket: Path) -> Json:
    return {
        "name": CONTROL_PLANE,
        "type": "STATIC",
        "connect_timeout": f"{_CONNECT_S}s",
        "load_assignment": _render_hosts(CONTROL_PLANE, {"pipe": {"path": str(socket)}}),
        "circuit_breakers": {
            "thresholds": [
                dict.fromkeys(("max_connections", "max_requests", "max_pending_requests", "max_retries"), 8192)
            ]
        },
        "typed_extension_protocol_options": _render_protocol(),
    }


def name_shadow(endpoint: RoutedEndpoint) -> str:
    """Return the name of the cluster that gets copies of an endpoint's requests."""
    copies_max = endpoint.route.shadow.in_flight_max if endpoint.route.shadow else 0
    return f"{endpoint.name}|shadow|{copies_max}"


def _render_shadow(endpoint: RoutedEndpoint, socket: Path) -> Json:
    """Return the cluster of the comparator, to which Envoy sends no more copies at once than the rule allows."""
    assert endpoint.route.shadow is not None, "the caller checks it"  # noqa: S101 - our own mistake
    copies_max, name = endpoint.route.shadow.in_flight_max, name_shadow(endpoint)
    bounds = {"max_connections": copies_max, "max_requests": copies_max, "max_pending_requests": 1}
    return {
        **_render_control_plane(socket),
        "name": name,
        "load_assignment": _render_hosts(name, {"pipe": {"path": str(socket)}}),
        "circuit_breakers": {"thresholds": [bounds]},
    }


def list_attempts(endpoint: RoutedEndpoint, served: ServedVersion, *, is_grpc: bool, is_chosen: bool) -> list[Attempt]:
    """Return where a request for a version goes in turn: to it, behind a canary to another one, to the activator.

    Only a request that names no version goes to another one.

    The activator loads models that their server has lost. It does not speak gRPC.
    """
    if is_grpc and served.grpc is None:
        return []
    attempts = [_make_attempt(endpoint, served, is_grpc=is_grpc)]
    rollout = endpoint.route.rollout
    if is_chosen and rollout is not None and rollout.version == served.version:
        others = [each for each in endpoint.route.versions if each.version != served.version and each.weight]
        others = [each for each in others if each.grpc] if is_grpc else others
        attempts += (
            [_make_attempt(endpoint, max(others, key=lambda each: each.weight), is_grpc=is_grpc)] if others else []
        )
    if endpoint.route.sleep is not None and not is_grpc:
        last = attempts[-1]
        path = client_path(endpoint.name, last.version)
        attempts.append(
            Attempt(cluster=CONTROL_PLANE, version=last.version, path=path, model=endpoint.name, model_version=None)
        )
    return attempts


def _make_attempt(endpoint: RoutedEndpoint, served: ServedVersion, *, is_grpc: bool) -> Attempt:
    is_direct = is_grpc or served.speaks == "v2"
    path = f"{urlsplit(served.url).path.rstrip('/')}/v2/models/{quote(served.upstream_model, safe='')}"
    if served.upstream_version is not None:
        path += f"/versions/{quote(served.upstream_version, safe='')}"
    return Attempt(
        cluster=_name_cluster(endpoint, served, is_grpc=is_grpc) if is_direct else CONTROL_PLANE,
        version=served.version,
        path=f"{path}/infer" if is_direct else client_path(endpoint.name, served.version),
        model=served.upstream_model,
        model_version=served.upstream_version,
    )


def client_path(endpoint: str, version: str | None = None) -> str:
    """Return the path by which clients ask an endpoint, or one version of it."""
    return f"/v2/models/{endpoint}/infer" if version is None else f"/v2/models/{endpoint}/versions/{version}/infer"


def name_fallback(attempts: Sequence[Attempt]) -> str:
    """Return the name of the cluster that makes these attempts in turn."""
    shape = [[each.cluster, each.path, each.model, each.model_version] for each in attempts]
    return f"{attempts[0].cluster}|{hashlib.sha256(json.dumps(shape).encode()).hexdigest()[:12]}"


def _render_fallback(endpoint: RoutedEndpoint, attempts: Sequence[Attempt], *, is_grpc: bool) -> Json:
    """Return the cluster that sends a request to one cluster, and a retry of it to the next one."""
    source = _render_attempts_lua(attempts, is_grpc=is_grpc)
    lua = typed("envoy.extensions.filters.http.lua.v3.Lua", default_source_code={"inline_string": source})
    aggregate = typed(
        "envoy.extensions.clusters.aggregate.v3.ClusterConfig", clusters=[each.cluster for each in attempts]
    )
    return {
        "name": name_fallback(attempts),
        "connect_timeout": f"{_CONNECT_S}s",
        "lb_policy": "CLUSTER_PROVIDED",
        "cluster_type": {"name": "envoy.clusters.aggregate", "typed_config": aggregate},
        "circuit_breakers": _render_limits(endpoint),
        "typed_extension_protocol_options": _render_protocol(
            is_grpc=is_grpc, filters=[{"name": "attempts", "typed_config": lua}]
        ),
    }


def _render_attempts_lua(attempts: Sequence[Attempt], *, is_grpc: bool) -> str:
    """Return the program that names the model as the server of this attempt has it."""
    if is_grpc:
        rows = [f"{{model={_quote(each.model)}, model_version={_quote(each.model_version)}}}" for each in attempts]
        body = _BODY_PROGRAM.read_text()
        return (
            f"local ATTEMPTS = {{{', '.join(rows)}}}\n{body}\n"
            "function envoy_on_request(handle)\n"
            "  local attempt = tonumber(handle:headers():get('x-envoy-attempt-count') or '1')\n"
            "  local context = ATTEMPTS[attempt] or ATTEMPTS[#ATTEMPTS]\n"
            "  local body = attempt > 1 and handle:body()\n"
            "  if body then name_model(handle, body, context.model, context.model_version, true) end\n"
            "end\n"
        )
    paths = ", ".join(_quote(each.path) for each in attempts)
    return (
        f"local PATHS = {{{paths}}}\n"
        "function envoy_on_request(handle)\n"
        "  local headers = handle:headers()\n"
        "  local attempt = tonumber(headers:get('x-envoy-attempt-count') or '1')\n"
        "  headers:replace(':path', PATHS[attempt] or PATHS[#PATHS])\n"
        "end\n"
    )


def _quote(text: str | None) -> str:
    """Return a text as Lua writes it; its names and paths hold no control characters."""
    return "nil" if text is None else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
