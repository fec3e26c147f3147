"""One endpoint as the control plane sees it: its route, its canary, its models, and the requests it answers itself."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from http import HTTPStatus

from serving.errors import BadRequest, Unanswered
from serving.gateway.access_log import LoggedRequest
from serving.gateway.envoy.messages import RoutedEndpoint
from serving.gateway.keys import Keys
from serving.gateway.metrics import Metrics
from serving.gateway.mlflow_scoring import MlflowUpstream
from serving.gateway.rollout import ShadowOutcome, compare_replies, judge_canary, tally_request
from serving.gateway.route import (
    Route,
    SavedEndpoint,
    ServedVersion,
    Trial,
    Verdict,
    promote_canary,
    roll_back_canary,
)
from serving.gateway.scale_to_zero import ModelLifecycle, make_loader
from serving.gateway.upstreams import CheckedRequest, HttpClient, Reply, V2Upstream


class Endpoint:
    """One endpoint. To be used in one event loop. `clock` gives the seconds since 1970."""

    def __init__(
        self,
        name: str,
        saved: SavedEndpoint,
        *,
        http: HttpClient,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.name = name
        self.models = ModelLifecycle(
            lambda: make_loader(http, self.route.sleep), metrics.load_seconds.labels(name).observe
        )
        self.saved = saved
        self._http, self._metrics, self._clock = http, metrics, clock
        self._last_request_s = clock()
        self._held = self._dropped = 0
        self._apply(saved)

    @property
    def route(self) -> Route:
        """The route in force."""
        return self.saved.route

    @property
    def idle_s(self) -> float:
        """Seconds since the last request ended."""
        return self._clock() - self._last_request_s

    @property
    def holds_requests(self) -> bool:
        """Whether requests wait for a load, or are answered here."""
        return self._held > 0

    def describe_routing(self, keys: Keys) -> RoutedEndpoint:
        """Return the endpoint as Envoy is to route it now."""
        return RoutedEndpoint(
            name=self.name,
            route=self.route,
            key_digests=frozenset(keys.list_digests(self.route.keys)),
            is_loaded=self.route.sleep is None or self.models.state == "awake",
        )

    def put(self, route: Route) -> None:
        """Take another route; a canary whose rule stays the same keeps its tally."""
        rule, trial = route.rollout, self.saved.trial
        if rule is None:
            trial = None
        elif trial is None or rule != self.route.rollout:
            trial = Trial(began=datetime.now(UTC))
        if route.versions != self.route.versions:
            # A version that is new to the route may not be loaded.
            self.models.mark_lost()
        self._last_request_s = self._clock()
        self._apply(SavedEndpoint(route=route, trial=trial, verdict=self.saved.verdict if rule is None else None))

    def restore(self, saved: SavedEndpoint) -> None:
        """Go back to an earlier route and canary."""
        self._apply(saved)

    async def activate(self) -> None:
        """Return once the models are loaded. Raises Unanswered where they can't be, or too many requests wait."""
        limits = self.route.limits
        waiting_max = limits.in_flight_max + limits.queue_max
        if self.models.waiting >= waiting_max:
            message = f"The endpoint may have {waiting_max} requests at once, got one more. Try again later."
            raise Unanswered(message, status=HTTPStatus.TOO_MANY_REQUESTS, retry_after_s=1)
        with self._hold():
            await self.models.load(self.route.sleep, self.route.versions)

    async def infer(self, request: CheckedRequest, version: str | None) -> Reply:
        """Return the answer of a version: the requested one, else one that is chosen by weight, but not the canary.

        Envoy sends here what no server of V2 can take: requests to MLflow's scoring server, and those to a model that
        its server has lost.

        Raises:
            BadRequest: where the endpoint has no such version.
            Unanswered: where no model server answers in time.
        """
        chosen = self._choose_version() if version is None else self.find_version(version)
        upstream = self._upstreams[chosen.version]
        timeout_s = self.route.limits.timeout_s
        with self._hold():
            if self.route.sleep is not None:
                if not await upstream.is_ready():
                    self.models.mark_lost()
                # Also where they are ready: they may be about to unload.
                await self.activate()
            try:
                async with asyncio.timeout(timeout_s):
                    reply = await upstream.infer(request)
            except TimeoutError:
                message = (
                    f"An answer must come within {timeout_s:g} s, but did not. Send fewer rows, or try again later."
                )
                raise Unanswered(message, status=HTTPStatus.GATEWAY_TIMEOUT) from None
        return Reply(status=reply.status, content=reply.content, headers=reply.headers, version=chosen.version)

    async def compare_shadow(self, request: CheckedRequest, version: str) -> None:
        """Ask the shadow and the version that serves, and count whether they answer alike."""
        rule = self.route.shadow
        if rule is None or version not in self._upstreams or version == rule.version:
            return
        outcome: ShadowOutcome = "failed"
        # Another route may be put meanwhile.
        serving, shadow, contract = self._upstreams[version], self._upstreams[rule.version], self.route.contract
        try:
            async with asyncio.timeout(self.route.limits.timeout_s):
                first = await serving.infer(request)
                if first.status != HTTPStatus.OK:
                    return
                second = await shadow.infer(request)
            if second.status == HTTPStatus.OK:
                outcome = compare_replies(first, second, contract, rule.tolerance)
        except (Unanswered, BadRequest, TimeoutError):
            outcome = "failed"
        self._metrics.shadows.labels(self.name, outcome).inc()

    def find_version(self, version: str) -> ServedVersion:
        """Return a version. Raises BadRequest, with 404, where there is none of that name."""
        if found := self.route.find_version(version):
            return found
        message = f"The version of {self.name!r} must be one of {list(self._upstreams)}, got {version[:100]!r}."
        raise BadRequest(message, status=HTTPStatus.NOT_FOUND)

    async def is_ready(self) -> bool:
        """Return whether a request would be answered: a version with a weight is ready, or its model can be loaded."""
        if self._is_loadable():
            return True
        weighted = [served.version for served in self.route.versions if served.weight]
        return any([await self._upstreams[version].is_ready() for version in weighted])

    async def is_version_ready(self, version: str) -> bool:
        """Return the same for one version. Raises BadRequest where there is none of that name."""
        upstream = self._upstreams[self.find_version(version).version]
        return self._is_loadable() or await upstream.is_ready()

    def has_idle_models(self) -> bool:
        """Return whether no request came for so long that the models are to be unloaded."""
        sleep = self.route.sleep
        if sleep is None or self.models.state not in ("awake", "unknown"):
            return False
        return not self._held and self.idle_s >= sleep.keep_warm_s

    def observe(self, request: LoggedRequest) -> None:
        """Count a request of the access log."""
        self._last_request_s = max(self._last_request_s, request.ended_s)
        metrics, seconds = self._metrics, request.latency_ms / 1000
        metrics.requests.labels(self.name, request.status).inc()
        metrics.seconds.labels(self.name).observe(seconds)
        if request.version is not None:
            labels = (self.name, request.version)
            metrics.answers.labels(*labels, request.status).inc()
            metrics.upstream_seconds.labels(*labels).observe(seconds)
            if request.status == HTTPStatus.OK and request.rows is not None:
                metrics.rows.labels(*labels).inc(request.rows)
        rule, canary = self.route.rollout, self.saved.trial
        if rule is None or canary is None or request.at_us / 1e6 < canary.began.timestamp():
            return
        if request.is_canary and request.attempts > 1:
            metrics.fallbacks.labels(self.name).inc()
        tally = tally_request(rule, canary.tally, request)
        if tally != canary.tally:
            self.saved = self.saved.model_copy(update={"trial": canary.model_copy(update={"tally": tally})})

    def observe_dropped_copies(self, count: int) -> None:
        """Count the copies for the shadow that Envoy has dropped since it started."""
        # After a restart Envoy counts from 0 again.
        added = count - self._dropped if count >= self._dropped else count
        self._dropped = count
        if added:
            self._metrics.shadows.labels(self.name, "dropped").inc(added)

    def decide_canary(self) -> bool:
        """Promote or roll back the canary, where its tally and its age decide; return whether they do."""
        rule, canary = self.route.rollout, self.saved.trial
        if rule is None or canary is None:
            return False
        now = datetime.now(UTC)
        decision = judge_canary(rule, canary.tally, age_s=(now - canary.began).total_seconds())
        if decision is None:
            return False
        outcome, reason = decision
        verdict = Verdict(version=rule.version, outcome=outcome, reason=reason, tally=canary.tally, at=now)
        route = promote_canary(self.route) if outcome == "promoted" else roll_back_canary(self.route)
        self._apply(SavedEndpoint(route=route, verdict=verdict))
        self._metrics.verdicts.labels(self.name, outcome).inc()
        return True

    @contextmanager
    def _hold(self) -> Generator[None]:
        """Keep the models loaded while a request waits here, and for `keep_warm_s` after it: Envoy then passes it."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            self._last_request_s = self._clock()

    def _apply(self, saved: SavedEndpoint) -> None:
        self.saved = saved
        http, contract = self._http, saved.route.contract
        self._upstreams = {
            served.version: V2Upstream(http, served)
            if served.speaks == "v2"
            else MlflowUpstream(http, served, contract)
            for served in saved.route.versions
        }

    def _is_loadable(self) -> bool:
        return self.route.sleep is not None and self.models.state != "awake"

    def _choose_version(self) -> ServedVersion:
        rollout = self.route.rollout
        choices = [
            served
            for served in self.route.versions
            if served.weight and (rollout is None or served.version != rollout.version)
        ]
        return random.choices(choices, [served.weight for served in choices])[0]  # noqa: S311 - traffic, not a secret
