"""One endpoint of a running gateway: its route, and the way of a request through limits, versions and canary."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from http import HTTPStatus

from serving.errors import BadRequest, Unanswered
from serving.gateway.admission import AdmissionQueue, TokenBucket, take_token
from serving.gateway.metrics import Metrics
from serving.gateway.mlflow_scoring import MlflowUpstream
from serving.gateway.rollout import ShadowTraffic, choose_version, judge_canary
from serving.gateway.route import (
    Canary,
    EndpointState,
    Rollout,
    Route,
    SavedEndpoint,
    ServedVersion,
    Verdict,
    promote_canary,
    roll_back_canary,
)
from serving.gateway.scale_to_zero import ModelLifecycle, is_unload_due, make_loader
from serving.gateway.upstreams import CheckedRequest, HttpClient, Reply, Upstream, V2Upstream
from serving.model.contract import Contract

_POLL_S = 0.01


class Endpoint:
    """One endpoint. To be used in one event loop; `on_change` is called when `saved` must be written."""

    def __init__(
        self,
        name: str,
        saved: SavedEndpoint,
        *,
        http: HttpClient,
        metrics: Metrics,
        on_change: Callable[[], None],
    ) -> None:
        self.name = name
        self.queue = AdmissionQueue(saved.route.limits)
        self.models = ModelLifecycle(
            lambda: make_loader(http, self.route.sleep), metrics.load_seconds.labels(name).observe
        )
        self._http, self._metrics, self._on_change = http, metrics, on_change
        self._shadow = ShadowTraffic(lambda outcome: metrics.shadows.labels(name, outcome).inc())
        self._in_flight: Counter[str] = Counter()
        self._requests = 0
        self._last_request_s = time.monotonic()
        self._bucket = TokenBucket(tokens=float(saved.route.limits.burst), at_s=self._last_request_s)
        self._apply(saved)

    @property
    def route(self) -> Route:
        """The route in force."""
        return self.saved.route

    @property
    def state(self) -> EndpointState:
        """The route, its canary, and the requests and models of the moment."""
        return EndpointState(
            route=self.route,
            trial=self.saved.trial,
            verdict=self.saved.verdict,
            in_flight={version: count for version, count in self._in_flight.items() if count},
            waiting=self.queue.waiting,
            models=self.models.state,
        )

    def put(self, route: Route) -> None:
        """Put another route in force; a canary whose rule stays the same keeps its tally.

        Requests that a model server has are answered by it; requests that wait take the new route.
        """
        rule, canary = route.rollout, self.saved.trial
        if rule is None:
            canary = None
        elif canary is None or rule != self.route.rollout:
            canary = Canary(began=datetime.now(UTC))
        self._apply(SavedEndpoint(route=route, trial=canary, verdict=self.saved.verdict if rule is None else None))

    @contextmanager
    def admit_request(self) -> Iterator[None]:
        """Count a request as admitted. Raises Unanswered, with 429, above the rate or where the queue is full."""
        limits, now_s = self.route.limits, time.monotonic()
        if limits.requests_per_second is not None:
            self._bucket, wait_s = take_token(
                self._bucket, now_s=now_s, per_second=limits.requests_per_second, burst=limits.burst
            )
            if wait_s:
                message = (
                    f"The endpoint must get at most {limits.requests_per_second:g} requests a second, got more. Send "
                    "the request again after the seconds in Retry-After."
                )
                raise Unanswered(message, status=HTTPStatus.TOO_MANY_REQUESTS, retry_after_s=int(wait_s) + 1)
        with self.queue.admit():
            try:
                yield
            finally:
                self._last_request_s = time.monotonic()

    async def infer(self, request: CheckedRequest, version: str | None) -> Reply:
        """Return the answer of a version: the requested one, else one that is chosen by weight.

        Raises:
            BadRequest: where the endpoint has no such version.
            Unanswered: where no model server answers in time.
        """
        if version is not None:
            self.find_version(version)
        await self.models.load(self.route.sleep, self.route.versions)
        timeout_s = self.route.limits.timeout_s
        try:
            async with asyncio.timeout(timeout_s), self.queue.run():
                if version is None:
                    reply = await self._ask_chosen_version(request)
                else:
                    reply = await self._ask(self.find_version(version), request)
        except TimeoutError:
            message = f"An answer must come within {timeout_s:g} s, but did not. Send fewer rows, or try again later."
            raise Unanswered(message, status=HTTPStatus.GATEWAY_TIMEOUT) from None
        self._copy_to_shadow(request, reply)
        return reply

    def find_version(self, version: str) -> VersionRoute:
        """Return the way to a version. Raises BadRequest, with 404, where there is none of that name."""
        if route := self._versions.get(version):
            return route
        message = f"The version of {self.name!r} must be one of {list(self._versions)}, got {version[:100]!r}."
        raise BadRequest(message, status=HTTPStatus.NOT_FOUND)

    async def is_ready(self) -> bool:
        """Return whether a request would be answered: a version with a weight is ready, or its model can be loaded."""
        if self._is_loadable():
            return True
        return any([await version.upstream.is_ready() for version in self._versions.values() if version.weight])

    async def is_version_ready(self, version: str) -> bool:
        """Return the same for one version. Raises BadRequest where there is none of that name."""
        route = self.find_version(version)
        return self._is_loadable() or await route.upstream.is_ready()

    def has_idle_models(self) -> bool:
        """Return whether the models are idle for so long that they are to be unloaded."""
        sleep = self.route.sleep
        if sleep is None or self.models.state not in ("awake", "unknown"):
            return False
        idle_s = time.monotonic() - self._last_request_s
        return is_unload_due(keep_warm_s=sleep.keep_warm_s, idle_s=idle_s, requests=self._count_requests())

    async def unload_models(self) -> None:
        """Unload the models, unless a request came in the meantime."""
        await self.models.unload(self.route.versions, count_requests=self._count_requests)

    async def wait_until_drained(self, seconds: float) -> None:
        """Return once all requests are answered, or after these seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._count_requests():  # noqa: ASYNC110 - once in its life; an event would be set by every request
                    await asyncio.sleep(_POLL_S)

    def decide_canary(self) -> None:
        """Promote or roll back the canary, where its tally and its age decide."""
        rule, canary = self.route.rollout, self.saved.trial
        if rule is None or canary is None:
            return
        now = datetime.now(UTC)
        decision = judge_canary(rule, canary.tally, age_s=(now - canary.began).total_seconds())
        if decision is None:
            return
        outcome, reason = decision
        verdict = Verdict(version=rule.version, outcome=outcome, reason=reason, tally=canary.tally, at=now)
        route = promote_canary(self.route) if outcome == "promoted" else roll_back_canary(self.route)
        self._apply(SavedEndpoint(route=route, verdict=verdict))
        self._metrics.verdicts.labels(self.name, outcome).inc()
        self._on_change()

    def _apply(self, saved: SavedEndpoint) -> None:
        self.saved = saved
        self._versions = {
            served.version: VersionRoute(
                endpoint=self.name,
                version=served.version,
                weight=served.weight,
                upstream=_make_upstream(self._http, served, saved.route.contract),
                metrics=self._metrics,
            )
            for served in saved.route.versions
        }
        self._ordered = list(self._versions.values())
        self._weights = [version.weight for version in self._ordered]
        self.queue.set_limits(saved.route.limits)

    def _is_loadable(self) -> bool:
        return self.route.sleep is not None and self.models.state != "awake"

    def _count_requests(self) -> int:
        return self.queue.admitted + self._shadow.in_flight

    async def _ask_chosen_version(self, request: CheckedRequest) -> Reply:
        self._requests += 1
        chosen = self._ordered[choose_version(self._weights, self._requests)]
        rule = self.route.rollout
        if rule is not None and chosen.version == rule.version:
            return await self._ask_canary(chosen, rule, request)
        return await self._ask(chosen, request)

    async def _ask(self, version: VersionRoute, request: CheckedRequest) -> Reply:
        """Send a request to a version; where its server has lost the model, load the model and send it once more."""
        try:
            reply = await self._send(version, request)
        except Unanswered:
            if not await self._load_lost_model(version):
                raise
            return await self._send(version, request)
        if reply.status != HTTPStatus.OK and await self._load_lost_model(version):
            return await self._send(version, request)
        return reply

    async def _send(self, version: VersionRoute, request: CheckedRequest) -> Reply:
        self._in_flight[version.version] += 1
        began = time.perf_counter()
        # The status of a request that is cancelled.
        status: int = HTTPStatus.GATEWAY_TIMEOUT
        try:
            reply = await version.upstream.infer(request)
            status = reply.status
        except (Unanswered, BadRequest) as error:
            status = error.status
            raise
        finally:
            self._in_flight[version.version] -= 1
            version.observe(status, time.perf_counter() - began, request.request.rows)
        return replace(reply, version=version.version)

    async def _load_lost_model(self, version: VersionRoute) -> bool:
        if self.route.sleep is None or await version.upstream.is_ready():
            return False
        self.models.mark_lost()
        await self.models.load(self.route.sleep, self.route.versions)
        return True

    async def _ask_canary(self, canary: VersionRoute, rule: Rollout, request: CheckedRequest) -> Reply:
        """Send a request to the canary, for half of the time; where it fails, to another version.

        The canary's failure counts only where the other version answers: else the request is to blame.
        """
        began = time.perf_counter()
        try:
            async with asyncio.timeout(self.route.limits.timeout_s / 2):
                reply = await self._ask(canary, request)
        except (Unanswered, TimeoutError):
            reply = None
        latency_ms = (time.perf_counter() - began) * 1000
        failed = reply is None or reply.status != HTTPStatus.OK
        if reply is None or failed:
            reply = await self._ask(self._choose_other(canary), request)
            self._metrics.fallbacks.labels(self.name).inc()
        if reply.status == HTTPStatus.OK:
            self._tally_canary(rule, failed=failed, latency_ms=latency_ms)
        return reply

    def _choose_other(self, canary: VersionRoute) -> VersionRoute:
        others = [version for version in self._ordered if version.version != canary.version]
        if not others:
            return canary
        return others[choose_version([version.weight for version in others], self._requests)]

    def _tally_canary(self, rule: Rollout, *, failed: bool, latency_ms: float) -> None:
        canary = self.saved.trial
        if canary is None or self.route.rollout != rule:
            return
        tally = canary.tally.add(rule, failed=failed, latency_ms=latency_ms)
        self.saved = self.saved.model_copy(update={"trial": canary.model_copy(update={"tally": tally})})
        self.decide_canary()

    def _copy_to_shadow(self, request: CheckedRequest, reply: Reply) -> None:
        rule = self.route.shadow
        if rule is None or reply.status != HTTPStatus.OK or reply.version == rule.version:
            return
        self._shadow.send_copy(
            rule,
            self._versions[rule.version].upstream,
            self.route.contract,
            request,
            reply,
            is_busy=self.queue.waiting > 0,
            timeout_s=self.route.limits.timeout_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionRoute:
    """The way to one version, and its metrics. It outlives its route until its last request is answered."""

    endpoint: str
    version: str
    weight: float
    upstream: Upstream
    metrics: Metrics

    def observe(self, status: int, seconds: float, rows: int) -> None:
        """Count an answer of the version, or that there was none."""
        labels = (self.endpoint, self.version)
        self.metrics.answers.labels(*labels, status).inc()
        self.metrics.upstream_seconds.labels(*labels).observe(seconds)
        if status == HTTPStatus.OK:
            self.metrics.rows.labels(*labels).inc(rows)


def _make_upstream(http: HttpClient, served: ServedVersion, contract: Contract) -> Upstream:
    if served.speaks == "v2":
        return V2Upstream(http, served)
    return MlflowUpstream(http, served, contract)
