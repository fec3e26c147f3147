"""When an endpoint's models are unloaded."""

from __future__ import annotations


def falls_asleep(*, keep_warm_s: float, idle_s: float, present: int) -> bool:
    """Say whether models are unloaded: no request is there, and none came for the keep-warm time."""
    return present == 0 and idle_s >= keep_warm_s
