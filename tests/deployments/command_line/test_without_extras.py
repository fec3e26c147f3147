"""What works where the extras are not installed, and what names the extra that it lacks, in one message."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from infra.local.gateway import gateway_server
from infra.local.prefect_server import PrefectServer
from tests.child_environment import block_packages
from tests.support import write_customers

# Those of the extras but fastapi, uvicorn and prometheus_client, which Prefect brings and imports itself.
EXTRAS = (
    *("aiohttp", "fastapi_offline", "grpc", "httptools", "uvloop"),
    *("confluent_kafka", "nats"),
    *("deltalake", "duckdb", "pyiceberg", "openlineage", "prefect_ray", "ray", "torch"),
)
COMMAND = ("-m", "deployments.command_line")
INSTALL = "Run: pip install 'overnight[serve]'"

CALLS = """
import json, sys
import flows
from deployments.command_line import app
from deployments.mlflow_target import OvernightDeploymentClient, run_local
from typer.testing import CliRunner

model, network, customers, scores, plot, gateway = sys.argv[1:]
# Every flow and every type of a parameter is there, so that `overnight deploy` can deploy them all.
names = {name: getattr(flows, name) for name in flows.__all__}
options = flows.BatchOptions(key_columns=("customer",), batch_size=512, slots=1)
report = flows.batch_inference(model, customers, scores, options)
stated = flows.StatedFigures(batch_rows_per_second=1e5, start_seconds=10, cold_start_seconds=4, request_ms=2)
workload = flows.Workload(
    name="nightly",
    model=model,
    consumer=flows.Table(rows=5_000_000, ready="01:00"),
    machines=[flows.Machine(prices=flows.Prices(on_demand=0.1, spot=0.03))],
)
decision = flows.choose_mode(
    workload, profile_options=flows.ProfileOptions(batch_options=options, stated_figures=stated), plot_file=plot
)


def refusal(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


spec = flows.EndpointSpec(name="churn", model=model, gateway=gateway, target=flows.Triton(repository="/nowhere"))
stated = flows.StatedFigures(batch_rows_per_second=1e5, start_seconds=10)
on_triton = flows.ProfileOptions(batch_options=options, target=spec.target, stated_figures=stated)
target = spec.target.model_dump(mode="json")
client = OvernightDeploymentClient("overnight")
told = CliRunner().invoke(app, ["--help"])
given = ("endpoint", "--name", "churn", "--model", model, "--target", json.dumps(target))
refused = CliRunner().invoke(app, [*given, "--gateway", gateway])
refusals = {
    "online_endpoint": refusal(lambda: flows.online_endpoint(spec)),
    "retire_endpoint": refusal(lambda: flows.retire_endpoint("churn", spec.target, gateway)),
    "measured on Triton": refusal(lambda: flows.choose_mode(workload, profile_options=on_triton, plot_file=plot)),
    "mlflow create": refusal(lambda: client.create_deployment("churn", model, config={"target": target})),
    "mlflow run-local": refusal(lambda: run_local("churn", model)),
    "batch_inference": refusal(lambda: flows.batch_inference(network, customers, scores + "-network", options)),
    "stream_inference": refusal(
        lambda: flows.stream_inference(
            model,
            flows.FromNats(stream="EVENTS", consumer="scorer"),
            flows.ToNats(subject="scores"),
            flows.StreamOptions(key_columns=("customer",)),
        )
    ),
}
commands = {"help": told.exit_code, "endpoint": [refused.exit_code, refused.stdout, refused.stderr.splitlines()[-1]]}
print(json.dumps({"rows": report.rows, "mode": decision.chosen.mode, "refusals": refusals, "commands": commands}))
"""


@pytest.fixture(scope="module")
def without_extras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of processes that have the core alone."""
    return block_packages(tmp_path_factory.mktemp("core"), EXTRAS)


def run(environment: Mapping[str, str], arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=dict(environment), capture_output=True, text=True, timeout=240, check=False
    )


@pytest.mark.machines
def test_batch_runs_and_decisions_need_no_extra_and_each_flow_that_does_names_it(
    server: PrefectServer, doubling: str, linear: str, without_extras: dict[str, str], tmp_path: Path
) -> None:
    customers = write_customers(tmp_path / "customers", rows=2000, files=1, rows_per_group=1000)
    with gateway_server(tmp_path / "gateway") as gateway:
        environment = {**without_extras, "OVERNIGHT_ADMIN_KEY": gateway.admin_key, "OVERNIGHT_GATEWAY": gateway.url}
        arguments = ("-c", CALLS, doubling, linear, str(customers), str(tmp_path / "scores"), str(tmp_path / "a.png"))
        done = run(environment, [*arguments, gateway.url])

    assert 0 == done.returncode, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (2000, "batch") == (found["rows"], found["mode"])
    no_grpc = f"This call must find the package grpc, got none. {INSTALL}"
    assert {
        "online_endpoint": f"BadInput: {no_grpc}",
        "retire_endpoint": f"BadInput: {no_grpc}",
        "measured on Triton": f"BadInput: {no_grpc}",
        "mlflow create": f"MlflowException: {no_grpc}",
        "mlflow run-local": f"MlflowException: {no_grpc.replace('grpc', 'fastapi_offline')}",
        "batch_inference": "BadInput: This call must find the package torch, got none. "
        "Run: pip install 'overnight[torch]'",
        "stream_inference": "BadInput: This call must find the package nats, got none. "
        "Run: pip install 'overnight[stream]'",
    } == found["refusals"]
    assert {"help": 0, "endpoint": [1, "", no_grpc]} == found["commands"]


@pytest.mark.parametrize(
    ("arguments", "package"),
    [
        (("serving.gateway", "--folder", "gateway"), "fastapi_offline"),
        (("serving.targets.triton_autoscale", "--repository", "models"), "grpc"),
        (("deployments.webhooks", "--config", "webhooks.yaml"), "httptools"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else value,
)
def test_a_program_ends_with_the_extra_that_it_lacks(
    without_extras: dict[str, str], tmp_path: Path, arguments: tuple[str, ...], package: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        env=without_extras,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )

    assert (1, "") == (done.returncode, done.stdout)
    assert f"This call must find the package {package}, got none. {INSTALL}" == done.stderr.strip()
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("gateway", "fastapi_offline", "serve"), ("nats", "nats", "stream")]
)
def test_a_local_server_that_lacks_an_extra_names_it(
    without_extras: dict[str, str], tmp_path: Path, name: str, package: str, extra: str
) -> None:
    done = run(without_extras, [*COMMAND, "local", "up", name, "--folder", str(tmp_path / "kept")])

    assert (1, "") == (done.returncode, done.stdout)
    said = done.stderr.splitlines()[-1]
    assert f"must find the package {package}, got none" in said or "must find the package aiohttp" in said
    assert f"pip install 'overnight[{extra}]'" in said
    assert "Traceback" not in done.stderr
