"""Decisions put into effect on real servers: each mode is made, verified, and the one before it retired after that."""

from __future__ import annotations

import logging
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import orjson
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.schedules import CronSchedule

from infra.local.gateway import GatewayServer, gateway_server
from infra.local.nats import NatsClient, NatsServer
from infra.local.prefect_server import PrefectServer, PrefectWorker
from infra.local.triton import TritonServer
from serving.errors import ApplyFailed, BudgetBroken, SourceNotFound
from serving.model.batching import BatchingConfig
from serving.model.registry import resolve_model
from serving.protocol.oip import encode_request
from tasks.batch.manifest import open_predictions
from tasks.batch.options import BatchOptions
from tasks.common.events import MODE_CHANGED
from tasks.endpoint.targets import Triton
from tasks.scheduler.decision import Decision
from tasks.scheduler.deployment_plan import ApplyConfig, BatchApplyConfig, OnlineApplyConfig, StreamApplyConfig
from tasks.scheduler.profile import ProfileOptions, StatedFigures
from tasks.scheduler.review import Hysteresis
from tasks.scheduler.workload import Events, Machine, MeteredArrivals, Prices, Requests, Workload
from tasks.stream.options import FromNats, StreamOptions, ToNats
from tests.eventually import eventually
from tests.prefect_events import find_events
from tests.tasks.scheduler.decisions import EVENTS, FRAUD, NIGHTLY, alternative, decision

if TYPE_CHECKING:
    from tasks.scheduler.deployment_plan import AppliedDecision

NAME = "workload"
OPTIONS = BatchOptions(key_columns=("customer",), batch_size=512, rows_per_chunk=5_000, slots=1, experiment=None)
STREAM = StreamOptions(key_columns=("customer",), batch_size=64, slots=1, rows_per_batch=100, wait_seconds=0.02)
BATCH = alternative("batch", "on-demand", 1.0)
STATED = ProfileOptions(
    batch_options=OPTIONS,
    stated_figures=StatedFigures(batch_rows_per_second=100_000, start_seconds=10, cold_start_seconds=4, request_ms=2),
)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Generator[GatewayServer]:
    with gateway_server(tmp_path_factory.mktemp("gateway")) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OVERNIGHT_ADMIN_KEY", server.admin_key)
        yield server


@pytest.fixture(scope="module")
def online(triton: TritonServer, gateway: GatewayServer) -> OnlineApplyConfig:
    target = Triton(repository=str(triton.repository), url=triton.url, grpc=triton.grpc)
    return OnlineApplyConfig(gateway=gateway.url, target=target)


def batch(source: Path, destination: Path, **changes: Any) -> BatchApplyConfig:
    # One pool has workers here.
    values = {"source": str(source), "destination": str(destination), "options": OPTIONS}
    return BatchApplyConfig.model_validate(values | {"on_demand": "batch-inference/adhoc"} | changes)


def of(workload: Workload, model: str) -> Workload:
    return workload.model_copy(update={"name": NAME, "model": model})


def applied(decided: Decision, config: ApplyConfig) -> AppliedDecision:
    from flows.runtime.apply import apply_decision
    from flows.runtime.steps import Steps

    return apply_decision(Steps(), decided, config, logging.getLogger(__name__))


def deployments() -> set[str]:
    """What serves the workload, by the names of its deployments."""
    from flows.runtime.deployment_store import find_deployments, read_full_name

    return {read_full_name(each) for each in find_deployments(NAME)}


def answer(config: OnlineApplyConfig, model: str) -> int:
    body = encode_request(resolve_model(model).contract({}, {}), {"x": np.ones((1, 3), dtype=np.float32)}).content
    return httpx.post(f"{config.gateway}/v2/models/{NAME}/infer", content=body, timeout=60).status_code


def test_a_night_on_spot_is_scheduled_with_its_deadline_and_what_machines_cost(
    deployed: PrefectServer, linear: str, customers: Path, tmp_path: Path
) -> None:
    from flows.runtime.apply import find_current_deployment
    from flows.runtime.deployment_store import find_deployments, remove_deployment

    decided = decision(of(NIGHTLY, linear), alternative("batch", "spot", 1.0, machines=2))
    config = ApplyConfig(batch=batch(customers, tmp_path / "scores"))
    first, again = applied(decided, config), applied(decided, config)
    (night,) = find_deployments(NAME)
    (schedule,) = night.schedules
    current = find_current_deployment(NAME)

    assert {f"nightly-inference/{NAME}"} == deployments()
    changes = [each["payload"] for each in find_events(deployed, MODE_CHANGED, f"overnight.workload.{NAME}")]
    assert [("batch", None, linear)] == [
        tuple(each[name] for name in ("mode", "mode_before", "model"))
        for each in changes
        if each["summary"] == first.summary
    ]
    assert ((), ()) == (first.retired + again.retired, first.to_do + again.to_do)
    assert f"{linear} takes the 2 files" in first.verified
    assert ("06:00", 2) == (night.parameters["deadline"], night.parameters["options"]["workers"])
    assert isinstance(schedule.schedule, CronSchedule)
    assert ("30 1 * * *", True) == (schedule.schedule.cron, schedule.active)
    assert current is not None
    assert ("batch", "spot") == (current.mode, current.policy)
    assert "resumes" in night.tags

    with pytest.raises(SourceNotFound):
        applied(decided, ApplyConfig(batch=batch(tmp_path / "nothing", tmp_path / "scores")))
    assert night.parameters == find_deployments(NAME)[0].parameters
    assert remove_deployment(night, end_runs=False)


@pytest.mark.machines
def test_an_endpoint_serves_until_its_replacement_is_verified(
    deployed: PrefectServer, online: OnlineApplyConfig, linear: str, customers: Path, tmp_path: Path
) -> None:
    asked = decision(of(FRAUD, linear), alternative("online", "always-on", 1.0))
    event = decision(of(EVENTS, linear), alternative("streaming", "micro-batches", 1.0))
    endpoint = applied(asked, ApplyConfig(online=online))

    assert 200 == answer(online, linear)
    assert "answered as the model itself" in endpoint.verified
    assert "50 ms are promised: p99 " in endpoint.verified
    assert {f"online-endpoint/{NAME}"} == deployments()

    stream = StreamApplyConfig(source=FromNats(stream="NONE"), sink=ToNats(subject="none"), start_seconds_max=0.1)
    with pytest.raises(ApplyFailed, match="what served before serves on"):
        applied(event, ApplyConfig(stream=stream))

    assert 200 == answer(online, linear)
    assert {f"online-endpoint/{NAME}"} == deployments()
    assert [] == unfinished()

    done = applied(decision(of(NIGHTLY, linear), BATCH), ApplyConfig(batch=batch(customers, tmp_path / "scores")))

    assert 404 == answer(online, linear)
    assert {f"batch-inference/{NAME}"} == deployments()
    assert f"online, deployment online-endpoint/{NAME}, with versions 1 of its endpoint" in done.retired[0]


@pytest.mark.machines
def test_an_endpoint_that_breaks_the_promise_under_load_is_refused_and_nothing_is_left(
    deployed: PrefectServer, online: OnlineApplyConfig, linear: str
) -> None:
    workload = of(FRAUD, linear).model_copy(update={"consumer": Requests(latency_ms=0.01)})
    asked = decision(workload, alternative("online", "always-on", 1.0, checked_rate=20.0))
    before = deployments()
    with pytest.raises(BudgetBroken, match=r"within 0\.01 ms, at 20 rows a second.*by ProfileOptions\(target=\.\.\.\)"):
        applied(asked, ApplyConfig(online=online))

    assert before == deployments()
    assert 404 == answer(online, linear)


@pytest.mark.machines
def test_a_review_of_metered_traffic_changes_the_mode_after_enough_proposals(
    deployed: PrefectServer,
    gateway: GatewayServer,
    online: OnlineApplyConfig,
    linear: str,
    customers: Path,
    tmp_path: Path,
) -> None:
    from flows.scheduler import review_modes

    metered = MeteredArrivals(folder=str(gateway.folder), endpoint=NAME)
    asked = of(FRAUD, linear).model_copy(update={"machines": (Machine(prices=Prices(on_demand=0.1)),)})
    stands = alternative("online", "always-on", 1.0).model_copy(update={"machine": "this"})
    applied(decision(asked, stands), ApplyConfig(online=online))
    assert [200] * 20 == [answer(online, linear) for _ in range(20)]

    # Nobody waits for the answers any more: the same traffic, within an hour.
    loose = asked.model_copy(update={"consumer": Events(within_seconds=3600), "arrivals": metered, "horizon_days": 1})
    config = ApplyConfig(batch=batch(customers, tmp_path / "scores"))
    hysteresis = Hysteresis(reviews_min=2, apply=True)
    first, second = (review_modes(loose, config, hysteresis, STATED) for _ in range(2))

    assert ("wait", False) == (first.verdict.outcome, first.applied)
    assert "at 1 of the 2 reviews in a row" in first.verdict.reason
    assert first.current == "online, always-on on this"
    assert ("change", True) == (second.verdict.outcome, second.applied)
    assert {f"batch-inference/{NAME}"} == deployments()
    assert 404 == answer(online, linear)
    assert "keep" == review_modes(loose, config, hysteresis, STATED).verdict.outcome


@pytest.mark.machines
def test_a_workload_goes_from_online_to_a_stream_to_batches_and_each_failure_leaves_what_served(
    deployed: PrefectServer,
    two_workers: list[PrefectWorker],
    online: OnlineApplyConfig,
    nats: NatsServer,
    nats_client: NatsClient,
    fresh: str,
    linear: str,
    customers: Path,
    tmp_path: Path,
) -> None:
    batching = BatchingConfig(batch_size_max=4, wait_ms_max=1.0)
    asked = decision(of(FRAUD, linear), alternative("online", "always-on", 1.0, batching=batching))
    event = decision(of(EVENTS, linear), alternative("streaming", "micro-batches", 1.0))
    source = FromNats(url=nats.url, stream=fresh)
    sink = ToNats(subject=f"{fresh}.scores", stream=f"{fresh}-scores")
    stream = StreamApplyConfig(source=source, sink=sink, options=STREAM, start_seconds_max=300)

    # Online first.
    applied(asked, ApplyConfig(online=online))

    assert {f"online-endpoint/{NAME}"} == deployments()

    # A stream that does not exist fails, and leaves the endpoint.
    with pytest.raises(ApplyFailed, match="what served before serves on"):
        applied(event, ApplyConfig(stream=stream))

    assert 200 == answer(online, linear)
    assert {f"online-endpoint/{NAME}"} == deployments()

    # One that does takes its place.
    nats_client.make(fresh, f"{fresh}.in.>")
    nats_client.publish(f"{fresh}.in.a", [orjson.dumps({"customer": 1, "a": 0.5, "b": 0.5, "c": 0.5})])
    streamed = applied(event, ApplyConfig(stream=stream))

    assert {f"stream-inference/{NAME}"} == deployments()
    assert 404 == answer(online, linear)
    assert f"online, deployment online-endpoint/{NAME}, with versions 1 of its endpoint" in streamed.retired[0]
    eventually(lambda: len(nats_client.read(f"{fresh}-scores")), lambda seen: seen == 1, seconds=400)
    (running,) = unfinished()

    # Batches that are not complete in time leave the stream.
    table = decision(of(NIGHTLY, linear), BATCH)
    with pytest.raises(ApplyFailed, match=r"must be complete within 0\.01 s"):
        applied(table, ApplyConfig(batch=batch(customers, tmp_path / "late", first_run_seconds=0.01)))

    assert {f"stream-inference/{NAME}"} == deployments()
    assert [running] == unfinished()

    # Those that are end it.
    done = applied(table, ApplyConfig(batch=batch(customers, tmp_path / "scores", first_run_seconds=400)))

    assert {f"batch-inference/{NAME}"} == deployments()
    assert ("a first run is complete", ()) == (done.verified.rpartition(", ")[2], done.to_do)
    assert list(range(10_000)) == sorted(open_predictions(str(tmp_path / "scores")).collect()["customer"])
    assert [] == unfinished()


def unfinished() -> list[Any]:
    """The runs of the workload's stream that have not ended."""
    from prefect.client.schemas.filters import FlowRunFilter

    query = FlowRunFilter.model_validate(
        {"tags": {"all_": [f"workload:{NAME}"]}, "state": {"type": {"any_": ["SCHEDULED", "PENDING", "RUNNING"]}}}
    )
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(flow_run_filter=query)
    # The later runs of a schedule do not count.
    return [run.id for run in runs if not run.auto_scheduled]
