"""Wakers: who loads the models of a server, and unloads them. One Protocol, an adapter for each way to do it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol
from urllib.parse import quote

import orjson

from serving.errors import Unanswered
from serving.gateway.http import Http
from serving.gateway.route import Served, Sleep
from serving.gateway.upstream import log_upstream, without_addresses
from serving.gateway.v2 import V2Upstream
from serving.targets.triton_grpc import ControlRefused, Verb, control_async

_OK_BELOW = 300
_ERROR_CHARACTERS = 2000


class Waker(Protocol):
    """What loads a model into a server, and unloads it. Both raise Unanswered with the reason where they fail."""

    async def loaded(self, served: Served) -> bool:
        """Say whether a version is loaded, and False where its server does not answer."""
        ...

    async def load(self, served: Served) -> None:
        """Load the model; returns once it answers."""
        ...

    async def unload(self, served: Served) -> None:
        """Unload every version of the model."""
        ...


class RepositoryWaker:
    """The model repository extension of V2, as Triton and MLServer have it."""

    def __init__(self, http: Http) -> None:
        self._http = http

    async def loaded(self, served: Served) -> bool:
        """GET /v2/models/MODEL/versions/VERSION/ready."""
        return await V2Upstream(self._http, served).ready()

    async def load(self, served: Served) -> None:
        """POST /v2/repository/models/MODEL/load, which a server answers once the model is loaded."""
        await self._post(served, "load")

    async def unload(self, served: Served) -> None:
        """POST /v2/repository/models/MODEL/unload."""
        await self._post(served, "unload")

    async def _post(self, served: Served, what: str) -> None:
        url = f"{served.url.rstrip('/')}/v2/repository/models/{quote(served.upstream_model, safe='')}/{what}"
        answered = await self._http.send("POST", url, orjson.dumps({}), {"Content-Type": "application/json"})
        if answered.status >= _OK_BELOW:
            told = answered.content.decode(errors="replace")[:_ERROR_CHARACTERS]
            log_upstream(url, f"{answered.status}: {told}")
            message = f"The model server must {what} the model, got {answered.status}: {without_addresses(told)}."
            raise Unanswered(message)


class TritonWaker:
    """Triton's own gRPC door, which keeps none of its HTTP connections waiting while a model loads."""

    def __init__(self, http: Http, address: str) -> None:
        self._http, self._address = http, address

    async def loaded(self, served: Served) -> bool:
        """GET /v2/models/MODEL/versions/VERSION/ready, over HTTP."""
        return await V2Upstream(self._http, served).ready()

    async def load(self, served: Served) -> None:
        """Load the model; Triton answers once it is loaded."""
        await self._tell(served, "load")

    async def unload(self, served: Served) -> None:
        """Unload every version of the model."""
        await self._tell(served, "unload")

    async def _tell(self, served: Served, what: Verb) -> None:
        try:
            await control_async(self._address, what, served.upstream_model)
        except ControlRefused as refused:
            told = str(refused)[:_ERROR_CHARACTERS]
            log_upstream(self._address, told)
            message = f"The model server must {what} the model, got: {without_addresses(told)}."
            raise Unanswered(message) from None


class RouteWaker:
    """The waker that a route names, as it is when it is needed."""

    def __init__(self, http: Http, sleep: Callable[[], Sleep | None]) -> None:
        self._http, self._sleep = http, sleep

    async def loaded(self, served: Served) -> bool:
        """Say whether a version is loaded, and False where its server does not answer."""
        return await self._waker().loaded(served)

    async def load(self, served: Served) -> None:
        """Load the model."""
        await self._waker().load(served)

    async def unload(self, served: Served) -> None:
        """Unload every version of the model."""
        await self._waker().unload(served)

    def _waker(self) -> Waker:
        sleep = self._sleep()
        if sleep is not None and sleep.grpc is not None:
            return TritonWaker(self._http, sleep.grpc)
        return RepositoryWaker(self._http)
