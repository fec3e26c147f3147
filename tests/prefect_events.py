"""Events that a real Prefect server has taken."""

from __future__ import annotations

from typing import Any

import httpx

from infra.local.prefect_server import PrefectServer
from tests.eventually import eventually


def find_events(server: PrefectServer, name: str, resource: str, count: int = 1) -> list[dict[str, Any]]:
    """The events of a name that concern a resource, the oldest first, once there are so many."""
    body = {"filter": {"event": {"name": [name]}, "any_resource": {"id": [resource]}, "order": "ASC"}, "limit": 50}

    def read() -> list[dict[str, Any]]:
        return list(httpx.post(f"{server.api_url}/events/filter", json=body).raise_for_status().json()["events"])

    # They are sent from a thread, and the server writes them in batches.
    return eventually(read, lambda found: len(found) >= count)
