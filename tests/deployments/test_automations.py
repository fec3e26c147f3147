"""A lost machine's run goes on elsewhere, and what can't go on comes to an end: on a real server, with real workers."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from prefect.client.schemas.objects import FlowRun

from infra.local.prefect_server import PrefectServer
from infra.local.prefect_worker import PrefectWorker
from infra.processes import family
from tasks.batch.options import BatchOptions
from tests.deployments.conftest import ATTEMPTS_MAX, SETTLED_SECONDS, StartWorkers
from tests.deployments.flow_runs import read, start, start_with, state_of, states, wait_for, wait_until
from tests.support import digests

pytestmark = pytest.mark.machines

OPTIONS = BatchOptions(
    key_columns=("customer",), batch_size=50, rows_per_chunk=50, slots=2, max_reject_fraction=1, experiment=None
)
# A worker alone is two processes; with a flow run in hand there are two more.
PROCESSES_IDLE = 2


@pytest.fixture(scope="module")
def fallen(
    two_workers: list[PrefectWorker],
    poison: str,
    customers: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[FlowRun, FlowRun]:
    """A run whose model kills its process, and one with parameters that only the flow itself refuses."""
    destination = tmp_path_factory.mktemp("fallen")
    bad = {"key_columns": ["customer"], "runner": {"kind": "ray", "address": "10.0.0.1:6379"}}
    return (
        start("adhoc", poison, customers, destination / "poison", OPTIONS),
        start_with("adhoc", model=poison, source=str(customers), destination=str(destination / "bad"), options=bad),
    )


def test_a_run_that_is_killed_with_its_worker_is_completed_by_another_to_the_same_bytes(
    deployed: PrefectServer,
    start_workers: StartWorkers,
    fallen: tuple[FlowRun, FlowRun],
    sleepy: str,
    customers: Path,
    tmp_path: Path,
) -> None:
    from flows.batch import batch_inference

    workers = start_workers("overnight-spot", "first", "second")
    run = start("spot", sleepy, customers, tmp_path / "killed", OPTIONS)
    wait_until(lambda: len(list((tmp_path / "killed").glob("run=*/*.parquet"))) > 20, "20 parts are written")
    (busy,) = [worker for worker in workers if len(family(worker.process.pid)) > PROCESSES_IDLE]
    busy.kill()
    standing = len(list((tmp_path / "killed").glob("run=*/*.parquet")))
    done = wait_for(run.id, "Completed", "Failed")

    # No other test is to find a machine of this one.
    for worker in workers:
        worker.stop()
    seen = states(deployed, run.id)
    names = [name for name, _ in seen if name not in {"Scheduled", "Pending", "Submitting"}]
    assert ["Running", "Crashed", "AwaitingRetry", "Running", "Completed"] == names
    assert 2 == done.run_count
    assert standing < 200
    batch_inference(sleepy, str(customers), str(tmp_path / "undisturbed"), OPTIONS)
    assert digests(tmp_path / "undisturbed") == digests(tmp_path / "killed")


def test_a_run_that_always_kills_its_process_is_given_up(
    deployed: PrefectServer, fallen: tuple[FlowRun, FlowRun]
) -> None:
    poisoned, _ = fallen
    wait_until(lambda: read(poisoned.id).run_count == ATTEMPTS_MAX, "the last attempt began")
    wait_for(poisoned.id, "Crashed")
    time.sleep(2 * SETTLED_SECONDS)

    assert ("Crashed", ATTEMPTS_MAX) == (state_of(read(poisoned.id)), read(poisoned.id).run_count)
    assert ATTEMPTS_MAX == [name for name, _ in states(deployed, poisoned.id)].count("Running")


def test_a_run_that_can_not_take_its_parameters_is_not_run_again(
    deployed: PrefectServer, fallen: tuple[FlowRun, FlowRun]
) -> None:
    _, bad = fallen
    ended = wait_for(bad.id, "Crashed", "Failed")

    assert ended.state is not None
    assert "slots must say how many forward passes the Ray cluster runs" in str(ended.state.message)
    assert (0, 1) == (read(bad.id).run_count, [name for name, _ in states(deployed, bad.id)].count("Pending"))
