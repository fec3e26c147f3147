"""Whether an endpoint's models are loaded: unloaded when idle, and loaded for a request, which waits meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from serving.errors import Unanswered
from serving.gateway.route import Served, Sleep
from serving.gateway.state import Models
from serving.gateway.waker import Waker

# A server that never answers must not keep the models from another try.
_LOAD_S_MAX, _UNLOAD_S_MAX = 600.0, 60.0

_log = logging.getLogger(__name__)


class Warmth:
    """The sleep of one endpoint. To be used in one event loop.

    A gateway that starts does not know whether the models are loaded: the first request asks. A model that is loaded
    already is never loaded again, since its server would. Promises: while models unload or load no request is with
    them, and one load serves all who wait.
    """

    def __init__(self, waker: Waker, woken: Callable[[float], None]) -> None:
        self.state: Models = "unknown"
        self._waker = waker
        self._woken = woken
        self._changing = asyncio.Lock()
        self._loading: asyncio.Task[None] | None = None

    async def wake(self, sleep: Sleep | None, versions: Sequence[Served]) -> None:
        """Return once the models are loaded. Raises Unanswered, with 503, where that fails or takes too long."""
        if self.state == "awake" or sleep is None:
            return
        if self._loading is None or self._loading.done():
            self.state = "waking"
            self._loading = asyncio.create_task(self._load(versions))
            # Whoever waits is told; where nobody does any more, nobody is to be warned of it either.
            self._loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            async with asyncio.timeout(sleep.hold_s_max):
                await asyncio.shield(self._loading)
        except TimeoutError:
            message = f"The model must be loaded within {sleep.hold_s_max:g} s, and still loads. Try again later."
            raise Unanswered(message, retry_after_s=1) from None

    async def sleep(self, versions: Sequence[Served], *, present: Callable[[], int]) -> bool:
        """Unload the models, unless a request came in the meantime; say whether they were. Logs what fails."""
        async with self._changing:
            if present():
                return False
            self.state = "asleep"
            return all([await self._unloaded(each) for each in _models(versions)])

    def lost(self) -> None:
        """Take note that the server has the models no more, as one that was restarted: the next request loads them."""
        if self.state == "awake":
            self.state = "asleep"

    async def _load(self, versions: Sequence[Served]) -> None:
        began = asyncio.get_running_loop().time()
        async with self._changing:
            try:
                async with asyncio.timeout(_LOAD_S_MAX):
                    sleeping = [each for each in versions if not await self._waker.loaded(each)]
                    for each in _models(sleeping):
                        await self._waker.load(each)
            except Unanswered:
                self.state = "asleep"
                raise
            except TimeoutError:
                self.state = "asleep"
                message = f"The model server must load the model within {_LOAD_S_MAX:g} s, and did not. Read its log."
                raise Unanswered(message) from None
            self.state = "awake"
        if sleeping:
            self._woken(asyncio.get_running_loop().time() - began)

    async def _unloaded(self, served: Served) -> bool:
        try:
            async with asyncio.timeout(_UNLOAD_S_MAX):
                await self._waker.unload(served)
        except Unanswered as error:
            _log.warning("%s", error)
        except TimeoutError:
            _log.warning("%s must unload %s within %g s.", served.url, served.upstream_model, _UNLOAD_S_MAX)
        else:
            return True
        return False


def _models(versions: Sequence[Served]) -> list[Served]:
    """Return one version of each model: a server loads and unloads all versions of a model at once."""
    return list({(each.url, each.upstream_model): each for each in versions}.values())
