"""A running gateway: its endpoints, and what it does without a request (judging, unloading, writing files)."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from http import HTTPStatus
from typing import Self

from serving.errors import BadRequest
from serving.gateway.endpoint import Endpoint
from serving.gateway.keys import Keys
from serving.gateway.metering import MeteringLog
from serving.gateway.metrics import Metrics
from serving.gateway.request_body import BodyMemory
from serving.gateway.route import EndpointState, Route, SavedEndpoint
from serving.gateway.store import Store
from serving.gateway.upstreams import HttpClient

_INTERVAL_S = 1.0
# Less than the time-out of the administrator's client.
_DRAIN_S_MAX = 20.0
_NAMES_SHOWN = 20

_log = logging.getLogger(__name__)


class Gateway:
    """All endpoints of one folder; an async context manager that runs the periodic work."""

    def __init__(self, store: Store, keys: Keys, *, bytes_max: int) -> None:
        self.keys = keys
        self.metrics = Metrics()
        self.memory = BodyMemory(bytes_max)
        self.metering_log = MeteringLog(store.folder)
        self._store = store
        self._written = store.load_all()
        self._endpoints: dict[str, Endpoint] = {}
        self._changed = asyncio.Event()
        self._write_lock = asyncio.Lock()
        self._unloading: set[asyncio.Task[None]] = set()
        self._is_closing = False

    async def __aenter__(self) -> Self:
        """Open the connections, and put the stored routes in force."""
        self._http = HttpClient()
        for name, saved in self._written.items():
            self._endpoints[name] = self._make_endpoint(name, saved)
        self._periodic_work = asyncio.create_task(self._work_periodically())
        return self

    async def __aexit__(self, *error: object) -> None:
        """Write all files. All requests are answered by now."""
        # The task is not cancelled: a thread of it would go on writing beside what follows.
        self._is_closing = True
        self._changed.set()
        await asyncio.gather(self._periodic_work, *self._unloading, return_exceptions=True)
        await self._save_all()
        self._flush_metering_log()
        with suppress(OSError):
            self.metering_log.close()
        await self._http.close()

    @property
    def names(self) -> list[str]:
        """The names of all endpoints."""
        return sorted(self._endpoints)

    def endpoint(self, name: str) -> Endpoint:
        """Return an endpoint. Raises BadRequest, with 404, where there is none of that name."""
        if endpoint := self._endpoints.get(name):
            return endpoint
        message = f"The model must be an endpoint of this gateway, got {name[:100]!r}."
        raise BadRequest(message, status=HTTPStatus.NOT_FOUND)

    async def put(self, name: str, route: Route) -> EndpointState:
        """Put a route in force and store it. Idempotent. Raises BadRequest, with 409, where it has an unknown key."""
        if unknown := sorted({*route.keys} - self.keys.names):
            message = (
                f"Each key of a route must be known to the gateway, got {unknown[:_NAMES_SHOWN]}. Put the key first."
            )
            raise BadRequest(message, status=HTTPStatus.CONFLICT)
        if name not in self._endpoints:
            self._endpoints[name] = self._make_endpoint(name, SavedEndpoint(route=route))
        self._endpoints[name].put(route)
        await self._save(name)
        return self.endpoint(name).state

    async def delete(self, name: str) -> None:
        """Delete an endpoint, and return once its requests are answered, or after 20 s. Idempotent."""
        async with self._write_lock:
            endpoint = self._endpoints.pop(name, None)
            if endpoint is None:
                return
            try:
                await asyncio.to_thread(self._store.delete, name)
            except OSError:
                self._endpoints.setdefault(name, endpoint)
                raise
            self._written.pop(name, None)
        await endpoint.wait_until_drained(_DRAIN_S_MAX)
        if name not in self._endpoints:
            self.metrics.remove_endpoint(name)

    def render_metrics(self) -> bytes:
        """Return the page that Prometheus scrapes."""
        for name, endpoint in self._endpoints.items():
            self.metrics.in_flight.labels(name).set(endpoint.queue.running)
            self.metrics.queued.labels(name).set(endpoint.queue.waiting)
            self.metrics.loaded.labels(name).set(endpoint.route.sleep is None or endpoint.models.state == "awake")
        self.metrics.metering_lost.set(self.metering_log.lost)
        return self.metrics.render()

    def _make_endpoint(self, name: str, saved: SavedEndpoint) -> Endpoint:
        return Endpoint(name, saved, http=self._http, metrics=self.metrics, on_change=self._changed.set)

    async def _work_periodically(self) -> None:
        """Judge canaries, unload idle models and write files: every second, and at once when a canary ends."""
        while not self._is_closing:
            with suppress(TimeoutError):
                async with asyncio.timeout(_INTERVAL_S):
                    await self._changed.wait()
            self._changed.clear()
            for endpoint in [*self._endpoints.values()]:
                endpoint.decide_canary()
                if endpoint.has_idle_models():
                    task = asyncio.create_task(endpoint.unload_models())
                    self._unloading.add(task)
                    task.add_done_callback(self._unloading.discard)
            await self._save_all()
            await asyncio.to_thread(self._flush_metering_log)

    def _flush_metering_log(self) -> None:
        try:
            self.metering_log.flush()
        except OSError as error:
            _log.warning("The metering log must be writable, got: %s. Its lines stay in memory for now.", error)

    async def _save_all(self) -> None:
        for name in [*self._endpoints]:
            try:
                await self._save(name)
            except OSError as error:
                _log.warning("The route of %s must be writable, got: %s. The gateway tries again.", name, error)

    async def _save(self, name: str) -> None:
        async with self._write_lock:
            endpoint = self._endpoints.get(name)
            if endpoint is None or self._written.get(name) is (saved := endpoint.saved):
                return
            await asyncio.to_thread(self._store.put, name, saved)
            self._written[name] = saved
