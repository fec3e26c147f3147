"""Several servers as one: started side by side, and none is left where one does not start."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from infra.local import stack
from infra.local.prefect_server import restore_template, template_path
from infra.local.process import ServerFailed
from infra.local.stack import local_stack, render_exports, write_exports

pytestmark = pytest.mark.servers


def test_servers_start_side_by_side_and_stop_together(tmp_path: Path) -> None:
    told: list[str] = []
    with local_stack(tmp_path, ["s3", "gateway"], told.append) as started:
        url = started["gateway"].exports["OVERNIGHT_GATEWAY"]
        assert 401 == httpx.get(f"{url}/admin/endpoints").status_code
        assert 403 == httpx.get(started["s3"].credentials["AWS_ENDPOINT_URL"]).status_code

    assert ["s3", "gateway"] == list(started)
    assert 2 == len(told)
    assert {} == started["s3"].exports
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_a_server_that_does_not_start_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls: list[str] = []

    def fail(folder: Path) -> stack.StartedServer:
        message = "it does not"
        raise ServerFailed(message, exit_code=1, log="", log_path=folder)

    def start(folder: Path) -> stack.StartedServer:
        started = stack.SERVERS["gateway"](folder)
        urls.append(started.exports["OVERNIGHT_GATEWAY"])
        return started

    servers = {**stack.SERVERS, "failing": fail, "starting": start}
    monkeypatch.setattr(stack, "SERVERS", servers)
    with pytest.raises(ServerFailed, match="it does not"), local_stack(tmp_path, ["failing", "starting"], urls.append):
        pytest.fail("a stack must start as a whole")
    with pytest.raises(httpx.ConnectError):
        httpx.get(urls[0])


@pytest.mark.parametrize("skip", ["skip", ""])
def test_a_program_that_is_missing_is_passed_over_where_that_is_asked_for(
    skip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_folder: Path) -> stack.StartedServer:
        message = "install it"
        raise FileNotFoundError(message)

    monkeypatch.setattr(stack, "SERVERS", {"missing": fail})
    told: list[str] = []
    if skip:
        with local_stack(tmp_path, ["missing"], told.append, skip_missing=True) as started:
            assert {} == started
        assert told[0].startswith("missing is left out: install it")
    else:
        with pytest.raises(FileNotFoundError, match="install it"), local_stack(tmp_path, ["missing"], told.append):
            pytest.fail("it is missing")


def test_exports_survive_a_shell_and_are_for_their_owner_alone(tmp_path: Path) -> None:
    path = write_exports(tmp_path / "env.sh", {"A": 'a "b" $c', "B": "{}"})

    assert ['A=a "b" $c', "B={}"] == [shlex.split(line)[1] for line in path.read_text().splitlines()]
    assert 0o600 == path.stat().st_mode & 0o777
    assert "" == render_exports({})


@pytest.mark.machines
def test_an_mlflow_server_keeps_models_across_a_restart(tmp_path: Path) -> None:
    from infra.local.mlflow_server import mlflow_server

    for count in (0, 1):
        with mlflow_server(tmp_path) as server:
            made = httpx.post(f"{server.url}/api/2.0/mlflow/registered-models/create", json={"name": f"m{count}"})
            found = httpx.get(f"{server.url}/api/2.0/mlflow/registered-models/search").json()

        assert 200 == made.status_code
        assert [f"m{at}" for at in range(count + 1)] == sorted(each["name"] for each in found["registered_models"])


def test_prefect_answers_only_whoever_has_the_exports_and_runs_flows_for_them(
    prefect_templates: Path, tmp_path: Path
) -> None:
    (tmp_path / "stack/prefect").mkdir(parents=True)
    restore_template(template_path(prefect_templates), tmp_path / "stack/prefect")
    flow = "from prefect import flow\n@flow\ndef double(x: int) -> int:\n    return 2 * x\nassert double(21) == 42\n"
    (tmp_path / "double.py").write_text(flow)
    told: list[str] = []
    with local_stack(tmp_path / "stack", ["prefect"], told.append) as started:
        exports = started["prefect"].exports
        auth = exports["PREFECT_API_AUTH_STRING"]
        call = {"url": f"{exports['PREFECT_API_URL']}/flow_runs/filter", "json": {}}
        refused = [httpx.post(**call).status_code, httpx.post(**call, auth=("overnight", "guess")).status_code]
        done = subprocess.run(
            [sys.executable, "double.py"],
            cwd=tmp_path,
            env={**os.environ, **exports},
            capture_output=True,
            text=True,
            check=False,
        )
        user, password = auth.split(":")
        found = httpx.post(**call, auth=(user, password)).json()

    assert 0 == done.returncode, done.stderr
    assert [401, 401] == refused
    assert ["COMPLETED"] == [run["state_type"] for run in found]
    assert len(password) >= 32
    assert auth not in " ".join(told) + repr(started["prefect"]) + done.stdout + done.stderr
