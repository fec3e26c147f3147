"""Scale to zero: an idle endpoint's models are unloaded, and loaded again for the next request, which waits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Protocol
from urllib.parse import quote

from serving.errors import Unanswered
from serving.gateway.route import ModelState, ServedVersion, SleepRule
from serving.gateway.upstreams import HttpClient, V2Upstream, log_upstream_error, remove_addresses
from serving.targets.triton_control import ControlRefused, Verb, control_model_async

# A server that never answers must not prevent another attempt.
_LOAD_S_MAX, _UNLOAD_S_MAX = 600.0, 60.0
_ERROR_CHARACTERS_MAX = 2000


class ModelLoader(Protocol):
    """What loads and unloads the models of a server. `load` and `unload` raise Unanswered, with the reason."""

    async def is_loaded(self, served: ServedVersion) -> bool:
        """Return whether a version is loaded; False where its server does not answer."""
        ...

    async def load(self, served: ServedVersion) -> None:
        """Load the model, and return once it is loaded."""
        ...

    async def unload(self, served: ServedVersion) -> None:
        """Unload every version of the model."""
        ...


class ModelLifecycle:
    """Loads and unloads the models of one endpoint. To be used in one event loop.

    A gateway that starts does not know whether the models are loaded, so that the first request asks their server.
    A loaded model is never loaded again, because its server would do the work twice. Promises: no model is loaded and
    unloaded at once, and one load serves all requests that wait for it.

    Args:
        choose_loader: Returns what loads and unloads; called for each model, since the route may change.
        observe_load: Takes the seconds of each load.
        load_s_max: Seconds after which a load is given up.
        unload_s_max: Seconds after which an unload is given up.
    """

    def __init__(
        self,
        choose_loader: Callable[[], ModelLoader],
        observe_load: Callable[[float], None],
        *,
        load_s_max: float = _LOAD_S_MAX,
        unload_s_max: float = _UNLOAD_S_MAX,
    ) -> None:
        self.state: ModelState = "unknown"
        self.waiting = 0
        self._choose_loader = choose_loader
        self._observe_load = observe_load
        self._load_s_max, self._unload_s_max = load_s_max, unload_s_max
        self._changing = asyncio.Lock()
        self._loading: asyncio.Task[None] | None = None

    async def load(self, rule: SleepRule | None, versions: Sequence[ServedVersion]) -> None:
        """Return once the models are loaded.

        Raises:
            Unanswered: with 503, where the load fails or takes longer than the rule's hold_s_max.
        """
        if self.state == "awake" or rule is None:
            return
        if self._loading is None or self._loading.done():
            self._loading = asyncio.create_task(self._load(versions))
            # Requests that wait get the error. Reading it here avoids asyncio's warning where none waits any more.
            self._loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        self.waiting += 1
        try:
            async with asyncio.timeout(rule.hold_s_max):
                await asyncio.shield(self._loading)
        except TimeoutError:
            message = f"The model must be loaded within {rule.hold_s_max:g} s, but is still loading. Try again later."
            raise Unanswered(message, retry_after_s=1) from None
        finally:
            self.waiting -= 1

    async def unload(self, versions: Sequence[ServedVersion], *, hold_requests: Callable[[], Awaitable[bool]]) -> bool:
        """Unload the models, and return whether they were: they stay loaded where requests are on their way to them.

        Args:
            versions: What is unloaded.
            hold_requests: Called first, once `state` is not awake: has further requests wait for a load, and returns
                whether no request is on its way to the models.

        Raises:
            Unanswered: where an unload fails, or takes too long. The next request finds out what is loaded.
        """
        async with self._changing:
            before, self.state = self.state, "unknown"
            if not await hold_requests():
                self.state = before
                return False
            # At once: requests wait for the slowest, not for one after the other.
            unloads = map(self._unload, _list_models(versions))
            try:
                found = await asyncio.gather(*unloads, return_exceptions=True)
            finally:
                self.state = "asleep"
        if (error := next(filter(None, found), None)) is not None:
            raise error
        return True

    def mark_lost(self) -> None:
        """Note that the server no longer has the models, for example after a restart: the next request loads them."""
        if self.state == "awake":
            self.state = "asleep"

    async def _load(self, versions: Sequence[ServedVersion]) -> None:
        began = asyncio.get_running_loop().time()
        async with self._changing:
            if self.state == "awake":
                # An unload was given up.
                return
            self.state = "waking"
            try:
                async with asyncio.timeout(self._load_s_max):
                    missing = [served for served in versions if not await self._choose_loader().is_loaded(served)]
                    for served in _list_models(missing):
                        await self._choose_loader().load(served)
            except Unanswered:
                self.state = "asleep"
                raise
            except TimeoutError:
                self.state = "asleep"
                message = (
                    f"The model server must load the model within {self._load_s_max:g} s, but did not. Read its log."
                )
                raise Unanswered(message) from None
            self.state = "awake"
        if missing:
            self._observe_load(asyncio.get_running_loop().time() - began)

    async def _unload(self, served: ServedVersion) -> None:
        try:
            async with asyncio.timeout(self._unload_s_max):
                await self._choose_loader().unload(served)
        except TimeoutError:
            message = f"{served.url} must unload {served.upstream_model} within {self._unload_s_max:g} s, but did not."
            raise Unanswered(message) from None


def _list_models(versions: Sequence[ServedVersion]) -> list[ServedVersion]:
    """Return one version of each model: a server loads and unloads all versions of a model at once."""
    return list({(served.url, served.upstream_model): served for served in versions}.values())


def make_loader(http: HttpClient, rule: SleepRule | None) -> ModelLoader:
    """Return the loader that a route's rule names."""
    if rule is not None and rule.grpc is not None:
        return TritonLoader(http, rule.grpc)
    return RepositoryLoader(http)


class RepositoryLoader:
    """Loads models by the model repository extension of V2, which Triton and MLServer have."""

    def __init__(self, http: HttpClient) -> None:
        self._http = http

    async def is_loaded(self, served: ServedVersion) -> bool:
        """GET /v2/models/MODEL/versions/VERSION/ready."""
        return await V2Upstream(self._http, served).is_ready()

    async def load(self, served: ServedVersion) -> None:
        """POST /v2/repository/models/MODEL/load, which a server answers once the model is loaded."""
        await self._post(served, "load")

    async def unload(self, served: ServedVersion) -> None:
        """POST /v2/repository/models/MODEL/unload."""
        await self._post(served, "unload")

    async def _post(self, served: ServedVersion, verb: Verb) -> None:
        url = f"{served.url.rstrip('/')}/v2/repository/models/{quote(served.upstream_model, safe='')}/{verb}"
        response = await self._http.send("POST", url, b"{}", {"Content-Type": "application/json"})
        if response.status >= HTTPStatus.MULTIPLE_CHOICES:
            reason = response.content.decode(errors="replace")[:_ERROR_CHARACTERS_MAX]
            raise _make_refusal(url, verb, f"{response.status}: {reason}")


def _make_refusal(address: str, verb: Verb, reason: str) -> Unanswered:
    """Return the error for what a server refuses. A client sees that of a load, but no addresses: they are logged."""
    if verb == "unload":
        return Unanswered(f"{address} must unload the model, got {reason}.")
    log_upstream_error(address, reason)
    return Unanswered(f"The model server must load the model, got {remove_addresses(reason)}.")


class TritonLoader(RepositoryLoader):
    """Loads models through Triton's gRPC, which delays none of its HTTP connections while a model loads."""

    def __init__(self, http: HttpClient, address: str) -> None:
        super().__init__(http)
        self._address = address

    async def load(self, served: ServedVersion) -> None:
        """Load the model; Triton answers once it is loaded."""
        await self._control(served, "load")

    async def unload(self, served: ServedVersion) -> None:
        """Unload every version of the model."""
        await self._control(served, "unload")

    async def _control(self, served: ServedVersion, verb: Verb) -> None:
        try:
            await control_model_async(self._address, verb, served.upstream_model)
        except ControlRefused as error:
            raise _make_refusal(self._address, verb, str(error)[:_ERROR_CHARACTERS_MAX]) from None
