"""Envoy's routes: those of endpoints, with weights, retries, limits and keys; the rest goes to the control plane."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

from serving.gateway.envoy.clusters import client_path, list_attempts, name_fallback, name_shadow
from serving.gateway.envoy.messages import (
    ACTIVATOR,
    ADMIN_BYTES_MAX,
    BODY,
    BODY_SIZE,
    CHECKS,
    CHOSEN_HEADER,
    CONTROL_PLANE,
    ENDPOINT_HEADER,
    RATE,
    RESTART_RETRIES,
    ROUTES_NAME,
    SHADOW_HEADER,
    VERSION_HEADER,
    Json,
    RoutedEndpoint,
    render_seconds,
    typed,
)
from serving.gateway.route import ServedVersion
from serving.model.contract import TEXT_DTYPES, Contract
from serving.protocol.tensors import get_row_shape

_GRPC_SERVICE = "inference.GRPCInferenceService"
_GRPC_METHODS = ("ModelInfer", "ModelMetadata", "ModelReady", "ServerLive", "ServerMetadata", "ServerReady")
_WEIGHTS_TOTAL = 1_000_000
# Answers of a canary that another version may give better.
_FAILED_STATUSES = range(300, 500)
# What servers answer for a model that they do not have.
_LOST_STATUSES = (400, 404, 503)
# Digits, exponent, sign and as many spaces as a pretty printer takes.
_VALUE_BYTES_MAX = 64


def render_routes(endpoints: Iterable[RoutedEndpoint], known_digests: Iterable[str]) -> Json:
    """Return the file of routes: those of all endpoints, and the rest to the control plane."""
    routes = [route for endpoint in endpoints for route in _render_endpoint_routes(endpoint)]
    host = {
        "name": "gateway",
        "domains": ["*"],
        "include_request_attempt_count": True,
        "include_attempt_count_in_response": True,
        "metadata": {"filter_metadata": {CHECKS: dict.fromkeys(sorted(known_digests), True)}},
        "routes": [*routes, *_render_other_routes()],
    }
    kind = "envoy.config.route.v3.RouteConfiguration"
    return {"resources": [typed(kind, name=ROUTES_NAME, virtual_hosts=[host], validate_clusters=False)]}


def _render_other_routes() -> list[Json]:
    off = typed("envoy.config.route.v3.FilterConfig", disabled=True)
    filters = dict.fromkeys((CHECKS, BODY), off)
    removed = {
        "request_headers_to_remove": [ENDPOINT_HEADER, SHADOW_HEADER, CHOSEN_HEADER],
        "typed_per_filter_config": filters,
    }
    message = (
        "The call must name an endpoint of this gateway in the metadata overnight-endpoint, and be one of "
        f"{', '.join(_GRPC_METHODS)}."
    )
    # They wait for a control plane that is started again; it has not seen the request.
    retries = {"retry_on": "connect-failure,refused-stream,reset-before-request", **RESTART_RETRIES}
    return [
        {
            "match": {"prefix": f"/{_GRPC_SERVICE}/"},
            "direct_response": {"status": 404, "body": {"inline_string": message}},
            **removed,
        },
        {
            "match": {"prefix": "/"},
            "route": {"cluster": CONTROL_PLANE, "timeout": "60s", "retry_policy": retries},
            "metadata": {"filter_metadata": {"overnight": {"bytes_max": str(ADMIN_BYTES_MAX), "timeout": "60"}}},
            **removed,
        },
    ]


def _render_endpoint_routes(endpoint: RoutedEndpoint) -> list[Json]:
    weighted = [served for served in endpoint.route.versions if served.weight]
    routes = []
    for served in endpoint.route.versions:
        match: Json = {
            "path": client_path(endpoint.name, served.version),
            "headers": [_match_header(":method", "POST")],
        }
        routes.append(_render_route(endpoint, match, [served], is_chosen=False))
    match = {"path": client_path(endpoint.name), "headers": [_match_header(":method", "POST")]}
    routes.append(_render_route(endpoint, match, weighted, is_chosen=True))
    methods = "|".join(_GRPC_METHODS)
    grpc: Json = {"safe_regex": {"regex": rf"/{re.escape(_GRPC_SERVICE)}/({methods})"}, "grpc": {}}
    named = _match_header(ENDPOINT_HEADER, endpoint.name)
    for served in endpoint.route.versions:
        if served.grpc:
            headers = [named, _match_header(VERSION_HEADER, served.version)]
            routes.append(
                _render_route(endpoint, {**grpc, "headers": headers}, [served], is_chosen=False, is_grpc=True)
            )
    if any(served.grpc for served in weighted):
        unnamed = {"name": VERSION_HEADER, "present_match": False}
        reached = [served for served in weighted if served.grpc]
        headers = [named, unnamed]
        routes.append(_render_route(endpoint, {**grpc, "headers": headers}, reached, is_chosen=True, is_grpc=True))
    return routes


def _match_header(name: str, value: str) -> Json:
    return {"name": name, "string_match": {"exact": value}}


def _render_route(
    endpoint: RoutedEndpoint,
    match: Json,
    versions: Sequence[ServedVersion],
    *,
    is_chosen: bool,
    is_grpc: bool = False,
) -> Json:
    limits, route = endpoint.route.limits, endpoint.route
    hold_s = route.sleep.hold_s_max if route.sleep else 0.0
    action: Json = {
        "weighted_clusters": {"clusters": _render_weighted(endpoint, versions, is_chosen=is_chosen, is_grpc=is_grpc)},
        "timeout": render_seconds(limits.timeout_s + hold_s),
        # No byte for so long: a body that stops, or a request that the activator holds.
        "idle_timeout": render_seconds(limits.timeout_s + hold_s + 1),
        "retry_policy": _render_retries(endpoint, is_grpc=is_grpc, is_chosen=is_chosen),
    }
    if route.shadow is not None and not is_grpc and is_chosen:
        marked = {"append": {"header": {"key": SHADOW_HEADER, "value": "1"}}}
        action["request_mirror_policies"] = [{"cluster": name_shadow(endpoint), "request_headers_mutations": [marked]}]
    return {
        "match": match,
        "route": action,
        "metadata": {"filter_metadata": _render_metadata(endpoint)},
        "typed_per_filter_config": _render_filters(endpoint),
    }


def _render_weighted(
    endpoint: RoutedEndpoint, versions: Sequence[ServedVersion], *, is_chosen: bool, is_grpc: bool
) -> list[Json]:
    total = sum(served.weight for served in versions)
    clusters = []
    for served in versions:
        attempts = list_attempts(endpoint, served, is_grpc=is_grpc, is_chosen=is_chosen)
        first = attempts[0]
        rollout = endpoint.route.rollout
        context: Json = {"version": served.version, "model": first.model}
        if not is_grpc and len(attempts) == 1:
            context["path"] = first.path
        if first.model_version is not None:
            context["model_version"] = first.model_version
        if is_chosen and rollout is not None and rollout.version == served.version:
            context["canary"] = True
        if endpoint.route.shadow is not None:
            context["has_shadow"] = True
        context.update({f"version {number}": each.version for number, each in enumerate(attempts, 1) if number > 1})
        lua = typed("envoy.extensions.filters.http.lua.v3.LuaPerRoute", filter_context=context)
        clusters.append(
            {
                "name": first.cluster if len(attempts) == 1 else name_fallback(attempts),
                "weight": max(1, round(served.weight / total * _WEIGHTS_TOTAL)) if is_chosen else 1,
                "typed_per_filter_config": {CHECKS: lua, BODY: lua},
                **_render_host(served, is_grpc=is_grpc),
            }
        )
    return clusters


def _render_host(served: ServedVersion, *, is_grpc: bool) -> Json:
    if served.speaks != "v2":
        return {}
    return {"host_rewrite_literal": served.grpc if is_grpc and served.grpc else urlsplit(served.url).netloc}


def _render_retries(endpoint: RoutedEndpoint, *, is_grpc: bool, is_chosen: bool) -> Json:
    """Return when a request is sent again: where nothing was sent, and from a canary or a lost model to the next."""
    route = endpoint.route
    conditions = ["connect-failure", "refused-stream", "reset-before-request"]
    policy: Json = {"num_retries": 1}
    statuses: set[int] = set()
    if route.rollout is not None and is_chosen:
        conditions += ["5xx", "reset"]
        conditions += ["cancelled", "internal", "resource-exhausted", "unavailable"] if is_grpc else []
        statuses.update(_FAILED_STATUSES)
    if route.sleep is not None:
        statuses.update(_LOST_STATUSES)
    attempts_max = max(
        len(list_attempts(endpoint, served, is_grpc=is_grpc, is_chosen=is_chosen)) for served in route.versions
    )
    if attempts_max > 1:
        policy["num_retries"] = attempts_max - 1
        selector = typed(
            "envoy.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig", update_frequency=1
        )
        policy["retry_priority"] = {"name": "envoy.retry_priorities.previous_priorities", "typed_config": selector}
    if statuses:
        conditions.append("retriable-status-codes")
        policy["retriable_status_codes"] = sorted(statuses)
    return {"retry_on": ",".join(conditions), **policy}


def _render_metadata(endpoint: RoutedEndpoint) -> Json:
    limits = endpoint.route.limits
    checks: Json = {"endpoint": endpoint.name, **dict.fromkeys(sorted(endpoint.key_digests), True)}
    if endpoint.route.keys:
        checks["needs_key"] = True
    shown = {
        "bytes_max": str(limits.bytes_max),
        "timeout": f"{limits.timeout_s:g}",
        "requests": str(limits.in_flight_max + limits.queue_max),
        "rate": f"{limits.requests_per_second or 0:g}",
    }
    sizes: Json = {"rows_max": limits.rows_max}
    if row_bytes_max := estimate_row_bytes(endpoint.route.contract):
        sizes["row_bytes_max"] = row_bytes_max
    return {CHECKS: checks, BODY: sizes, "overnight": {"endpoint": endpoint.name, **shown}}


def estimate_row_bytes(contract: Contract) -> int | None:
    """Return the bytes that a row of numbers takes as JSON at most, generously; None where it has text or bytes."""
    if any(value.dtype in TEXT_DTYPES for value in contract.inputs):
        return None
    return sum(math.prod(get_row_shape(value)) * _VALUE_BYTES_MAX for value in contract.inputs)


def _render_filters(endpoint: RoutedEndpoint) -> Json:
    limits = endpoint.route.limits
    size = typed(
        "envoy.extensions.filters.http.buffer.v3.BufferPerRoute", buffer={"max_request_bytes": limits.bytes_max}
    )
    filters: Json = {BODY_SIZE: size}
    if limits.requests_per_second is not None:
        filters[RATE] = _render_rate_limit(limits.requests_per_second, limits.burst)
    if not endpoint.is_loaded:
        held = typed("envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute", check_settings={})
        filters[ACTIVATOR] = typed("envoy.config.route.v3.FilterConfig", config=held)
    return filters


def _render_rate_limit(per_second: float, burst: int) -> Json:
    """Return a token bucket of `burst` tokens; Envoy fills it in whole tokens, at most every 50 ms."""
    interval_s = max(0.05, 1 / per_second)
    full = {"numerator": 100, "denominator": "HUNDRED"}
    return typed(
        "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit",
        stat_prefix="rate",
        token_bucket={
            "max_tokens": burst,
            "tokens_per_fill": max(1, round(per_second * interval_s)),
            "fill_interval": render_seconds(interval_s),
        },
        filter_enabled={"default_value": full},
        filter_enforced={"default_value": full},
        response_headers_to_add=[{"header": {"key": "retry-after", "value": str(max(1, math.ceil(1 / per_second)))}}],
    )
