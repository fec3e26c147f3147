"""The receiver of MLflow's webhooks: what it refuses, and what a real MLflow and a real Prefect server make of it."""

from __future__ import annotations

import asyncio
import contextvars
import json
import secrets
import threading
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from cryptography.fernet import Fernet
from fastapi import FastAPI
from fastapi.testclient import TestClient
from mlflow import MlflowClient
from mlflow.webhooks.delivery import _generate_hmac_signature
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings

from deployments.webhooks import (
    PATH,
    SECRET,
    AliasTrigger,
    WebhookConfig,
    build_app,
    read_config,
    read_secret,
    run,
    sign,
)
from infra.local.mlflow_server import mlflow_server
from infra.local.prefect_server import PrefectServer
from infra.local.process import HOST
from serving.errors import BadInput, Unanswered
from tests.eventually import eventually

KEY = "the-secret-of-the-tests"
NOW = 1_800_000_000
TRIGGER = AliasTrigger(
    model="churn",
    alias="champion",
    deployment="webhook-test/alias",
    parameters={"model": "models:/{name}@{alias}", "options": {"name": "by-{alias}", "slots": 1}},
)
CONFIG = WebhookConfig(triggers=(TRIGGER,))


class Started:
    """Stands for Prefect: one run for each key, once it answers; or an error."""

    def __init__(self, error: Exception | None = None) -> None:
        self.runs: dict[str, tuple[str, Any]] = {}
        self.error = error
        self.asked = 0
        self.answers = threading.Event()
        self.answers.set()

    async def __call__(self, deployment: str, parameters: Mapping[str, Any], key: str) -> str:
        self.asked += 1
        if self.error is not None:
            raise self.error
        await asyncio.to_thread(self.answers.wait)
        self.runs.setdefault(key, (deployment, parameters))
        return f"run-{list(self.runs).index(key) + 1}"


def event(entity: str = "model_version_alias", action: str = "created", **data: Any) -> bytes:
    given = {"name": "churn", "alias": "champion", "version": "7", **data}
    return json.dumps({"entity": entity, "action": action, "timestamp": "2026-01-01T00:00:00", "data": given}).encode()


def send(
    client: TestClient, body: bytes, *, delivery: str = "d-1", at: int = NOW, key: str = KEY, **headers: str
) -> httpx.Response:
    given = {
        "X-MLflow-Delivery-Id": delivery,
        "X-MLflow-Timestamp": str(at),
        "X-MLflow-Signature": sign(key, delivery, str(at), body),
    } | {name.replace("_", "-"): value for name, value in headers.items()}
    return client.post(PATH, content=body, headers=given)


@pytest.fixture
def started() -> Started:
    return Started()


@pytest.fixture
def client(started: Started) -> TestClient:
    return TestClient(build_app(CONFIG, KEY, start=started, clock=lambda: float(NOW)))


def test_an_alias_that_moves_starts_its_deployment_with_the_events_values(client: TestClient, started: Started) -> None:
    answer = send(client, event())

    assert (200, {"started": ["run-1"]}) == (answer.status_code, answer.json())
    parameters = {"model": "models:/churn@champion", "options": {"name": "by-champion", "slots": 1}}
    assert {"d-1:webhook-test/alias": ("webhook-test/alias", parameters)} == started.runs


def test_the_signature_is_mlflows_own() -> None:
    body = event()

    assert _generate_hmac_signature(KEY, "d-1", str(NOW), body.decode()) == sign(KEY, "d-1", str(NOW), body)


@pytest.mark.parametrize(
    "body",
    [
        event(entity="model_version"),
        event(action="deleted"),
        event(alias="challenger"),
        event(name="another"),
        json.dumps({"entity": "registered_model", "action": "created", "data": {"name": "x"}}).encode(),
    ],
)
def test_other_events_are_taken_and_start_nothing(client: TestClient, started: Started, body: bytes) -> None:
    answer = send(client, body)

    assert (200, []) == (answer.status_code, answer.json()["started"])
    assert 0 == started.asked


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"key": "another-secret-altogether"}, 401, f"that of the secret in {SECRET}"),
        ({"X_MLflow_Signature": ""}, 401, "X-MLflow-Signature"),
        ({"X_MLflow_Signature": "v1,\u00e4"}, 401, "X-MLflow-Signature"),
        ({"X_MLflow_Delivery_Id": "d-2"}, 401, "X-MLflow-Signature"),
        ({"X_MLflow_Delivery_Id": "d.1"}, 401, "X-MLflow-Delivery-Id"),
        ({"X_MLflow_Timestamp": str(NOW - 1)}, 401, "X-MLflow-Signature"),
        ({"X_MLflow_Timestamp": "now"}, 401, "X-MLflow-Timestamp"),
        ({"at": NOW - 301}, 401, "at most 300 s old, got 301 s"),
        ({"at": NOW + 301}, 401, "at most 300 s old, got -301 s"),
    ],
)
def test_a_request_that_is_not_mlflows_or_not_fresh_is_refused(
    client: TestClient, started: Started, changes: dict[str, Any], status: int, said: str
) -> None:
    if "X_MLflow_Signature" in changes:
        changes = {**changes, "X_MLflow_Signature": changes["X_MLflow_Signature"].encode("latin-1")}
    answer = send(client, event(), **changes)

    assert status == answer.status_code
    assert said in answer.json()["error"]
    assert KEY not in answer.text
    assert 0 == started.asked


def test_a_changed_body_is_refused_before_it_is_parsed(client: TestClient, started: Started) -> None:
    body = event()
    headers = {"X-MLflow-Signature": sign(KEY, "d-1", str(NOW), body)}
    answer = send(client, b"{" * 1000, **{name.replace("-", "_"): value for name, value in headers.items()})

    assert 401 == answer.status_code
    assert 0 == started.asked


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"entity": 1}', event(version=7), event(name=None), b"\xff"])
def test_a_body_that_is_no_event_is_refused(client: TestClient, started: Started, body: bytes) -> None:
    assert 422 == send(client, body).status_code
    assert 0 == started.asked


def test_a_large_body_is_refused_before_it_is_parsed(client: TestClient, started: Started) -> None:
    body = event(name="x" * CONFIG.bytes_max)
    stated, unstated = send(client, body), client.post(PATH, content=iter([body[:1000], body[1000:]]))

    assert (413, 413) == (stated.status_code, unstated.status_code)
    assert 0 == started.asked


def test_a_delivery_that_comes_again_has_the_run_that_it_started(client: TestClient, started: Started) -> None:
    answers = [send(client, event(), delivery=each) for each in ("d-1", "d-1", "d-2")]

    assert [(200, ["run-1"]), (200, ["run-1"]), (200, ["run-2"])] == [
        (each.status_code, each.json()["started"]) for each in answers
    ]


def test_a_delivery_that_comes_again_while_prefect_hangs_waits_for_its_run(
    client: TestClient, started: Started
) -> None:
    started.answers.clear()
    with client, ThreadPoolExecutor() as threads:
        # MLflow gives a request up after 30 s, and sends it again; another answer than 429 and 5xx ends its tries.
        sent = [threads.submit(send, client, event()) for _ in range(2)]
        try:
            eventually(lambda: started.asked + sum(each.done() for each in sent) == len(sent))
        finally:
            started.answers.set()
        answers = [each.result() for each in sent]

    assert [(200, ["run-1"])] * 2 == [(each.status_code, each.json().get("started")) for each in answers]


@pytest.mark.parametrize("arrivals", [("2", "3"), ("3", "2")])
def test_every_run_of_a_move_scores_what_the_alias_names_when_it_begins(
    client: TestClient, started: Started, arrivals: tuple[str, str]
) -> None:
    for version in arrivals:
        send(client, event(version=version), delivery=f"moved-to-{version}")
    # Both moves were made before either run begins.
    registry = {"models:/churn@champion": "3", "models:/churn/2": "2", "models:/churn/3": "3"}

    assert ["3", "3"] == [registry[parameters["model"]] for _, parameters in started.runs.values()]


def test_a_delivery_that_prefect_did_not_take_may_come_again(client: TestClient, started: Started) -> None:
    started.error = Unanswered("The Prefect server must answer.", retry_after_s=5)
    refused = send(client, event())
    started.error = None
    taken = send(client, event())

    assert (503, "5", 200) == (refused.status_code, refused.headers["Retry-After"], taken.status_code)
    assert ["d-1:webhook-test/alias"] == list(started.runs)


def test_a_config_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    file = tmp_path / "webhooks.yaml"
    with pytest.raises(BadInput, match=r"must hold the triggers of webhooks.*No such file"):
        read_config(file)
    file.write_text("triggers: [{model: churn, alias: champion, deployment: nightly}]")
    with pytest.raises(BadInput, match="deployment"):
        read_config(file)
    file.write_text("triggers: [" + "{model: churn, alias: champion, deployment: batch-inference/adhoc}," * 2 + "]")
    with pytest.raises(BadInput, match="twice"):
        read_config(file)
    pinned = "parameters: {model: 'models:/{name}/{version}'}"
    file.write_text("triggers: [{model: churn, alias: champion, deployment: batch-inference/adhoc, " + pinned + "}]")
    with pytest.raises(BadInput, match=r"must name the model by its alias.*models:/\{name\}@\{alias\}"):
        read_config(file)
    refused = "parameters: {options: {params: {api_key: hunter2}}}"
    file.write_text("triggers: [{model: churn, alias: champion, deployment: batch-inference/adhoc, " + refused + "}]")
    with pytest.raises(BadInput, match=r"triggers\.0\.parameters\.options\.params\.api_key must hold no password"):
        read_config(file)
    file.write_text("triggers: [{model: churn, alias: champion, deployment: batch-inference/adhoc}]")

    assert "champion" == read_config(file).triggers[0].alias


def test_the_secret_comes_from_the_environment_and_is_long() -> None:
    for environment in ({}, {SECRET: "short"}):
        with pytest.raises(BadInput, match=r"at least 16 characters, got \d\. Make one"):
            read_secret(environment)

    assert KEY == read_secret({SECRET: KEY})


@contextmanager
def serving(app: FastAPI) -> Iterator[int]:
    server = uvicorn.Server(uvicorn.Config(app, host=HOST, port=0, log_level="warning", ws="none"))
    # Of this thread are the settings by which Prefect's client finds its server.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(server.run,), daemon=True)
    thread.start()
    eventually(lambda: server.started)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """A real tracking server of MLflow, which may send webhooks to loopback by http."""
    environment = {
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": Fernet.generate_key().decode(),
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
    }
    with mlflow_server(tmp_path_factory.mktemp("mlflow"), environment) as server:
        yield server.url


@pytest.fixture
def deployment(server: PrefectServer) -> str:
    """A deployment that nothing runs: its runs stay scheduled."""
    with get_client(sync_client=True) as client:
        flow = client.create_flow_from_name("webhook-test")
        client.create_deployment(flow_id=flow, name="alias", enforce_parameter_schema=False)
    return "webhook-test/alias"


def runs_of_webhooks() -> list[FlowRun]:
    with get_client(sync_client=True) as client:
        wanted = FlowRunFilter.model_validate({"tags": {"all_": ["mlflow-webhook"]}})
        return client.read_flow_runs(flow_run_filter=wanted)


@pytest.mark.machines
def test_a_real_mlflow_starts_a_run_on_a_real_prefect_when_an_alias_moves(
    tracking: str, deployment: str, caplog: pytest.LogCaptureFixture
) -> None:
    secret = secrets.token_hex(32)
    client = MlflowClient(tracking_uri=tracking, registry_uri=tracking)
    client.create_registered_model("churn")
    logged = client.create_run("0")
    for _ in range(2):
        client.create_model_version("churn", source=f"{logged.info.artifact_uri}/model", run_id=logged.info.run_id)
    seen: list[tuple[bytes, dict[str, str]]] = []
    app = build_app(CONFIG, secret)

    @app.middleware("http")
    async def keep(request: Any, call: Any) -> Any:
        seen.append((await request.body(), dict(request.headers)))
        return await call(request)

    with serving(app) as port:
        url = f"http://{HOST}:{port}{PATH}"
        hook = client.create_webhook(name="alias", url=url, events=["model_version_alias.created"], secret=secret)
        tested = client.test_webhook(hook.webhook_id)
        client.set_registered_model_alias("churn", "challenger", "1")
        client.set_registered_model_alias("churn", "champion", "2")
        runs = eventually(runs_of_webhooks)
        body, headers = next(each for each in seen if b"champion" in each[0])
        replayed = httpx.post(url, content=body, headers=headers)

    # As after a restart, when the receiver remembers nothing: Prefect has the run of that delivery already.
    with serving(build_app(CONFIG, secret)) as port:
        restarted = httpx.post(f"http://{HOST}:{port}{PATH}", content=body, headers=headers)

    (flow_run,) = runs
    assert (True, 200) == (tested.success, tested.response_status)
    assert {"model": "models:/churn@champion", "options": {"name": "by-champion", "slots": 1}} == flow_run.parameters
    assert [[str(flow_run.id)]] * 2 == [each.json()["started"] for each in (replayed, restarted)]
    assert [flow_run.id] == [each.id for each in runs_of_webhooks()]


def test_a_deployment_that_is_missing_is_said_to_mlflow_as_worth_another_try(server: PrefectServer) -> None:
    config = WebhookConfig(triggers=(TRIGGER.model_copy(update={"deployment": "webhook-test/none-such"}),))
    with TestClient(build_app(config, KEY, clock=lambda: float(NOW))) as client:
        answer = send(client, event())

    assert 503 == answer.status_code
    assert "webhook-test/none-such must exist" in answer.json()["error"]


def test_the_receiver_says_what_it_lacks_before_it_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "webhooks.yaml"
    file.write_text("triggers: [{model: churn, alias: champion, deployment: batch-inference/adhoc}]")
    monkeypatch.delenv(SECRET, raising=False)
    with pytest.raises(BadInput, match=SECRET):
        run(file)
    monkeypatch.setenv(SECRET, KEY)
    with temporary_settings(restore_defaults={PREFECT_API_URL}), pytest.raises(BadInput, match="PREFECT_API_URL"):
        run(file)
