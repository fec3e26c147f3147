"""A night on two real pools: spot machines come and go as a trace says, and the run is done by its deadline."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client

from infra.local.prefect_server import PrefectServer, PrefectWorker
from tasks.batch.manifest import open_predictions
from tasks.batch.options import BatchOptions
from tasks.spot.purchase import PurchaseOptions
from tests.deployments.conftest import StartWorkers
from tests.deployments.flow_runs import machine_of, start_with, state_of, wait_for
from tests.eventually import eventually
from tests.support import digests

pytestmark = pytest.mark.machines

# 10,000 customers at 50 ms for 50 of them, two at a time, are 5 s of work; with 20 customers a batch 12.5 s.
OPTIONS = BatchOptions(
    key_columns=("customer",), batch_size=10, rows_per_chunk=50, slots=2, max_reject_fraction=1, experiment=None
)
BUYING = PurchaseOptions(spot_price=1, on_demand_price=3, changeover_seconds=10, interval_seconds=1)


def soon(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


@contextmanager
def taken_when(happened: Callable[[], bool], machine: PrefectWorker) -> Generator[None]:
    """Have a machine vanish, with all that runs on it, once something has happened."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            if happened():
                machine.kill()
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_run_whose_spot_machine_is_taken_is_moved_and_done_in_time_to_the_same_bytes(
    deployed: PrefectServer, start_workers: StartWorkers, sleepy: str, customers: Path, tmp_path: Path
) -> None:
    from flows.batch import batch_inference
    from flows.nightly import nightly_inference

    (spot,) = start_workers("overnight-spot", "taken", heartbeat_seconds=4)
    (on_demand,) = start_workers("overnight-on-demand", "kept")
    destination = tmp_path / "scores"

    with on_demand, taken_when(lambda: len(list(destination.glob("run=*/part-*"))) > 20, spot):
        # Too little slack to wait for spot to come back.
        report = nightly_inference(sleepy, str(customers), str(destination), soon(110), BUYING, OPTIONS)

    # A busy machine may keep the worker's heartbeats waiting, and spot is then left and found again.
    placements = [move.to for move in report.moves if move.to != "nowhere"]
    assert ("spot", "on-demand") == (placements[0], placements[-1])
    assert report.slack_seconds > 0
    assert report.rows == 10_000
    assert 0 < report.rows_recomputed_max <= 100
    assert 0 < report.cost == pytest.approx((report.spot_seconds + 3 * report.on_demand_seconds) / 3600)
    batch_inference(sleepy, str(customers), str(tmp_path / "undisturbed"), OPTIONS)
    assert digests(tmp_path / "undisturbed") == digests(destination)

    again = nightly_inference(sleepy, str(customers), str(destination), soon(60), BUYING, OPTIONS)

    assert again.moves == ()
    assert again.cost == 0


def test_a_night_on_two_machines_takes_over_its_flow_runs_after_its_own_worker_was_stopped(
    deployed: PrefectServer, start_workers: StartWorkers, sleepy: str, customers: Path, tmp_path: Path
) -> None:
    from flows.nightly import find_sent_runs

    watchers = dict(zip(("watch-1", "watch-2"), start_workers("overnight", "watch-1", "watch-2"), strict=True))
    spot = start_workers("overnight-spot", "both-1", "both-2")
    destination = tmp_path / "scores"
    night = start_with(
        "nightly-inference/by-deadline",
        model=sleepy,
        source=str(customers),
        destination=str(destination),
        deadline=soon(400),
        buying=BUYING.model_dump(mode="json"),
        options=OPTIONS.model_copy(update={"workers": 2}).model_dump(mode="json"),
    )
    eventually(lambda: len(list(destination.glob("run=*/part-*"))), lambda seen: seen > 20, seconds=400)
    watchers[machine_of(night.id)].stop()
    ended = wait_for(night.id, "Completed", "Failed")
    for worker in (*watchers.values(), *spot):
        worker.stop()
    with get_client(sync_client=True) as client:
        sent = find_sent_runs(client, str(night.id))

    assert ("Completed", 2) == (state_of(ended), ended.run_count)
    assert ["spot", "spot"] == [kind for kind, _ in sent]
    assert {"both-1", "both-2"} == {machine_of(run.id) for _, run in sent}
    assert list(range(10_000)) == sorted(open_predictions(str(destination)).collect()["customer"])
