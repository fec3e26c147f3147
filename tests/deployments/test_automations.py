"""A lost machine's run goes on elsewhere, and what can't go on comes to an end: on a real server, with real workers."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from prefect.client.schemas.objects import FlowRun

from infra.local.prefect_server import PrefectServer
from tasks.batch.options import BatchOptions
from tests.deployments.conftest import ATTEMPTS_MAX, SETTLE_SECONDS, StartWorkers
from tests.deployments.flow_runs import machine_of, read, start, start_with, state_of, states, wait_for, wait_until
from tests.support import digests

# 200 chunks of a batch of 50 ms, two at a time: five seconds.
OPTIONS = BatchOptions(
    key_columns=("customer",), batch_size=50, rows_per_chunk=50, slots=2, max_reject_fraction=1, experiment=None
)
PARTS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbed:
    """A run that something has happened to, and how many of its parts stood then."""

    run: FlowRun
    destination: Path
    parts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Befallen:
    """Runs that something happens to, all at once, since most of it is waiting."""

    lost: Disturbed
    drained: Disturbed
    poisoned: FlowRun
    bad: FlowRun


@pytest.fixture(scope="module")
def befallen(
    start_workers: StartWorkers, sleepy: str, poison: str, customers: Path, tmp_path_factory: pytest.TempPathFactory
) -> Befallen:
    """Start the runs, kill the machine of one, tell that of another to go, and let the others end by themselves."""
    folder = tmp_path_factory.mktemp("befallen")
    names = {pool: (f"{pool}-1", f"{pool}-2") for pool in ("overnight-spot", "overnight-on-demand")}
    with ThreadPoolExecutor() as threads:
        started = list(threads.map(lambda pool: start_workers(pool, *names[pool]), names))
    workers = {
        name: worker
        for pool, found in zip(names, started, strict=True)
        for name, worker in zip(names[pool], found, strict=True)
    }

    def disturbed(deployment: str, act: str) -> Disturbed:
        run = start(deployment, sleepy, customers, folder / act, OPTIONS)
        wait_until(lambda: parts(folder / act) > PARTS // 10, f"{PARTS // 10} parts are written")
        getattr(workers[machine_of(run.id)], act)()
        return Disturbed(run=run, destination=folder / act, parts=parts(folder / act))

    with ThreadPoolExecutor() as threads:
        # In threads that know this one's server.
        lost, drained = (
            future.result()
            for future in [
                threads.submit(copy_context().run, disturbed, deployment, act)
                for deployment, act in (("spot", "kill"), ("on-demand", "stop"))
            ]
        )
    ray = {"key_columns": ["customer"], "runner": {"kind": "ray", "address": "10.0.0.1:6379"}}
    return Befallen(
        lost=lost,
        drained=drained,
        poisoned=start("on-demand", poison, customers, folder / "poison", OPTIONS),
        bad=start_with(
            "batch-inference/on-demand",
            model=poison,
            source=str(customers),
            destination=str(folder / "bad"),
            options=ray,
        ),
    )


@pytest.fixture(scope="module")
def undisturbed(befallen: Befallen, sleepy: str, customers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from flows.batch import batch_inference

    destination = tmp_path_factory.mktemp("undisturbed")
    batch_inference(sleepy, str(customers), str(destination), OPTIONS)
    return destination


def parts(destination: Path) -> int:
    return len(list(destination.glob("run=*/*.parquet")))


def course(server: PrefectServer, run: FlowRun) -> list[str]:
    """The states of a flow run in order, without those on the way to Running."""
    on_the_way = {"Scheduled", "Late", "Pending", "Submitting"}
    return [name for name, _ in states(server, run.id) if name not in on_the_way]


def test_the_run_of_a_worker_that_is_stopped_is_completed_by_another_to_the_same_bytes(
    deployed: PrefectServer, befallen: Befallen, undisturbed: Path
) -> None:
    drained = befallen.drained
    wait_for(drained.run.id, "Completed", "Failed")

    assert ["Running", "AwaitingRetry", "Running", "Completed"] == course(deployed, drained.run)
    assert drained.parts < PARTS
    assert digests(undisturbed) == digests(drained.destination)


@pytest.mark.machines
def test_a_run_that_is_killed_with_its_worker_is_completed_by_another_to_the_same_bytes(
    deployed: PrefectServer, befallen: Befallen, undisturbed: Path
) -> None:
    lost = befallen.lost
    done = wait_for(lost.run.id, "Completed", "Failed")

    assert ["Running", "Crashed", "AwaitingRetry", "Running", "Completed"] == course(deployed, lost.run)
    assert 2 == done.run_count
    assert lost.parts < PARTS
    assert digests(undisturbed) == digests(lost.destination)


@pytest.mark.machines
def test_a_run_that_always_kills_its_process_is_given_up(deployed: PrefectServer, befallen: Befallen) -> None:
    run = befallen.poisoned.id
    wait_until(lambda: read(run).run_count == ATTEMPTS_MAX, "the last attempt began")
    crashed = wait_for(run, "Crashed").state
    assert crashed is not None
    # Long enough for another attempt, if there were to be one.
    settled = 2 * SETTLE_SECONDS - (datetime.now(UTC) - crashed.timestamp).total_seconds()
    time.sleep(max(settled, 0.0))

    assert ("Crashed", ATTEMPTS_MAX) == (state_of(read(run)), read(run).run_count)
    assert ATTEMPTS_MAX == [name for name, _ in states(deployed, run)].count("Running")


def test_a_run_that_can_not_take_its_parameters_is_not_run_again(deployed: PrefectServer, befallen: Befallen) -> None:
    # By now all others have been run again that are to be.
    ended = wait_for(befallen.bad.id, "Crashed", "Failed")

    assert ended.state is not None
    assert "slots must say how many forward passes the Ray cluster runs" in str(ended.state.message)
    assert (0, 1) == (ended.run_count, [name for name, _ in states(deployed, ended.id)].count("Pending"))
