"""What docs/deploying.md tells people to write works as it stands, on a real server: serve, deploy, triggers."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.events import emit_event

from infra.local.prefect_server import PrefectServer, PrefectWorker
from tasks.batch.manifest import open_predictions
from tests.child_environment import add_project
from tests.deployments.flow_runs import state_of, wait_for
from tests.eventually import eventually
from tests.pages import ROOT, read_blocks

SECONDS_MAX = 120.0


def find_recipe(words: str, **replaced: str) -> str:
    """Return the only Python block of the page that has these words, with addresses of the test's own."""
    (block,) = (each.text for each in read_blocks(ROOT / "docs/deploying.md") if words in each.text)
    for old, new in replaced.items():
        block = block.replace({"model": "models:/churn@champion", "source": "s3://lake/customers/"}.get(old, old), new)
    return block


def localize(words: str, model: str, customers: Path, scores: Path) -> str:
    block = find_recipe(words, model=model, source=str(customers))
    return block.replace("s3://lake/scores/", str(scores)).replace("customer_id", "customer")


def runs_of(deployment: str) -> list[FlowRun]:
    with get_client(sync_client=True) as client:
        found = client.read_deployment_by_name(deployment)
        return client.read_flow_runs(deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[found.id])))


@pytest.fixture
def serving(deployed: PrefectServer, doubling: str, customers: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The recipe of serve as a program that runs in a folder of its own."""
    script = tmp_path / "served.py"
    script.write_text(localize(".serve(", doubling, customers, tmp_path / "scores"))
    environment = {**add_project(), **deployed.environment, "PREFECT_RUNNER_POLL_FREQUENCY": "2"}
    with (tmp_path / "log").open("w") as log, subprocess.Popen(
        [sys.executable, script.name], cwd=tmp_path, env=environment, stdout=log, stderr=log, text=True
    ) as child:  # fmt: skip
        yield child
        child.terminate()
        child.wait(60)


@pytest.mark.machines
def test_served_from_a_folder_of_ones_own_it_scores(
    serving: subprocess.Popen[str], deployed: PrefectServer, tmp_path: Path
) -> None:
    def is_there() -> bool:
        assert serving.poll() is None, (tmp_path / "log").read_text()
        name = "batch-inference/served"
        return httpx.get(f"{deployed.api_url}/deployments/name/{name}").status_code == httpx.codes.OK

    eventually(is_there)
    run = run_deployment("batch-inference/served", timeout=0)
    assert isinstance(run, FlowRun)
    ended = wait_for(run.id, "Completed", "Failed", "Crashed")

    assert "Completed" == state_of(ended), (tmp_path / "log").read_text()
    assert ended.name.startswith("doubling v")
    assert ended.name.endswith("→ scores")
    assert list(range(10_000)) == sorted(open_predictions(str(tmp_path / "scores")).collect()["customer"])


@pytest.mark.machines
def test_deployed_to_a_pool_its_worker_scores(
    deployed: PrefectServer, two_workers: list[PrefectWorker], doubling: str, customers: Path, tmp_path: Path
) -> None:
    recipe = localize('.deploy(\n    name="deployed"', doubling, customers, tmp_path / "scores")
    exec(compile(recipe, "docs", "exec"), {})  # noqa: S102 - the recipe of the page

    run = run_deployment("batch-inference/deployed", timeout=0)
    assert isinstance(run, FlowRun)
    ended = wait_for(run.id, "Completed", "Failed", "Crashed")

    assert "Completed" == state_of(ended)
    assert list(range(10_000)) == sorted(open_predictions(str(tmp_path / "scores")).collect()["customer"])
    with get_client(sync_client=True) as client:
        assert "flows.batch.batch_inference" == client.read_deployment_by_name("batch-inference/deployed").entrypoint


def test_a_run_starts_when_its_table_is_ready(
    deployed: PrefectServer, doubling: str, customers: Path, tmp_path: Path
) -> None:
    recipe = localize("table_is_ready", doubling, customers, tmp_path / "scores")
    exec(compile(recipe.replace("s3://lake/features", str(tmp_path / "features")), "docs", "exec"), {})  # noqa: S102

    table = {"prefect.resource.id": "lake.table.customers"}
    send_until_run("batch-inference/when-ready", lambda: emit_event("lake.table.ready", resource=table))

    from tasks.common.events import RUN_PUBLISHED, describe_resource, send_event

    before = len(runs_of("batch-inference/when-ready"))
    send_event(
        RUN_PUBLISHED,
        describe_resource("run", "k", role=False),
        [describe_resource("destination", str(tmp_path / "features"))],
        {"rows": 1},
    )
    eventually(lambda: len(runs_of("batch-inference/when-ready")), lambda seen: seen > before, seconds=400)
    cancel(runs_of("batch-inference/when-ready"))


def test_a_model_is_trained_again_when_a_run_of_it_is_refused(
    deployed: PrefectServer, registry: Path, customers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "training.py").write_text(
        "from prefect import flow\n\n@flow\ndef train_churn(reason: str) -> None:\n    print(reason)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    recipe = find_recipe("train_churn.deploy")
    exec(compile(recipe.replace('"SchemaMismatch"', '"ModelNotFound"'), "docs", "exec"), {})  # noqa: S102

    from flows.batch import batch_inference

    found = send_until_run(
        "train-churn/when-refused",
        lambda: batch_inference("models:/churn@champion", str(customers), str(tmp_path / "scores"), return_state=True),
    )

    assert "churn" in found[0].parameters["reason"]
    cancel(found)


def send_until_run(deployment: str, send: Callable[[], object]) -> list[FlowRun]:
    """Send an event until the deployment has runs: the server may load a new automation some seconds late."""

    def send_and_look() -> list[FlowRun]:
        send()
        # Each event that is heard starts a run.
        time.sleep(3)
        return runs_of(deployment)

    assert [] == runs_of(deployment)
    return eventually(send_and_look, seconds=SECONDS_MAX)


def cancel(runs: list[FlowRun]) -> None:
    """End flow runs that no other test is to wait behind."""
    from prefect.states import Cancelled

    with get_client(sync_client=True) as client:
        for run in runs:
            client.set_flow_run_state(run.id, Cancelled(), force=True)
