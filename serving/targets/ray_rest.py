"""What Ray's dashboard answers about Serve, and the list of applications that it is to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import httpx

from serving.errors import EndpointFailed

Application = dict[str, Any]
Applications = dict[str, Application]

_PATH = "/api/serve/applications/"
_TOLD_LENGTH_MAX = 2000
_NEXT: dict[int, str] = {
    HTTPStatus.UNAUTHORIZED: "Pass the cluster's token.",
    HTTPStatus.FORBIDDEN: "Pass the cluster's token.",
    HTTPStatus.NOT_IMPLEMENTED: "Install ray[serve] on the cluster's nodes.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeApi:
    """The REST API of Serve on one cluster; `serve_url` is where its proxies are to answer."""

    client: httpx.Client
    serve_url: str

    def status(self) -> Applications:
        """Return what Ray says of each application, by name. Raises EndpointFailed where it does not answer."""
        applications: Applications = self._ask("GET").json().get("applications", {})
        return applications

    def change(self, edit: Callable[[Applications], Applications]) -> None:
        """Have the cluster run other applications than now. Raises EndpointFailed where it refuses.

        Ray takes the whole list at once, and ends what is not on it: of two that change it at the same time one may
        undo the other's change, so each looks whether its own has come to stand.
        """
        now = self._ask("GET").json()
        running = {
            name: details["deployed_app_config"]
            for name, details in now.get("applications", {}).items()
            # What a driver runs by serve.run has no config here, and stays whatever is put.
            if details.get("deployed_app_config") and details["status"] != "DELETING"
        }
        config = {**self._options(now), "applications": list(edit(running).values())}
        self._ask("PUT", config)

    def _options(self, now: dict[str, Any]) -> dict[str, Any]:
        """Return what the list of applications comes with: as it is where Serve runs, else what starts it."""
        kept = ("proxy_location", "http_options", "grpc_options", "target_capacity")
        if now.get("http_options"):
            return {name: now[name] for name in kept if now.get(name) is not None}
        where = urlsplit(self.serve_url)
        return {"http_options": {"host": where.hostname, "port": where.port or 80}}

    def _ask(self, method: str, config: dict[str, Any] | None = None) -> httpx.Response:
        base = self.client.base_url
        try:
            answer = self.client.request(method, _PATH, json=config)
        except httpx.HTTPError as error:
            message = f"Ray's dashboard must answer at {base}, got {type(error).__name__}: {error}. Start the cluster."
            raise EndpointFailed(message) from error
        if answer.is_success:
            return answer
        next_move = _NEXT.get(answer.status_code, "Mend what it says, then call again.")
        told = answer.text[:_TOLD_LENGTH_MAX]
        message = f"Ray's dashboard at {base} must take the applications, got {answer.status_code}: {told} {next_move}"
        raise EndpointFailed(message)
