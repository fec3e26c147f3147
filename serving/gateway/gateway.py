"""The control plane of a gateway: its endpoints, what Envoy is told of them, and what Envoy's log tells of requests."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from http import HTTPStatus
from typing import Self

from serving.errors import BadRequest, EndpointFailed, Unanswered
from serving.gateway.access_log import AccessLogReader
from serving.gateway.endpoint import Endpoint
from serving.gateway.envoy.admin import EnvoyAdmin, EnvoyGone
from serving.gateway.envoy.bootstrap import BootstrapOptions
from serving.gateway.envoy.files import ClusterRequests, ConfigurationFiles
from serving.gateway.envoy.messages import RoutedEndpoint
from serving.gateway.keys import Keys
from serving.gateway.metrics import Metrics
from serving.gateway.request_body import BodyMemory
from serving.gateway.route import EndpointState, Route, SavedEndpoint
from serving.gateway.store import Store
from serving.gateway.upstreams import HttpClient

_INTERVAL_S = 0.25
# Less than the time-out of the administrator's client.
_DRAIN_S_MAX = 20.0
# An idle endpoint has no requests; one that came in the last moment is soon answered.
_IDLE_S_MAX = 10.0
_POLL_S = 0.01
_NAMES_SHOWN = 20
_SAVE_TURNS = 4

_log = logging.getLogger(__name__)


class Gateway:
    """All endpoints of one folder; an async context manager that runs the periodic work."""

    def __init__(self, store: Store, keys: Keys, options: BootstrapOptions) -> None:
        self.keys = keys
        self.metrics = Metrics()
        self.memory = BodyMemory(options.bytes_max)
        self._admin = EnvoyAdmin(options.admin_socket)
        self._files = ConfigurationFiles(options)
        self._log_reader = AccessLogReader(store.folder, self._admin)
        self._store = store
        self._written = store.load_all()
        self._endpoints: dict[str, Endpoint] = {}
        self._routed: dict[str, RoutedEndpoint] = {}
        self._apply_lock = asyncio.Lock()
        self._write_lock, self._read_lock = asyncio.Lock(), asyncio.Lock()
        self._unloading: dict[str, asyncio.Task[None]] = {}
        # The error of each thing that is tried again.
        self._told: dict[str, str] = {}
        self._has_work = asyncio.Event()
        self._is_closing = False

    async def __aenter__(self) -> Self:
        """Open the connections, and write the stored routes for Envoy."""
        self._http = HttpClient()
        for name, saved in self._written.items():
            self._endpoints[name] = self._make_endpoint(name, saved)
        await self._apply()
        self._periodic_work = asyncio.create_task(self._work_periodically())
        return self

    async def __aexit__(self, *error: object) -> None:
        """Write all files. Envoy serves on by the routes that it has."""
        # The task is not cancelled: a thread of it would go on writing beside what follows.
        self._is_closing = True
        self._has_work.set()
        await asyncio.gather(self._periodic_work, *self._unloading.values(), return_exceptions=True)
        await self._save_all()
        self._log_reader.close()
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

    async def describe(self, name: str) -> EndpointState:
        """Return the route of an endpoint, its canary, and the requests and models of the moment.

        A verdict is returned once requests are routed by it.
        """
        endpoint = self.endpoint(name)
        await self._read_log()
        # Canaries are judged while this waits. Their verdicts are for the next description.
        saved = endpoint.saved
        if not self._is_routed(endpoint):
            # The periodic work tries again, and logs what fails.
            with suppress(EndpointFailed, OSError):
                await self._apply()
        clusters = await asyncio.to_thread(self._read_requests, name)
        in_flight: Counter[str] = Counter()
        for cluster, requests in clusters.items():
            in_flight[cluster.split("|")[1]] += requests.active
        return EndpointState(
            route=saved.route,
            trial=saved.trial,
            verdict=saved.verdict,
            in_flight={version: count for version, count in in_flight.items() if count},
            waiting=sum(each.waiting for each in clusters.values()) + endpoint.models.waiting,
            models=endpoint.models.state,
        )

    async def put(self, name: str, route: Route) -> EndpointState:
        """Put a route in force and store it. Idempotent.

        Raises:
            BadRequest: with 409 where it has an unknown key, with 422 where Envoy rejects it; the earlier route stays
                in force.
        """
        if unknown := sorted({*route.keys} - self.keys.names):
            message = (
                f"Each key of a route must be known to the gateway, got {unknown[:_NAMES_SHOWN]}. Put the key first."
            )
            raise BadRequest(message, status=HTTPStatus.CONFLICT)
        endpoint = self._endpoints.get(name)
        before = None if endpoint is None else endpoint.saved
        if endpoint is None:
            endpoint = self._endpoints[name] = self._make_endpoint(name, SavedEndpoint(route=route))
        endpoint.put(route)
        try:
            await self._apply()
        except EndpointFailed as error:
            if before is None:
                self._endpoints.pop(name, None)
            else:
                endpoint.restore(before)
            raise BadRequest(str(error), status=HTTPStatus.UNPROCESSABLE_ENTITY) from None
        await self._save(name)
        return await self.describe(name)

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
        await self._apply()
        await self._wait_until_idle(name, _DRAIN_S_MAX)
        if name not in self._endpoints:
            await self._read_log()
            self.metrics.remove_endpoint(name)

    async def put_key(self, name: str, digest: str) -> None:
        """Store the digest of an API key, and have Envoy accept it."""
        self.keys.put(name, digest)
        await self._apply()

    async def delete_key(self, name: str) -> None:
        """Delete an API key, and have Envoy refuse it. Idempotent."""
        self.keys.delete(name)
        await self._apply()

    async def activate(self, name: str) -> None:
        """Return once the models of an endpoint are loaded. Raises Unanswered, or BadRequest for an unknown name."""
        endpoint = self.endpoint(name)
        await endpoint.activate()
        # Envoy is told at once, but the request need not wait for it.
        self._has_work.set()

    async def render_metrics(self) -> bytes:
        """Return the page that Prometheus scrapes."""
        await self._read_log()
        for name, endpoint in self._endpoints.items():
            clusters = (await asyncio.to_thread(self._read_requests, name)).values()
            self.metrics.in_flight.labels(name).set(sum(each.active for each in clusters))
            self.metrics.queued.labels(name).set(sum(each.waiting for each in clusters) + endpoint.models.waiting)
            endpoint.observe_dropped_copies(await asyncio.to_thread(self._count_dropped_copies, name))
            self.metrics.loaded.labels(name).set(endpoint.route.sleep is None or endpoint.models.state == "awake")
        self.metrics.metering_lost.set(self._log_reader.unreadable)
        return self.metrics.render()

    def _make_endpoint(self, name: str, saved: SavedEndpoint) -> Endpoint:
        return Endpoint(name, saved, http=self._http, metrics=self.metrics)

    def _is_routed(self, endpoint: Endpoint) -> bool:
        return endpoint.describe_routing(self.keys) == self._routed.get(endpoint.name)

    async def _apply(self) -> None:
        """Have Envoy route by what is known now. Raises EndpointFailed where it rejects that."""
        async with self._apply_lock:
            routed = {name: endpoint.describe_routing(self.keys) for name, endpoint in self._endpoints.items()}
            await asyncio.to_thread(self._files.apply, routed.values(), self.keys.list_digests(self.keys.names))
            self._routed = routed

    async def _work_periodically(self) -> None:
        """Read the log, judge canaries, unload idle models and write files, four times a second and when asked."""
        turn = 0
        while not self._is_closing:
            with suppress(TimeoutError):
                async with asyncio.timeout(_INTERVAL_S):
                    await self._has_work.wait()
            self._has_work.clear()
            turn += 1
            await self._try_work("The periodic work of the gateway", self._work(is_saving=turn % _SAVE_TURNS == 0))

    async def _try_work(self, what: str, work: Awaitable[object]) -> None:
        """Wait for work that is tried again where it fails. Its error is logged, and once while it stays the same."""
        try:
            await work
        except Exception as error:  # noqa: BLE001 - everything else must go on
            if self._told.get(what) != repr(error):
                is_foreseen = isinstance(error, (OSError, EndpointFailed, EnvoyGone, Unanswered))
                _log.warning("%s has failed, and is tried again: %s", what, error, exc_info=not is_foreseen)
            self._told[what] = repr(error)
        else:
            self._told.pop(what, None)

    async def _work(self, *, is_saving: bool) -> None:
        await self._read_log()
        for name, endpoint in [*self._endpoints.items()]:
            if endpoint.has_idle_models() and name not in self._unloading:
                task = asyncio.create_task(self._unload(endpoint))
                self._unloading[name] = task
                task.add_done_callback(lambda _, name=name: self._unloading.pop(name, None))  # type: ignore[misc]
        if any(not self._is_routed(endpoint) for endpoint in self._endpoints.values()):
            await self._apply()
        if is_saving:
            await self._save_all()
            await asyncio.to_thread(self._log_reader.rotate)
            # Not while routes are put: their clusters come first.
            async with self._apply_lock:
                await asyncio.to_thread(self._files.remove_unused_clusters, self._routed.values())

    async def _read_log(self) -> None:
        async with self._read_lock:
            for request in await asyncio.to_thread(self._log_reader.read):
                if endpoint := self._endpoints.get(request.endpoint):
                    endpoint.observe(request)
        for endpoint in self._endpoints.values():
            endpoint.decide_canary()

    async def _unload(self, endpoint: Endpoint) -> None:
        """Unload the models of an endpoint, whose requests wait for the next load from then on."""

        async def hold_requests() -> bool:
            await self._apply()
            await self._wait_until_idle(endpoint.name, _IDLE_S_MAX, stop=lambda: endpoint.holds_requests)
            await self._read_log()
            return not await asyncio.to_thread(self._has_requests, endpoint.name) and not endpoint.holds_requests

        unload = endpoint.models.unload(endpoint.route.versions, hold_requests=hold_requests)
        await self._try_work(f"Unloading the models of endpoint {endpoint.name}", unload)

    async def _wait_until_idle(self, name: str, seconds_max: float, *, stop: Callable[[], bool] | None = None) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds_max):
                # Envoy tells it only when asked.
                while not (stop and stop()) and await asyncio.to_thread(self._has_requests, name):  # noqa: ASYNC110
                    await asyncio.sleep(_POLL_S)

    def _has_requests(self, name: str) -> bool:
        return any(each.active or each.waiting for each in self._read_requests(name).values())

    def _read_requests(self, name: str) -> dict[str, ClusterRequests]:
        try:
            return self._files.read_requests(name)
        except EnvoyGone:
            return {}

    def _count_dropped_copies(self, name: str) -> int:
        try:
            return self._files.count_dropped_copies(name)
        except EnvoyGone:
            return 0

    async def _save_all(self) -> None:
        for name in [*self._endpoints]:
            await self._try_work(f"Writing the route of {name}", self._save(name))
        save_position = asyncio.to_thread(self._log_reader.save_position)
        await self._try_work("Writing the position in the access log", save_position)

    async def _save(self, name: str) -> None:
        async with self._write_lock:
            endpoint = self._endpoints.get(name)
            if endpoint is None or self._written.get(name) is (saved := endpoint.saved):
                return
            await asyncio.to_thread(self._store.put, name, saved)
            self._written[name] = saved
