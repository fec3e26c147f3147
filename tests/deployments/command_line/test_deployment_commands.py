"""Deploy and worker, against a real Prefect server."""

from __future__ import annotations

import asyncio
import configparser
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
import yaml
from prefect.client.orchestration import get_client
from typer.testing import CliRunner

from deployments.apply import deploy as deploy_all
from deployments.command_line import app
from deployments.command_line.deployment_commands import choose_name, make_absolute
from infra.local.prefect_server import PrefectServer
from infra.worker import parse_arguments
from tasks.batch.manifest import open_predictions
from tests.deployments.conftest import AUTOMATIONS
from tests.deployments.flow_runs import wait_for
from tests.servers import hold_port

CALL = ["deploy", "models:/churn@champion", "customers/", "s3://lake/scores/", "--key", "customer"]


@pytest.fixture(scope="module", autouse=True)
def own_automations(deployed: PrefectServer) -> Generator[None]:
    """Give the server the automations of the other tests again, which wait for less than those of a call.

    The store that calls name answers at once that it is not there.
    """
    with hold_port() as held, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{held.getsockname()[1]}")
        yield
    asyncio.run(deploy_all(automations=AUTOMATIONS))


def deploy(*arguments: str) -> dict[str, str]:
    """Deploy and return what was changed, by name."""
    result = CliRunner().invoke(app, [*CALL, *arguments, "--json"])
    assert 0 == result.exit_code, result.output
    found = json.loads(result.stdout)
    assert found["server"] == os.environ["PREFECT_API_URL"]
    return {each["name"]: each["what"] for each in found["changes"] if each["what"] != "unchanged"}


def test_a_call_is_deployed_with_its_schedule_and_twice_changes_nothing(
    deployed: PrefectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    schedule = ["--schedule", "0 1 * * *", "--timezone", "Europe/Berlin"]
    first, again = deploy(*schedule), deploy(*schedule)
    with get_client(sync_client=True) as client:
        made = client.read_deployment_by_name("batch-inference/churn")
        (schedule_made,) = made.schedules
        pattern = client.read_deployment_by_name("batch-inference/adhoc")

    assert "created" == first["batch-inference/churn"]
    assert {} == again
    assert {
        "model": "models:/churn@champion",
        "source": f"{tmp_path}/customers/",
        "destination": "s3://lake/scores/",
        "options": {"key_columns": ["customer"]},
    } == made.parameters
    assert ("0 1 * * *", "Europe/Berlin", True) == (
        *(schedule_made.schedule.cron, schedule_made.schedule.timezone, schedule_made.active),  # type: ignore[union-attr]
    )
    for field in ("tags", "job_variables", "pull_steps", "entrypoint", "enforce_parameter_schema", "work_pool_name"):
        assert getattr(pattern, field) == getattr(made, field)

    changed = deploy("--pool", "overnight-spot", "--options", '{"slots": 2}')
    with get_client(sync_client=True) as client:
        made = client.read_deployment_by_name("batch-inference/churn")

    assert {"batch-inference/churn": "changed: parameters, schedules, work_pool_name"} == changed
    assert ([], "overnight-spot") == (made.schedules, made.work_pool_name)
    assert {"key_columns": ["customer"], "slots": 2} == made.parameters["options"]


def test_what_was_paused_stays_paused_when_its_call_is_deployed_again(deployed: PrefectServer) -> None:
    call = ["--name", "paused", "--schedule", "0 1 * * *"]
    deploy(*call)
    with get_client(sync_client=True) as client:
        made = client.read_deployment_by_name("batch-inference/paused")
        (schedule,) = made.schedules
        client.update_deployment_schedule(made.id, schedule.id, active=False)
        client.pause_deployment(made.id)

    assert {} == deploy(*call)
    assert {"batch-inference/paused": "changed: parameters"} == deploy(*call, "--options", '{"slots": 2}')
    with get_client(sync_client=True) as client:
        again = client.read_deployment_by_name("batch-inference/paused")
    assert (True, [False], 2) == (
        again.paused,
        [each.active for each in again.schedules],
        again.parameters["options"]["slots"],
    )


def test_a_time_zone_without_a_schedule_is_refused() -> None:
    result = CliRunner().invoke(app, [*CALL, "--timezone", "Europe/Berlin"])

    assert (2, "") == (result.exit_code, result.stdout)
    assert "--timezone must go with --schedule, got 'Europe/Berlin' alone" in " ".join(
        result.stderr.replace("│", " ").split()
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--name", "a/b"], "must have none of % & / < >, got 'a/b'. Choose another --name."),
        (["--pool", "nowhere"], "The work pool 'nowhere' of deployment batch-inference/churn must exist"),
        (["--name", "nightly"], "must be none of those that `overnight deploy` creates alone, got 'nightly'"),
        (["--schedule", "every night"], "--schedule must be a time as cron, such as '0 1 * * *'"),
        (["--schedule", " "], "every night at one, got ' '."),
        (["--timezone", "Berlin", "--schedule", "0 1 * * *"], "--timezone must be a name such as Europe/Berlin, got "),
        (["--options", '{"name": "s3://key:secret@host/"}'], "name"),
    ],
)
def test_a_call_that_can_not_be_deployed_is_refused_with_its_reason(
    deployed: PrefectServer, arguments: list[str], said: str
) -> None:
    result = CliRunner().invoke(app, [*CALL, *arguments])

    assert (1, "") == (result.exit_code, result.stdout)
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_a_call_is_deployed_with_a_warning_of_what_this_machine_does_not_see(
    deployed: PrefectServer, linear: str, customers: Path, tmp_path: Path
) -> None:
    def read_warnings(*call: str) -> list[str]:
        result = CliRunner().invoke(app, ["deploy", *call, "--name", "unseen", "--json"])
        assert 0 == result.exit_code, result.output
        return list(json.loads(result.stdout)["warnings"])

    seen = read_warnings(linear, str(customers), str(tmp_path / "scores"))
    unseen = read_warnings("models:/nosuch@champion", f"{tmp_path}/nowhere", "s3://lake/scores/")
    told = CliRunner().invoke(app, ["deploy", "models:/nosuch/1", str(customers), str(tmp_path), "--name", "unseen"])

    assert [] == seen
    for words, warning in zip(["has no model 'nosuch'", "nowhere", "must answer"], unseen, strict=True):
        assert words in warning
    assert "Warning: This machine does not see the model models:/nosuch/1: " in told.stderr


def test_a_secret_in_a_call_is_refused(deployed: PrefectServer) -> None:
    call = ["deploy", "models:/churn/1", "https://me:hunter2secret@host/customers", "scores/"]
    result = CliRunner().invoke(app, call)

    assert 1 == result.exit_code
    assert "must hold no password" in result.stderr
    assert "hunter2secret" not in result.output


def test_without_arguments_everything_is_deployed(deployed: PrefectServer) -> None:
    result = CliRunner().invoke(app, ["deploy"])

    assert 0 == result.exit_code, result.output
    assert "batch-inference/nightly" in result.stdout
    assert "work pool   overnight-spot" in result.stdout


def test_no_server_is_an_error_that_says_how_to_get_one(tmp_path: Path) -> None:
    without = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    done = subprocess.run(
        [sys.executable, "-m", "deployments.command_line", *CALL],
        env={**without, "PREFECT_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (1, "") == (done.returncode, done.stdout)
    assert "PREFECT_API_URL must name the Prefect server" in done.stderr
    assert "overnight local up" in done.stderr


@pytest.mark.machines
def test_a_deployed_call_is_scored_by_a_worker_of_the_command_line(
    deployed: PrefectServer, doubling: str, customers: Path, tmp_path: Path
) -> None:
    call = ["deploy", doubling, str(customers), str(tmp_path / "scores"), "-k", "customer", "--name", "by-worker"]
    result = CliRunner().invoke(app, [*call, "--options", '{"experiment": null}'])
    assert 0 == result.exit_code, result.output
    assert "overnight worker --pool overnight" in result.stderr
    command = [sys.executable, "-m", "deployments.command_line", "worker", "--name", "of-the-command-line"]
    environment = {**os.environ, "PREFECT_WORKER_QUERY_SECONDS": "2", "MLFLOW_DISABLE_TELEMETRY": "true"}
    log = tmp_path / "worker.log"
    with (
        log.open("w") as stream,
        subprocess.Popen(command, stdout=stream, stderr=stream, env=environment, cwd=tmp_path) as worker,
    ):
        try:
            with get_client(sync_client=True) as client:
                made = client.read_deployment_by_name("batch-inference/by-worker")
                run = client.create_flow_run_from_deployment(made.id)
            wait_for(run.id, "Completed", "Failed", "Crashed")
        finally:
            worker.send_signal(signal.SIGTERM)
            worker.wait(60)

    assert list(range(10_000)) == sorted(open_predictions(str(tmp_path / "scores")).collect()["customer"]), (
        log.read_text()
    )
    assert 0 == worker.returncode
    assert "Ending: " in log.read_text()


def test_a_worker_of_a_pool_that_is_not_there_says_so(deployed: PrefectServer) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "deployments.command_line", "worker", "--pool", "nowhere"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert 1 == result.returncode
    assert "The work pool 'nowhere' must exist" in result.stderr
    assert len(result.stderr.splitlines()) <= 12


def test_packaged_files_are_printed() -> None:
    content = yaml.safe_load(CliRunner().invoke(app, ["deploy", "--show", "prefect.yaml"]).stdout)
    template = json.loads(CliRunner().invoke(app, ["deploy", "--show", "work-pool.json"]).stdout)
    unit = configparser.ConfigParser(interpolation=None)
    unit.read_string(CliRunner().invoke(app, ["worker", "--systemd"]).stdout)
    program, *arguments = shlex.split(unit["Service"]["ExecStart"].replace("%i", "overnight").replace("%H", "host"))

    assert 13 == len(content["deployments"])
    assert "job_configuration" in template
    assert (sys.executable, ["-m", "infra.worker"]) == (program, arguments[:2])
    assert "overnight" == parse_arguments(arguments[2:]).pool


def test_the_name_of_a_call_is_that_of_its_model() -> None:
    given = ["models:/churn@champion", "models:/churn/3", "churn@champion", "churn"]

    assert ["churn"] * 4 == [choose_name(model) for model in given]


def test_local_paths_are_made_absolute_and_addresses_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert f"{tmp_path}/in/*.parquet" == make_absolute("in/*.parquet")
    assert f"{tmp_path}/in/" == make_absolute("in/")
    assert str(Path.home() / "in") == make_absolute("~/in")
    assert ["s3://lake/in/", "gs://lake/in", "file:///in", "/in"] == [
        make_absolute(each) for each in ("s3://lake/in/", "gs://lake/in", "file:///in", "/in")
    ]
