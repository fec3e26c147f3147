"""Events that a real Prefect server has taken."""

from __future__ import annotations

import time
from typing import Any

import httpx

from infra.local.prefect_server import PrefectServer

SECONDS_MAX = 60.0


def find_events(server: PrefectServer, name: str, resource: str, count: int = 1) -> list[dict[str, Any]]:
    """The events of a name that concern a resource, the oldest first, once there are so many."""
    body = {"filter": {"event": {"name": [name]}, "any_resource": {"id": [resource]}, "order": "ASC"}, "limit": 50}
    until = time.monotonic() + SECONDS_MAX
    while True:
        answer = httpx.post(f"{server.api_url}/events/filter", json=body)
        answer.raise_for_status()
        found = list(answer.json()["events"])
        # They are sent from a thread, and the server writes them in batches.
        if len(found) >= count or time.monotonic() > until:
            return found
        time.sleep(0.1)
