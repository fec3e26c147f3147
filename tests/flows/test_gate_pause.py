"""A run that its gate refuses asks for approval in Prefect, waits for the answer, and does as it says."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import SetStateStatus
from prefect.context import FlowRunContext
from prefect.input.actions import read_flow_run_input
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE, temporary_settings

from flows.runtime.run_gate import open_gate
from flows.runtime.steps import Steps
from serving.errors import ApprovalNeeded, BadInput
from tasks.batch.column_statistics import write_statistics
from tasks.batch.gate_records import Approval, approve_run, find_statistics
from tasks.batch.gate_rules import Gate, MeanShiftRule, StatisticsFile
from tasks.batch.manifest import find_complete_manifest, find_manifest
from tasks.batch.options import BatchOptions
from tasks.batch.report import BatchReport
from tasks.storage import open_storage
from tests.eventually import eventually
from tests.support import write_moved
from tests.tasks.batch.small import a_plan, numbers, put

pytestmark = pytest.mark.usefixtures("prefect")

ASKS = Gate(on_refusal="pause", pause_hours=0.02)
OPTIONS = BatchOptions(key_columns=("customer",), batch_size=128, rows_per_chunk=1024, experiment=None, gate=ASKS)
SECONDS_MAX = 60.0

Answer = Callable[[FlowRun], dict[str, object]]


def infer(model: str, source: Path, destination: Path, options: BatchOptions = OPTIONS) -> BatchReport:
    from flows.batch import batch_inference

    return batch_inference(model, str(source), str(destination), options)


@pytest.fixture
def moved(linear: str, tmp_path: Path) -> Path:
    """A source whose features moved since the run that is published at `scores` beside it."""
    infer(linear, write_moved(tmp_path / "in", 0.0), tmp_path / "scores")
    return write_moved(tmp_path / "in", 5.0)


def find_paused(client: SyncPrefectClient, destination: Path) -> FlowRun | None:
    paused = FlowRunFilter.model_validate({"state": {"type": {"any_": ["PAUSED"]}}})
    found = client.read_flow_runs(flow_run_filter=paused)
    return next((run for run in found if run.parameters.get("destination") == str(destination)), None)


@contextmanager
def answering(destination: Path, *answers: Answer) -> Generator[list[FlowRun]]:
    """Resume the run of a destination once for each answer, as a person does; yield the flow runs as they waited."""
    asked: list[FlowRun] = []

    def answer_all() -> None:
        with get_client(sync_client=True) as client:
            for answer in answers:
                run = eventually(lambda: find_paused(client, destination), seconds=SECONDS_MAX)
                assert run is not None
                given = answer(run)
                # Prefect takes no answer before it has the form, which follows the state.
                eventually(
                    lambda run=run, given=given: client.resume_flow_run(run.id, run_input=given),
                    lambda resumed: resumed.status == SetStateStatus.ACCEPT,
                )
                asked.append(run)

    with ThreadPoolExecutor(1) as threads:
        # With the settings that say where the server is.
        answered = threads.submit(copy_context().run, answer_all)
        try:
            yield asked
        finally:
            # Where this failed, it is why the run had no answer.
            answered.result()


def read_question(run: FlowRun) -> str:
    """Return what a paused run asks, as Prefect's page shows it."""
    assert run.state is not None
    keys = run.state.state_details.run_input_keyset
    assert keys is not None
    # The question follows the state, too.
    return str(eventually(lambda: read_flow_run_input(keys["description"], run.id), lambda found: found is not None))


def list_states(flow_run: UUID) -> list[str]:
    with get_client(sync_client=True) as client:
        states = client.read_flow_run_states(flow_run)
    return [str(state.name) for state in sorted(states, key=lambda state: state.timestamp)]


def test_a_run_that_is_approved_in_prefect_is_published_with_who_and_why(
    linear: str, moved: Path, tmp_path: Path
) -> None:
    questions: list[str] = []

    def approve(run: FlowRun) -> dict[str, object]:
        questions.append(read_question(run))
        return {"approve": True, "approved_by": "the team", "reason": "prices were raised"}

    with answering(tmp_path / "scores", approve) as asked:
        report = infer(linear, moved, tmp_path / "scores")
    (record,) = (tmp_path / "scores/_overnight" / report.run).glob("approved-*.json")
    approval = Approval.model_validate_json(record.read_bytes())

    assert ("scored", 2_000) == (report.status, report.rows)
    assert ("the team", "prices were raised") == (approval.approved_by, approval.reason)
    assert any("output score: mean" in finding for finding in approval.findings)
    assert f"Run `{report.run}` must keep the rules of its gate to be published. Beside run " in questions[0]
    assert "- output score: mean" in questions[0]
    assert ["Pending", "Running", "Paused", "Running", "Completed"] == list_states(asked[0].id)


def test_a_run_that_is_declined_is_refused_and_may_be_approved_by_the_command_later(
    linear: str, moved: Path, tmp_path: Path
) -> None:
    storage = open_storage(str(tmp_path / "scores"))
    with (
        answering(tmp_path / "scores", lambda _: {"approved_by": "ada", "reason": "the feed is broken"}),
        pytest.raises(ApprovalNeeded, match=r"was declined by ada: the feed is broken\.") as refused,
    ):
        infer(linear, moved, tmp_path / "scores")
    run = str(refused.value).split()[1]
    assert find_manifest(storage, run) is None
    approve_run(storage, run)
    report = infer(linear, moved, tmp_path / "scores")

    assert len(str(refused.value).splitlines()) <= 12
    assert (run, 0) == (report.run, report.rows_scored)


def test_a_run_that_nobody_answers_in_time_is_refused_with_what_it_breaks(
    linear: str, moved: Path, tmp_path: Path
) -> None:
    from flows.batch import batch_inference

    options = OPTIONS.model_copy(update={"gate": ASKS.model_copy(update={"pause_hours": 0.0005})})
    state = batch_inference(linear, str(moved), str(tmp_path / "scores"), options, return_state=True)

    with pytest.raises(ApprovalNeeded, match=r"had no answer within 0\.0005 h\. Correct the data"):
        state.result()
    assert ("Failed", True) == (state.name, "breaks" in str(state.message))
    assert state.state_details.flow_run_id is not None
    assert "Paused" in list_states(state.state_details.flow_run_id)


def test_a_run_that_was_approved_by_the_command_meanwhile_needs_no_answer(
    linear: str, moved: Path, tmp_path: Path
) -> None:
    storage = open_storage(str(tmp_path / "scores"))

    def approve(_: FlowRun) -> dict[str, object]:
        (refusal,) = (tmp_path / "scores/_overnight").glob("*/refused-*.json")
        approve_run(storage, refusal.parent.name, "the team")
        return {}

    with answering(tmp_path / "scores", approve):
        report = infer(linear, moved, tmp_path / "scores")

    assert "scored" == report.status
    assert find_manifest(storage, report.run) is not None


def test_an_answer_is_to_what_was_asked_and_other_findings_are_asked_about_again(linear: str, tmp_path: Path) -> None:
    first = infer(linear, write_moved(tmp_path / "in", 0.0), tmp_path / "scores")
    second = infer(
        linear,
        write_moved(tmp_path / "in", 1.0),
        tmp_path / "scores",
        OPTIONS.model_copy(update={"gate": Gate(rules=())}),
    )
    storage = open_storage(str(tmp_path / "scores"))
    baseline = tmp_path / "baseline.json"
    runs = [find_complete_manifest(storage, report.run, "") for report in (first, second)]
    older, newer = (find_statistics(storage, run) for run in runs)
    assert older is not None
    assert newer is not None
    baseline.write_bytes(write_statistics(older))
    rules = (MeanShiftRule(columns="a", severity="refuse"),)
    gate = ASKS.model_copy(update={"baseline": StatisticsFile(address=str(baseline)), "rules": rules})

    def approve_and_change(_: FlowRun) -> dict[str, object]:
        baseline.write_bytes(write_statistics(newer))
        return {"approve": True}

    with (
        answering(tmp_path / "scores", approve_and_change, lambda _: {"reason": "that is another one"}) as asked,
        pytest.raises(ApprovalNeeded, match="was declined: that is another one"),
    ):
        infer(linear, write_moved(tmp_path / "in", 9.0), tmp_path / "scores", OPTIONS.model_copy(update={"gate": gate}))

    assert 2 == len({str(run.state.state_details.pause_key) for run in asked if run.state})
    assert 1 == len({run.id for run in asked})


def test_of_several_flow_runs_on_one_run_those_that_joined_ask_nobody(linear: str, moved: Path, tmp_path: Path) -> None:
    fails = OPTIONS.model_copy(update={"gate": Gate()})
    before = set((tmp_path / "scores/_overnight/starts").iterdir())
    with pytest.raises(ApprovalNeeded):
        infer(linear, moved, tmp_path / "scores", fails)
    (started,) = set((tmp_path / "scores/_overnight/starts").iterdir()) - before
    joins = OPTIONS.model_copy(update={"joins": UUID(started.stem)})

    with pytest.raises(ApprovalNeeded, match=f"Flow run {started.stem}, which it has joined, may ask for approval"):
        infer(linear, moved, tmp_path / "scores", joins)


def test_a_run_that_is_to_ask_needs_a_server_that_stays(tmp_path: Path) -> None:
    from flows.batch import batch_inference

    plan = a_plan(put(f"{tmp_path}/in", {"a.parquet": numbers(0, 25)}), f"{tmp_path}/out")
    storage = open_storage(f"{tmp_path}/out")
    run = FlowRun(flow_id=uuid4())
    with (
        FlowRunContext.model_construct(flow=batch_inference, flow_run=run, parameters={}),
        temporary_settings({PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: True}, restore_defaults={PREFECT_API_URL}),
        pytest.raises(BadInput, match="a Prefect server that people can reach, but PREFECT_API_URL names none"),
    ):
        open_gate(plan, storage, OPTIONS, Steps(), None)  # type: ignore[arg-type]  # it logs nothing before that


def test_a_night_that_would_wait_for_a_person_is_refused(linear: str, moved: Path, tmp_path: Path) -> None:
    from flows.nightly import nightly_inference
    from tasks.spot.purchase import PurchaseOptions

    buying = PurchaseOptions(spot_price=1, on_demand_price=3)
    with pytest.raises(BadInput, match="The gate of a night must fail a run that it refuses"):
        nightly_inference(linear, str(moved), str(tmp_path / "scores"), "06:00", buying, OPTIONS)
