"""How much and how many: refused early, and never by losing what was taken."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor

from infra.local.gateway import GatewayServer
from serving.gateway.client import GatewayClient
from serving.gateway.route import Limits
from tests.serving.gateway.conftest import Put
from tests.serving.gateway.support import Door, V2Server, error, route


def at_once(door: Door, requests: int) -> list[int]:
    with ThreadPoolExecutor(requests) as pool:
        return [answer.status_code for answer in pool.map(lambda _: door.infer(), range(requests))]


def beginning_of_a_request(door: Door) -> bytes:
    return f"POST /v2/models/{door.name}/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{{".encode()


def test_a_full_queue_answers_429_and_when_to_come_again_and_the_rest_are_answered(put: Put, v2: V2Server) -> None:
    door = put(route(v2.url, ("slow", 1), limits=Limits(in_flight_max=2, queue_max=3)))
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: door.infer(), range(12)))
    refused = [answer for answer in answers if answer.status_code != 200]

    assert 5 <= 12 - len(refused) < 12
    assert {429} == {answer.status_code for answer in refused}
    assert all(1 <= int(answer.headers["Retry-After"]) <= 30 for answer in refused)
    assert [200] * 5 == at_once(door, 5)


def test_requests_above_the_rate_are_told_when_to_come_again(put: Put, v2: V2Server) -> None:
    door = put(route(v2.url, limits=Limits(requests_per_second=0.5, burst=3)))
    answers = [door.infer() for _ in range(4)]

    assert [200, 200, 200, 429] == [answer.status_code for answer in answers]
    assert 1 <= int(answers[3].headers["Retry-After"]) <= 2


def test_an_answer_that_takes_too_long_is_504(put: Put, v2: V2Server) -> None:
    door = put(route(v2.url, ("slow", 1), limits=Limits(timeout_s=0.1)))

    assert (504, "An answer must come within 0.1 s, and did not. Send fewer rows, or try again later.") == error(
        door.infer()
    )


def test_the_time_in_the_queue_counts(put: Put, v2: V2Server, admin: GatewayClient) -> None:
    door = put(route(v2.url, ("slow", 1), limits=Limits(timeout_s=0.6, in_flight_max=1)))

    assert [200, 504, 504] == sorted(at_once(door, 3))
    state = admin.get(door.name)
    assert state is not None
    assert ({}, 0) == (state.in_flight, state.waiting)


def test_a_body_that_does_not_come_is_408(put: Put, v2: V2Server, gateway: GatewayServer) -> None:
    door = put(route(v2.url, limits=Limits(timeout_s=0.2)))
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(beginning_of_a_request(door))
        answer = b"".join(iter(lambda: client.recv(1000), b""))

    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'{"error":"The body must come in within 0.2 s, and did not."}' in answer


def test_those_who_send_slowly_hold_places_in_the_queue_and_give_them_back(
    put: Put, v2: V2Server, gateway: GatewayServer
) -> None:
    door = put(route(v2.url, limits=Limits(timeout_s=1.5, in_flight_max=1, queue_max=1)))
    host, port = gateway.url.removeprefix("http://").split(":")
    slow = [socket.create_connection((host, int(port))) for _ in range(2)]
    for client in slow:
        client.sendall(beginning_of_a_request(door))
    deadline = time.monotonic() + 10
    while (status := door.infer().status_code) == 200:
        assert time.monotonic() < deadline

    assert 429 == status
    for client in slow:
        client.close()
    while door.infer().status_code != 200:
        assert time.monotonic() < deadline
