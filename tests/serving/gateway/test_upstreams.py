"""Servers that die, come back, or answer with something else; and how little of it a client sees."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from serving.gateway.client import GatewayClient
from serving.gateway.route import Limits
from serving.gateway.upstream import without_addresses
from tests.serving.gateway.conftest import Put
from tests.serving.gateway.support import Door, V2Server, error, route, v2_server


@contextmanager
def steady_load(door: Door, threads: int = 4) -> Generator[list[tuple[int, str]]]:
    """Ask without a pause; the list holds the status and the version, or the reason, of each answer."""
    answers: list[tuple[int, str]] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            answer = door.infer()
            told = answer.headers.get("Overnight-Version") or error(answer)[1]
            answers.append((answer.status_code, told))

    asking = [threading.Thread(target=ask) for _ in range(threads)]
    for each in asking:
        each.start()
    try:
        yield answers
    finally:
        done.set()
        for each in asking:
            each.join()


def wait_for(answers: list[tuple[int, str]], wanted: tuple[int, str]) -> None:
    after, deadline = len(answers), time.monotonic() + 20
    while wanted not in answers[after:]:
        assert time.monotonic() < deadline, answers[-3:]
        time.sleep(0.01)


def test_a_server_that_is_killed_is_503_with_the_reason_until_it_is_back(put: Put, tmp_path: Path) -> None:
    server = v2_server(tmp_path)
    door = put(route(server.url))
    try:
        with steady_load(door) as answers:
            wait_for(answers, (200, "1"))
            os.kill(server.process.pid, signal.SIGKILL)
            deadline = time.monotonic() + 20
            while not any(status == 503 for status, _ in answers):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            server.process.stop()
            assert {"name": door.name, "ready": False} == door.get("/ready").json()
            assert 503 == door.get("/versions/1/ready").status_code
            server = v2_server(tmp_path, server.port)
            wait_for(answers, (200, "1"))
    finally:
        server.process.stop()

    assert {200, 503} == {status for status, _ in answers}
    refused = [told for status, told in answers if status == 503]
    assert all("The model server of the endpoint must answer" in told for told in refused)
    assert not [told for told in refused if "127.0.0.1" in told or str(server.port) in told]


def test_connections_that_went_stale_with_a_restart_cost_no_request(put: Put, tmp_path: Path) -> None:
    server = v2_server(tmp_path)
    door = put(route(server.url))
    try:
        with steady_load(door, threads=8) as answers:
            wait_for(answers, (200, "1"))
        server.process.stop()
        server = v2_server(tmp_path, server.port)

        assert [10] * 20 == [door.score() for _ in range(20)]
    finally:
        server.process.stop()


@pytest.mark.parametrize(
    "said",
    [
        "cannot open /opt/models/churn/1/model.py: no such file",
        "http://triton.internal:8000/v2 refused",
        "connect to triton.prod.svc:8001 failed",
        "no answer of 10.0.3.7",
        "no answer of [fd00::12]:8000",
    ],
)
def test_addresses_and_paths_in_what_a_server_said_are_left_out(said: str) -> None:
    told = without_addresses(said)

    assert "(left out)" in told
    for secret in ("/opt", "triton", "churn", "10.0", "fd00", "800"):
        assert secret not in told


@pytest.mark.parametrize(
    "said",
    ["no row is good enough", "<html>Bad</html>", "x must be 1/2, got 3: at least 4 (5.5)", "model 'a:b' and/or c"],
)
def test_what_is_no_address_stays(said: str) -> None:
    assert said == without_addresses(said)


@pytest.mark.parametrize(
    ("version", "status", "words"),
    [("broken", 500, "no row is good enough"), ("html", 502, "<html>Bad</html>")],
)
def test_whatever_a_server_says_the_client_gets_an_error_it_can_read(
    put: Put, v2: V2Server, version: str, status: int, words: str
) -> None:
    got, told = error(put(route(v2.url, (version, 1))).infer())

    assert status == got
    assert words in told


def test_a_server_that_has_not_the_model_is_503_not_404(put: Put, v2: V2Server) -> None:
    door = put(route(f"{v2.url}/elsewhere"))
    status, told = error(door.infer())

    assert 503 == status
    assert "must be served there, got 404" in told


def test_a_switch_of_versions_loses_no_request_and_the_old_server_can_go(
    put: Put, v2: V2Server, tmp_path: Path, admin: GatewayClient
) -> None:
    old = v2_server(tmp_path)
    door = put(route(old.url, ("slow", 1)))
    try:
        with steady_load(door, threads=8) as answers:
            wait_for(answers, (200, "slow"))
            admin.put(door.name, route(v2.url, ("2", 1)))
            admin.wait_until_idle(door.name, "slow", timeout_s=20)
            old.process.stop()
            wait_for(answers, (200, "2"))
    finally:
        old.process.stop()

    assert {(200, "slow"), (200, "2")} == {*answers}


def test_an_endpoint_that_is_taken_out_has_its_requests_answered_by_then(
    put: Put, tmp_path: Path, admin: GatewayClient
) -> None:
    server = v2_server(tmp_path)
    door = put(route(server.url, ("slow", 1), limits=Limits(in_flight_max=2)))
    try:
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(door.infer) for _ in range(4)]
            admin.wait(door.name, lambda state: state.waiting == 2, timeout_s=20)
            admin.delete(door.name)
            server.process.stop()
            statuses = [each.result().status_code for each in asked]
    finally:
        server.process.stop()

    assert [200] * 4 == statuses
    assert 404 == door.infer().status_code


def test_endpoints_come_and_go_while_others_serve(put: Put, v2: V2Server, admin: GatewayClient) -> None:
    door = put(route(v2.url))
    with steady_load(door) as answers:
        for at in range(10):
            admin.put(f"guest-{at}", route(v2.url, ("2", 1)))
            guest = Door(f"guest-{at}", door.url.split("/v2")[0])
            assert 16 == guest.score()
            guest.http.close()
            admin.delete(f"guest-{at}")
            admin.delete(f"guest-{at}")
            assert admin.get(f"guest-{at}") is None

    assert {(200, "1")} == {*answers}
