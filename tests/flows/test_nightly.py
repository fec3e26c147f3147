"""What a night refuses before it sends anything anywhere, and by which clock it goes."""

from __future__ import annotations

import logging
import signal
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import TerminationSignal
from prefect.states import AwaitingRetry, Completed, Pending, Running

from infra.local.prefect_server import PrefectServer
from serving.errors import DeadlineImpossible, DeploymentMissing, SourceFormat
from tasks.batch.options import BatchOptions
from tasks.spot import work_pools
from tasks.spot.night import Machine, Night
from tasks.spot.policy import Placement
from tasks.spot.purchase import PurchaseOptions
from tasks.spot.work_pools import PrefectWorkerPool
from tests.tasks.spot.market import Market

BUYING = PurchaseOptions(spot_price=1, on_demand_price=3)


@pytest.fixture
def client(prefect: PrefectServer) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


def soon(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


def deploy(client: SyncPrefectClient, pool: str | None) -> str:
    """A deployment that has this work pool, by its name."""
    flow = f"flow-{uuid.uuid4()}"
    client.create_deployment(client.create_flow_from_name(flow), "any", work_pool_name=pool)
    return f"{flow}/any"


def make_pool(client: SyncPrefectClient) -> str:
    return client.create_work_pool(WorkPoolCreate(name=f"pool-{uuid.uuid4()}", type="process")).name


def test_a_source_that_does_not_tell_its_rows_is_refused_by_its_format(
    linear: str, prefect: PrefectServer, tmp_path: Path
) -> None:
    from flows.nightly import nightly_inference

    source = tmp_path / "customers.csv"
    source.write_text("customer,a,b,c\n1,1.0,2.0,3.0\n")

    with pytest.raises(SourceFormat, match=r"which Parquet files state, got csv at .*Write it as Parquet"):
        nightly_inference(linear, str(source), str(tmp_path / "scores"), "06:00", BUYING)

    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize(
    ("workers", "words"),
    [
        (1, "16 min 40 s of work over 1 worker(s) take 16 min 40 s, with 2 min of changeover 18 min 40 s, got "),
        (2, "16 min 40 s of work over 2 worker(s) take 8 min 20 s, with 2 min of changeover 10 min 20 s, got "),
    ],
)
def test_a_deadline_that_can_not_be_met_is_refused_with_the_arithmetic(
    linear: str, prefect: PrefectServer, customers: Path, tmp_path: Path, workers: int, words: str
) -> None:
    from flows.nightly import nightly_inference

    slow = BUYING.model_copy(update={"rows_per_second": 10})
    options = BatchOptions(workers=workers)

    with pytest.raises(DeadlineImpossible) as refused:
        nightly_inference(linear, str(customers), str(tmp_path / "scores"), soon(300), slow, options)

    assert words in str(refused.value)
    assert "Move the deadline by at least" in str(refused.value)
    assert not (tmp_path / "scores").exists()


class TestMissing:
    def test_a_deployment_is_named(self, linear: str, prefect: PrefectServer, customers: Path, tmp_path: Path) -> None:
        from flows.nightly import nightly_inference

        elsewhere = BUYING.model_copy(update={"on_demand": "batch-inference/nowhere"})

        with pytest.raises(DeploymentMissing, match=r"batch-inference/nowhere must exist, got none.*overnight deploy"):
            nightly_inference(linear, str(customers), str(tmp_path / "scores"), soon(3600), elsewhere)

    def test_the_work_pool_of_a_deployment_is_named(self, client: SyncPrefectClient) -> None:
        name = deploy(client, None)

        with pytest.raises(DeploymentMissing, match=f"{name} must have a work pool, got none.*overnight deploy"):
            work_pools.find_pool(client, name)

    def test_a_work_pool_that_was_deleted_since_is_named(self, client: SyncPrefectClient) -> None:
        pool = make_pool(client)
        name = deploy(client, pool)

        assert pool == work_pools.find_pool(client, name)

        client.delete_work_pool(pool)
        with pytest.raises(DeploymentMissing, match=f"{name} must have a work pool, got none"):
            work_pools.find_pool(client, name)
        with pytest.raises(DeploymentMissing, match=f"The work pool {pool} must exist, got none of that name"):
            PrefectWorkerPool(pool=pool).list_live_workers()


class TestFlowRuns:
    def test_a_run_is_sent_once_for_a_key(self, client: SyncPrefectClient) -> None:
        name = deploy(client, make_pool(client))
        first, again, other = (work_pools.submit_flow_run(client, name, {"at": 1}, key) for key in ("a", "a", "b"))

        assert first.id == again.id != other.id

    def test_what_a_night_has_sent_is_found_in_order_by_its_later_attempt(self, client: SyncPrefectClient) -> None:
        from flows.nightly import find_sent_runs, make_idempotency_key

        name, night = deploy(client, make_pool(client)), str(uuid.uuid4())
        sent = [
            work_pools.submit_flow_run(client, name, {}, make_idempotency_key(night, at, kind)).id
            for at, kind in enumerate(("spot", "on-demand", "spot"))
        ]

        assert list(zip(("spot", "on-demand", "spot"), sent, strict=True)) == [
            (kind, run.id) for kind, run in find_sent_runs(client, night)
        ]
        assert [] == find_sent_runs(client, str(uuid.uuid4()))

    def test_a_worker_is_named_only_while_it_has_the_run(self, client: SyncPrefectClient) -> None:
        run = work_pools.submit_flow_run(client, deploy(client, make_pool(client)), {}, "a").id
        client.update_flow_run_labels(run, {"prefect.worker.name": "one"})
        told = []
        for state in (Pending(), Running(), AwaitingRetry()):
            client.set_flow_run_state(run, state, force=True)
            status = work_pools.read_status(client, run)
            told.append((status.stage, status.worker))

        assert [("waiting", "one"), ("running", "one"), ("waiting", None)] == told

    def test_a_run_that_prefect_does_not_know_is_lost(self, client: SyncPrefectClient) -> None:
        assert "lost" == work_pools.read_status(client, uuid.uuid4()).stage

    def test_a_flow_run_that_runs_drains_and_one_that_is_lost_or_waits_is_cancelled(
        self, client: SyncPrefectClient
    ) -> None:
        name = deploy(client, make_pool(client))
        states = []
        for key, lost in (("runs", False), ("lost", True), ("waits", False)):
            run = work_pools.submit_flow_run(client, name, {}, key).id
            if key != "waits":
                client.set_flow_run_state(run, Running(), force=True)
            work_pools.end_flow_run(client, run, "why", lost=lost)
            states.append(client.read_flow_run(run).state)

        assert ["Cancelling", "Cancelled", "Cancelled"] == [state.name for state in states if state]
        assert {"why"} == {state.message for state in states if state}

    def test_a_flow_run_that_has_ended_by_itself_stays_as_it_is(self, client: SyncPrefectClient) -> None:
        run = work_pools.submit_flow_run(client, deploy(client, make_pool(client)), {}, "a").id
        client.set_flow_run_state(run, Completed(), force=True)
        work_pools.end_flow_run(client, run, "why", lost=True)

        assert "done" == work_pools.read_status(client, run).stage


def a_night(market: Market) -> Night:
    buying = PurchaseOptions(
        spot_price=1, on_demand_price=3, rows_per_second=10, changeover_seconds=5, interval_seconds=0.05
    )
    return Night(rows=100, buying=buying, spot_pool=market, dispatcher=market, count_rows_done=lambda: market.rows)


def test_a_clock_that_jumps_after_the_begin_does_not_move_the_deadline(
    prefect: PrefectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.nightly import run_night

    market = Market(stage="waiting")
    left: list[float] = []
    asked: list[datetime] = []

    def decide(night: Night, machine: Machine, seconds: float) -> tuple[Placement, str]:
        left.append(seconds)
        market.stage = "done" if len(left) == 5 else "running"
        return decide_by_policy(night, machine, seconds)

    def jumping() -> datetime:
        """An hour off, now ahead and now behind, once the night has begun."""
        asked.append(datetime.now(UTC))
        return asked[-1] + timedelta(hours=0 if len(asked) == 1 else (-1) ** len(asked))

    decide_by_policy = Night.decide
    monkeypatch.setattr(Night, "decide", decide)
    began = time.monotonic()
    due = datetime.now(UTC) + timedelta(seconds=600)
    night = a_night(market)
    seconds = run_night(night, due, logging.getLogger(), lambda _: None, is_cancelled=lambda: False, now=jumping)

    assert 5 == len(left)
    assert all(before > after for before, after in pairwise(left))
    # By a clock that does not jump, the night has gone on for no longer than this test.
    assert 0 < max(seconds, 600 - left[-1]) <= time.monotonic() - began
    assert ["spot"] == market.sent


@pytest.mark.parametrize("cancelled", [True, False])
def test_a_night_that_gets_sigterm_ends_its_runs_only_where_it_is_cancelled(
    prefect: PrefectServer, *, cancelled: bool
) -> None:
    from flows.nightly import run_night

    market = Market(stage="waiting")

    def get_sigterm(seconds: float) -> None:
        raise TerminationSignal(signal.SIGTERM)

    due = datetime.now(UTC) + timedelta(seconds=600)
    with pytest.raises(TerminationSignal):
        run_night(
            a_night(market),
            due,
            logging.getLogger(),
            lambda _: None,
            is_cancelled=lambda: cancelled,
            sleep=get_sigterm,
        )

    assert ["spot"] == market.sent
    assert [("The night was cancelled.", False)] * cancelled == market.drained
