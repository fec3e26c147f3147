"""How requests are divided among versions: by weight, with a canary that is judged, and with copies to a shadow."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Literal

import numpy as np

from serving.errors import BadRequest, Unanswered
from serving.gateway.route import CanaryTally, Outcome, Rollout, Shadow
from serving.gateway.upstreams import CheckedRequest, Reply, Upstream
from serving.model.contract import Contract
from serving.protocol.oip import decode_response
from serving.protocol.tensors import Array

# The golden ratio as a fraction of 2**64.
_GOLDEN_RATIO = 0x9E3779B97F4A7C15
_MODULUS = 1 << 64


def choose_version(weights: Sequence[float], count: int) -> int:
    """Return the index of the version that answers request number `count`.

    Multiples of the golden ratio, modulo 1, are evenly distributed in every interval of them (Weyl's sequence, here
    in integers). Promises: a weight of 0 is never chosen; of any n consecutive requests a version gets its share,
    give or take a few. At least one weight must be above 0.
    """
    point = (count * _GOLDEN_RATIO) % _MODULUS / _MODULUS * sum(weights)
    chosen = 0
    for index, weight in enumerate(weights):
        if weight > 0:
            chosen = index
            if point < weight:
                break
            point -= weight
    return chosen


def judge_canary(rule: Rollout, tally: CanaryTally, *, age_s: float) -> tuple[Outcome, str] | None:
    """Return how a canary ends and why, None while it is not decided.

    It is rolled back as soon as it can no longer be promoted: where its errors, or its slow answers, are more than
    the rule allows of requests_min requests, or of the requests so far if those are more. The 99th percentile is
    above its limit exactly where more than one answer in a hundred is slow.
    """
    requests = max(tally.requests, rule.requests_min)
    if tally.errors > rule.error_rate_max * requests:
        return "rolled back", f"{tally.errors} of {tally.requests} requests failed; {rule.error_rate_max:.2%} may"
    if tally.slow > requests / 100:
        return "rolled back", f"{tally.slow} of {tally.requests} requests took over {rule.p99_ms_max:g} ms; 1.00% may"
    if tally.requests >= rule.requests_min and age_s >= rule.seconds_min:
        slow = "" if rule.p99_ms_max is None else f", {tally.slow} took over {rule.p99_ms_max:g} ms"
        return "promoted", f"{tally.errors} of {tally.requests} requests failed{slow}"
    return None


ShadowOutcome = Literal["equal", "different", "failed", "dropped"]


class ShadowTraffic:
    """The copies of one endpoint's requests that are sent to its shadow."""

    def __init__(self, count: Callable[[ShadowOutcome], None]) -> None:
        self._count = count
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def in_flight(self) -> int:
        """How many copies have no answer yet."""
        return len(self._tasks)

    def send_copy(
        self,
        rule: Shadow,
        upstream: Upstream,
        contract: Contract,
        request: CheckedRequest,
        reply: Reply,
        *,
        is_busy: bool,
        timeout_s: float,
    ) -> None:
        """Send a copy in a background task. Drop it while requests wait, or where in_flight_max are under way."""
        if is_busy or len(self._tasks) >= rule.in_flight_max:
            self._count("dropped")
            return
        task = asyncio.create_task(self._compare(rule, upstream, contract, request, reply, timeout_s))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _compare(
        self,
        rule: Shadow,
        upstream: Upstream,
        contract: Contract,
        request: CheckedRequest,
        reply: Reply,
        timeout_s: float,
    ) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                other = await upstream.infer(request)
        except (Unanswered, BadRequest, TimeoutError):
            self._count("failed")
            return
        if other.status != HTTPStatus.OK:
            self._count("failed")
            return
        self._count(compare_replies(reply, other, contract, rule.tolerance))


def compare_replies(reply: Reply, other: Reply, contract: Contract, tolerance: float) -> ShadowOutcome:
    """Compare the answers of two versions to one request."""
    try:
        first = decode_response(reply.content, contract, header_length=reply.header_length)
        second = decode_response(other.content, contract, header_length=other.header_length)
    except BadRequest:
        return "failed"
    return "equal" if _are_equal(first, second, tolerance) else "different"


def _are_equal(first: Mapping[str, Array], second: Mapping[str, Array], tolerance: float) -> bool:
    return first.keys() == second.keys() and all(_are_close(first[name], second[name], tolerance) for name in first)


def _are_close(first: Array, second: Array, tolerance: float) -> bool:
    if first.dtype.kind == "f":
        return first.shape == second.shape and np.allclose(
            first, second, rtol=tolerance, atol=tolerance, equal_nan=True
        )
    return bool(np.array_equal(first, second))
