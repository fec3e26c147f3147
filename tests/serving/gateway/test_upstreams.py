"""Model servers that die, restart, or answer with errors, and what a client sees of it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from serving.gateway.client import GatewayClient
from serving.gateway.route import Limits
from serving.gateway.upstreams import HttpClient, remove_addresses
from tests.eventually import eventually
from tests.serving.gateway.conftest import Put
from tests.serving.gateway.support import EndpointClient, V2Server, error, route, v2_server

CUT_OFF = 0


@contextmanager
def steady_load(endpoint: EndpointClient, threads: int = 4) -> Generator[list[tuple[int, str]]]:
    """Send requests without a pause; the list holds each answer's status, and its version or error.

    An answer that ends before it is whole has the status of CUT_OFF.
    """
    answers: list[tuple[int, str]] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            try:
                answer = endpoint.infer()
            except httpx.RemoteProtocolError as broken:
                answers.append((CUT_OFF, str(broken)))
                continue
            text = answer.headers.get("Overnight-Version") or error(answer)[1]
            answers.append((answer.status_code, text))

    with ThreadPoolExecutor(threads) as workers:
        asking = [workers.submit(ask) for _ in range(threads)]
        try:
            yield answers
        finally:
            done.set()
    for each in asking:
        each.result()


def wait_for_answer(answers: list[tuple[int, str]], expected: tuple[int, str]) -> None:
    start = len(answers)
    eventually(lambda: expected in answers[start:])


def test_a_killed_server_is_503_with_the_reason_until_it_is_restarted(put: Put, tmp_path: Path) -> None:
    server = v2_server(tmp_path)
    endpoint = put(route(server.url))
    try:
        with steady_load(endpoint) as answers:
            wait_for_answer(answers, (200, "1"))
            os.kill(server.process.pid, signal.SIGKILL)
            eventually(lambda: any(status == 503 for status, _ in answers))
            server.process.stop()
            assert {"name": endpoint.name, "ready": False} == endpoint.get("/ready").json()
            assert 503 == endpoint.get("/versions/1/ready").status_code
            server = v2_server(tmp_path, server.port)
            wait_for_answer(answers, (200, "1"))
    finally:
        server.process.stop()

    assert {200, 503} == {status for status, _ in answers} - {CUT_OFF}
    # What the killed server had begun to send is no longer another answer.
    assert [status for status, _ in answers].count(CUT_OFF) <= 4
    refused = [message for status, message in answers if status == 503]
    assert [] == [message for message in refused if "The model server of the endpoint must answer" not in message]
    assert not [message for message in refused if "127.0.0.1" in message or str(server.port) in message]


def test_connections_that_a_restart_closed_cost_no_request(put: Put, tmp_path: Path) -> None:
    server = v2_server(tmp_path)
    endpoint = put(route(server.url))
    try:
        with steady_load(endpoint, threads=8) as answers:
            wait_for_answer(answers, (200, "1"))
        server.process.stop()
        server = v2_server(tmp_path, server.port)

        assert [10] * 20 == [endpoint.score() for _ in range(20)]
    finally:
        server.process.stop()


@pytest.mark.parametrize(
    "text",
    [
        "cannot open /opt/models/churn/1/model.py: no such file",
        "http://triton.internal:8000/v2 refused",
        "connect to triton.prod.svc:8001 failed",
        "no answer of 10.0.3.7",
        "no answer of [fd00::12]:8000",
    ],
)
def test_addresses_and_paths_are_removed_from_a_servers_message(text: str) -> None:
    cleaned = remove_addresses(text)

    assert "(left out)" in cleaned
    for secret in ("/opt", "triton", "churn", "10.0", "fd00", "800"):
        assert secret not in cleaned


@pytest.mark.parametrize(
    "text",
    ["no row is good enough", "<html>Bad</html>", "x must be 1/2, got 3: at least 4 (5.5)", "model 'a:b' and/or c"],
)
def test_the_rest_of_a_servers_message_is_kept(text: str) -> None:
    assert text == remove_addresses(text)


@pytest.mark.parametrize(
    ("version", "status", "words"),
    [("broken", 500, "no row is good enough"), ("html", 502, "<html>Bad</html>")],
)
def test_every_error_of_a_server_becomes_json_with_its_reason(
    put: Put, v2: V2Server, version: str, status: int, words: str
) -> None:
    found, message = error(put(route(v2.url, (version, 1))).infer())

    assert status == found
    assert words in message


def test_a_server_without_the_model_is_503_not_404(put: Put, v2: V2Server) -> None:
    endpoint = put(route(f"{v2.url}/elsewhere"))
    status, message = error(endpoint.infer())

    assert 503 == status
    assert "must have the model, got 404" in message


def test_a_change_of_versions_loses_no_request_and_the_old_server_can_be_stopped(
    put: Put, v2: V2Server, tmp_path: Path, admin: GatewayClient
) -> None:
    old = v2_server(tmp_path)
    endpoint = put(route(old.url, ("slow", 1)))
    try:
        with steady_load(endpoint, threads=8) as answers:
            wait_for_answer(answers, (200, "slow"))
            admin.put(endpoint.name, route(v2.url, ("2", 1)))
            admin.wait_until_idle(endpoint.name, "slow", timeout_s=20)
            old.process.stop()
            wait_for_answer(answers, (200, "2"))
    finally:
        old.process.stop()

    assert {(200, "slow"), (200, "2")} == {*answers}


def test_deleting_an_endpoint_waits_for_its_requests(put: Put, tmp_path: Path, admin: GatewayClient) -> None:
    server = v2_server(tmp_path)
    endpoint = put(route(server.url, ("slow", 1), limits=Limits(in_flight_max=2)))
    try:
        with ThreadPoolExecutor(4) as pool:
            pending = [pool.submit(endpoint.infer) for _ in range(4)]
            admin.wait_until(endpoint.name, lambda state: state.waiting == 2, timeout_s=20)
            admin.delete(endpoint.name)
            server.process.stop()
            statuses = [request.result().status_code for request in pending]
    finally:
        server.process.stop()

    assert [200] * 4 == statuses
    assert 404 == endpoint.infer().status_code


def test_endpoints_are_added_and_deleted_while_others_serve(put: Put, v2: V2Server, admin: GatewayClient) -> None:
    endpoint = put(route(v2.url))
    with steady_load(endpoint) as answers:
        for index in range(10):
            admin.put(f"guest-{index}", route(v2.url, ("2", 1)))
            guest = EndpointClient(f"guest-{index}", endpoint.url.split("/v2")[0])
            assert 16 == guest.score()
            guest.http.close()
            admin.delete(f"guest-{index}")
            admin.delete(f"guest-{index}")
            assert admin.get(f"guest-{index}") is None

    assert {(200, "1")} == {*answers}


async def is_healthy(url: str) -> bool:
    client = HttpClient()
    try:
        return await client.is_healthy(url, timeout_s=0.1)
    finally:
        await client.close()


def test_a_server_that_accepts_a_connection_and_never_answers_is_not_healthy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert not asyncio.run(asyncio.wait_for(is_healthy(f"http://127.0.0.1:{silent.getsockname()[1]}/ready"), 10))
