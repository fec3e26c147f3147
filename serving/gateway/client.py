"""The administrator's client of a gateway: it puts routes and keys, and waits for their effect."""

from __future__ import annotations

import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Self

import httpx
import orjson
from pydantic import BaseModel

from serving.errors import EndpointFailed
from serving.gateway.keys import KEY_LENGTH_MIN, hash_key
from serving.gateway.route import EndpointState, Route

_TIMEOUT_S = 30.0
_POLL_S = 0.1


class GatewayClient:
    """A client of one gateway; a context manager that closes its connections.

    Every method raises EndpointFailed, with the gateway's message, or the reason why it did not answer. All methods are
    idempotent.
    """

    def __init__(self, url: str, admin_key: str) -> None:
        self.url = url.rstrip("/")
        self._http = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {admin_key}"}, timeout=_TIMEOUT_S, trust_env=False
        )

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the connections."""
        self._http.close()

    def put(self, name: str, route: Route) -> EndpointState:
        """Put a route in force for all requests that come from now on."""
        return EndpointState.model_validate_json(self._send("PUT", f"/admin/endpoints/{name}", route))

    def get(self, name: str) -> EndpointState | None:
        """Return the state of an endpoint, None where there is none of that name."""
        response = self._request("GET", f"/admin/endpoints/{name}")
        if response.status_code == HTTPStatus.NOT_FOUND:
            return None
        return EndpointState.model_validate_json(self._check(response))

    def list_endpoints(self) -> list[str]:
        """Return the names of all endpoints."""
        response = self._request("GET", "/admin/endpoints")
        return [str(name) for name in orjson.loads(self._check(response))["endpoints"]]

    def delete(self, name: str) -> None:
        """Delete an endpoint, and return once its requests are answered, or after 20 s."""
        self._send("DELETE", f"/admin/endpoints/{name}")

    def put_key(self, name: str, key: str) -> None:
        """Register an API key with the gateway, which gets only its digest."""
        if len(key) < KEY_LENGTH_MIN:
            message = f"An API key must have at least {KEY_LENGTH_MIN} characters, got {len(key)}: openssl rand -hex 32"
            raise EndpointFailed(message)
        self._send("PUT", f"/admin/keys/{name}", {"sha256": hash_key(key)})

    def delete_key(self, name: str) -> None:
        """Delete an API key from the gateway."""
        self._send("DELETE", f"/admin/keys/{name}")

    def wait_until(self, name: str, condition: Callable[[EndpointState], bool], *, timeout_s: float) -> EndpointState:
        """Return the state of an endpoint once the condition holds. Raises EndpointFailed where it does not in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            state = self.get(name)
            if state is None:
                message = (
                    f"The gateway at {self.url} must have the endpoint {name!r}, but has not. Put its route first."
                )
                raise EndpointFailed(message)
            if condition(state):
                return state
            if time.monotonic() > deadline:
                found = state.model_dump_json(exclude={"route"})
                message = f"The endpoint {name!r} must be in the expected state within {timeout_s:g} s, got {found}."
                raise EndpointFailed(message)
            time.sleep(_POLL_S)

    def wait_until_idle(self, name: str, version: str, *, timeout_s: float) -> None:
        """Return once a version that left the route has answered all its requests, so that it can be removed."""
        self.wait_until(name, lambda state: version not in state.in_flight, timeout_s=timeout_s)

    def _send(self, method: str, path: str, body: BaseModel | dict[str, Any] | None = None) -> bytes:
        return self._check(self._request(method, path, body))

    def _request(self, method: str, path: str, body: BaseModel | dict[str, Any] | None = None) -> httpx.Response:
        content = body.model_dump(mode="json") if isinstance(body, BaseModel) else body
        try:
            return self._http.request(method, path, json=content)
        except httpx.HTTPError as error:
            message = f"The gateway must answer at {self.url}, got {type(error).__name__}: {error}. Start it first."
            raise EndpointFailed(message) from None

    def _check(self, response: httpx.Response) -> bytes:
        if response.is_success:
            return response.content
        message = f"The gateway must accept the request, got {response.status_code}: {response.text[:2000]}"
        raise EndpointFailed(message)
