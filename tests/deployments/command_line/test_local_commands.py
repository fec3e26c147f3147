"""`overnight local up` as a real process: it prints what to export, and everything ends with it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.servers

COMMAND = [sys.executable, "-m", "deployments.command_line", "local", "up"]
PATIENCE_SECONDS = 180.0
OWN_KEYS = {"AWS_ACCESS_KEY_ID": "mine", "AWS_SECRET_ACCESS_KEY": "my-secret"}


def start(*arguments: str) -> tuple[subprocess.Popen[str], list[str]]:
    """Start the command; return it with the lines that it prints once all servers answer."""
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **OWN_KEYS},
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if line.startswith("# In another shell"):
            break
    return process, lines


def exports_of(lines: list[str]) -> dict[str, str]:
    found = (shlex.split(line)[1].partition("=") for line in lines if line.startswith("export "))
    return {name: value for name, _, value in found}


def test_s3_and_the_gateway_start_and_end_with_ctrl_c_and_no_key_of_ones_own_is_replaced(tmp_path: Path) -> None:
    process, lines = start("s3", "gateway", "--folder", str(tmp_path / "kept"))
    exports, keys = exports_of(lines), exports_of((tmp_path / "kept/s3.sh").read_text().splitlines())
    try:
        answer = httpx.get(
            f"{exports['OVERNIGHT_GATEWAY']}/admin/endpoints",
            headers={"Authorization": f"Bearer {exports['OVERNIGHT_ADMIN_KEY']}"},
        )
        refused = httpx.get(keys["AWS_ENDPOINT_URL"])
    finally:
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=PATIENCE_SECONDS)

    assert (200, 403) == (answer.status_code, refused.status_code)
    assert [] == [name for name in exports if name.startswith("AWS_")]
    assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} < set(keys)
    assert 0o600 == (tmp_path / "kept/s3.sh").stat().st_mode & 0o777
    assert exports == exports_of((tmp_path / "kept/env.sh").read_text().splitlines())
    assert (0, True) == (process.returncode, stderr.endswith("Stopping them.\n"))
    for url in (exports["OVERNIGHT_GATEWAY"], keys["AWS_ENDPOINT_URL"]):
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)


def test_keys_of_s3_are_exported_where_that_is_asked_for_and_sigterm_ends_it() -> None:
    process, lines = start("s3", "--export-aws")
    exports = exports_of(lines)
    process.terminate()
    process.communicate(timeout=PATIENCE_SECONDS)

    assert 0 == process.returncode
    assert {"AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} < set(exports)
    assert "mine" != exports["AWS_ACCESS_KEY_ID"]


def test_a_server_whose_program_is_missing_ends_it_with_the_reason(tmp_path: Path) -> None:
    code = "import sys; sys.executable = '/nowhere/python'; from deployments.command_line import app; "
    code += "app(['local', 'up', 's3'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": "/nowhere"},
    )

    assert (1, "") == (done.returncode, done.stdout)
    assert "The `weed` program must be" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.machines
def test_all_servers_start_and_a_model_is_registered_and_scored_by_them(tmp_path: Path) -> None:
    process, lines = start("--folder", str(tmp_path / "kept"))
    exports = exports_of(lines)
    try:
        assert {"PREFECT_API_URL", "MLFLOW_TRACKING_URI", "OVERNIGHT_TARGET", "OVERNIGHT_GATEWAY"} < set(exports)
        assert httpx.get(f"{exports['PREFECT_API_URL']}/health").json() is True
        assert "OK" == httpx.get(f"{exports['MLFLOW_TRACKING_URI']}/health").text
        others = ("PREFECT_", "MLFLOW_EXPERIMENT")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(others)} | exports
        code = "from tests.support import register_script, write_customers; from pathlib import Path; "
        code += f"write_customers(Path({str(tmp_path / 'in')!r}), rows=1000, files=1, rows_per_group=500); "
        code += "print(register_script('churn', 'pass'))"
        made = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert 0 == made.returncode, made.stderr
        uri = made.stdout.splitlines()[-1]
        program = [sys.executable, "-m", "deployments.command_line"]
        for command in (
            ["score", uri, str(tmp_path / "in"), str(tmp_path / "out"), "-k", "customer", "--json"],
            ["verify", str(tmp_path / "out")],
        ):
            done = subprocess.run([*program, *command], env=environment, capture_output=True, text=True, check=False)
            assert 0 == done.returncode, done.stderr
            if command[0] == "score":
                assert 1000 == json.loads(done.stdout)["rows"]
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE_SECONDS)

    assert 0 == process.returncode
