"""A night whose own worker is stopped goes on at another one with the flow runs that it had sent."""

from __future__ import annotations

from pathlib import Path

import pytest
from prefect.client.orchestration import get_client

from infra.local.prefect_server import PrefectServer
from tasks.batch.manifest import open_predictions
from tests.deployments.conftest import StartWorkers
from tests.deployments.flow_runs import machine_of, start_with, state_of, wait_for
from tests.deployments.test_nightly import BUYING, OPTIONS, soon
from tests.eventually import eventually

pytestmark = pytest.mark.machines


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
