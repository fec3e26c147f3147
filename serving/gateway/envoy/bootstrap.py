"""Envoy's bootstrap: what is fixed while it runs. Addresses, limits of clients, the filters, the access log, errors."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from serving.gateway.envoy.messages import (
    ACTIVATOR,
    ACTIVATOR_REFUSED,
    ADMIN_BYTES_MAX,
    BODY,
    BODY_SIZE,
    CHECKS,
    CONTROL_PLANE,
    ENDPOINT_HEADER,
    LISTENER_STATS,
    RATE,
    ROUTES_NAME,
    Json,
    typed,
)

_HEADERS_KIB_MAX, _HEADERS_COUNT_MAX, _HEADERS_S_MAX = 32, 100, 10
_CLIENT_IDLE_S, _BODY_S_MAX = 75, 3600
# Envoy takes the longest interval between retries of this filter for the time limit of each try as well.
_ACTIVATOR_RETRIES: Json = {
    "num_retries": 10,
    "retry_back_off": {"base_interval": "0.1s", "max_interval": f"{_BODY_S_MAX}s"},
}
_PROGRAMS = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class BootstrapOptions:
    """What is fixed while Envoy runs: addresses, files and limits of the whole process."""

    folder: Path
    host: str = "127.0.0.1"
    port: int = 0
    bytes_max: int = 1 << 30
    connections_max: int = 4096
    certificate: Path | None = None
    private_key: Path | None = None

    @property
    def sockets(self) -> Path:
        """The folder of Unix sockets, whose paths have at most some hundred characters."""
        digest = hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"overnight-{os.getuid()}-{digest}"

    @property
    def admin_socket(self) -> Path:
        """The Unix socket of Envoy's statistics."""
        return self.sockets / "admin.sock"

    @property
    def control_socket(self) -> Path:
        """The Unix socket of the control plane."""
        return self.sockets / "control.sock"

    @property
    def clusters_file(self) -> Path:
        """The file of clusters, which Envoy reads again when it is replaced."""
        return self.folder / "clusters.json"

    @property
    def routes_file(self) -> Path:
        """The file of routes."""
        return self.folder / "routes.json"

    @property
    def access_log(self) -> Path:
        """The access log, one JSON object a line."""
        return self.folder / "access.jsonl"


def render_bootstrap(options: BootstrapOptions) -> Json:
    """Return the part of the configuration that Envoy reads when it starts."""
    return {
        "node": {"id": "overnight", "cluster": "overnight"},
        "admin": {"address": {"pipe": {"path": str(options.admin_socket), "mode": 0o600}}},
        "dynamic_resources": {"cds_config": _render_file_source(options.clusters_file)},
        "static_resources": {"listeners": [_render_listener(options)]},
        "overload_manager": {
            "refresh_interval": "0.25s",
            "resource_monitors": [
                {
                    "name": "envoy.resource_monitors.fixed_heap",
                    "typed_config": typed(
                        "envoy.extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig",
                        max_heap_size_bytes=options.bytes_max,
                    ),
                },
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": typed(
                        "envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                        max_active_downstream_connections=options.connections_max,
                    ),
                },
            ],
            "actions": [
                {
                    "name": "envoy.overload_actions.stop_accepting_requests",
                    "triggers": [{"name": "envoy.resource_monitors.fixed_heap", "threshold": {"value": 0.95}}],
                }
            ],
        },
    }


def _render_file_source(path: Path) -> Json:
    return {
        "resource_api_version": "V3",
        "path_config_source": {"path": str(path), "watched_directory": {"path": str(path.parent)}},
    }


def _render_listener(options: BootstrapOptions) -> Json:
    manager = {"name": "http", "typed_config": _render_connection_manager(options)}
    chain: Json = {"filters": [manager]}
    if options.certificate is not None and options.private_key is not None:
        certificate = {
            "certificate_chain": {"filename": str(options.certificate)},
            "private_key": {"filename": str(options.private_key)},
            "watched_directory": {"path": str(options.certificate.parent)},
        }
        tls = typed("envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext")
        tls["common_tls_context"] = {"tls_certificates": [certificate], "alpn_protocols": ["h2", "http/1.1"]}
        chain["transport_socket"] = {"name": "tls", "typed_config": tls}
    return {
        "name": "gateway",
        "address": {"socket_address": {"address": options.host, "port_value": options.port}},
        "per_connection_buffer_limit_bytes": 1 << 20,
        # Without it a second gateway can't share the port by mistake.
        "enable_reuse_port": False,
        "filter_chains": [chain],
    }


def _render_connection_manager(options: BootstrapOptions) -> Json:
    return typed(
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix=LISTENER_STATS,
        rds={"route_config_name": ROUTES_NAME, "config_source": _render_file_source(options.routes_file)},
        http_filters=_render_http_filters(),
        access_log=[_render_access_log(options.access_log)],
        local_reply_config=_render_local_replies(),
        common_http_protocol_options={
            "idle_timeout": f"{_CLIENT_IDLE_S}s",
            "max_headers_count": _HEADERS_COUNT_MAX,
            "headers_with_underscores_action": "REJECT_REQUEST",
        },
        http2_protocol_options={"max_concurrent_streams": 256},
        max_request_headers_kb=_HEADERS_KIB_MAX,
        request_headers_timeout=f"{_HEADERS_S_MAX}s",
        request_timeout=f"{_BODY_S_MAX}s",
        normalize_path=True,
        server_header_transformation="PASS_THROUGH",
        generate_request_id=False,
        use_remote_address=True,
        skip_xff_append=True,
        delayed_close_timeout="1s",
    )


def _render_http_filters() -> list[Json]:
    lua = "envoy.extensions.filters.http.lua.v3.Lua"
    checks = typed(lua, default_source_code={"filename": str(_PROGRAMS / "checks.lua")}, clear_route_cache=False)
    body = typed(lua, default_source_code={"filename": str(_PROGRAMS / "body.lua")}, clear_route_cache=False)
    rate = typed("envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit", stat_prefix="rate")
    size = typed("envoy.extensions.filters.http.buffer.v3.Buffer", max_request_bytes=ADMIN_BYTES_MAX)
    return [
        {"name": CHECKS, "typed_config": checks},
        {"name": RATE, "typed_config": rate},
        {"name": ACTIVATOR, "disabled": True, "typed_config": _render_activator()},
        {"name": BODY_SIZE, "typed_config": size},
        {"name": BODY, "typed_config": body},
        {"name": "router", "typed_config": typed("envoy.extensions.filters.http.router.v3.Router")},
    ]


def _render_activator() -> Json:
    """Return the filter that asks the control plane to load the models, and holds the request until it has."""
    return typed(
        "envoy.extensions.filters.http.ext_authz.v3.ExtAuthz",
        transport_api_version="V3",
        status_on_error={"code": 503},
        http_service={
            "server_uri": {"uri": "http://control", "cluster": CONTROL_PLANE, "timeout": f"{_BODY_S_MAX}s"},
            "path_prefix": "/activator",
            # A control plane that is started again loads the models that the earlier one was loading.
            "retry_policy": {"retry_on": "connect-failure,reset", **_ACTIVATOR_RETRIES},
            "authorization_request": {},
            "authorization_response": {"allowed_client_headers": {"patterns": [{"exact": "retry-after"}]}},
        },
        allowed_headers={"patterns": [{"exact": ENDPOINT_HEADER}]},
    )


def _render_access_log(path: Path) -> Json:
    """Return the log of the requests that reached an endpoint; see `serving.gateway.access_log` for its fields."""
    fields = {
        "at_us": "%START_TIME(%s%6f)%",
        "endpoint": "%DYNAMIC_METADATA(overnight:endpoint)%",
        "version": "%RESP(OVERNIGHT-VERSION)%",
        "rows": "%DYNAMIC_METADATA(overnight:rows)%",
        "size": "%BYTES_RECEIVED%",
        "status": "%RESPONSE_CODE%",
        "grpc_status": "%GRPC_STATUS_NUMBER%",
        "latency_us": "%COMMON_DURATION(DS_RX_BEG:DS_TX_END:us)%",
        "is_canary": "%DYNAMIC_METADATA(overnight:canary)%",
        "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
        "flags": "%RESPONSE_FLAGS%",
    }
    return {
        "name": "file",
        "filter": _render_metadata_filter("endpoint"),
        "typed_config": typed(
            "envoy.extensions.access_loggers.file.v3.FileAccessLog",
            path=str(path),
            log_format={"json_format": fields},
        ),
    }


def _render_metadata_filter(key: str) -> Json:
    """Return the condition that a program in Lua has noted something of a request."""
    matcher = {"filter": "overnight", "path": [{"key": key}], "value": {"present_match": True}}
    return {"metadata_filter": {"matcher": matcher, "match_if_key_not_found": False}}


_NO_ANSWER = "The model server of the endpoint must answer, got %RESPONSE_FLAGS_LONG%. Try again later."
_NOT_LOADED = "The gateway must load the models of the endpoint first, but could not. Try again later."
_SHOWN = "%METADATA(ROUTE:overnight:{})%"


def _render_local_replies() -> Json:
    """Return the errors that Envoy answers itself, each as {"error": ...}."""
    return {
        "mappers": [
            {
                # The programs in Lua say themselves what is wrong.
                "filter": _render_metadata_filter("refused"),
                "body_format_override": {"json_format": {"error": "%LOCAL_REPLY_BODY%"}},
            },
            _render_mapper(
                ["UO"],
                f"The endpoint may have {_SHOWN.format('requests')} requests at once, got one more. Try again later.",
                status=429,
                headers={"retry-after": "1"},
            ),
            _render_mapper((ACTIVATOR_REFUSED,), "%LOCAL_REPLY_BODY%", status=503),
            # Refusals of the control plane have other statuses: it was not reached.
            _render_mapper((503,), _NOT_LOADED, flags=["UAEX"]),
            _render_mapper(["UAEX"], "%LOCAL_REPLY_BODY%"),
            _render_mapper(
                (429,),
                f"The endpoint must get at most {_SHOWN.format('rate')} requests a second, got more. Send the request "
                "again after the seconds in Retry-After.",
            ),
            _render_mapper(
                ["UT", "UPE"],
                f"An answer must come within {_SHOWN.format('timeout')} s, but did not. Send fewer rows, or try again "
                "later.",
            ),
            _render_mapper(["SI", "DT", "OM"], "The request must be complete in time, but is not. Send it again."),
            _render_mapper(
                ["UMSDR"],
                f"An answer must come within {_SHOWN.format('timeout')} s, but did not. Send fewer rows, or try again "
                "later.",
                status=504,
            ),
            _render_mapper(["UF", "UC", "UH", "UR", "LR", "URX", "NC"], _NO_ANSWER, status=503),
            _render_mapper(
                (413,),
                f"The body must have at most {_SHOWN.format('bytes_max')} bytes, got more. Send fewer rows at once.",
            ),
            _render_mapper(
                (431,),
                f"A request may have {_HEADERS_COUNT_MAX} headers of {_HEADERS_KIB_MAX << 10} bytes in all, got more.",
            ),
        ],
        "body_format": {"json_format": {"error": "%LOCAL_REPLY_BODY%"}},
    }


def _render_mapper(
    reasons: Sequence[str | int],
    message: str,
    *,
    status: int | None = None,
    flags: Sequence[str] = (),
    headers: Mapping[str, str] | None = None,
) -> Json:
    """Return the reply for response flags of Envoy, or for a status, of replies with these flags alone where given."""
    first = reasons[0]
    if isinstance(first, int):
        comparison = {"op": "EQ", "value": {"default_value": first, "runtime_key": "overnight.none"}}
        found: Json = {"status_code_filter": {"comparison": comparison}}
    else:
        found = {"response_flag_filter": {"flags": list(reasons)}}
    if flags:
        found = {"and_filter": {"filters": [found, {"response_flag_filter": {"flags": list(flags)}}]}}
    mapper: Json = {
        "filter": found,
        "body_format_override": {"json_format": {"error": message}},
        "headers_to_add": [{"header": {"key": key, "value": value}} for key, value in (headers or {}).items()],
    }
    if status is not None:
        mapper["status_code"] = status
    return mapper
