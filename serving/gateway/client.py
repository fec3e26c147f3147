"""The administrator's client of a gateway: puts routes and keys, and waits for what becomes of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import httpx
from pydantic import BaseModel

from serving.errors import EndpointFailed
from serving.gateway.keys import KEY_LENGTH_MIN, digest
from serving.gateway.route import Route
from serving.gateway.state import EndpointState
from serving.gateway.trial import Verdict

_TIMEOUT_S = 30.0
_POLL_S = 0.1
_NOT_FOUND = 404


class GatewayClient:
    """A client of one gateway; a context manager that closes its connections.

    Every verb raises EndpointFailed, with what the gateway said, or why it did not answer. All but the waits are
    idempotent, and may be called again.
    """

    def __init__(self, url: str, admin_key: str) -> None:
        self.url = url.rstrip("/")
        self._http = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {admin_key}"}, timeout=_TIMEOUT_S, trust_env=False
        )

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connections."""
        self._http.close()

    def put(self, name: str, route: Route) -> EndpointState:
        """Put a route in force; the requests that come from now on go by it."""
        return EndpointState.model_validate_json(self._send("PUT", f"/admin/endpoints/{name}", route))

    def get(self, name: str) -> EndpointState | None:
        """Return the state of an endpoint, None where there is none of that name."""
        response = self._request("GET", f"/admin/endpoints/{name}")
        if response.status_code == _NOT_FOUND:
            return None
        return EndpointState.model_validate_json(self._checked(response))

    def delete(self, name: str) -> None:
        """Take an endpoint out, and return once the requests that it had are answered, or 20 s later."""
        self._send("DELETE", f"/admin/endpoints/{name}")

    def put_key(self, name: str, key: str) -> None:
        """Have the gateway know an API key; only its digest goes there."""
        if len(key) < KEY_LENGTH_MIN:
            message = f"An API key must have at least {KEY_LENGTH_MIN} characters, got {len(key)}: openssl rand -hex 32"
            raise EndpointFailed(message)
        self._send("PUT", f"/admin/keys/{name}", {"sha256": digest(key)})

    def delete_key(self, name: str) -> None:
        """Have the gateway forget an API key."""
        self._send("DELETE", f"/admin/keys/{name}")

    def wait(self, name: str, until: Callable[[EndpointState], bool], *, timeout_s: float) -> EndpointState:
        """Return the state of an endpoint once it is as wanted. Raises EndpointFailed where it is not in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            state = self.get(name)
            if state is None:
                message = f"The gateway at {self.url} must have the endpoint {name!r}, got none. Put its route first."
                raise EndpointFailed(message)
            if until(state):
                return state
            if time.monotonic() > deadline:
                at = state.model_dump_json(exclude={"route"})
                message = f"The endpoint {name!r} must come to be as wanted within {timeout_s:g} s, got {at}."
                raise EndpointFailed(message)
            time.sleep(_POLL_S)

    def wait_for_verdict(self, name: str, *, timeout_s: float) -> Verdict:
        """Return how the trial of an endpoint ended, once it has."""
        verdict = self.wait(name, lambda state: state.verdict is not None, timeout_s=timeout_s).verdict
        assert verdict is not None, "waited for"  # noqa: S101 - our own mistake, not a caller's
        return verdict

    def wait_until_idle(self, name: str, version: str, *, timeout_s: float) -> None:
        """Return once no request is with a version that the route has no more: then it can be taken down."""
        self.wait(name, lambda state: version not in state.in_flight, timeout_s=timeout_s)

    def _send(self, method: str, path: str, body: BaseModel | dict[str, Any] | None = None) -> bytes:
        return self._checked(self._request(method, path, body))

    def _request(self, method: str, path: str, body: BaseModel | dict[str, Any] | None = None) -> httpx.Response:
        content = body.model_dump(mode="json") if isinstance(body, BaseModel) else body
        try:
            return self._http.request(method, path, json=content)
        except httpx.HTTPError as error:
            message = f"The gateway must answer at {self.url}, got {type(error).__name__}: {error}. Start it first."
            raise EndpointFailed(message) from None

    def _checked(self, response: httpx.Response) -> bytes:
        if response.is_success:
            return response.content
        message = f"The gateway must do as asked, got {response.status_code}: {response.text[:2000]}"
        raise EndpointFailed(message)
