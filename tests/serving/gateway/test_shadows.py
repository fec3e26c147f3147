"""Shadow traffic through a real gateway: asked, compared, counted, never returned."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from infra.local.gateway import GatewayServer
from serving.gateway.route import Limits, Shadow
from serving.gateway.shadow import compare
from serving.gateway.upstream import Reply
from serving.protocol.oip import InferRequest, Wanted, encode_response
from tests.serving.gateway.conftest import Put
from tests.serving.gateway.support import Door, V2Server, read_metrics, route
from tests.serving.gateway.v2_child import CONTRACT


@pytest.fixture
def counted(gateway: GatewayServer) -> Callable[[Door, str], int]:
    def counted(door: Door, compared: str) -> int:
        """How often the shadow of an endpoint was so, once nothing more happens."""
        page = read_metrics(gateway)
        wanted = f'overnight_shadows_total{{compared="{compared}",endpoint="{door.name}"}} '
        return sum(int(float(line.removeprefix(wanted))) for line in page.splitlines() if line.startswith(wanted))

    return counted


@pytest.mark.parametrize(
    ("shadow", "compared"), [("same", "equal"), ("2", "different"), ("broken", "failed"), ("wrong", "different")]
)
def test_the_shadow_is_asked_too_and_only_counted(
    put: Put, v2: V2Server, counted: Callable[[Door, str], int], shadow: str, compared: str
) -> None:
    before = v2.seen(shadow)
    door = put(route(v2.url, ("1", 1), (shadow, 0), shadow=Shadow(version=shadow)))

    assert [10] * 3 == [door.score() for _ in range(3)]
    deadline = time.monotonic() + 10
    while counted(door, compared) + counted(door, "dropped") < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert v2.seen(shadow) == before + counted(door, compared)
    assert counted(door, compared) >= 1


def test_a_slow_shadow_slows_nobody_and_what_is_too_much_for_it_is_dropped(
    put: Put, v2: V2Server, counted: Callable[[Door, str], int]
) -> None:
    door = put(route(v2.url, ("1", 1), ("slow", 0), shadow=Shadow(version="slow", in_flight_max=1)))
    assert [10] * 10 == [door.score() for _ in range(10)]

    deadline = time.monotonic() + 10
    while counted(door, "equal") + counted(door, "dropped") < 10:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert counted(door, "dropped") > 0


def test_while_requests_wait_the_shadow_is_not_asked(
    put: Put, v2: V2Server, counted: Callable[[Door, str], int]
) -> None:
    door = put(
        route(v2.url, ("slow", 1), ("1", 0), shadow=Shadow(version="1"), limits=Limits(in_flight_max=1, queue_max=9))
    )
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: door.score(), range(3)))

    assert 1 <= counted(door, "dropped") <= 2


@pytest.mark.parametrize(("off", "binary", "compared"), [(1e-7, True, "equal"), (1e-3, False, "different")])
def test_numbers_are_equal_within_the_tolerance_in_whichever_form(off: float, compared: str, *, binary: bool) -> None:
    asked = InferRequest(id=None, inputs={"n": np.zeros(2)}, outputs=(Wanted(name="score", binary=binary),))

    def reply(scores: list[float]) -> Reply:
        outputs = {"score": np.array(scores, np.float32)}
        body = encode_response(asked, outputs, CONTRACT, model="toy", version="1")
        return Reply(status=200, content=body.content, headers=body.headers)

    assert compared == compare(reply([1, 2]), reply([1, 2 + off]), CONTRACT, 1e-5)
    assert "different" == compare(reply([1, 2]), reply([1]), CONTRACT, 1e-5)
    assert "failed" == compare(reply([1, 2]), Reply(status=200, content=b"{"), CONTRACT, 1e-5)
