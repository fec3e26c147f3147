"""A run of a deployment that its gate refuses leaves its worker while it asks, and goes on as the answer says."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.responses import SetStateStatus

from flows.batch import batch_inference
from infra.local.prefect_server import PrefectServer
from tasks.batch.gate_records import Approval, approve_run
from tasks.batch.gate_rules import Gate
from tasks.batch.options import BatchOptions
from tasks.storage import open_storage
from tests.deployments.conftest import SETTLE_SECONDS, SILENT_SECONDS, StartWorkers
from tests.deployments.flow_runs import read, start, state_of, states, table, wait_for
from tests.eventually import eventually
from tests.support import digests, write_moved

pytestmark = pytest.mark.machines

ASKS = Gate(on_refusal="pause")
OPTIONS = BatchOptions(key_columns=("customer",), batch_size=128, rows_per_chunk=1024, experiment=None, gate=ASKS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """A source whose features moved since the run that is published at a destination."""

    model: str
    source: Path
    destination: Path

    def start(self, gate: Gate) -> UUID:
        """Start a run that is refused, and waits."""
        options = OPTIONS.model_copy(update={"gate": gate})
        return start("adhoc", self.model, self.source, self.destination, options).id

    @property
    def refused(self) -> str:
        """The run that was refused."""
        (refusal,) = self.destination.glob("_overnight/*/refused-*.json")
        return refusal.parent.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A run that asked at a time, the parts that stood then, and one that its worker ran after it."""

    moved: Moved
    run: UUID
    since: float
    parts: dict[str, str]
    other: UUID


def make_moved(model: str, folder: Path) -> Moved:
    batch_inference(model, str(write_moved(folder / "in", 0.0)), str(folder / "scores"), OPTIONS)
    return Moved(model=model, source=write_moved(folder / "in", 5.0), destination=folder / "scores")


@pytest.fixture(scope="module")
def asked(start_workers: StartWorkers, doubling: str, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """A run that nobody answers while other tests have its worker, which runs one flow run at a time."""
    start_workers("overnight", "gate")
    moved = make_moved(doubling, tmp_path_factory.mktemp("asked"))
    run = moved.start(ASKS)
    wait_for(run, "Suspended", "Failed", "Crashed", "Completed")
    since, parts = time.monotonic(), digests(moved.destination)
    source = write_moved(moved.source.parent / "other", 0.0)
    other = start("adhoc", moved.model, source, moved.source.parent / "other-scores", OPTIONS)
    wait_for(other.id, "Completed", "Failed", "Crashed")
    return Asked(moved=moved, run=run, since=since, parts=parts, other=other.id)


@pytest.fixture
def moved(asked: Asked, doubling: str, tmp_path: Path) -> Moved:
    return make_moved(doubling, tmp_path)


def answer(run: UUID, **given: Any) -> None:
    # Prefect takes no answer before it has the form, which follows the state.
    with get_client(sync_client=True) as client:
        eventually(
            lambda: client.resume_flow_run(run, run_input=given),
            lambda resumed: resumed.status == SetStateStatus.ACCEPT,
        )


def list_course(server: PrefectServer, run: UUID) -> list[str]:
    """The states of a flow run in order, without those on the way to Running."""
    return [name for name, _ in states(server, run) if name not in {"Scheduled", "Late", "Pending", "Submitting"}]


def test_it_is_refused_where_it_is_declined_and_where_it_was_approved_by_the_command_it_needs_no_answer(
    deployed: PrefectServer, moved: Moved
) -> None:
    declined = moved.start(ASKS)
    wait_for(declined, "Suspended")
    answer(declined, approve=False, reason="the feed is broken")
    failed = wait_for(declined, "Failed", "Crashed", "Completed")
    approved = moved.start(ASKS)
    wait_for(approved, "Suspended")
    approve_run(open_storage(str(moved.destination)), moved.refused)
    answer(approved)

    assert "Completed" == state_of(wait_for(approved, "Failed", "Crashed", "Completed"))
    assert failed.state is not None
    assert "ApprovalNeeded" in str(failed.state.message)
    assert "was declined: the feed is broken." in str(failed.state.message)


def test_it_fails_where_nobody_answers_in_time_and_the_refusal_stays(deployed: PrefectServer, moved: Moved) -> None:
    run = moved.start(ASKS.model_copy(update={"pause_hours": 0.002}))
    failed = wait_for(run, "Failed", "Crashed", "Completed")

    assert failed.state is not None
    assert ("Failed", "The flow was paused and never resumed.") == (failed.state.name, failed.state.message)
    approve_run(open_storage(str(moved.destination)), moved.refused)
    assert moved.refused == batch_inference(moved.model, str(moved.source), str(moved.destination), OPTIONS).run


def test_it_is_suspended_for_as_long_as_nobody_answers_and_published_once_it_is_approved(
    deployed: PrefectServer, asked: Asked
) -> None:
    run, moved = asked.run, asked.moved
    # Longer than a run may be silent before it counts as lost.
    time.sleep(max(0.0, asked.since + SILENT_SECONDS + 2 * SETTLE_SECONDS - time.monotonic()))

    assert "Completed" == state_of(read(asked.other))
    assert ["Running", "Suspended"] == list_course(deployed, run)
    answer(run, approve=True, approved_by="ada", reason="a new market")
    wait_for(run, "Completed", "Failed", "Crashed")
    (record,) = (moved.destination / "_overnight" / moved.refused).glob("approved-*.json")
    approval = Approval.model_validate_json(record.read_bytes())
    calls = (moved.destination / "_overnight" / moved.refused / "costs").glob("call-*")

    assert ["complete", "paused"] == sorted(json.loads(call.read_bytes())["state"] for call in calls)
    assert ["Running", "Suspended", "Resuming", "Running", "Completed"] == list_course(deployed, run)
    assert ("ada", "a new market") == (approval.approved_by, approval.reason)
    assert "0" == table(deployed, run)["rows scored by this call"]
    assert asked.parts.items() <= digests(moved.destination).items()
