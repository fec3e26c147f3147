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
from serving.errors import ApplyFailed, SourceNotFound
from serving.model.registry import resolve_model
from serving.protocol.oip import encode_request
from tasks.batch.options import BatchOptions
from tasks.batch.predictions import open_predictions
from tasks.endpoint.spec import Triton
from tasks.scheduler.decision import Decision
from tasks.scheduler.profile import Measuring, Stated
from tasks.scheduler.review import Hysteresis
from tasks.scheduler.terms import BatchTerms, OnlineTerms, StreamTerms, Terms
from tasks.scheduler.workload import Events, Machine, Metered, Prices, Workload
from tasks.stream.options import FromNats, StreamOptions, ToNats
from tests.deployments.flow_runs import wait_until
from tests.servers import triton_or_skip
from tests.tasks.scheduler.decisions import EVENTS, FRAUD, NIGHTLY, decision, way

if TYPE_CHECKING:
    from tasks.scheduler.effect import Applied

NAME = "churn"
OPTIONS = BatchOptions(key_columns=("customer",), batch_size=512, rows_per_chunk=5_000, slots=1, experiment=None)
STREAM = StreamOptions(key_columns=("customer",), batch_size=64, slots=1, rows_per_batch=100, wait_seconds=0.02)
BATCH = way("batch", "on-demand", 1.0)
STATED = Measuring(
    options=OPTIONS,
    stated=Stated(batch_rows_per_second=100_000, start_seconds=10, cold_start_seconds=4, request_ms=2),
)


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Generator[TritonServer]:
    with triton_or_skip(tmp_path_factory.mktemp("triton")) as server:
        yield server


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Generator[GatewayServer]:
    with gateway_server(tmp_path_factory.mktemp("gateway")) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OVERNIGHT_ADMIN_KEY", server.admin_key)
        yield server


@pytest.fixture(scope="module")
def online(triton: TritonServer, gateway: GatewayServer) -> OnlineTerms:
    target = Triton(repository=str(triton.repository), url=triton.url, grpc=triton.grpc)
    return OnlineTerms(gateway=gateway.url, target=target)


def batch(source: Path, destination: Path, **changes: Any) -> BatchTerms:
    # One pool has workers here.
    told = {"source": str(source), "destination": str(destination), "options": OPTIONS}
    return BatchTerms.model_validate(told | {"on_demand": "batch-inference/adhoc"} | changes)


def of(workload: Workload, model: str) -> Workload:
    return workload.model_copy(update={"name": NAME, "model": model})


def applied(decided: Decision, terms: Terms) -> Applied:
    from flows.runtime.apply import apply_decision
    from flows.runtime.steps import Steps

    return apply_decision(Steps(), decided, terms, logging.getLogger(__name__))


def deployments() -> set[str]:
    """What serves the workload, by the names of its deployments."""
    from flows.runtime.deployment_store import full_name, serving

    return {full_name(each) for each in serving(NAME)}


def answer(terms: OnlineTerms, model: str) -> int:
    body = encode_request(resolve_model(model).contract({}, {}), {"x": np.ones((1, 3), dtype=np.float32)}).content
    return httpx.post(f"{terms.gateway}/v2/models/{NAME}/infer", content=body, timeout=60).status_code


def test_a_night_on_spot_is_scheduled_with_its_deadline_and_what_machines_cost(
    deployed: PrefectServer, linear: str, customers: Path, tmp_path: Path
) -> None:
    from flows.runtime.apply import find_standing
    from flows.runtime.deployment_store import remove, serving

    decided = decision(of(NIGHTLY, linear), way("batch", "spot", 1.0, machines=2))
    terms = Terms(batch=batch(customers, tmp_path / "scores"))
    first, again = applied(decided, terms), applied(decided, terms)
    (night,) = serving(NAME)
    (schedule,) = night.schedules
    standing = find_standing(NAME)

    assert {f"nightly-inference/{NAME}"} == deployments()
    assert ((), ()) == (first.retired + again.retired, first.left + again.left)
    assert f"{linear} takes the 2 files" in first.verified
    assert ("06:00", 2) == (night.parameters["deadline"], night.parameters["options"]["workers"])
    assert isinstance(schedule.schedule, CronSchedule)
    assert ("30 1 * * *", True) == (schedule.schedule.cron, schedule.active)
    assert standing is not None
    assert ("batch", "spot") == (standing.mode, standing.policy)
    assert "resumes" in night.tags

    with pytest.raises(SourceNotFound):
        applied(decided, Terms(batch=batch(tmp_path / "nothing", tmp_path / "scores")))
    assert night.parameters == serving(NAME)[0].parameters
    assert remove(night, end=False)


def test_an_endpoint_serves_until_what_takes_its_place_is_verified(
    deployed: PrefectServer, online: OnlineTerms, linear: str, customers: Path, tmp_path: Path
) -> None:
    asked = decision(of(FRAUD, linear), way("online", "always-on", 1.0))
    event = decision(of(EVENTS, linear), way("streaming", "micro-batches", 1.0))
    endpoint = applied(asked, Terms(online=online))

    assert 200 == answer(online, linear)
    assert "answered as the model itself" in endpoint.verified
    assert {f"online-endpoint/{NAME}"} == deployments()

    stream = StreamTerms(source=FromNats(stream="NONE"), sink=ToNats(subject="none"), begin_seconds=0.1)
    with pytest.raises(ApplyFailed, match="what served before serves on"):
        applied(event, Terms(stream=stream))

    assert 200 == answer(online, linear)
    assert {f"online-endpoint/{NAME}"} == deployments()
    assert [] == unfinished()

    done = applied(decision(of(NIGHTLY, linear), BATCH), Terms(batch=batch(customers, tmp_path / "scores")))

    assert 404 == answer(online, linear)
    assert {f"batch-inference/{NAME}"} == deployments()
    assert f"online, deployment online-endpoint/{NAME}, with versions 1 of its endpoint" in done.retired[0]


def test_a_review_of_metered_traffic_changes_the_mode_once_that_was_said_often_enough(
    deployed: PrefectServer, gateway: GatewayServer, online: OnlineTerms, linear: str, customers: Path, tmp_path: Path
) -> None:
    from flows.scheduler import review_modes

    metered = Metered(folder=str(gateway.folder), endpoint=NAME)
    asked = of(FRAUD, linear).model_copy(update={"machines": (Machine(prices=Prices(on_demand=0.1)),)})
    stands = way("online", "always-on", 1.0).model_copy(update={"machine": "this"})
    applied(decision(asked, stands), Terms(online=online))
    assert [200] * 20 == [answer(online, linear) for _ in range(20)]

    # Nobody waits for the answers any more: the same traffic, within an hour.
    loose = asked.model_copy(update={"consumer": Events(within_seconds=3600), "arrivals": metered, "horizon_days": 1})
    terms = Terms(batch=batch(customers, tmp_path / "scores"))
    hysteresis = Hysteresis(times_min=2, apply=True)
    first, second = (review_modes(loose, terms, hysteresis, STATED) for _ in range(2))

    assert ("wait", False) == (first.verdict.outcome, first.applied)
    assert "at 1 of the 2 reviews in a row" in first.verdict.reason
    assert first.standing == "online, always-on on this"
    assert ("change", True) == (second.verdict.outcome, second.applied)
    assert {f"batch-inference/{NAME}"} == deployments()
    assert 404 == answer(online, linear)
    assert "keep" == review_modes(loose, terms, hysteresis, STATED).verdict.outcome


@pytest.mark.machines
def test_a_workload_goes_from_online_to_a_stream_to_batches_and_each_failure_leaves_what_served(
    deployed: PrefectServer,
    two_workers: list[PrefectWorker],
    online: OnlineTerms,
    nats: NatsServer,
    nats_client: NatsClient,
    fresh: str,
    linear: str,
    customers: Path,
    tmp_path: Path,
) -> None:
    asked = decision(of(FRAUD, linear), way("online", "always-on", 1.0, batch_size_max=4, wait_ms_max=1.0))
    event = decision(of(EVENTS, linear), way("streaming", "micro-batches", 1.0))
    source = FromNats(url=nats.url, stream=fresh)
    sink = ToNats(subject=f"{fresh}.scores", stream=f"{fresh}-scores")
    stream = StreamTerms(source=source, sink=sink, options=STREAM, begin_seconds=300)

    # Online first.
    applied(asked, Terms(online=online))

    assert {f"online-endpoint/{NAME}"} == deployments()

    # A stream that can't begin, since nobody has made it, leaves the endpoint.
    with pytest.raises(ApplyFailed, match="what served before serves on"):
        applied(event, Terms(stream=stream))

    assert 200 == answer(online, linear)
    assert {f"online-endpoint/{NAME}"} == deployments()

    # One that does takes its place.
    nats_client.make(fresh, f"{fresh}.in.>")
    nats_client.publish(f"{fresh}.in.a", [orjson.dumps({"customer": 1, "a": 0.5, "b": 0.5, "c": 0.5})])
    streamed = applied(event, Terms(stream=stream))

    assert {f"stream-inference/{NAME}"} == deployments()
    assert 404 == answer(online, linear)
    assert f"online, deployment online-endpoint/{NAME}, with versions 1 of its endpoint" in streamed.retired[0]
    wait_until(lambda: len(nats_client.read(f"{fresh}-scores")) == 1, "the event's score")
    (running,) = unfinished()

    # Batches that are not complete in time leave the stream.
    table = decision(of(NIGHTLY, linear), BATCH)
    with pytest.raises(ApplyFailed, match=r"must be complete within 0\.01 s"):
        applied(table, Terms(batch=batch(customers, tmp_path / "late", first_run_seconds=0.01)))

    assert {f"stream-inference/{NAME}"} == deployments()
    assert [running] == unfinished()

    # Those that are end it.
    done = applied(table, Terms(batch=batch(customers, tmp_path / "scores", first_run_seconds=400)))

    assert {f"batch-inference/{NAME}"} == deployments()
    assert ("a first run is complete", ()) == (done.verified.rpartition(", ")[2], done.left)
    assert list(range(10_000)) == sorted(open_predictions(str(tmp_path / "scores")).collect()["customer"])
    assert [] == unfinished()


def unfinished() -> list[Any]:
    """The runs of the workload's stream that have not ended."""
    from prefect.client.schemas.filters import FlowRunFilter

    wanted = FlowRunFilter.model_validate(
        {"tags": {"all_": [f"workload:{NAME}"]}, "state": {"type": {"any_": ["SCHEDULED", "PENDING", "RUNNING"]}}}
    )
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(flow_run_filter=wanted)
    # The next ones of a schedule are no work in hand.
    return [run.id for run in runs if not run.auto_scheduled]
