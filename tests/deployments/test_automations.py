"""A lost machine's run goes on elsewhere, and what can't go on comes to an end: on a real server, with real workers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.server.events.schemas.automations import EventTrigger
from prefect.states import Crashed, InfrastructurePending, Pending, Running, State, Submitting

from deployments.apply import deploy
from deployments.automations import make_automations
from infra.local.prefect_server import PrefectServer, PrefectWorker
from tasks.batch.options import BatchOptions
from tests.deployments.conftest import ATTEMPTS_MAX, AUTOMATIONS, SETTLE_SECONDS, StartWorkers
from tests.deployments.flow_runs import machine_of, read, start, start_with, state_of, states, wait_for
from tests.eventually import eventually
from tests.support import digests

# 200 chunks of a batch of 50 ms, two at a time: five seconds.
OPTIONS = BatchOptions(
    key_columns=("customer",), batch_size=50, rows_per_chunk=50, slots=2, max_reject_fraction=1, experiment=None
)
PARTS = 200


# Workers whose runs are stopped and killed.
pytestmark = pytest.mark.machines


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbed:
    """A run that something has happened to, and how many of its parts stood then."""

    run: FlowRun
    destination: Path
    parts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """A run whose worker was told to go, and one that can't take its parameters, which waits for the other worker."""

    disturbed: Disturbed
    bad: FlowRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Killed:
    """A run that was killed with its worker, and one that kills its process, both for the worker that is left."""

    lost: Disturbed
    poisoned: FlowRun


def start_pair(start_workers: StartWorkers, pool: str) -> dict[str, PrefectWorker]:
    """Start two workers of a pool: one for what is to happen, and one that goes on."""
    names = (f"{pool}-1", f"{pool}-2")
    return dict(zip(names, start_workers(pool, *names), strict=True))


def disturb(
    workers: dict[str, PrefectWorker], deployment: str, act: str, model: str, source: Path, destination: Path
) -> Disturbed:
    """Start a run, and have the worker that took it do something once a tenth of its parts are written."""
    run = start(deployment, model, source, destination, OPTIONS)
    eventually(lambda: parts(destination), lambda seen: seen > PARTS // 10, seconds=400)
    getattr(workers[machine_of(run.id)], act)()
    return Disturbed(run=run, destination=destination, parts=parts(destination))


@pytest.fixture(scope="module")
def killed(
    start_workers: StartWorkers, sleepy: str, poison: str, customers: Path, tmp_path_factory: pytest.TempPathFactory
) -> Killed:
    folder = tmp_path_factory.mktemp("killed")
    workers = start_pair(start_workers, "overnight-spot")
    lost = disturb(workers, "spot", "kill", sleepy, customers, folder / "kill")
    return Killed(lost=lost, poisoned=start("spot", poison, customers, folder / "poison", OPTIONS))


@pytest.fixture(scope="module")
def stopped(
    killed: Killed,
    start_workers: StartWorkers,
    sleepy: str,
    poison: str,
    customers: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Stopped:
    # Meanwhile the killed run is silent for long enough to be seen as lost.
    folder = tmp_path_factory.mktemp("stopped")
    workers = start_pair(start_workers, "overnight-on-demand")
    disturbed = disturb(workers, "on-demand", "stop", sleepy, customers, folder / "stop")
    ray = {"key_columns": ["customer"], "runner": {"kind": "ray", "address": "10.0.0.1:6379"}}
    bad = start_with(
        "batch-inference/on-demand",
        model=poison,
        source=str(customers),
        destination=str(folder / "bad"),
        options=ray,
    )
    return Stopped(disturbed=disturbed, bad=bad)


@pytest.fixture(scope="module")
def undisturbed(
    deployed: PrefectServer, sleepy: str, customers: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
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


@pytest.fixture
def impatient(deployed: PrefectServer) -> Generator[None]:
    """Have the server start runs again as soon as Prefect lets it; afterwards as in the other tests."""
    asyncio.run(deploy(automations=make_automations(settle_seconds=SETTLE_SECONDS, start_seconds=SETTLE_SECONDS)))
    yield
    asyncio.run(deploy(automations=AUTOMATIONS))


def start_untaken(tmp_path: Path, *states: State) -> FlowRun:
    """Start a run of a pool that has no worker, and take it through some states."""
    run = start("spot", "models:/untaken/1", tmp_path, tmp_path, OPTIONS)
    with get_client(sync_client=True) as client:
        for state in states:
            client.set_flow_run_state(run.id, state, force=True)
    return run


def test_what_crashed_or_did_not_begin_is_scheduled_again_once(
    deployed: PrefectServer, impatient: None, tmp_path: Path
) -> None:
    crashed = [start_untaken(tmp_path, Pending(), Running(), Crashed()) for _ in range(3)]
    unstarted = start_untaken(tmp_path, Pending(), Submitting())
    pod = start_untaken(tmp_path, Pending(), Submitting(), InfrastructurePending())
    for run in (*crashed, unstarted):
        wait_for(run.id, "AwaitingRetry", "Late")
    # Events are looked at in order: by the time that a later one has had its effect, those before have had theirs.
    last = start_untaken(tmp_path, Pending(), Running(), Crashed())
    wait_for(last.id, "AwaitingRetry", "Late")
    courses = [course(deployed, run) for run in (*crashed, unstarted, pod)]
    with get_client(sync_client=True) as client:
        for run in (*crashed, unstarted, pod, last):
            client.delete_flow_run(run.id)

    assert [*[["Running", "Crashed", "AwaitingRetry"]] * 3, ["AwaitingRetry"], ["InfrastructurePending"]] == courses


def test_an_automation_that_schedules_a_run_is_not_set_off_by_it() -> None:
    triggers = [EventTrigger.model_validate(each.trigger.model_dump()) for each in make_automations()[1:]]

    assert [False, False] == [trigger.expects("prefect.flow-run.AwaitingRetry") for trigger in triggers]
    assert [True, True] == [trigger.expects("prefect.flow-run.Running") for trigger in triggers]


def test_the_run_of_a_worker_that_is_stopped_is_completed_by_another_to_the_same_bytes(
    deployed: PrefectServer, stopped: Stopped, undisturbed: Path
) -> None:
    disturbed = stopped.disturbed
    wait_for(disturbed.run.id, "Completed", "Failed")

    assert ["Running", "AwaitingRetry", "Running", "Completed"] == course(deployed, disturbed.run)
    assert disturbed.parts < PARTS
    assert digests(undisturbed) == digests(disturbed.destination)


def test_a_run_that_is_killed_with_its_worker_is_completed_by_another_to_the_same_bytes(
    deployed: PrefectServer, killed: Killed, undisturbed: Path
) -> None:
    lost = killed.lost
    done = wait_for(lost.run.id, "Completed", "Failed")

    assert ["Running", "Crashed", "AwaitingRetry", "Running", "Completed"] == course(deployed, lost.run)
    assert 2 == done.run_count
    assert lost.parts < PARTS
    assert digests(undisturbed) == digests(lost.destination)


def test_a_run_that_always_kills_its_process_is_given_up(deployed: PrefectServer, killed: Killed) -> None:
    run = killed.poisoned.id
    eventually(lambda: read(run).run_count, lambda seen: seen == ATTEMPTS_MAX, seconds=400)
    crashed = wait_for(run, "Crashed").state
    assert crashed is not None
    # Long enough for another attempt, if there were to be one.
    settled = 2 * SETTLE_SECONDS - (datetime.now(UTC) - crashed.timestamp).total_seconds()
    time.sleep(max(settled, 0.0))

    assert ("Crashed", ATTEMPTS_MAX) == (state_of(read(run)), read(run).run_count)
    assert ATTEMPTS_MAX == [name for name, _ in states(deployed, run)].count("Running")


def test_a_run_that_can_not_take_its_parameters_is_not_run_again(deployed: PrefectServer, stopped: Stopped) -> None:
    # By now the other has been run again.
    ended = wait_for(stopped.bad.id, "Crashed", "Failed")

    assert ended.state is not None
    assert "slots must say how many forward passes the Ray cluster runs" in str(ended.state.message)
    assert (0, 1) == (ended.run_count, [name for name, _ in states(deployed, ended.id)].count("Pending"))
