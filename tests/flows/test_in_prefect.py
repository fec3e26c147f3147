"""How a run looks in Prefect: its name, its steps in the graph, its artifacts, its events; on a real server."""

from __future__ import annotations

import json
import logging
import socket
import threading
import uuid
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.context import SyncClientContext
from prefect.events.worker import EventsWorker

from infra.local.prefect_server import PrefectServer
from serving.errors import ModelNotFound, TooManyRejects
from tasks.batch.options import BatchOptions
from tasks.common.artifacts import ProgressArtifact, start_thread
from tests.eventually import eventually
from tests.prefect_events import find_events
from tests.support import write_customers

OPTIONS = BatchOptions(key_columns=("customer",), batch_size=128, rows_per_chunk=1024, experiment=None)


def infer(model: str, source: Path | str, destination: Path | str, options: BatchOptions = OPTIONS) -> FlowRun:
    """Make the call, and return its flow run."""
    from flows.batch import batch_inference

    state = batch_inference(model, str(source), str(destination), options, return_state=True)
    assert state.state_details.flow_run_id is not None
    with get_client(sync_client=True) as client:
        return client.read_flow_run(state.state_details.flow_run_id)


def ask(server: PrefectServer, path: str, body: dict[str, Any]) -> Any:
    answer = httpx.post(f"{server.api_url}/{path}", json=body)
    answer.raise_for_status()
    return answer.json()


def artifacts_of(server: PrefectServer, run: FlowRun) -> dict[str, str]:
    """The artifacts of a flow run by key; each key is there once."""
    found = ask(server, "artifacts/filter", {"flow_runs": {"id": {"any_": [str(run.id)]}}})
    # A flow with retries keeps its result, as an artifact without a key.
    keyed = [each for each in found if each["key"]]
    by_key = {each["key"]: each["data"] for each in keyed}
    assert len(by_key) == len(keyed)
    return by_key


class TestTheName:
    def test_says_which_version_goes_where_once_the_alias_is_resolved(
        self, linear: str, customers: Path, tmp_path: Path, prefect: PrefectServer
    ) -> None:
        import mlflow

        name, version = linear.removeprefix("models:/").split("/")
        mlflow.MlflowClient().set_registered_model_alias(name, "champion", version)

        assert f"linear v{version} → scores" == infer(f"models:/{name}@champion", customers, tmp_path / "scores").name

    def test_says_what_was_asked_for_where_nothing_was_resolved(
        self, customers: Path, tmp_path: Path, prefect: PrefectServer, registry: Path
    ) -> None:
        assert "nobody@champion → scores" == infer("models:/nobody@champion", customers, tmp_path / "scores").name

    def test_that_a_person_has_given_is_kept(
        self, linear: str, customers: Path, tmp_path: Path, prefect: PrefectServer
    ) -> None:
        from flows.batch import batch_inference

        named = batch_inference.with_options(flow_run_name="the first one")
        state = named(linear, str(customers), str(tmp_path / "scores"), OPTIONS, return_state=True)
        with get_client(sync_client=True) as client:
            assert "the first one" == client.read_flow_run(state.state_details.flow_run_id).name

    def test_is_taken_for_random_only_where_it_has_two_words_of_prefects(self) -> None:
        from prefect.utilities.names import generate_slug

        from flows.runtime.names import is_random_name

        assert all(is_random_name(generate_slug(2)) for _ in range(200))
        assert not any(is_random_name(each) for each in ("first-try", "night", "a-b-c", "churn v3 → scores", ""))

    def test_stays_the_provisional_one_where_the_server_does_not_take_another(
        self, prefect: PrefectServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from flows.runtime.names import rename_flow_run
        from flows.runtime.steps import flow_run

        lines: list[str] = []

        class Log:
            def warning(self, text: str, *values: object) -> None:
                lines.append(text % values)

        def refuse(*_: object) -> None:
            message = "the server is gone"
            raise httpx.ConnectError(message)

        @flow(flow_run_name="provisional")
        def rename() -> str:
            with monkeypatch.context() as patch:
                patch.setattr(SyncPrefectClient, "set_flow_run_name", refuse)
                rename_flow_run("final", "provisional", Log())  # type: ignore[arg-type]
            run = flow_run()
            return run.name if run else ""

        assert "provisional" == rename()
        assert [
            "The Prefect server must take the run's name, got: the server is gone. The run goes on without."
        ] == lines


class TestTheGraph:
    def test_links_the_steps_in_order_and_holds_the_shards(
        self, linear: str, customers: Path, tmp_path: Path, prefect: PrefectServer
    ) -> None:
        run = infer(linear, customers, tmp_path / "scores")
        steps = ["resolve", "plan", "load", "score", "check keys", "publish", "report"]

        def read_nodes() -> dict[str, dict[str, Any]]:
            graph = httpx.get(f"{prefect.api_url}/flow_runs/{run.id}/graph-v2").json()
            return {node["label"].partition(" of ")[0]: node for _, node in graph["nodes"]}

        # Prefect's client sends the states of task runs from a thread of its own.
        nodes = eventually(read_nodes, lambda found: found.keys() >= {*steps, "shard 1"})
        names = {node["id"]: name for name, node in nodes.items()}
        after = {name: [names[each["id"]] for each in nodes[name]["parents"]] for name in steps}
        assert {name: [before] for before, name in pairwise(steps)} | {"resolve": []} == after
        assert ["score"] == [names[each["id"]] for each in nodes["shard 1"]["encapsulating"]]


class TestTheArtifacts:
    def test_say_each_thing_once_and_stay_where_another_attempt_finds_the_run_complete(
        self, linear: str, customers: Path, tmp_path: Path, prefect: PrefectServer
    ) -> None:
        from flows.batch import batch_inference

        runs = []

        def fail_once(*_: object) -> None:
            runs.append(1)
            if len(runs) == 1:
                message = "the first attempt fails at its end"
                raise ValueError(message)

        import flows.batch

        with pytest.MonkeyPatch.context() as patch:
            inner = flows.batch.publish_artifacts
            patch.setattr(flows.batch, "publish_artifacts", lambda *args: (inner(*args), fail_once())[0])
            again = batch_inference.with_options(retries=1)
            state = again(linear, str(customers), str(tmp_path / "scores"), OPTIONS, return_state=True)
        with get_client(sync_client=True) as client:
            run = client.read_flow_run(state.state_details.flow_run_id)
        found = artifacts_of(prefect, run)

        assert (1, "COMPLETED") == (len(runs), run.state_type.value if run.state_type else "")
        assert 2 == run.run_count
        assert "| status | scored |" in found["batch-summary"]
        assert {"batch-progress", "batch-summary", "batch-sample", "batch-distributions"} == set(found)
        assert str(tmp_path / "scores") in found["batch-summary"]
        assert "report.html" in found["batch-summary"]

    def test_have_ten_predictions_with_their_keys_and_a_picture_of_all(
        self, linear: str, customers: Path, tmp_path: Path, prefect: PrefectServer
    ) -> None:
        found = artifacts_of(prefect, infer(linear, customers, tmp_path / "scores"))
        rows = json.loads(found["batch-sample"])

        assert 10 == len(rows)
        assert {"customer", "score"} == set(rows[0])
        assert found["batch-distributions"].startswith("data:image/svg+xml;base64,")

    def test_hold_nothing_of_the_predictions_where_that_is_asked_for(
        self, linear: str, customers: Path, tmp_path: Path, prefect: PrefectServer
    ) -> None:
        silent = OPTIONS.model_copy(update={"sample_rows": 0})
        found = artifacts_of(prefect, infer(linear, customers, tmp_path / "scores", silent))

        assert {"batch-progress", "batch-summary"} == set(found)
        assert OPTIONS.key_fields() == silent.key_fields()

    def test_count_the_rejects_by_reason_where_there_are_any(
        self, linear: str, tmp_path: Path, prefect: PrefectServer
    ) -> None:
        source = write_customers(
            *(tmp_path / "customers",),
            rows=1_000,
            files=1,
            rows_per_group=500,
            edit=lambda table: table.with_columns(a=pl.when(pl.col("customer") % 50 != 0).then("a")),
        )
        found = artifacts_of(prefect, infer(linear, source, tmp_path / "scores"))

        assert [("a", 20)] == [(row["column"], row["rows"]) for row in json.loads(found["batch-rejects"])]
        assert "| rejects | 20 |" in found["batch-summary"]

    def test_of_a_call_that_finds_the_run_complete_are_its_summary(
        self, linear: str, customers: Path, tmp_path: Path, prefect: PrefectServer
    ) -> None:
        infer(linear, customers, tmp_path / "scores")
        found = artifacts_of(prefect, infer(linear, customers, tmp_path / "scores"))

        assert {"batch-summary"} == set(found)
        assert "already complete" in found["batch-summary"]


class TestEvents:
    def test_a_run_is_published_once_and_concerns_destination_model_and_flow_run(
        self, linear: str, customers: Path, tmp_path: Path, prefect: PrefectServer
    ) -> None:
        run = infer(linear, customers, tmp_path / "scores")
        infer(linear, customers, tmp_path / "scores")
        (event,) = find_events(prefect, "overnight.run.published", f"overnight.destination.{tmp_path / 'scores'}")
        related = {each["prefect.resource.role"]: each["prefect.resource.id"] for each in event["related"]}

        assert f"overnight.run.{event['payload']['run']}" == event["resource"]["prefect.resource.id"]
        assert (10_000, 0, linear) == tuple(event["payload"][name] for name in ("rows", "rows_rejected", "model"))
        assert {"destination", "source", "model", "flow-run", "flow"} <= set(related)
        assert ("overnight.model.linear", f"prefect.flow-run.{run.id}") == (related["model"], related["flow-run"])

    def test_a_run_is_refused_with_the_kind_of_error_and_the_message(
        self, linear: str, tmp_path: Path, prefect: PrefectServer
    ) -> None:
        source = write_customers(
            *(tmp_path / "customers",),
            rows=1_000,
            files=1,
            rows_per_group=500,
            edit=lambda table: table.with_columns(a=pl.when(pl.col("customer") % 2 == 0).then("a")),
        )
        infer(linear, source, tmp_path / "scores")
        (event,) = find_events(prefect, "overnight.run.refused", f"overnight.destination.{tmp_path / 'scores'}")

        assert TooManyRejects.__name__ == event["resource"]["overnight.error"] == event["payload"]["error"]
        assert "may be rejects" in event["payload"]["message"]
        assert 32 == len(event["resource"]["prefect.resource.id"].removeprefix("overnight.run."))

    def test_a_run_that_was_never_planned_is_refused_too(
        self, customers: Path, tmp_path: Path, prefect: PrefectServer, registry: Path
    ) -> None:
        name = f"m{uuid.uuid4().hex[:8]}"
        infer(f"models:/{name}@champion", customers, tmp_path / "scores")
        (event,) = find_events(prefect, "overnight.run.refused", f"overnight.model.{name}")

        assert ("overnight.run.unplanned", ModelNotFound.__name__) == (
            *(event["resource"]["prefect.resource.id"], event["payload"]["error"]),
        )

    def test_workers_of_one_run_that_end_for_the_same_reason_are_one_event(
        self, prefect: PrefectServer, registry: Path
    ) -> None:
        from tasks.batch.events import RunCall, emit_refusal

        first, destination = str(uuid.uuid4()), f"/data/{uuid.uuid4()}"
        for kind in (TooManyRejects, TooManyRejects, ModelNotFound):
            call = RunCall(model="models:/m/1", source="/data", destination=destination, key="k", first_worker=first)
            with pytest.raises(kind), emit_refusal(call):
                raise kind
        found = find_events(prefect, "overnight.run.refused", f"overnight.destination.{destination}", count=2)

        assert ["TooManyRejects", "ModelNotFound"] == [each["payload"]["error"] for each in found]

    def test_a_server_that_takes_none_holds_nothing_up(self, linear: str, customers: Path, tmp_path: Path) -> None:
        from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_API_URL, temporary_settings

        from tasks.common.events import RUN_PUBLISHED, describe_resource, send_event

        EventsWorker.drain_all(timeout=60)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}/api"
            # A call that waited for an answer would do so for an hour.
            with temporary_settings({PREFECT_API_URL: url, PREFECT_API_REQUEST_TIMEOUT: 3600}):
                for _ in range(3):
                    send_event(RUN_PUBLISHED, describe_resource("run", "k", role=False), [], {"rows": 1})
        # The worker that sends events stays with the server that was there when it began.
        EventsWorker.drain_all(timeout=0)

    def test_one_that_is_too_large_is_left_out_with_a_warning(
        self, prefect: PrefectServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        from tasks.common.events import RUN_PUBLISHED, describe_resource, send_event

        send_event(RUN_PUBLISHED, describe_resource("run", "k", role=False), [], {"rows": "1" * 5_000_000})


class TestLimits:
    def test_a_limit_on_the_tag_bounds_the_shards_that_are_scored_at_once(
        self, sleepy: str, tmp_path: Path, prefect: PrefectServer
    ) -> None:
        from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate

        from flows.runtime.shard_task import SHARD_TAG

        source = write_customers(tmp_path / "customers", rows=4_000, files=8, rows_per_group=500)
        options = OPTIONS.model_copy(update={"slots": 4, "batch_size": 64, "rows_per_chunk": 64})
        with get_client(sync_client=True) as client:
            client.create_global_concurrency_limit(
                GlobalConcurrencyLimitCreate(name=f"tag:{SHARD_TAG}", limit=1, active=True)
            )
        try:
            run = infer(sleepy, source, tmp_path / "scores", options)
        finally:
            with get_client(sync_client=True) as client:
                client.delete_global_concurrency_limit_by_name(f"tag:{SHARD_TAG}")
        tasks = ask(prefect, "task_runs/filter", {"flow_runs": {"id": {"any_": [str(run.id)]}}})
        shards = sorted((each["start_time"], each["end_time"]) for each in tasks if each["name"].startswith("shard "))

        assert "COMPLETED" == (run.state_type.value if run.state_type else "")
        assert all(before[1] <= after[0] for before, after in pairwise(shards))
        assert all(SHARD_TAG in each["tags"] for each in tasks if each["name"].startswith("shard "))


def test_a_bar_that_is_late_passes_over_a_client_that_the_flow_has_closed(prefect: PrefectServer) -> None:
    bar = ProgressArtifact("late", "A bar", logging.getLogger("bar"))
    ended = threading.Event()
    failed: list[Exception] = []

    def show_late() -> None:
        ended.wait(30)
        try:
            bar.show(50)
        except RuntimeError as error:
            failed.append(error)

    with SyncClientContext.get_or_create():
        thread = start_thread("late-bar", show_late)
    ended.set()
    thread.join(30)
    assert not thread.is_alive()
    assert [] == failed
