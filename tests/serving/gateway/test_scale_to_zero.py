"""Models that are unloaded while idle, and loaded for the request that needs them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from infra.local.gateway import GatewayServer
from serving.errors import Unanswered
from serving.gateway.client import GatewayClient
from serving.gateway.endpoint import Endpoint
from serving.gateway.envoy.admin import EnvoyAdmin
from serving.gateway.envoy.bootstrap import BootstrapOptions
from serving.gateway.gateway import Gateway
from serving.gateway.keys import Keys
from serving.gateway.metrics import Metrics
from serving.gateway.route import Limits, SavedEndpoint, ServedVersion, SleepRule
from serving.gateway.scale_to_zero import ModelLifecycle
from serving.gateway.store import Store
from serving.gateway.upstreams import CheckedRequest, HttpClient, HttpResponse
from serving.protocol.oip import Body, InferRequest
from tests.eventually import eventually
from tests.serving.gateway.conftest import Put
from tests.serving.gateway.support import EndpointClient, V2Server, error, read_metrics, route, served

RULE_SHORT = SleepRule(keep_warm_s=0.2)


@pytest.fixture
def wait_until_unloaded(admin: GatewayClient) -> Callable[[EndpointClient], None]:
    def wait_until_unloaded(endpoint: EndpointClient) -> None:
        admin.wait_until(endpoint.name, lambda state: state.models == "asleep", timeout_s=20)

    return wait_until_unloaded


def test_models_are_unloaded_while_idle_and_a_request_loads_them_once(
    put: Put, v2: V2Server, gateway: GatewayServer, wait_until_unloaded: Callable[[EndpointClient], None]
) -> None:
    endpoint = put(route(v2.url, ("1", 1), ("2", 1), model="sleepy", sleep=RULE_SHORT))
    assert 200 == endpoint.infer().status_code
    wait_until_unloaded(endpoint)
    loads = v2.seen("sleepy load")

    assert 1 == v2.seen("sleepy unload")
    assert {"name": endpoint.name, "ready": True} == endpoint.get("/ready").json()
    with ThreadPoolExecutor(8) as pool:
        assert {200} == {answer.status_code for answer in pool.map(lambda _: endpoint.infer(), range(8))}
    assert loads + 1 == v2.seen("sleepy load")
    assert f'overnight_wake_seconds_count{{endpoint="{endpoint.name}"}} 2.0' in read_metrics(gateway)


def test_a_model_that_is_loaded_already_is_not_loaded_again(put: Put, v2: V2Server) -> None:
    assert 10 == put(route(v2.url, model="steady", sleep=SleepRule(keep_warm_s=60))).score()
    assert 0 == v2.seen("steady load")


def test_no_request_is_lost_while_models_unload_and_load(
    put: Put, v2: V2Server, wait_until_unloaded: Callable[[EndpointClient], None]
) -> None:
    endpoint = put(route(v2.url, ("1", 1), model="restless", sleep=SleepRule(keep_warm_s=0.05)))
    statuses = []
    for pause_s in (0.0, 1.0, 1.05, 0.0):
        time.sleep(pause_s)
        statuses.append(endpoint.infer().status_code)

    assert [200] * 4 == statuses
    assert v2.seen("restless unload") >= 1


def test_a_request_waits_at_most_hold_s_max_and_the_load_goes_on(put: Put, v2: V2Server) -> None:
    endpoint = put(route(v2.url, model="late", sleep=SleepRule(keep_warm_s=60, hold_s_max=0.1)))

    assert (503, "The model must be loaded within 0.1 s, but is still loading. Try again later.") == error(
        endpoint.infer()
    )
    eventually(lambda: endpoint.infer().status_code == 200)
    assert 1 == v2.seen("late load")


def test_envoy_asks_once_for_a_load_however_long_that_takes(put: Put, v2: V2Server, gateway: GatewayServer) -> None:
    assert 200 == put(route(v2.url, model="sluggish", sleep=SleepRule(keep_warm_s=60))).infer().status_code
    envoy = EnvoyAdmin(BootstrapOptions(folder=gateway.folder).admin_socket)

    assert [0] == [*envoy.read_statistics(r"^cluster\.control_plane\.upstream_rq_per_try_timeout$").values()]


def test_requests_that_wait_for_a_load_are_limited(put: Put, v2: V2Server) -> None:
    endpoint = put(
        route(v2.url, model="popular", sleep=SleepRule(keep_warm_s=60), limits=Limits(in_flight_max=1, queue_max=1))
    )
    with ThreadPoolExecutor(6) as pool:
        statuses = sorted(answer.status_code for answer in pool.map(lambda _: endpoint.infer(), range(6)))

    assert [200, 200, 429, 429, 429, 429] == statuses


def test_a_model_that_does_not_load_is_503_with_the_reason(put: Put, v2: V2Server) -> None:
    status, message = error(put(route(v2.url, model="unloadable", sleep=RULE_SHORT)).infer())

    assert 503 == status
    assert "must load the model" in message
    assert "no memory for it" in message


def test_a_model_that_its_server_has_lost_is_loaded_again(put: Put, v2: V2Server) -> None:
    endpoint = put(route(v2.url, model="lost", sleep=SleepRule(keep_warm_s=60)))
    assert 10 == endpoint.score()
    httpx.post(f"{v2.url}/v2/repository/models/lost/unload")

    assert 10 == endpoint.score()
    assert 2 == v2.seen("lost load")


RULE_LONG = SleepRule(keep_warm_s=1, hold_s_max=10)
VERSIONS = (served("http://127.0.0.1:9"),)


class SilentLoader:
    """A server that does not answer until it is repaired."""

    is_repaired = False

    async def is_loaded(self, _served: ServedVersion) -> bool:
        return False

    async def load(self, served: ServedVersion) -> None:
        await self.unload(served)

    async def unload(self, _served: ServedVersion) -> None:
        if not self.is_repaired:
            await asyncio.get_running_loop().create_future()


def make_lifecycle(loader: SilentLoader) -> ModelLifecycle:
    return ModelLifecycle(lambda: loader, lambda _seconds: None, load_s_max=0.05, unload_s_max=0.05)


async def is_unasked() -> bool:
    """No request is on its way to the models."""
    return True


def test_a_load_that_never_ends_times_out_and_the_next_request_tries_again() -> None:
    async def load_twice() -> str:
        server = SilentLoader()
        models = make_lifecycle(server)
        with pytest.raises(Unanswered, match=r"must load the model within 0\.05 s, but did not"):
            await models.load(RULE_LONG, VERSIONS)
        server.is_repaired = True
        await models.load(RULE_LONG, VERSIONS)
        return models.state

    assert "awake" == asyncio.run(asyncio.wait_for(load_twice(), 10))


def test_an_unload_that_never_ends_does_not_block_a_later_request() -> None:
    async def unload_and_load() -> str:
        server = SilentLoader()
        models = make_lifecycle(server)
        with pytest.raises(Unanswered, match=r"must unload toy within 0\.05 s, but did not"):
            await models.unload(VERSIONS, hold_requests=is_unasked)
        server.is_repaired = True
        await models.load(RULE_LONG, VERSIONS)
        return models.state

    assert "awake" == asyncio.run(asyncio.wait_for(unload_and_load(), 10))


def test_a_request_that_comes_during_an_unload_is_503_after_hold_s_max_and_may_come_again() -> None:
    async def load_during_unload() -> int | None:
        models = ModelLifecycle(SilentLoader, lambda _seconds: None)
        unloading = asyncio.create_task(models.unload(VERSIONS, hold_requests=is_unasked))
        with pytest.raises(Unanswered, match=r"within 0\.05 s, but is still loading") as refused:
            await models.load(RULE_LONG.model_copy(update={"hold_s_max": 0.05}), VERSIONS)
        unloading.cancel()
        return refused.value.retry_after_s

    assert 1 == asyncio.run(asyncio.wait_for(load_during_unload(), 10))


def test_an_unload_that_fails_each_time_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def unload_three_times() -> None:
        options = BootstrapOptions(folder=tmp_path)
        with Store(tmp_path) as store:
            async with Gateway(store, Keys(tmp_path, {}), options) as gateway, asyncio.timeout(60):
                await gateway.put("unasked", route("http://127.0.0.1:9", sleep=SleepRule(keep_warm_s=0.01)))
                models = gateway.endpoint("unasked").models
                for _ in range(3):
                    models.state = "awake"
                    while models.state != "asleep":  # noqa: ASYNC110 - it is told to nobody
                        await asyncio.sleep(0.01)

    asyncio.run(unload_three_times())

    assert 1 == caplog.text.count("Unloading the models of endpoint unasked has failed")
    assert "Traceback" not in caplog.text


class MeetingLoader(SilentLoader):
    """A server that has unloaded a model once it is asked for another one too."""

    def __init__(self) -> None:
        self.asked = asyncio.Barrier(2)

    async def unload(self, _served: ServedVersion) -> None:
        await self.asked.wait()


def test_all_models_of_an_endpoint_are_unloaded_at_once() -> None:
    async def unload_two() -> bool:
        models = make_lifecycle(MeetingLoader())
        versions = [served("http://127.0.0.1:9", model=model) for model in ("one", "other")]
        return await models.unload(versions, hold_requests=is_unasked)

    assert asyncio.run(unload_two())


class SlowServer(HttpClient):
    """A server that takes five seconds of a clock of its own for each load and answer, and notes who is idle then."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.is_loaded = False
        self.idle_while_asked: list[bool] = []
        self.endpoint = Endpoint(
            "slow",
            SavedEndpoint(route=route("http://127.0.0.1:9", sleep=SleepRule(keep_warm_s=1))),
            http=self,
            metrics=Metrics(),
            clock=lambda: self.now_s,
        )

    async def send(self, _method: str, url: str, _content: bytes | None, _headers: Mapping[str, str]) -> HttpResponse:
        self.now_s += 5
        self.is_loaded = True
        self.idle_while_asked.append(self.endpoint.has_idle_models())
        return HttpResponse(status=200, content=b"{}", headers={})

    async def is_healthy(self, _url: str, *, timeout_s: float = 0) -> bool:
        del timeout_s
        return self.is_loaded


def is_idle_now_and_a_second_later(server: SlowServer) -> tuple[bool, bool]:
    now = server.endpoint.has_idle_models()
    server.now_s += 1
    return now, server.endpoint.has_idle_models()


def test_a_request_that_waited_for_a_load_finds_the_models_loaded_for_keep_warm_s_from_then_on() -> None:
    server = SlowServer()
    asyncio.run(server.endpoint.activate())

    assert (False, True) == is_idle_now_and_a_second_later(server)


def test_models_stay_loaded_while_the_gateway_itself_asks_them() -> None:
    server = SlowServer()
    request = CheckedRequest(body=Body(content=b"{}"), request=InferRequest(id=None, inputs={}, outputs=()))
    asyncio.run(server.endpoint.infer(request, None))

    assert [False, False] == server.idle_while_asked  # the load, and the request
    assert (False, True) == is_idle_now_and_a_second_later(server)
