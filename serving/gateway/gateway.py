"""The gateway as it runs: every endpoint, and what is written down of them."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Self

from serving.errors import BadRequest
from serving.gateway.body import Memory
from serving.gateway.endpoint import Endpoint
from serving.gateway.http import Http
from serving.gateway.keys import Keys
from serving.gateway.metering import Meter
from serving.gateway.metrics import Metrics
from serving.gateway.route import Route
from serving.gateway.state import EndpointState, Kept
from serving.gateway.store import Store

_TICK_S = 1.0
# Below the time that the administrator's client waits for an answer.
_DRAIN_S_MAX = 20.0
_NOT_FOUND, _CONFLICT = 404, 409
_NAMES_SHOWN = 20

_log = logging.getLogger(__name__)


class Gateway:
    """All endpoints of one folder; an async context manager that runs what happens without a request."""

    def __init__(self, store: Store, keys: Keys, *, bytes_max: int) -> None:
        self.keys = keys
        self.metrics = Metrics()
        self.memory = Memory(bytes_max)
        self.meter = Meter(store.folder)
        self._store = store
        self._kept = store.load()
        self._endpoints: dict[str, Endpoint] = {}
        self._changed = asyncio.Event()
        self._writing = asyncio.Lock()
        self._written: dict[str, Kept] = dict(self._kept)
        self._tasks: set[asyncio.Task[None]] = set()
        self._over = False

    async def __aenter__(self) -> Self:
        """Open the connections and put the routes that were kept in force."""
        self._http = Http()
        for name, kept in self._kept.items():
            self._endpoints[name] = self._open(name, kept)
        self._ticking = asyncio.create_task(self._tick())
        return self

    async def __aexit__(self, *error: object) -> None:
        """Write down what there is; requests are through by now."""
        # Not cancelled: what a thread is writing down by then would be written on beside what follows.
        self._over = True
        self._changed.set()
        await asyncio.gather(self._ticking, *self._tasks, return_exceptions=True)
        await self._save_all()
        self._flush()
        with suppress(OSError):
            self.meter.close()
        await self._http.close()

    @property
    def names(self) -> list[str]:
        """The names of all endpoints."""
        return sorted(self._endpoints)

    def endpoint(self, name: str) -> Endpoint:
        """Return an endpoint. Raises BadRequest, with 404, where there is none of that name."""
        if endpoint := self._endpoints.get(name):
            return endpoint
        message = f"The model must be an endpoint that is served here, got {name[:100]!r}."
        raise BadRequest(message, status=_NOT_FOUND)

    async def put(self, name: str, route: Route) -> EndpointState:
        """Put a route in force and keep it. Idempotent. Raises BadRequest, with 409, where a key of it is unknown."""
        if strange := sorted({*route.keys} - self.keys.names):
            message = f"Each key of a route must be known to the gateway, got {strange[:_NAMES_SHOWN]}. Put it first."
            raise BadRequest(message, status=_CONFLICT)
        if name not in self._endpoints:
            self._endpoints[name] = self._open(name, Kept(route=route))
        self._endpoints[name].put(route)
        await self._save(name)
        return self.state(name)

    async def delete(self, name: str) -> None:
        """Take an endpoint out, and return once the requests that it had are answered, or 20 s later. Idempotent."""
        async with self._writing:
            endpoint = self._endpoints.pop(name, None)
            if endpoint is None:
                return
            try:
                await asyncio.to_thread(self._store.delete, name)
            except OSError:
                self._endpoints.setdefault(name, endpoint)
                raise
            self._written.pop(name, None)
        await endpoint.drained(_DRAIN_S_MAX)
        if name not in self._endpoints:
            self.metrics.forget(name)

    def state(self, name: str) -> EndpointState:
        """Return what there is of an endpoint now. Raises BadRequest, with 404, where there is none."""
        endpoint = self.endpoint(name)
        kept = endpoint.kept
        return EndpointState(
            route=kept.route,
            trial=kept.trial,
            verdict=kept.verdict,
            in_flight={version: count for version, count in endpoint.in_flight.items() if count},
            waiting=endpoint.admission.waiting,
            models=endpoint.warmth.state,
        )

    def metrics_page(self) -> bytes:
        """Return what Prometheus scrapes."""
        for name, endpoint in self._endpoints.items():
            self.metrics.in_flight.labels(name).set(endpoint.admission.running)
            self.metrics.queued.labels(name).set(endpoint.admission.waiting)
            self.metrics.awake.labels(name).set(endpoint.route.sleep is None or endpoint.warmth.state == "awake")
        self.metrics.metering_lost.set(self.meter.lost)
        return self.metrics.page()

    def _open(self, name: str, kept: Kept) -> Endpoint:
        return Endpoint(name, kept, http=self._http, metrics=self.metrics, changed=self._changed.set)

    async def _tick(self) -> None:
        """Every second, and at once when a trial ends: judge, unload, write down."""
        while not self._over:
            try:
                async with asyncio.timeout(_TICK_S):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
            for endpoint in [*self._endpoints.values()]:
                if endpoint.tick():
                    task = asyncio.create_task(endpoint.sleep())
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
            await self._save_all()
            await asyncio.to_thread(self._flush)

    def _flush(self) -> None:
        try:
            self.meter.flush()
        except OSError as error:
            _log.warning("The metering log must be written, got: %s. Its lines are kept for now.", error)

    async def _save_all(self) -> None:
        for name in [*self._endpoints]:
            try:
                await self._save(name)
            except OSError as error:
                _log.warning("The route of %s must be written, got: %s. It is tried again.", name, error)

    async def _save(self, name: str) -> None:
        async with self._writing:
            endpoint = self._endpoints.get(name)
            if endpoint is None or self._written.get(name) is (kept := endpoint.kept):
                return
            await asyncio.to_thread(self._store.put, name, kept)
            self._written[name] = kept
