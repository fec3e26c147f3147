"""The real Triton on loopback: started, watched, started again, and what is missing told."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import sys
from collections.abc import Generator
from pathlib import Path

import httpx
import pytest

from infra.local import triton
from infra.local.process import ServerFailed
from infra.local.triton import TritonServer, triton_server
from infra.worker import list_process_tree
from tests.eventually import eventually

_CONFIG = """
name: "{name}"
backend: "python"
max_batch_size: 8
input {{ name: "x" data_type: TYPE_STRING dims: [1] }}
output {{ name: "y" data_type: TYPE_STRING dims: [1] }}
instance_group {{ count: 1 kind: KIND_CPU }}
"""
_MODEL = """
import sys

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        given = [pb_utils.get_input_tensor_by_name(request, "x") for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", each.as_numpy())]) for each in given]
"""


@pytest.fixture(autouse=True, scope="module")
def _the_wheel() -> None:
    if importlib.util.find_spec("pytriton") is None:
        pytest.skip("pip install --no-deps --require-hashes -r infra/local/wheels.txt brings the server")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[TritonServer]:
    folder = tmp_path_factory.mktemp("triton")
    write_model(folder / "repository", "mirror")
    with triton_server(folder / "repository", folder / "server") as server:
        yield server


def write_model(repository: Path, name: str, code: str = _MODEL) -> None:
    (repository / name / "1").mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text(_CONFIG.format(name=name))
    (repository / name / "1/model.py").write_text(code)


def load(server: TritonServer, name: str) -> httpx.Response:
    return httpx.post(f"{server.url}/v2/repository/models/{name}/load", json={}, timeout=60)


def mirrored(server: TritonServer, *texts: str) -> httpx.Response:
    given = {"name": "x", "datatype": "BYTES", "shape": [len(texts), 1], "data": texts}
    return httpx.post(f"{server.url}/v2/models/mirror/infer", json={"inputs": [given]}, timeout=60)


def test_text_passes_a_model_both_ways_under_this_numpy(server: TritonServer) -> None:
    assert 200 == load(server, "mirror").status_code
    answer = mirrored(server, "a", "", "höher", "b\0")

    assert 200 == answer.status_code, answer.text
    assert ["a", "", "höher", "b\0"] == answer.json()["outputs"][0]["data"]


def test_a_model_runs_in_the_environment_of_the_caller(server: TritonServer) -> None:
    write_model(server.repository, "curious", f"{_MODEL}\nprint('PREFIX', sys.prefix, flush=True)\nimport pydantic")

    assert 200 == load(server, "curious").status_code
    assert f"PREFIX {sys.prefix}" in server.process.log_text()


def test_the_reason_why_a_model_does_not_load_is_tritons_answer(server: TritonServer) -> None:
    write_model(server.repository, "broken", "raise RuntimeError('because of this')")
    answer = load(server, "broken")

    assert 400 == answer.status_code
    assert "because of this" in answer.json()["error"]


def test_metrics_have_their_own_address(server: TritonServer) -> None:
    assert "nv_inference_pending_request_count" in httpx.get(server.metrics_url).text


def test_it_listens_on_loopback_alone(server: TritonServer) -> None:
    listening = [line.split()[1:4] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ports = {f"{int(url.rpartition(':')[2].split('/')[0]):04X}" for url in (server.url, server.metrics_url)}
    found = {local for local, _, state in listening if state == "0A" and local.split(":")[1] in ports}

    assert {f"0100007F:{port}" for port in ports} == found


def test_a_server_that_is_killed_is_noticed_leaves_nothing_and_starts_again_where_it_was(server: TritonServer) -> None:
    load(server, "mirror")
    before = list_process_tree(server.process.pid)
    shared = shared_memory(server)
    os.kill(server.process.pid, signal.SIGKILL)
    eventually(lambda: not server.running)

    assert 128 + signal.SIGKILL == server.process.exit_code
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url)
    with server.restart() as again:
        assert (again.url, again.metrics_url, True) == (server.url, server.metrics_url, again.running)
        assert 200 == load(again, "mirror").status_code
        assert 200 == mirrored(again, "a").status_code
        assert shared
        assert not any(path.exists() for path in shared)
        assert [] == [pid for pid in before if runs(pid)]
        shared = shared_memory(again)
    assert shared
    assert not any(path.exists() for path in shared)


def runs(pid: int) -> bool:
    """Whether a process is there, and not one that only waits for its parent to ask how it ended."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def shared_memory(server: TritonServer) -> list[Path]:
    """Return what the server and its models share memory by."""
    arguments = Path(f"/proc/{server.process.pid}/cmdline").read_text().split("\0")
    (identity,) = (each.removeprefix("--id=") for each in arguments if each.startswith("--id="))
    return list(triton._SHARED_MEMORY.glob(f"{identity}*"))


def test_a_port_in_use_is_an_error_that_names_it(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        with pytest.raises(ServerFailed, match=f"Port {port} of 127.0.0.1 must be free for Triton.*in use"):
            triton_server(tmp_path / "repository", tmp_path / "server", port=port)


def test_a_missing_wheel_is_an_error_that_states_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "_PACKAGE", "no_such_package")

    with pytest.raises(
        FileNotFoundError, match=r"pip install --no-deps --require-hashes -r /.*/infra/local/wheels\.txt`"
    ):
        triton_server(tmp_path / "repository", tmp_path / "server")


def test_a_python_that_triton_has_no_stub_for_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_PYTHON", "3.99")

    with pytest.raises(FileNotFoundError, match=r"stub for Python 3.99, found those for \["):
        triton_server(tmp_path / "repository", tmp_path / "server")
