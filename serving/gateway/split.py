"""Which version the next request goes to: a split by weight that needs no chance, and is even in every stretch."""

from __future__ import annotations

from collections.abc import Sequence

_TURN = 0x9E3779B97F4A7C15
_WHOLE = 1 << 64


def choose(weights: Sequence[float], count: int) -> int:
    """Return the place of the version that request number `count` goes to.

    The multiples of the golden ratio, modulo 1, lie evenly in every stretch of them (Weyl's sequence, in whole
    numbers). Promises: a weight of 0 is never chosen; of any n requests in a row a version gets its share of n,
    within a few. Some weight must be above 0.
    """
    point = (count * _TURN) % _WHOLE / _WHOLE * sum(weights)
    chosen = 0
    for at, weight in enumerate(weights):
        if weight > 0:
            chosen = at
            if point < weight:
                break
            point -= weight
    return chosen
