"""What Triton is told over HTTP, and waited for: to load a model, to unload it, to answer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import quote

import httpx

from serving.errors import EndpointFailed

_POLL_S = 0.02
_REASON_LENGTH_MAX = 1500


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonControl:
    """A running Triton with explicit model control. Raises EndpointFailed with its own reason."""

    url: str
    wait_s_max: float

    def load(self, model: str, versions: Iterable[str] = ()) -> None:
        """Load a model as its config says now, and return once these versions answer.

        Versions that serve are loaded once more, and replaced when all have loaded; where one does not, they stay.
        """
        self._repository(model, "load")
        for version in versions:
            path = f"/v2/models/{quote(model)}/versions/{version}/ready"
            self._wait(lambda path=path: self._ask("GET", path).is_success, f"{model!r} version {version} be ready")  # type: ignore[misc]

    def unload(self, model: str) -> None:
        """Unload every version of a model; requests under way are answered. Idempotent."""
        self._repository(model, "unload")
        self._wait(lambda: not self._states(model) - {"UNAVAILABLE"}, f"{model!r} be unloaded")

    def infer(self, model: str, version: str, content: bytes) -> httpx.Response:
        """Ask a version, and return the answer as it comes."""
        return self._ask("POST", f"/v2/models/{quote(model)}/versions/{version}/infer", content)

    def _repository(self, model: str, verb: str) -> None:
        response = self._ask("POST", f"/v2/repository/models/{quote(model)}/{verb}", b"{}")
        if response.status_code != HTTPStatus.OK:
            message = f"Triton must {verb} {model!r}, got: {_reason(response)}"
            raise EndpointFailed(message)

    def _states(self, model: str) -> set[str]:
        listed = self._ask("POST", "/v2/repository/index", b"{}").json()
        return {each["state"] for each in listed if each["name"] == model and "state" in each}

    def _wait(self, reached: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + self.wait_s_max
        while not reached():
            if time.monotonic() > deadline:
                message = f"With Triton at {self.url} must {what} within {self.wait_s_max:g} s; read its log."
                raise EndpointFailed(message)
            time.sleep(_POLL_S)

    def _ask(self, method: str, path: str, content: bytes | None = None) -> httpx.Response:
        try:
            # A proxy of the environment has no business with a server of this machine.
            with httpx.Client(base_url=self.url, timeout=self.wait_s_max, trust_env=False) as client:
                return client.request(method, path, content=content)
        except httpx.HTTPError as error:
            message = (
                f"Triton must answer at {self.url}, got {type(error).__name__}: {error}. Start it, or read in its log "
                "why it ended."
            )
            raise EndpointFailed(message) from None


def _reason(response: httpx.Response) -> str:
    try:
        reason = str(json.loads(response.text)["error"])
    except (ValueError, KeyError, TypeError):
        reason = f"HTTP {response.status_code}: {response.text}"
    # A traceback follows the reason of a Python model.
    return reason.split("\n\nAt:\n")[0].strip()[:_REASON_LENGTH_MAX]
