"""What requests may cost, and clients that send too much, too slowly, or nothing: others are served meanwhile."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import httpx

from infra.local.gateway import GatewayServer
from serving.gateway.client import GatewayClient
from serving.gateway.route import Limits
from tests.eventually import eventually
from tests.serving.gateway.conftest import Put
from tests.serving.gateway.support import EndpointClient, V2Server, error, route


def infer_at_once(endpoint: EndpointClient, count: int) -> list[httpx.Response]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda _: endpoint.infer(), range(count)))


def statuses(answers: list[httpx.Response]) -> list[int]:
    return sorted(answer.status_code for answer in answers)


def start_of_request(endpoint: EndpointClient) -> bytes:
    return f"POST /v2/models/{endpoint.name}/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode()


def connect(gateway: GatewayServer) -> socket.socket:
    host, port = gateway.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def read_to_end(client: socket.socket) -> bytes:
    """What the gateway sends until it closes the connection."""
    parts = []
    try:
        while part := client.recv(1 << 16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def test_requests_beyond_a_full_queue_are_429_with_retry_after_and_the_others_are_answered(
    put: Put, v2: V2Server
) -> None:
    endpoint = put(route(v2.url, ("slow", 1), limits=Limits(in_flight_max=2, queue_max=3)))
    answers = infer_at_once(endpoint, 24)
    refused = [answer for answer in answers if answer.status_code != 200]

    # While connections are made, those that wait for one count twice.
    assert 5 <= 24 - len(refused) <= 9
    assert {429} == {answer.status_code for answer in refused}
    assert all(1 <= int(answer.headers["Retry-After"]) <= 30 for answer in refused)
    assert "requests at once, got one more" in error(refused[0])[1]
    assert [200] * 5 == statuses(infer_at_once(endpoint, 5))


def test_a_server_never_has_more_requests_than_in_flight_max(put: Put, v2: V2Server, admin: GatewayClient) -> None:
    endpoint = put(route(v2.url, ("slow", 1), limits=Limits(in_flight_max=2)))
    with ThreadPoolExecutor(8) as pool:
        pending = [pool.submit(endpoint.infer) for _ in range(8)]
        seen = admin.wait_until(endpoint.name, lambda state: state.waiting > 0, timeout_s=20)
        assert {200} == {answer.result().status_code for answer in pending}

    assert 0 < seen.in_flight.get("slow", 0) <= 2


def test_requests_above_the_rate_are_429_with_retry_after(put: Put, v2: V2Server) -> None:
    endpoint = put(route(v2.url, limits=Limits(requests_per_second=0.5, burst=3)))
    answers = [endpoint.infer() for _ in range(4)]

    assert [200, 200, 200, 429] == [answer.status_code for answer in answers]
    assert 1 <= int(answers[3].headers["Retry-After"]) <= 2
    assert "at most 0.5 requests a second" in error(answers[3])[1]


def test_an_answer_that_takes_too_long_is_504(put: Put, v2: V2Server) -> None:
    endpoint = put(route(v2.url, ("slow", 1), limits=Limits(timeout_s=0.1)))

    assert (504, "An answer must come within 0.1 s, but did not. Send fewer rows, or try again later.") == error(
        endpoint.infer()
    )


def test_the_time_in_the_queue_counts(put: Put, v2: V2Server, admin: GatewayClient) -> None:
    endpoint = put(route(v2.url, ("slow", 1), limits=Limits(timeout_s=0.6, in_flight_max=1)))

    assert [200, 504, 504] == statuses(infer_at_once(endpoint, 3))
    admin.wait_until(endpoint.name, lambda state: ({}, 0) == (state.in_flight, state.waiting), timeout_s=20)


def test_a_body_that_stops_is_408(put: Put, v2: V2Server, gateway: GatewayServer) -> None:
    endpoint = put(route(v2.url, limits=Limits(timeout_s=0.2)))
    with connect(gateway) as client:
        client.sendall(start_of_request(endpoint))
        answer = read_to_end(client)

    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'{"error":"The request must be complete in time, but is not. Send it again."}' in answer


def test_bodies_that_stop_take_no_place_of_other_requests(put: Put, v2: V2Server, gateway: GatewayServer) -> None:
    endpoint = put(route(v2.url, limits=Limits(in_flight_max=1, queue_max=1)))
    stopped = [connect(gateway) for _ in range(5)]
    for client in stopped:
        client.sendall(start_of_request(endpoint))

    assert 10 == endpoint.score()
    for client in stopped:
        client.close()


def test_headers_that_are_too_many_too_large_or_too_slow_are_refused(
    gateway: GatewayServer, put: Put, v2: V2Server
) -> None:
    endpoint = put(route(v2.url))
    slow = [connect(gateway) for _ in range(50)]
    for client in slow:
        client.sendall(b"GET /v2 HTTP/1.1\r\na: ")
    with connect(gateway) as client:
        client.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 101 + b"\r\n")

        assert read_to_end(client).startswith(b"HTTP/1.1 431 ")
    with connect(gateway) as client:
        client.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\na: " + b"b" * (33 << 10) + b"\r\n\r\n")

        assert read_to_end(client).startswith(b"HTTP/1.1 431 ")
    assert 10 == endpoint.score()
    assert all(read_to_end(client).startswith(b"HTTP/1.1 408 ") for client in slow)
    for client in slow:
        client.close()


def test_a_header_without_an_end_is_not_buffered(gateway: GatewayServer) -> None:
    sent = 0
    with connect(gateway) as client:
        client.sendall(b"GET /v2 HTTP/1.1\r\na: ")
        try:
            while sent < 48 << 20:
                client.sendall(b"b" * 4096)
                sent += 4096
        except OSError:
            pass

    # What the buffers of the sockets take.
    assert sent < 16 << 20


def test_the_names_of_the_gateways_own_headers_do_nothing_for_a_client(put: Put, v2: V2Server) -> None:
    endpoint = put(route(v2.url, ("1", 1), ("2", 0)))
    headers = {
        "overnight-endpoint": "other",
        "overnight-shadow": "1",
        "overnight-version": "2",
        "overnight-chosen": "2",
    }

    assert "1" == endpoint.infer(headers=headers).headers["Overnight-Version"]
    assert 404 == endpoint.http.get(f"{endpoint.url}/activator/any", headers=headers).status_code


def test_a_request_by_an_unusual_path_is_no_way_around_the_keys(put: Put, v2: V2Server) -> None:
    endpoint = put(route(v2.url, keys=("fixed",)))
    base = endpoint.url.removesuffix(endpoint.name)
    paths = (f"{base}{endpoint.name}/infer/", f"{base}./{endpoint.name}/infer", f"{base}%65{endpoint.name[1:]}/infer")
    for path in paths:
        headers = {"overnight-endpoint": endpoint.name}
        answer = endpoint.http.post(path, json={"inputs": []}, headers=headers, follow_redirects=False)

        assert answer.status_code in (401, 404), path


def test_a_client_gets_a_place_again_once_others_are_gone(put: Put, v2: V2Server) -> None:
    endpoint = put(route(v2.url, ("slow", 1), limits=Limits(in_flight_max=1, queue_max=0)))
    infer_at_once(endpoint, 8)

    eventually(lambda: endpoint.infer().status_code == 200)
