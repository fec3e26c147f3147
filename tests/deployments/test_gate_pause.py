"""A run of a deployment that its gate refuses leaves its worker while it asks, and goes on as the answer says."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import pytest
from prefect.flow_runs import resume_flow_run

from infra.local.prefect_server import PrefectServer
from tasks.batch.gate_records import Approval, approve_run
from tasks.batch.gate_rules import Gate
from tasks.batch.options import BatchOptions
from tasks.storage import open_storage
from tests.deployments.conftest import SETTLE_SECONDS, SILENT_SECONDS, StartWorkers
from tests.deployments.flow_runs import read, start, state_of, states, table, wait_for
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


@pytest.fixture(scope="module")
def one_worker(start_workers: StartWorkers) -> None:
    """One worker, which runs one flow run at a time."""
    start_workers("overnight", "gate")


@pytest.fixture
def moved(one_worker: None, linear: str, tmp_path: Path) -> Moved:
    from flows.batch import batch_inference

    batch_inference(linear, str(write_moved(tmp_path / "in", 0.0)), str(tmp_path / "scores"), OPTIONS)
    return Moved(model=linear, source=write_moved(tmp_path / "in", 5.0), destination=tmp_path / "scores")


def list_course(server: PrefectServer, run: UUID) -> list[str]:
    """The states of a flow run in order, without those on the way to Running."""
    return [name for name, _ in states(server, run) if name not in {"Scheduled", "Late", "Pending", "Submitting"}]


def test_it_is_suspended_for_as_long_as_nobody_answers_and_published_once_it_is_approved(
    deployed: PrefectServer, moved: Moved
) -> None:
    run = moved.start(ASKS)
    wait_for(run, "Suspended", "Failed", "Crashed", "Completed")
    parts = digests(moved.destination)
    other = start("adhoc", moved.model, write_moved(moved.source.parent / "other", 0.0), moved.destination, OPTIONS)
    wait_for(other.id, "Completed", "Failed", "Crashed")
    # Longer than a run may be silent before it counts as lost.
    time.sleep(SILENT_SECONDS + 2 * SETTLE_SECONDS)

    assert "Completed" == state_of(read(other.id))
    assert ["Running", "Suspended"] == list_course(deployed, run)
    resume_flow_run(run, run_input={"approve": True, "approved_by": "ada", "reason": "a new market"})
    wait_for(run, "Completed", "Failed", "Crashed")
    (record,) = (moved.destination / "_overnight" / moved.refused).glob("approved-*.json")
    approval = Approval.model_validate_json(record.read_bytes())
    calls = (moved.destination / "_overnight" / moved.refused / "costs").iterdir()

    assert ["complete", "paused"] == sorted(json.loads(call.read_bytes())["state"] for call in calls)
    assert ["Running", "Suspended", "Resuming", "Running", "Completed"] == list_course(deployed, run)
    assert ("ada", "a new market") == (approval.approved_by, approval.reason)
    assert "0" == table(deployed, run)["rows scored by this call"]
    assert parts.items() <= digests(moved.destination).items()


def test_it_is_refused_where_it_is_declined_and_where_it_was_approved_by_the_command_it_needs_no_answer(
    deployed: PrefectServer, moved: Moved
) -> None:
    declined = moved.start(ASKS)
    wait_for(declined, "Suspended")
    resume_flow_run(declined, run_input={"approve": False, "reason": "the feed is broken"})
    failed = wait_for(declined, "Failed", "Crashed", "Completed")
    approved = moved.start(ASKS)
    wait_for(approved, "Suspended")
    approve_run(open_storage(str(moved.destination)), moved.refused)
    resume_flow_run(approved, run_input={})

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
    again = moved.start(ASKS)
    assert "Completed" == state_of(wait_for(again, "Suspended", "Failed", "Crashed", "Completed"))
