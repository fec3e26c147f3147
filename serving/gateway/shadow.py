"""Shadow traffic: another version is asked the same, and its answers are compared, counted, and never returned."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from serving.errors import BadRequest, Unanswered
from serving.gateway.route import Shadow
from serving.gateway.upstream import Call, Reply, Upstream
from serving.model.contract import Contract
from serving.protocol.oip import decode_response
from serving.protocol.tensors import Array

Compared = Literal["equal", "different", "failed", "dropped"]

_OK = 200


class Shadowing:
    """The shadow requests of one endpoint, few at a time."""

    def __init__(self, count: Callable[[Compared], None]) -> None:
        self._count = count
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def in_flight(self) -> int:
        """How many are under way."""
        return len(self._tasks)

    def offer(
        self,
        rule: Shadow,
        upstream: Upstream,
        contract: Contract,
        call: Call,
        reply: Reply,
        *,
        busy: bool,
        timeout_s: float,
    ) -> None:
        """Ask the shadow too, in a task of its own; not while requests wait or as many as may are under way."""
        if busy or len(self._tasks) >= rule.in_flight_max:
            self._count("dropped")
            return
        task = asyncio.create_task(self._ask(rule, upstream, contract, call, reply, timeout_s))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(
        self, rule: Shadow, upstream: Upstream, contract: Contract, call: Call, reply: Reply, timeout_s: float
    ) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                other = await upstream.infer(call)
        except (Unanswered, BadRequest, TimeoutError):
            self._count("failed")
            return
        if other.status != _OK:
            self._count("failed")
            return
        self._count(compare(reply, other, contract, rule.tolerance))


def compare(reply: Reply, other: Reply, contract: Contract, tolerance: float) -> Compared:
    """Hold the answers of two versions to one request against each other."""
    try:
        first, second = (
            decode_response(each.content, contract, header_length=each.header_length) for each in (reply, other)
        )
    except BadRequest:
        return "failed"
    return "equal" if _equal(first, second, tolerance) else "different"


def _equal(first: Mapping[str, Array], second: Mapping[str, Array], tolerance: float) -> bool:
    return first.keys() == second.keys() and all(_close(first[name], second[name], tolerance) for name in first)


def _close(first: Array, second: Array, tolerance: float) -> bool:
    if first.dtype.kind == "f":
        return first.shape == second.shape and np.allclose(
            first, second, rtol=tolerance, atol=tolerance, equal_nan=True
        )
    return bool(np.array_equal(first, second))
