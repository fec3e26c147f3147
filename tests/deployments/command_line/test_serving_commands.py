"""Commands about models and endpoints: what they hand to the flows, and what they print."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from deployments.command_line import app
from infra.local.gateway import gateway_server
from infra.local.prefect_server import PrefectServer
from infra.local.triton import triton_server
from serving.errors import BadInput
from serving.model.interface import Engine, TuningLimits
from serving.model.tuner import Tuning, tuning_tag
from tasks.endpoint.spec import Canary, EndpointSpec
from tests.support import register_script

WORKLOAD = """
name: churn
model: {model}
consumer: {{kind: requests, latency_ms: 50}}
arrivals: {{kind: rate, per_second: 5}}
horizon_days: 1
machines: [{{kind: here, speed: 1, prices: {{on_demand: 0.1, spot: 0.04}}}}]
"""


def test_a_model_that_loads_is_shown_with_inputs_outputs_and_packages(linear: str) -> None:
    table = CliRunner().invoke(app, ["model", "check", linear])
    found = json.loads(CliRunner().invoke(app, ["model", "check", linear, "--json"]).stdout)

    assert 0 == table.exit_code, table.output
    for text in ("loads here", "yes", "a (float32), b (float32), c (float32)", "score (float32)", "pytorch"):
        assert text in table.stdout
    assert (linear, True, []) == (found["model"], found["loads"], found["problems"])


def test_a_model_that_does_not_load_ends_with_one_and_the_reason(registry: Path) -> None:
    from tests.serving.model.test_model_check import register_pickled

    uri = register_pickled("pickled-for-the-command-line")
    refused = CliRunner().invoke(app, ["model", "check", uri])
    allowed = CliRunner().invoke(app, ["model", "check", uri, "--allow-pickle"])

    assert (1, 0) == (refused.exit_code, allowed.exit_code), refused.output + allowed.output
    assert "must not need unpickling" in refused.stdout
    assert ".pkl" in allowed.stdout


def test_the_flags_of_a_canary_are_its_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[EndpointSpec] = []

    def refuse(spec: EndpointSpec) -> None:
        asked.append(spec)
        message = "enough is known"
        raise BadInput(message)

    monkeypatch.setattr("flows.endpoint.online_endpoint", refuse)
    common = ["endpoint", "--name", "churn", "--model", "models:/churn/4", "--canary", "10"]
    for flags in ([], ["--canary-requests", "5", "--canary-seconds", "60", "--no-wait"]):
        CliRunner().invoke(app, [*common, *flags])

    given = Canary(percent=10, requests_min=5, seconds_max=60, wait=False)
    assert [Canary(percent=10), given] == [each.rollout for each in asked]


def test_kept_tunings_are_shown_and_dropped(registry: Path) -> None:
    from mlflow import MlflowClient

    from tests.support import register_network

    uri = register_network("tuned-for-the-command-line", seed=0)
    tuning = Tuning(
        machine="a machine of 2 cores",
        limits=TuningLimits(),
        engine=Engine(),
        batch_size=64,
        slots=2,
        rows_per_second=29.0,
        trials=(),
    )
    name, version = uri.removeprefix("models:/").split("/")
    tag = tuning_tag(tuning.machine, tuning.limits)
    MlflowClient().set_model_version_tag(name, version, tag, tuning.model_dump_json())
    MlflowClient().set_model_version_tag(name, version, "theirs", "stays")
    shown, dropped, after = (
        CliRunner().invoke(app, ["model", "tuning", uri, *flags]) for flags in ([], ["--drop"], ["--json"])
    )

    assert (0, 0, 0) == (shown.exit_code, dropped.exit_code, after.exit_code), shown.output + dropped.output
    for text in ("a machine of 2 cores", "64", "29"):
        assert text in shown.stdout
    assert "keeps no tuning any more: 1 were dropped" in dropped.stdout
    assert [] == json.loads(after.stdout)["tunings"]
    assert {"theirs": "stays"} == MlflowClient().get_model_version(name, version).tags


@pytest.mark.machines
def test_an_endpoint_is_put_online_asked_and_retired(
    server: PrefectServer, linear: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        triton_server(tmp_path / "models", tmp_path / "triton") as triton,
        gateway_server(tmp_path / "gateway") as gateway,
    ):
        target = {"kind": "triton", "repository": str(triton.repository), "url": triton.url, "grpc": triton.grpc}
        monkeypatch.setenv("OVERNIGHT_TARGET", json.dumps(target))
        monkeypatch.setenv("OVERNIGHT_GATEWAY", gateway.url)
        monkeypatch.setenv("OVERNIGHT_ADMIN_KEY", gateway.admin_key)
        monkeypatch.setenv("CHURN_KEY", "a-key-of-the-tests-0123456789abcdef")
        seen = []
        for flags in (["--api-key", "CHURN_KEY"], [], ["--no-api-key"]):
            put = CliRunner().invoke(app, ["endpoint", "--name", "churn", "--model", linear, *flags, "--json"])
            assert 0 == put.exit_code, put.output
            answer = json.loads(put.stdout)
            without_key = httpx.get(f"{gateway.url}/v2/models/churn/ready").status_code
            seen.append((answer["url"], answer["callers"], without_key))
        retired = CliRunner().invoke(app, ["endpoint", "retire", "churn"])
        again = CliRunner().invoke(app, ["endpoint", "retire", "churn", "--json"])

    url = f"{gateway.url}/v2/models/churn/infer"
    with_key, anyone = "Callers need the key CHURN_KEY.", "Anyone who reaches the gateway may call it, without a key."
    assert [(url, with_key, 401), (url, with_key, 401), (url, anyone, 200)] == seen
    assert "churn is retired: no longer serves" in retired.stdout
    assert {"name": "churn", "versions": []} == json.loads(again.stdout)


@pytest.mark.machines
def test_a_workload_is_decided_on(
    server: PrefectServer, registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It is measured for three seconds of scoring, which are few rows of a slow model.
    slow = register_script("slow-rows", "time.sleep(len(model_input) / 100_000)")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "workload.yaml").write_text(WORKLOAD.format(model=slow))
    words = CliRunner().invoke(app, ["choose", "workload.yaml", "--plot", "plot.png"])
    figures = CliRunner().invoke(app, ["choose", "@workload.yaml", "--json"])

    assert (0, 0) == (words.exit_code, figures.exit_code), words.output + figures.output
    assert "churn" in words.stdout
    assert (tmp_path / "plot.png").exists()
    assert json.loads(figures.stdout)["chosen"]["mode"] in {"online", "batch", "streaming"}
