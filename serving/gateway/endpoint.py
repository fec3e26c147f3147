"""One endpoint of the running gateway: its route, and the way of a request through it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime

from serving.errors import BadRequest, Unanswered
from serving.gateway.admission import Admission
from serving.gateway.http import Http
from serving.gateway.keep_warm import falls_asleep
from serving.gateway.lanes import Lane, lanes
from serving.gateway.metrics import Metrics
from serving.gateway.rate import Bucket, take
from serving.gateway.route import Rollout, Route, promoted, rolled_back
from serving.gateway.shadow import Shadowing
from serving.gateway.split import choose
from serving.gateway.state import Kept
from serving.gateway.trial import Trial, Verdict, judge
from serving.gateway.upstream import Call, Reply
from serving.gateway.waker import RouteWaker
from serving.gateway.warmth import Warmth

_OK, _NOT_FOUND, _TOO_MANY, _TIMEOUT = 200, 404, 429, 504
_POLL_S = 0.01


class Endpoint:
    """One endpoint. To be used in one event loop; `changed` is called when `kept` must be written."""

    def __init__(self, name: str, kept: Kept, *, http: Http, metrics: Metrics, changed: Callable[[], None]) -> None:
        self.name = name
        self.in_flight: Counter[str] = Counter()
        self._http, self._metrics, self._changed = http, metrics, changed
        self._count = 0
        self._last_s = time.monotonic()
        self._bucket = Bucket(tokens=float(kept.route.limits.burst), at_s=self._last_s)
        self.admission = Admission(kept.route.limits)
        self.warmth = Warmth(RouteWaker(http, lambda: self.route.sleep), metrics.wakes.labels(name).observe)
        self.shadowing = Shadowing(lambda compared: metrics.shadows.labels(name, compared).inc())
        self._take(kept)

    @property
    def route(self) -> Route:
        """The route in force."""
        return self.kept.route

    def put(self, route: Route) -> Kept:
        """Take another route and return what is to be kept; a trial whose rule stays the same goes on.

        Requests on their way end where they were sent; those that wait go by the new route.
        """
        rule, trial = route.rollout, self.kept.trial
        if rule is None:
            trial = None
        elif trial is None or rule != self.route.rollout:
            trial = Trial(began=datetime.now(UTC))
        self._take(Kept(route=route, trial=trial, verdict=self.kept.verdict if rule is None else None))
        return self.kept

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Hold a place for a request. Raises Unanswered, with 429, above the rate or where the queue is full."""
        limits, now_s = self.route.limits, time.monotonic()
        if limits.requests_per_second is not None:
            self._bucket, wait_s = take(
                self._bucket, now_s=now_s, per_second=limits.requests_per_second, burst=limits.burst
            )
            if wait_s:
                message = f"The endpoint must get at most {limits.requests_per_second:g} requests a second, got more."
                raise Unanswered(message, status=_TOO_MANY, retry_after_s=int(wait_s) + 1)
        with self.admission.place():
            try:
                yield
            finally:
                self._last_s = time.monotonic()

    async def infer(self, call: Call, version: str | None) -> Reply:
        """Return the answer of a version: the one asked for, else one chosen by weight.

        Raises BadRequest where there is no such version, Unanswered where no server answers in time.
        """
        if version is not None:
            self.named(version)
        await self.warmth.wake(self.route.sleep, self.route.versions)
        timeout_s = self.route.limits.timeout_s
        try:
            async with asyncio.timeout(timeout_s), self.admission.turn():
                reply = await (self._of_any(call) if version is None else self._ask(self.named(version), call))
        except TimeoutError:
            message = f"An answer must come within {timeout_s:g} s, and did not. Send fewer rows, or try again later."
            raise Unanswered(message, status=_TIMEOUT) from None
        self._offer_to_shadow(call, reply)
        return reply

    def tick(self) -> bool:
        """Judge the trial by its age too; say whether it is time to unload the models."""
        self._judge()
        sleep = self.route.sleep
        return (
            sleep is not None
            and self.warmth.state in ("awake", "unknown")
            and falls_asleep(
                keep_warm_s=sleep.keep_warm_s, idle_s=time.monotonic() - self._last_s, present=self._present()
            )
        )

    async def sleep(self) -> None:
        """Unload the models, unless a request came in the meantime."""
        await self.warmth.sleep(self.route.versions, present=self._present)

    async def drained(self, seconds: float) -> None:
        """Return once nobody is there any more, or after these seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._present():  # noqa: ASYNC110 - once in its life; an event would be set by every request
                    await asyncio.sleep(_POLL_S)

    async def ready(self) -> bool:
        """Say whether a request would be answered: a version with a weight is ready, or will be when it is woken."""
        if self.route.sleep is not None and self.warmth.state != "awake":
            return True
        return any([await lane.upstream.ready() for lane in self._lanes.values() if lane.weight])

    async def version_ready(self, version: str) -> bool:
        """Say the same of one version. Raises BadRequest where there is none of that name."""
        lane = self.named(version)
        return (self.route.sleep is not None and self.warmth.state != "awake") or await lane.upstream.ready()

    def _present(self) -> int:
        return self.admission.present + self.shadowing.in_flight

    def _take(self, kept: Kept) -> None:
        self.kept = kept
        self._lanes = lanes(self.name, kept.route, self._http, self._metrics)
        self._weights = [lane.weight for lane in self._lanes.values()]
        self._by_place = list(self._lanes.values())
        self.admission.resize(kept.route.limits)

    def named(self, version: str) -> Lane:
        """Return the way to a version. Raises BadRequest, with 404, where there is none of that name."""
        if lane := self._lanes.get(version):
            return lane
        message = f"The version of {self.name!r} must be one of {list(self._lanes)}, got {version[:100]!r}."
        raise BadRequest(message, status=_NOT_FOUND)

    async def _of_any(self, call: Call) -> Reply:
        """Ask the version that the next request goes to."""
        self._count += 1
        lane = self._by_place[choose(self._weights, self._count)]
        rule = self.route.rollout
        if rule is not None and lane.version == rule.version:
            return await self._try(lane, rule, call)
        return await self._ask(lane, call)

    async def _ask(self, lane: Lane, call: Call) -> Reply:
        """Ask one version; where its server has lost a model that sleeps and wakes, once more after loading it."""
        try:
            reply = await self._sent(lane, call)
        except Unanswered:
            if not await self._reloaded(lane):
                raise
            return await self._sent(lane, call)
        if reply.status != _OK and await self._reloaded(lane):
            return await self._sent(lane, call)
        return reply

    async def _sent(self, lane: Lane, call: Call) -> Reply:
        self.in_flight[lane.version] += 1
        began = time.perf_counter()
        status = _TIMEOUT
        try:
            reply = await lane.upstream.infer(call)
            status = reply.status
        except (Unanswered, BadRequest) as error:
            status = error.status
            raise
        finally:
            self.in_flight[lane.version] -= 1
            lane.observe(status, time.perf_counter() - began, call.request.rows)
        return replace(reply, version=lane.version)

    async def _reloaded(self, lane: Lane) -> bool:
        if self.route.sleep is None or await lane.upstream.ready():
            return False
        self.warmth.lost()
        await self.warmth.wake(self.route.sleep, self.route.versions)
        return True

    async def _try(self, lane: Lane, rule: Rollout, call: Call) -> Reply:
        """Ask the version on trial; where it fails, another answers, and only then the failure is its own.

        It has half of the time, so that there is some left for the other.
        """
        began = time.perf_counter()
        try:
            async with asyncio.timeout(self.route.limits.timeout_s / 2):
                reply = await self._ask(lane, call)
        except (Unanswered, TimeoutError):
            reply = None
        latency_ms = (time.perf_counter() - began) * 1000
        failed = reply is None or reply.status != _OK
        if reply is None or failed:
            reply = await self._ask(self._other(lane), call)
            self._metrics.fallbacks.labels(self.name).inc()
        if reply.status == _OK:
            self._tally(rule, failed=failed, latency_ms=latency_ms)
        return reply

    def _other(self, lane: Lane) -> Lane:
        others = [each for each in self._by_place if each.version != lane.version]
        return others[choose([each.weight for each in others], self._count)] if others else lane

    def _tally(self, rule: Rollout, *, failed: bool, latency_ms: float) -> None:
        trial = self.kept.trial
        if trial is None or self.route.rollout != rule:
            return
        tally = trial.tally.plus(rule, failed=failed, latency_ms=latency_ms)
        self.kept = self.kept.model_copy(update={"trial": trial.model_copy(update={"tally": tally})})
        self._judge()

    def _judge(self) -> None:
        rule, trial = self.route.rollout, self.kept.trial
        if rule is None or trial is None:
            return
        now = datetime.now(UTC)
        ended = judge(rule, trial.tally, age_s=(now - trial.began).total_seconds())
        if ended is None:
            return
        outcome, reason = ended
        verdict = Verdict(version=rule.version, outcome=outcome, reason=reason, tally=trial.tally, at=now)
        route = promoted(self.route) if outcome == "promoted" else rolled_back(self.route)
        self._take(Kept(route=route, verdict=verdict))
        self._metrics.verdicts.labels(self.name, outcome).inc()
        self._changed()

    def _offer_to_shadow(self, call: Call, reply: Reply) -> None:
        rule = self.route.shadow
        if rule is None or reply.status != _OK or reply.version == rule.version:
            return
        self.shadowing.offer(
            rule,
            self._lanes[rule.version].upstream,
            self.route.contract,
            call,
            reply,
            busy=self.admission.waiting > 0,
            timeout_s=self.route.limits.timeout_s,
        )
