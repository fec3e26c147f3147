"""Models that are unloaded when nobody asks, and loaded for the request that needs them."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from infra.local.gateway import GatewayServer
from serving.gateway.client import GatewayClient
from serving.gateway.route import Limits, Sleep
from tests.serving.gateway.conftest import Put
from tests.serving.gateway.support import Door, V2Server, error, read_metrics, route

SLEEP = Sleep(keep_warm_s=0.2)


@pytest.fixture
def falls_asleep(admin: GatewayClient) -> Callable[[Door], None]:
    def falls_asleep(door: Door) -> None:
        admin.wait(door.name, lambda state: state.models == "asleep", timeout_s=20)

    return falls_asleep


def test_models_are_unloaded_when_idle_and_a_request_wakes_them(
    put: Put, v2: V2Server, gateway: GatewayServer, falls_asleep: Callable[[Door], None]
) -> None:
    door = put(route(v2.url, ("1", 1), ("2", 1), model="sleepy", sleep=SLEEP))
    assert 200 == door.infer().status_code
    falls_asleep(door)
    loads = v2.seen("sleepy load")

    assert 1 == v2.seen("sleepy unload")
    assert {"name": door.name, "ready": True} == door.get("/ready").json()
    with ThreadPoolExecutor(8) as pool:
        assert {200} == {answer.status_code for answer in pool.map(lambda _: door.infer(), range(8))}
    assert loads + 1 == v2.seen("sleepy load")
    assert f'overnight_wake_seconds_count{{endpoint="{door.name}"}} 2.0' in read_metrics(gateway)


def test_a_model_that_is_loaded_already_is_not_loaded_again(put: Put, v2: V2Server) -> None:
    assert 10 == put(route(v2.url, model="steady", sleep=Sleep(keep_warm_s=60))).score()
    assert 0 == v2.seen("steady load")


def test_no_request_is_lost_while_models_come_and_go(
    put: Put, v2: V2Server, falls_asleep: Callable[[Door], None]
) -> None:
    door = put(route(v2.url, ("1", 1), model="restless", sleep=Sleep(keep_warm_s=0.05)))
    statuses = []
    for pause_s in (0.0, 1.0, 1.05, 0.0):
        time.sleep(pause_s)
        statuses.append(door.infer().status_code)

    assert [200] * 4 == statuses
    assert v2.seen("restless unload") >= 1


def test_a_request_is_held_only_so_long_and_the_load_goes_on(put: Put, v2: V2Server) -> None:
    door = put(route(v2.url, model="late", sleep=Sleep(keep_warm_s=60, hold_s_max=0.1)))

    assert (503, "The model must be loaded within 0.1 s, and still loads. Try again later.") == error(door.infer())
    deadline = time.monotonic() + 10
    while door.infer().status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert 1 == v2.seen("late load")


def test_only_so_many_requests_are_held(put: Put, v2: V2Server) -> None:
    door = put(route(v2.url, model="popular", sleep=Sleep(keep_warm_s=60), limits=Limits(in_flight_max=1, queue_max=1)))
    with ThreadPoolExecutor(6) as pool:
        statuses = sorted(answer.status_code for answer in pool.map(lambda _: door.infer(), range(6)))

    assert [200, 200, 429, 429, 429, 429] == statuses


def test_a_model_that_does_not_load_is_503_with_the_reason(put: Put, v2: V2Server) -> None:
    status, told = error(put(route(v2.url, model="unloadable", sleep=SLEEP)).infer())

    assert 503 == status
    assert "must load the model" in told
    assert "no memory for it" in told


def test_a_model_that_its_server_has_lost_is_loaded_again(put: Put, v2: V2Server) -> None:
    door = put(route(v2.url, model="lost", sleep=Sleep(keep_warm_s=60)))
    assert 10 == door.score()
    httpx.post(f"{v2.url}/v2/repository/models/lost/unload")

    assert 10 == door.score()
    assert 2 == v2.seen("lost load")
