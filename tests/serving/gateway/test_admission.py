"""Limits on rate and number of requests: refused early, and no accepted request is lost."""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.local.gateway import GatewayServer
from serving.errors import Unanswered
from serving.gateway.admission import AdmissionQueue, TokenBucket, estimate_retry_after_s, take_token
from serving.gateway.client import GatewayClient
from serving.gateway.route import Limits
from tests.serving.gateway.conftest import Put
from tests.serving.gateway.support import EndpointClient, V2Server, error, route, wait_for


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(0, 4), st.lists(st.integers(1, 5), max_size=20), st.integers(1, 4))
def test_limits_are_never_exceeded_and_every_request_runs_or_is_refused(
    in_flight_max: int, queue_max: int, steps_per_request: list[int], in_flight_max_later: int
) -> None:
    limits = Limits(in_flight_max=in_flight_max, queue_max=queue_max)

    async def ask(queue: AdmissionQueue, steps: int, seen: list[str]) -> None:
        try:
            with queue.admit():
                async with queue.run():
                    assert queue.running <= max(in_flight_max, in_flight_max_later)
                    for _ in range(steps):
                        await asyncio.sleep(0)
                    if steps == 5:
                        raise asyncio.CancelledError
            seen.append("answered")
        except Unanswered as error:
            seen.append(f"refused with {error.status}")

    async def run_all() -> list[str]:
        queue, seen = AdmissionQueue(limits), []
        tasks = [asyncio.create_task(ask(queue, steps, seen)) for steps in steps_per_request]
        await asyncio.sleep(0)
        if tasks:
            # One is cancelled while it waits or runs.
            tasks[-1].cancel()
        queue.set_limits(Limits(in_flight_max=in_flight_max_later, queue_max=queue_max))
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (0, 0, 0) == (queue.admitted, queue.running, queue.waiting)
        return seen

    seen = asyncio.run(run_all())

    assert max(0, len(steps_per_request) - in_flight_max - queue_max) == seen.count("refused with 429")


def test_requests_run_in_the_order_of_arrival() -> None:
    async def run_all() -> list[int]:
        queue, order = AdmissionQueue(Limits(in_flight_max=1, queue_max=9)), []

        async def ask(number: int) -> None:
            with queue.admit():
                async with queue.run():
                    order.append(number)
                    await asyncio.sleep(0)

        await asyncio.gather(*(ask(number) for number in range(9)))
        return order

    assert list(range(9)) == asyncio.run(run_all())


@pytest.mark.parametrize("is_started", [True, False])
def test_a_cancelled_request_counts_neither_as_running_nor_as_waiting(*, is_started: bool) -> None:
    async def run_second() -> int:
        queue = AdmissionQueue(Limits(in_flight_max=1, queue_max=9))

        async def run() -> None:
            async with queue.run():
                pass

        async with AsyncExitStack() as first:
            await first.enter_async_context(queue.run())
            second = asyncio.create_task(run())
            await asyncio.sleep(0)
            if is_started:
                # The second request may run, and is cancelled before it does.
                await first.aclose()
            second.cancel()
            await asyncio.gather(second, return_exceptions=True)
            return queue.running if is_started else queue.waiting

    assert 0 == asyncio.run(run_second())


def test_a_full_queue_says_when_to_retry() -> None:
    queue = AdmissionQueue(Limits(in_flight_max=1, queue_max=0))

    with queue.admit(), pytest.raises(Unanswered, match="Retry after 1 s"), queue.admit():
        pass


rates = st.floats(0.1, 1000)
gaps = st.lists(st.floats(0, 2), min_size=1, max_size=200)


@given(rates, st.integers(1, 50), gaps)
def test_no_interval_admits_more_than_burst_and_rate_allow(rate: float, burst: int, pauses_s: list[float]) -> None:
    bucket, now_s, admitted_s = TokenBucket(tokens=float(burst), at_s=0.0), 0.0, []
    for pause_s in pauses_s:
        now_s += pause_s
        bucket, wait_s = take_token(bucket, now_s=now_s, per_second=rate, burst=burst)
        if not wait_s:
            admitted_s.append(now_s)

    for index, first_s in enumerate(admitted_s):
        for count, last_s in enumerate(admitted_s[index:], start=1):
            assert count <= burst + rate * (last_s - first_s) + 1e-6


@given(rates, st.integers(1, 50), st.floats(0, 1, exclude_max=True))
def test_a_request_after_the_wait_is_admitted(rate: float, burst: int, tokens: float) -> None:
    bucket, wait_s = take_token(TokenBucket(tokens=tokens, at_s=5.0), now_s=5.0, per_second=rate, burst=burst)
    _, again_s = take_token(bucket, now_s=5.0 + wait_s + 1e-6, per_second=rate, burst=burst)

    assert 0 == again_s


@given(st.integers(0, 70_000), st.integers(1, 4096), st.floats(0, 1e4))
def test_a_client_is_asked_to_retry_within_half_a_minute(queued: int, in_flight_max: int, request_s: float) -> None:
    assert 1 <= estimate_retry_after_s(queued=queued, in_flight_max=in_flight_max, request_s=request_s) <= 30


def infer_at_once(endpoint: EndpointClient, requests: int) -> list[int]:
    with ThreadPoolExecutor(requests) as pool:
        return [answer.status_code for answer in pool.map(lambda _: endpoint.infer(), range(requests))]


def start_of_request(endpoint: EndpointClient) -> bytes:
    return f"POST /v2/models/{endpoint.name}/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{{".encode()


def test_requests_beyond_a_full_queue_are_429_with_retry_after_and_the_others_are_answered(
    put: Put, v2: V2Server
) -> None:
    endpoint = put(route(v2.url, ("slow", 1), limits=Limits(in_flight_max=2, queue_max=3)))
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: endpoint.infer(), range(12)))
    refused = [answer for answer in answers if answer.status_code != 200]

    assert 5 <= 12 - len(refused) < 12
    assert {429} == {answer.status_code for answer in refused}
    assert all(1 <= int(answer.headers["Retry-After"]) <= 30 for answer in refused)
    assert [200] * 5 == infer_at_once(endpoint, 5)


def test_requests_above_the_rate_are_429_with_retry_after(put: Put, v2: V2Server) -> None:
    endpoint = put(route(v2.url, limits=Limits(requests_per_second=0.5, burst=3)))
    answers = [endpoint.infer() for _ in range(4)]

    assert [200, 200, 200, 429] == [answer.status_code for answer in answers]
    assert 1 <= int(answers[3].headers["Retry-After"]) <= 2


def test_an_answer_that_takes_too_long_is_504(put: Put, v2: V2Server) -> None:
    endpoint = put(route(v2.url, ("slow", 1), limits=Limits(timeout_s=0.1)))

    assert (504, "An answer must come within 0.1 s, but did not. Send fewer rows, or try again later.") == error(
        endpoint.infer()
    )


def test_the_time_in_the_queue_counts(put: Put, v2: V2Server, admin: GatewayClient) -> None:
    endpoint = put(route(v2.url, ("slow", 1), limits=Limits(timeout_s=0.6, in_flight_max=1)))

    assert [200, 504, 504] == sorted(infer_at_once(endpoint, 3))
    state = admin.get(endpoint.name)
    assert state is not None
    assert ({}, 0) == (state.in_flight, state.waiting)


def test_a_body_that_does_not_arrive_is_408(put: Put, v2: V2Server, gateway: GatewayServer) -> None:
    endpoint = put(route(v2.url, limits=Limits(timeout_s=0.2)))
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(start_of_request(endpoint))
        answer = b"".join(iter(lambda: client.recv(1000), b""))

    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'{"error":"The body must be complete within 0.2 s, but is not."}' in answer


def test_requests_whose_bodies_arrive_slowly_count_as_admitted_until_they_end(
    put: Put, v2: V2Server, gateway: GatewayServer
) -> None:
    endpoint = put(route(v2.url, limits=Limits(timeout_s=1.5, in_flight_max=1, queue_max=1)))
    host, port = gateway.url.removeprefix("http://").split(":")
    slow = [socket.create_connection((host, int(port))) for _ in range(2)]
    for client in slow:
        client.sendall(start_of_request(endpoint))
    wait_for(lambda: endpoint.infer().status_code == 429)
    for client in slow:
        client.close()
    wait_for(lambda: endpoint.infer().status_code == 200)
