"""The gateway as a process: it keeps its routes, drains, and states why it does not start."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from infra.local.gateway import GRACE_S, GatewayServer, gateway_server
from infra.local.process import ServerFailed
from serving.errors import EndpointFailed
from serving.gateway.__main__ import main
from serving.gateway.client import GatewayClient
from serving.gateway.envoy.admin import EnvoyAdmin, EnvoyGone
from serving.gateway.envoy.bootstrap import BootstrapOptions
from serving.gateway.envoy.process import EnvoyProcess
from serving.gateway.metering import read_metering
from serving.gateway.route import Rollout, SavedEndpoint, SleepRule
from serving.gateway.supervisor import STOP_S_MAX
from tests.child_environment import block_packages
from tests.eventually import eventually
from tests.serving.gateway.support import ROW, EndpointClient, V2Server, read_metrics, route, wait_for_verdict

ADMIN_KEY = "the-key-of-the-administrator"


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
        assert [200] * 12 == ask(server, "churn", 12)
        eventually(lambda: 'overnight_requests_total{endpoint="churn",status="200"} 12.0' in read_metrics(server))
        stored = tmp_path / "routes/churn.json"
        before = eventually(
            lambda: admin.get("churn"),
            lambda state: state.trial == SavedEndpoint.model_validate_json(stored.read_bytes()).trial,
        )
        os.kill(server.process.pid, signal.SIGKILL)

    with gateway_server(tmp_path) as server, GatewayClient(server.url, server.admin_key) as admin:
        after = admin.get("churn")
        assert before is not None
        assert before == after
        assert admin.get("deleted") is None
        admin.put("keyed", route(v2.url, keys=("app",)))
        assert before.trial is not None
        assert 0 < before.trial.tally.requests < 15
        assert [200] * 60 == ask(server, "churn", 60)
        assert "requests failed" in wait_for_verdict(admin, "churn", timeout_s=20).reason

    log = read_metering(tmp_path).collect()
    assert 72 == len(log.filter(endpoint="churn", status=200))
    assert 0 == log["at"].null_count()


def test_sigterm_lets_requests_finish(tmp_path: Path, v2: V2Server) -> None:
    with gateway_server(tmp_path) as server, GatewayClient(server.url, server.admin_key) as admin:
        admin.put("churn", route(v2.url, ("slow", 1)))
        with ThreadPoolExecutor(4) as pool:
            pending = [pool.submit(ask, server, "churn", 1) for _ in range(4)]
            admin.wait_until("churn", lambda state: state.in_flight == {"slow": 4}, timeout_s=20)
            os.kill(server.process.pid, signal.SIGTERM)
            assert [[200]] * 4 == [request.result() for request in pending]
        eventually(lambda: not server.process.running)

        assert 0 == server.process.exit_code
    assert [200] * 4 == read_metering(tmp_path).collect()["status"].to_list()


def ask_until_refused(url: str) -> list[tuple[int, str | None]]:
    """Send one request after another until no server listens; return each status, and what is said of the connection.

    Raises httpx.TransportError where a request gets no answer.
    """
    answers = []
    with httpx.Client(timeout=60) as client:
        while True:
            try:
                answer = client.post(url, json=ROW)
            except httpx.ConnectError:
                return answers
            answers.append((answer.status_code, answer.headers.get("Connection")))


def test_a_gateway_that_stops_answers_clients_that_send_one_request_after_another(tmp_path: Path, v2: V2Server) -> None:
    seen = v2.seen("slow")
    with gateway_server(tmp_path) as server, GatewayClient(server.url, server.admin_key) as admin:
        admin.put("churn", route(v2.url, ("slow", 1)))
        with ThreadPoolExecutor(4) as pool:
            asking = [pool.submit(ask_until_refused, f"{server.url}/v2/models/churn/infer") for _ in range(4)]
            eventually(lambda: v2.seen("slow") >= seen + 12)
            server.stop()
            answers = [each.result() for each in asking]

    for each in answers:
        assert [(200, None)] * (len(each) - 1) + [(200, "close")] == each
    # The log has a line for each step of the end.
    assert 0 == server.process.exit_code, server.process.log_text()


def test_a_gateway_is_not_killed_while_its_supervisor_may_still_wait_for_requests() -> None:
    assert GRACE_S > STOP_S_MAX


def test_an_envoy_that_does_not_answer_at_first_is_asked_again_to_close_its_connections(tmp_path: Path) -> None:
    class BusyAdmin(EnvoyAdmin):
        asked = 0

        def drain_listeners(self) -> None:
            self.asked += 1
            if self.asked == 1:
                message = "timed out"
                raise EnvoyGone(message)

        def read_statistics(self, _pattern: str) -> dict[str, int]:
            return {}

    envoy = EnvoyProcess(BootstrapOptions(folder=tmp_path), threads=1)
    envoy.admin = admin = BusyAdmin(tmp_path / "admin.sock")
    # Any process that runs.
    envoy.pid = os.getpid()
    envoy.drain(60.0)

    assert 2 == admin.asked


def read_pid(server: GatewayServer, process: str, before: int = 0) -> int:
    """Return the process that runs, as soon as it is another than the one before."""
    return eventually(lambda: find_pid(server, process), lambda pid: pid not in {0, before})


def find_pid(server: GatewayServer, process: str) -> int:
    """Return what a process's file says, or zero: between its end and the next one's start there is no file."""
    try:
        return int((server.folder / f"{process}.pid").read_text())
    except FileNotFoundError:
        return 0


def kill_and_wait(server: GatewayServer, process: str) -> None:
    """Kill a process of the gateway, and return once the gateway has started the next."""
    before = read_pid(server, process)
    os.kill(before, signal.SIGKILL)
    read_pid(server, process, before)


@contextmanager
def steady_load(url: str) -> Generator[list[int]]:
    """Send requests without a pause, each again where its connection broke; the list holds the statuses."""
    statuses: list[int] = []
    over = threading.Event()

    def ask_steadily() -> None:
        with httpx.Client(timeout=60) as client:
            while not over.is_set():
                try:
                    statuses.append(client.post(url, json=ROW).status_code)
                except httpx.TransportError:
                    # It was with the process that was killed, or none listens for a moment.
                    time.sleep(0.05)

    with ThreadPoolExecutor(4) as workers:
        asking = [workers.submit(ask_steadily) for _ in range(4)]
        try:
            yield statuses
        finally:
            over.set()
    for each in asking:
        each.result()


def wait_for_more(statuses: list[int], count: int = 20) -> None:
    start = len(statuses)
    eventually(lambda: len(statuses) >= start + count)


def test_envoy_serves_on_while_the_control_plane_is_killed_and_started_again(tmp_path: Path, v2: V2Server) -> None:
    with gateway_server(tmp_path) as server, GatewayClient(server.url, server.admin_key) as admin:
        admin.put("churn", route(v2.url))
        with steady_load(f"{server.url}/v2/models/churn/infer") as statuses:
            wait_for_more(statuses)
            before = read_pid(server, "control_plane")
            os.kill(before, signal.SIGKILL)
            wait_for_more(statuses)
            read_pid(server, "control_plane", before)
            # The next control plane answers as soon as it is up.
            assert admin.get("churn") is not None
            admin.put("churn", route(v2.url, ("2", 1)))
            wait_for_more(statuses)

        assert {200} == {*statuses}


def test_a_request_that_waits_for_a_load_outlives_the_control_plane(tmp_path: Path, v2: V2Server) -> None:
    with gateway_server(tmp_path) as server, GatewayClient(server.url, server.admin_key) as admin:
        admin.put("sleepy", route(v2.url, model="dreamy", sleep=SleepRule(keep_warm_s=60)))
        with ThreadPoolExecutor(4) as pool:
            pending = [pool.submit(ask, server, "sleepy", 1) for _ in range(4)]
            eventually(lambda: v2.seen("dreamy load") == 1)
            os.kill(read_pid(server, "control_plane"), signal.SIGKILL)
            assert [[200]] * 4 == [request.result() for request in pending]


def test_a_killed_envoy_is_started_again_with_every_route(tmp_path: Path, v2: V2Server) -> None:
    with gateway_server(tmp_path) as server, GatewayClient(server.url, server.admin_key) as admin:
        admin.put("churn", route(v2.url, ("1", 1), ("2", 1)))
        with steady_load(f"{server.url}/v2/models/churn/infer") as statuses:
            for _ in range(3):
                wait_for_more(statuses)
                kill_and_wait(server, "envoy")
            wait_for_more(statuses)

        assert {200} == {*statuses}
        assert admin.get("churn") is not None


@contextmanager
def abandoned_gateway(folder: Path, port: int) -> Generator[subprocess.Popen[str]]:
    """Start a gateway without a guard, which would end the Envoy that it leaves."""
    command = (sys.executable, "-m", "serving.gateway", "--folder", str(folder), "--port", str(port))
    environment = {**os.environ, "OVERNIGHT_ADMIN_KEY": ADMIN_KEY}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            assert "The gateway answers" in process.stdout.readline()
            yield process
        finally:
            process.kill()


def test_the_next_gateway_adopts_the_envoy_that_a_killed_one_left(tmp_path: Path, v2: V2Server, held_port: int) -> None:
    url = f"http://127.0.0.1:{held_port}"
    with abandoned_gateway(tmp_path, held_port) as first, GatewayClient(url, ADMIN_KEY) as admin:
        admin.put("churn", route(v2.url))
        envoy = (tmp_path / "envoy.pid").read_text()
        with steady_load(f"{url}/v2/models/churn/infer") as statuses:
            wait_for_more(statuses)
            first.kill()
            wait_for_more(statuses)
            with gateway_server(tmp_path, {"OVERNIGHT_ADMIN_KEY": ADMIN_KEY}, port=held_port):
                assert envoy == (tmp_path / "envoy.pid").read_text()
                admin.put("churn", route(v2.url, ("2", 1)))
                wait_for_more(statuses)

    assert {200} == {*statuses}


def test_a_gateway_is_not_taken_for_ready_because_another_one_answers_at_its_port(tmp_path: Path) -> None:
    with gateway_server(tmp_path) as server, pytest.raises(ServerFailed, match="Only one gateway may use a folder"):
        gateway_server(tmp_path, {"OVERNIGHT_ADMIN_KEY": server.admin_key}, port=int(server.url.rpartition(":")[2]))


def test_an_envoy_that_was_told_to_end_is_not_adopted(tmp_path: Path, v2: V2Server, held_port: int) -> None:
    with abandoned_gateway(tmp_path, held_port) as first:
        envoy = (tmp_path / "envoy.pid").read_text()
        EnvoyAdmin(BootstrapOptions(folder=tmp_path).admin_socket).drain_listeners()
        first.kill()
        first.wait()
        with gateway_server(tmp_path, {"OVERNIGHT_ADMIN_KEY": ADMIN_KEY}, port=held_port) as server:
            assert envoy != (tmp_path / "envoy.pid").read_text()
            with GatewayClient(server.url, server.admin_key) as admin:
                admin.put("churn", route(v2.url))
            assert [200] == ask(server, "churn", 1)


def test_a_route_that_envoy_rejects_is_named_and_the_earlier_one_stays(
    gateway: GatewayServer, admin: GatewayClient, v2: V2Server
) -> None:
    admin.put("rejected", route(v2.url))
    # A name of a server has at most 255 characters in TLS.
    with pytest.raises(EndpointFailed, match=r"422.*Envoy must accept the configuration, but rejected it: .*255"):
        admin.put("rejected", route("https://" + "a" * 300))
    with pytest.raises(EndpointFailed, match="rejected it"):
        admin.put("rejected-too", route("https://" + "a" * 300))

    assert [200] == ask(gateway, "rejected", 1)
    state = admin.get("rejected")
    assert state is not None
    assert v2.url == state.route.versions[0].url
    admin.delete("rejected")
    assert admin.get("rejected") is None


def test_the_gateway_speaks_tls_with_a_certificate(tmp_path: Path, v2: V2Server) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subject = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    made = subprocess.run(
        ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, *subject),
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("openssl must make a certificate: apt-get install openssl")
    with gateway_server(tmp_path / "gateway", certificate=certificate, private_key=key) as server:
        trusted = ssl.create_default_context(cafile=certificate)
        with httpx.Client(verify=trusted) as client:
            assert 200 == client.get(f"{server.url}/v2/health/ready").status_code
        with pytest.raises(httpx.TransportError):
            httpx.get(server.url.replace("https", "http"))


def test_without_envoy_the_gateway_says_how_to_install_it(tmp_path: Path) -> None:
    environment = block_packages(tmp_path / "blocked", ["envoy"])
    done = subprocess.run(
        [sys.executable, "-m", "serving.gateway", "--folder", str(tmp_path / "gateway"), "--port", "0"],
        # A program of that name may be on the PATH.
        env={**environment, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert 1 == done.returncode
    assert "must have the program envoy" in done.stderr
    assert "pip install 'overnight[serve]'" in done.stderr


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
    eventually((routes / "unwritten.json").exists)
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


@pytest.mark.parametrize("package", ["aiohttp", "fastapi", "fastapi_offline", "prometheus_client", "uvicorn"])
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
