"""The gateway as a process: it keeps its routes, drains, and states why it does not start."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from infra.local.gateway import GatewayServer, gateway_server
from serving.errors import EndpointFailed
from serving.gateway.__main__ import main
from serving.gateway.client import GatewayClient
from serving.gateway.metering import read_metering
from serving.gateway.route import Rollout
from tests.blocked import block_packages
from tests.serving.gateway.support import EndpointClient, V2Server, route, wait_for, wait_for_verdict


def ask(server: GatewayServer, name: str, requests: int) -> list[int]:
    endpoint = EndpointClient(name, server.url)
    try:
        return [endpoint.infer().status_code for _ in range(requests)]
    finally:
        endpoint.http.close()


def test_a_killed_and_restarted_gateway_has_its_routes_keys_and_canaries(tmp_path: Path, v2: V2Server) -> None:
    rule = Rollout(version="2", requests_min=15, error_rate_max=0.2)
    with gateway_server(tmp_path) as server, GatewayClient(server.url, server.admin_key) as admin:
        admin.put("churn", route(v2.url, ("1", 50), ("2", 50), rollout=rule))
        admin.put("deleted", route(v2.url))
        admin.delete("deleted")
        admin.put_key("app", "a-key-that-outlives-it")
        assert [200] * 20 == ask(server, "churn", 20)
        # The gateway writes tallies every second.
        time.sleep(1.5)
        before = admin.get("churn")
        os.kill(server.process.pid, signal.SIGKILL)

    with gateway_server(tmp_path) as server, GatewayClient(server.url, server.admin_key) as admin:
        after = admin.get("churn")
        assert before is not None
        assert before == after
        assert admin.get("deleted") is None
        admin.put("keyed", route(v2.url, keys=("app",)))
        assert before.trial is not None
        assert 10 == before.trial.tally.requests
        assert [200] * 20 == ask(server, "churn", 20)
        assert "0 of 15 requests failed" == wait_for_verdict(admin, "churn", timeout_s=20).reason

    log = read_metering(tmp_path).collect()
    assert 40 == len(log.filter(endpoint="churn", status=200))
    assert 0 == log["at"].null_count()


def test_sigterm_lets_requests_finish(tmp_path: Path, v2: V2Server) -> None:
    with gateway_server(tmp_path) as server, GatewayClient(server.url, server.admin_key) as admin:
        admin.put("churn", route(v2.url, ("slow", 1)))
        with ThreadPoolExecutor(4) as pool:
            pending = [pool.submit(ask, server, "churn", 1) for _ in range(4)]
            admin.wait_until("churn", lambda state: state.in_flight == {"slow": 4}, timeout_s=20)
            os.kill(server.process.pid, signal.SIGTERM)
            assert [[200]] * 4 == [request.result() for request in pending]
        wait_for(lambda: not server.process.running)

        assert 0 == server.process.exit_code
    assert [200] * 4 == read_metering(tmp_path).collect()["status"].to_list()


def run_refused(folder: Path, port: int) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["--folder", str(folder), "--port", str(port)])
    return str(caught.value)


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        assert run_refused(tmp_path, port).startswith(
            f"The gateway must be able to listen on 127.0.0.1:{port}, got: Address already in use."
        )


def test_a_folder_of_another_gateway_is_named(gateway: GatewayServer) -> None:
    assert run_refused(gateway.folder, 0).startswith("Only one gateway may use a folder, got a second for")


def test_a_path_that_cannot_be_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    assert "Not a directory" in run_refused(tmp_path / "file" / "gateway", 0)
    assert "pass another --folder" in run_refused(tmp_path / "file" / "gateway", 0)


def test_a_route_that_cannot_be_written_is_503_and_written_as_soon_as_possible(
    gateway: GatewayServer, admin: GatewayClient, v2: V2Server
) -> None:
    routes, aside = gateway.folder / "routes", gateway.folder / "aside"
    routes.rename(aside)
    try:
        with pytest.raises(
            EndpointFailed, match=r"503.*must be able to write its files, got: .*No such file.* then send"
        ):
            admin.put("unwritten", route(v2.url))
    finally:
        aside.rename(routes)
    wait_for((routes / "unwritten.json").exists)
    routes.rename(aside)
    try:
        with pytest.raises(EndpointFailed, match="must be able to write"):
            admin.delete("unwritten")
        assert admin.get("unwritten") is not None
    finally:
        aside.rename(routes)
    admin.delete("unwritten")

    assert not (routes / "unwritten.json").exists()


def test_invalid_keys_of_the_environment_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERNIGHT_API_KEYS", "app=0123456789abcdef")

    assert run_refused(tmp_path, 0).startswith("OVERNIGHT_API_KEYS must be NAME:KEY pairs")


def test_a_client_without_a_gateway_states_its_address() -> None:
    with GatewayClient("http://127.0.0.1:9", "any") as admin, pytest.raises(EndpointFailed, match="must answer at"):
        admin.get("churn")


def test_starting_the_gateway_imports_neither_mlflow_nor_torch() -> None:
    code = "import sys, serving.gateway.app; print({'mlflow', 'torch', 'polars', 'prefect'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "set()" == done.stdout.strip()


def test_the_api_pages_load_nothing_from_other_servers(gateway: GatewayServer) -> None:
    browser = httpx.Client(auth=("any", gateway.admin_key))
    page = browser.get(f"{gateway.url}/docs").text
    scripts = [part.split('"')[0] for part in page.replace('href="', 'src="').split('src="')[1:]]

    assert scripts
    assert {200} == {browser.get(f"{gateway.url}{path}").status_code for path in scripts}
    browser.close()


@pytest.mark.parametrize(
    "package", ["aiohttp", "fastapi", "fastapi_offline", "httptools", "prometheus_client", "uvicorn"]
)
def test_without_a_package_of_its_extra_the_gateway_names_it(tmp_path: Path, package: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "serving.gateway", "--folder", str(tmp_path / "gateway"), "--port", "0"],
        env=block_packages(tmp_path / "blocked", [package]),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    said = f"This call must find the package {package}, got none. Run: pip install 'overnight[serve]'"
    assert (1, said) == (done.returncode, done.stderr.strip())
    assert not (tmp_path / "gateway").exists()
