"""What every part of Envoy's configuration is made of: typed messages, and the names that the parts share.

The fields are described at https://www.envoyproxy.io/docs/envoy/v1.40.0/api-v3/api.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from serving.gateway.route import Route

Json = dict[str, Any]

CONTROL_PLANE = "control_plane"
ROUTES_NAME = "endpoints"
LISTENER_STATS = "gateway"
# Headers by which Envoy and the control plane know each other's requests. Those of clients are removed.
ENDPOINT_HEADER, VERSION_HEADER = "overnight-endpoint", "overnight-version"
SHADOW_HEADER, CHOSEN_HEADER = "overnight-shadow", "overnight-chosen"
# Envoy takes a 5xx of the activator for a failure of it, so that it refuses with this status in place of 503.
ACTIVATOR_REFUSED = 424
# The filters of a request, in their order.
CHECKS, RATE, ACTIVATOR = "overnight.checks", "overnight.rate", "overnight.activator"
BODY_SIZE, BODY = "overnight.body_size", "overnight.body"
# Retries that wait for a control plane that is started again.
RESTART_RETRIES: Json = {"num_retries": 30, "retry_back_off": {"base_interval": "0.1s", "max_interval": "1s"}}
# The bytes of a request to the control plane.
ADMIN_BYTES_MAX = 8 << 20


def typed(kind: str, /, **fields: Any) -> Json:
    """Return a message of Envoy's API with its type."""
    return {"@type": f"type.googleapis.com/{kind}", **fields}


def render_seconds(seconds: float) -> str:
    """Return a duration as Envoy reads it; 0 would mean none."""
    return f"{max(seconds, 0.001):.6f}s"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedEndpoint:
    """An endpoint as Envoy routes it.

    `key_digests` are the SHA-256 of the keys that it accepts. Where `is_loaded` is False, the activator holds each
    request until the models are loaded.
    """

    name: str
    route: Route
    key_digests: frozenset[str] = field(default=frozenset())
    is_loaded: bool = True
