"""The limit on requests a second, as a token bucket; and when a client that is sent away may come again."""

from __future__ import annotations

import math
from dataclasses import dataclass

_RETRY_S_MAX = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Requests that may come at once, counted at a time."""

    tokens: float
    at_s: float


def take(bucket: Bucket, *, now_s: float, per_second: float, burst: int) -> tuple[Bucket, float]:
    """Return the bucket after one request, and 0.0; or the seconds until there is room for it.

    Promises: any stretch of T seconds lets at most burst + per_second * T requests in.
    """
    gained = max(0.0, now_s - bucket.at_s) * per_second
    tokens, at_s = min(float(burst), bucket.tokens + gained), max(now_s, bucket.at_s)
    if tokens >= 1:
        return Bucket(tokens=tokens - 1, at_s=at_s), 0.0
    return Bucket(tokens=tokens, at_s=at_s), (1 - tokens) / per_second


def retry_after_s(*, queued: int, in_flight_max: int, request_s: float) -> int:
    """Return the seconds until those that are queued now should be through: from 1 to 30, whole as HTTP has them."""
    return min(_RETRY_S_MAX, max(1, math.ceil((queued + 1) / in_flight_max * request_s)))
