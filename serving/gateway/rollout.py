"""The judgement of a canary by its requests, and the comparison of a shadow's answers."""

from __future__ import annotations

from http import HTTPStatus
from typing import Literal

import numpy as np

from serving.errors import BadRequest
from serving.gateway.access_log import LoggedRequest
from serving.gateway.route import CanaryTally, Outcome, Rollout
from serving.gateway.upstreams import Reply
from serving.model.contract import Contract
from serving.protocol.oip import decode_response
from serving.protocol.tensors import Array


def tally_request(rule: Rollout, tally: CanaryTally, request: LoggedRequest) -> CanaryTally:
    """Return the tally after one more request, which counts where the canary was asked and a version answered.

    The canary has failed where another version answered in its place. Where that one failed too, the request is to
    blame.
    """
    if not request.is_canary or request.status != HTTPStatus.OK:
        return tally
    return tally.add(rule, failed=request.attempts > 1, latency_ms=request.latency_ms)


def judge_canary(rule: Rollout, tally: CanaryTally, *, age_s: float) -> tuple[Outcome, str] | None:
    """Return how a canary ends and why, None while it is not decided.

    It is rolled back as soon as it can no longer be promoted: where its errors, or its slow answers, are more than
    the rule allows of requests_min requests, or of the requests so far if those are more. The 99th percentile is
    above its limit exactly where more than one answer in a hundred is slow. Too few requests in seconds_max roll it
    back as well.
    """
    requests = max(tally.requests, rule.requests_min)
    if tally.errors > rule.error_rate_max * requests:
        return "rolled back", f"{tally.errors} of {tally.requests} requests failed; {rule.error_rate_max:.2%} may"
    if tally.slow > requests / 100:
        return "rolled back", f"{tally.slow} of {tally.requests} requests took over {rule.p99_ms_max:g} ms; 1.00% may"
    if tally.requests >= rule.requests_min and age_s >= rule.seconds_min:
        slow = "" if rule.p99_ms_max is None else f", {tally.slow} took over {rule.p99_ms_max:g} ms"
        return "promoted", f"{tally.errors} of {tally.requests} requests failed{slow}"
    if rule.seconds_max is not None and age_s >= rule.seconds_max:
        return "rolled back", f"got {tally.requests} of {rule.requests_min} requests in {rule.seconds_max:g} s"
    return None


ShadowOutcome = Literal["equal", "different", "failed", "dropped"]


def compare_replies(reply: Reply, other: Reply, contract: Contract, tolerance: float) -> ShadowOutcome:
    """Compare the answers of two versions to one request."""
    try:
        first = decode_response(reply.content, contract, header_length=reply.header_length)
        second = decode_response(other.content, contract, header_length=other.header_length)
    except BadRequest:
        return "failed"
    is_equal = first.keys() == second.keys() and all(_are_close(first[name], second[name], tolerance) for name in first)
    return "equal" if is_equal else "different"


def _are_close(first: Array, second: Array, tolerance: float) -> bool:
    if first.dtype.kind == "f":
        return first.shape == second.shape and np.allclose(
            first, second, rtol=tolerance, atol=tolerance, equal_nan=True
        )
    return bool(np.array_equal(first, second))
