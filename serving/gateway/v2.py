"""An upstream that speaks the Open Inference Protocol: Triton, Ray Serve, BentoML, KServe, MLServer.

A request goes through as it came, binary data too; only what the contract says of it was checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import orjson

from serving.gateway.http import Answered, Http
from serving.gateway.route import Served
from serving.gateway.upstream import UPSTREAM_ERROR_CHARACTERS, Call, Reply, log_upstream, without_addresses
from serving.protocol.oip import HEADER_LENGTH, error_body

_OK, _BAD_REQUEST, _UNPROCESSABLE, _SERVER_ERROR = 200, 400, 422, 500
_BAD_GATEWAY, _UNAVAILABLE, _TIMEOUT, _TOO_LARGE, _TOO_MANY = 502, 503, 504, 413, 429
# Statuses that mean the same from behind the gateway as from the gateway; of others the client could make nothing.
_PASSED = {_BAD_REQUEST, _UNPROCESSABLE, _TOO_LARGE, _TOO_MANY, _SERVER_ERROR, _BAD_GATEWAY, _UNAVAILABLE, _TIMEOUT}
_NOT_FOUND = 404


class V2Upstream:
    """One version on a server that speaks V2."""

    def __init__(self, http: Http, served: Served) -> None:
        self._http = http
        self._model = model_url(served)

    async def infer(self, call: Call) -> Reply:
        """Forward the bytes of a request, and return those of the answer."""
        answered = await self._http.send("POST", f"{self._model}/infer", call.body.content, call.body.headers)
        if answered.status == _OK:
            return Reply(status=_OK, content=answered.content, headers=_kept(answered.headers))
        return refusal(answered, self._model)

    async def ready(self) -> bool:
        """Ask the server whether this version of the model is ready."""
        return await self._http.healthy(f"{self._model}/ready")


def model_url(served: Served) -> str:
    """Return where a V2 server has a model, or one version of it."""
    url = f"{served.url.rstrip('/')}/v2/models/{quote(served.upstream_model, safe='')}"
    if served.upstream_version is None:
        return url
    return f"{url}/versions/{quote(served.upstream_version, safe='')}"


def refusal(answered: Answered, where: str) -> Reply:
    """Return the reply for an answer that is an error: {"error": ...}, whatever the server said it in."""
    said = _told(answered.content)
    told = without_addresses(said)
    if answered.status >= _SERVER_ERROR or answered.status == _NOT_FOUND:
        log_upstream(where, f"{answered.status}: {said}")
    if answered.status == _NOT_FOUND:
        status, told = _UNAVAILABLE, f"The model must be served there, got 404: {told}. Deploy the version again."
    else:
        status = answered.status if answered.status in _PASSED else _BAD_GATEWAY
    headers = {"Content-Type": "application/json"}
    if again := answered.headers.get("Retry-After"):
        headers["Retry-After"] = again
    return Reply(status=status, content=error_body(told), headers=headers)


def _told(content: bytes) -> str:
    try:
        said: Any = orjson.loads(content)
    except orjson.JSONDecodeError:
        said = content.decode(errors="replace")
    if isinstance(said, dict):
        said = said.get("error", said.get("detail", said))
    text = said if isinstance(said, str) else orjson.dumps(said).decode()
    return text[:UPSTREAM_ERROR_CHARACTERS] or "The model server gave no reason."


def _kept(headers: Mapping[str, str]) -> dict[str, str]:
    kept = {"Content-Type": headers.get("Content-Type", "application/json")}
    if length := headers.get(HEADER_LENGTH):
        kept[HEADER_LENGTH] = length
    return kept
