"""Backfills on a real Prefect server: order, limit, what is passed over, what fails, what goes on after a kill."""

from __future__ import annotations

import json
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterKey,
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
)
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.states import Completed, Failed, Running

from infra.local.prefect_server import PrefectServer
from serving.errors import AlreadyRunning, BackfillFailed, BadInput, DeploymentMissing
from tasks.batch.backfill import BackfillOptions, BackfillReport, Partitions, Piece, TableVersions, open_backfill
from tasks.batch.manifest import open_predictions
from tasks.batch.options import BatchOptions
from tasks.batch.ownership import Owner, own_destination
from tasks.storage import open_storage
from tests.eventually import PROCESS_SECONDS, eventually
from tests.flows.children import start_child
from tests.support import write_customers

pytestmark = pytest.mark.usefixtures("serverless")

OPTIONS = BatchOptions(key_columns=("customer",), batch_size=128, rows_per_chunk=256, experiment=None)
ALL = Partitions(column="date")
DAYS = ("2026-11-01", "2026-11-02", "2026-11-03", "2026-11-04")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for at, day in enumerate(DAYS):
        write_customers(tmp_path / f"in/date={day}", rows=200 + at, files=1, rows_per_group=100)
    return tmp_path / "in"


@pytest.fixture
def client(prefect: PrefectServer) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


def fill(
    model: str, source: Path, destination: Path, how: BackfillOptions | None = None, pieces: Any = ALL
) -> BackfillReport:
    from flows.backfill import backfill_inference

    return backfill_inference(model, str(source), str(destination), pieces, how or BackfillOptions(), OPTIONS)


def states_of(report: BackfillReport) -> dict[str, str]:
    return {piece.piece.removeprefix("date="): piece.state for piece in report.pieces}


def read_table(client: SyncPrefectClient) -> list[dict[str, str]]:
    """Return the newest table of pieces that Prefect has."""
    by_key = ArtifactFilter(key=ArtifactFilterKey(any_=["backfill"]))
    (newest, *_) = sorted(client.read_artifacts(artifact_filter=by_key), key=lambda each: each.updated, reverse=True)
    rows: list[dict[str, str]] = json.loads(str(newest.data))
    return rows


@pytest.mark.parametrize("order", ["newest", "oldest"])
def test_every_piece_is_a_run_of_its_own_in_the_order_that_is_asked_for(
    doubling: str, source: Path, tmp_path: Path, client: SyncPrefectClient, order: Any
) -> None:
    report = fill(doubling, source, tmp_path / "out", BackfillOptions(order=order))
    planned = {
        day: json.loads(next((tmp_path / f"out/date={day}/_overnight").glob("*/plan.json")).read_text())["planned_at"]
        for day in DAYS
    }

    days = list(DAYS if order == "oldest" else reversed(DAYS))
    assert dict.fromkeys(days, "scored") == states_of(report)
    assert days == list(states_of(report)) == sorted(planned, key=planned.__getitem__)
    assert [201, 202] == [
        open_predictions(f"{tmp_path}/out/date={day}").collect().height for day in ("2026-11-02", "2026-11-03")
    ]
    assert {day: 200 + at for at, day in enumerate(DAYS)} == dict(
        open_backfill(str(tmp_path / "out")).group_by("date").len().collect().iter_rows()
    )
    assert {"scored"} == {row["state"] for row in read_table(client)}


def test_what_is_complete_is_passed_over_and_what_has_changed_is_scored(
    doubling: str, source: Path, tmp_path: Path
) -> None:
    first = fill(doubling, source, tmp_path / "out", pieces=Partitions(column="date", last="2026-11-02"))
    write_customers(source / "date=2026-11-02", rows=333, files=1, rows_per_group=100)
    second = fill(doubling, source, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("date=*/**/*")}
    again = fill(doubling, source, tmp_path / "out")

    assert ["2026-11-02", "2026-11-01"] == list(states_of(first))
    assert {**dict.fromkeys(DAYS, "scored"), "2026-11-01": "complete before"} == states_of(second)
    assert 333 == open_predictions(f"{tmp_path}/out/date=2026-11-02").collect().height
    assert {"complete before"} == set(states_of(again).values())
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("date=*/**/*")}


def test_a_destination_that_is_a_block_is_refused_and_no_folder_gets_its_name(
    doubling: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(BadInput, match="batch_inference alone takes blocks"):
        fill(doubling, source, Path("block:scores"))
    assert not Path("block:scores").exists()


def test_a_piece_of_which_readers_get_a_newer_run_is_told(
    doubling: str, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from flows.batch import batch_inference

    caplog.set_level("WARNING", logger="prefect.overnight")
    one = Partitions(column="date", first="2026-11-04")
    first = fill(doubling, source, tmp_path / "out", pieces=one)
    other = OPTIONS.model_copy(update={"rescore": "another"})
    batch_inference(doubling, str(source / "date=2026-11-04"), str(tmp_path / "out/date=2026-11-04"), other)
    again = fill(doubling, source, tmp_path / "out", pieces=one)

    assert ("complete before", first.pieces[0].run) == (again.pieces[0].state, again.pieces[0].run)
    assert open_predictions(f"{tmp_path}/out/date=2026-11-04").collect().height == 203
    assert f"such as {again.pieces[0].newer} of date=2026-11-04" in caplog.text
    assert "rescore='a text of your own'" in caplog.text


def test_a_piece_that_fails_does_not_stop_the_others_and_is_listed_at_the_end(
    doubling: str, source: Path, tmp_path: Path, client: SyncPrefectClient
) -> None:
    (source / "date=2026-11-03/customers-00.parquet").write_bytes(b"not Parquet")
    with pytest.raises(BackfillFailed) as failed:
        fill(doubling, source, tmp_path / "out")

    assert "1 of 4 failed; the others are complete" in str(failed.value)
    assert "date=2026-11-03: " in str(failed.value)
    assert str(failed.value).count("\n") < 12
    first, *others = read_table(client)
    assert ("date=2026-11-03", "failed") == (first["piece"], first["state"])
    assert {"scored"} == {row["state"] for row in others}
    write_customers(source / "date=2026-11-03", rows=20, files=1, rows_per_group=100)
    assert {**dict.fromkeys(DAYS, "complete before"), "2026-11-03": "scored"} == states_of(
        fill(doubling, source, tmp_path / "out")
    )


def test_versions_of_a_delta_table_are_pieces_and_one_that_is_not_there_fails_alone(
    doubling: str, tmp_path: Path
) -> None:
    for at in range(3):
        table = pl.DataFrame({"customer": [at], **{name: [float(at)] for name in "abc"}}).cast(
            dict.fromkeys("abc", pl.Float32)
        )
        table.write_delta(str(tmp_path / "table"), mode="append")
    with pytest.raises(BackfillFailed, match="1 of 4 failed"):
        fill(doubling, tmp_path / "table", tmp_path / "out", pieces=TableVersions(first=0, last=3))

    assert {"0": 1, "1": 2, "2": 3} == dict(
        open_backfill(str(tmp_path / "out")).group_by("version").len().collect().iter_rows()
    )


def test_a_backfill_that_was_killed_goes_on_at_once_with_what_is_left(
    doubling: str, source: Path, tmp_path: Path
) -> None:
    options = (ALL.model_dump_json(), OPTIONS.model_dump_json())
    with start_child("backfill_child.py", "2", doubling, str(source), str(tmp_path / "out"), *options) as child:
        child.communicate(timeout=PROCESS_SECONDS)
    report = fill(doubling, source, tmp_path / "out")

    assert -9 == child.returncode
    assert ["scored", "scored", "complete before", "complete before"] == [states_of(report)[day] for day in DAYS]


@pytest.mark.machines
def test_a_backfill_that_is_told_to_end_drains_its_run_and_goes_on_with_the_next_call(
    sleepy: str, source: Path, tmp_path: Path
) -> None:
    options = OPTIONS.model_copy(update={"batch_size": 4, "rows_per_chunk": 4, "slots": 1})
    asked = (ALL.model_dump_json(), options.model_dump_json())
    with start_child("backfill_child.py", "99", sleepy, str(source), str(tmp_path / "out"), *asked) as child:
        eventually(lambda: list((tmp_path / "out").glob("date=*/run=*/part-*")), process=child)
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=PROCESS_SECONDS)
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("date=*/run=*/part-*")}
    from flows.backfill import backfill_inference

    report = backfill_inference(sleepy, str(source), str(tmp_path / "out"), ALL, options=options)

    assert child.returncode
    assert 0 < len(parts) < 200
    assert parts == {path: path.stat().st_mtime_ns for path in parts}
    assert {"scored"} == set(states_of(report).values()) - {"complete before"}
    assert 806 == open_backfill(str(tmp_path / "out")).collect().height


def test_another_backfill_of_the_destination_is_refused_while_one_goes_on(
    doubling: str, source: Path, tmp_path: Path
) -> None:
    other = Owner(owner="another", machine="elsewhere/1", process=1, model=doubling)
    with (
        own_destination(open_storage(str(tmp_path / "out")), "backfill", other, beat_seconds=0.2),
        pytest.raises(AlreadyRunning, match="while flow run another"),
    ):
        fill(doubling, source, tmp_path / "out")

    assert {"scored"} == set(states_of(fill(doubling, source, tmp_path / "out")).values())


class TestWithDeployment:
    """The runs go to a deployment, whose worker the test itself is."""

    @pytest.fixture
    def deployment(self, client: SyncPrefectClient) -> tuple[str, uuid.UUID]:
        pool = client.create_work_pool(WorkPoolCreate(name=f"pool-{uuid.uuid4()}", type="process")).name
        flow = f"flow-{uuid.uuid4()}"
        made = client.create_deployment(client.create_flow_from_name(flow), "any", work_pool_name=pool)
        return f"{flow}/any", made

    def list_runs(self, client: SyncPrefectClient, deployment: uuid.UUID) -> list[FlowRun]:
        by_id = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
        return client.read_flow_runs(deployment_filter=by_id, sort=FlowRunSort.EXPECTED_START_TIME_ASC)

    def work(
        self, client: SyncPrefectClient, deployment: uuid.UUID, stop: threading.Event, failing: str = "none"
    ) -> tuple[int, list[str]]:
        """Score what is sent, two looks after it came; return the most runs at a time, and the order of pieces."""
        from flows.batch import batch_inference

        most, order = 0, list[str]()
        while not stop.is_set():
            time.sleep(0.3)
            going = [run for run in self.list_runs(client, deployment) if run.state and not run.state.is_final()]
            most = max(most, len(going))
            for run in going:
                if run.state is None or not run.state.is_running():
                    client.set_flow_run_state(run.id, Running(), force=True)
                    continue
                destination = run.parameters["destination"]
                order.append(destination.rpartition("=")[2])
                if destination.endswith(failing):
                    client.set_flow_run_state(run.id, Failed(message="no machine was good enough"), force=True)
                    continue
                options = BatchOptions.model_validate(run.parameters["options"])
                batch_inference(run.parameters["model"], run.parameters["source"], destination, options)
                client.set_flow_run_state(run.id, Completed(), force=True)
        return most, order

    def test_as_many_go_on_at_a_time_as_are_allowed_and_a_failed_one_is_named(
        self,
        doubling: str,
        source: Path,
        tmp_path: Path,
        client: SyncPrefectClient,
        deployment: tuple[str, uuid.UUID],
    ) -> None:
        how = BackfillOptions(deployment=deployment[0], runs_at_a_time=2, interval_seconds=0.2)
        stop = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            working = pool.submit(self.work, client, deployment[1], stop, "2026-11-03")
            try:
                with pytest.raises(BackfillFailed, match=r"date=2026-11-03: no machine was good enough"):
                    fill(doubling, source, tmp_path / "out", how)
            finally:
                stop.set()
            most, order = working.result()

        assert 2 == most
        assert {"2026-11-04", "2026-11-03"} == set(order[:2])
        assert 200 + 201 + 203 == open_backfill(str(tmp_path / "out")).collect().height
        assert 4 == len(self.list_runs(client, deployment[1]))

    def test_a_retry_finds_the_runs_that_go_on_and_sends_those_that_failed_once_more(
        self, client: SyncPrefectClient, deployment: tuple[str, uuid.UUID]
    ) -> None:
        from flows.backfill import Deployment

        name = str(uuid.uuid4())
        pieces = [
            Piece(name=f"date={at}", source="in", destination=f"out/date={at}", options=OPTIONS) for at in range(3)
        ]
        first = [Deployment(name=deployment[0], model="m", backfill=name).submit(piece) for piece in pieces]
        client.set_flow_run_state(first[1], Failed(), force=True)
        client.set_flow_run_state(first[2], Running(), force=True)
        again = [Deployment(name=deployment[0], model="m", backfill=name).submit(piece) for piece in pieces]

        assert [first[0], first[2]] == [again[0], again[2]]
        assert again[1] not in first
        assert again[1] == Deployment(name=deployment[0], model="m", backfill=name).submit(pieces[1])

    @pytest.mark.usefixtures("prefect")
    def test_a_deployment_that_does_not_exist_is_refused(self, doubling: str, source: Path, tmp_path: Path) -> None:
        with pytest.raises(DeploymentMissing, match="The deployment nobodys/any must exist"):
            fill(doubling, source, tmp_path / "out", BackfillOptions(deployment="nobodys/any"))


def test_the_runs_of_pieces_are_below_the_flow_run_of_the_backfill(
    doubling: str, source: Path, tmp_path: Path, client: SyncPrefectClient
) -> None:
    fill(doubling, source, tmp_path / "out", pieces=Partitions(column="date", first="2026-11-03"))
    parents = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=20)
    (backfill,) = [run for run in parents if run.parameters.get("destination") == str(tmp_path / "out")]
    below = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[backfill.id]))
    )

    assert {"date=2026-11-03", "date=2026-11-04"} == {run.parameters["destination"].rpartition("/")[2] for run in below}
    assert backfill.name.startswith("backfill doubling v")


def test_a_retry_of_the_same_flow_run_keeps_the_model_version(
    doubling: str, sleepy: str, source: Path, tmp_path: Path, client: SyncPrefectClient
) -> None:
    from prefect.flow_engine import run_flow

    from flows.backfill import backfill_inference

    asked = Partitions(column="date", first="2026-11-04")
    parameters = {"model": sleepy, "source": str(source), "destination": str(tmp_path / "out"), "pieces": asked}
    parameters["options"] = OPTIONS
    run = client.create_flow_run(backfill_inference, parameters=parameters)
    before = Owner(owner=str(run.id), machine="elsewhere/1", process=1, model=doubling)
    with own_destination(open_storage(str(tmp_path / "out")), "backfill", before):
        # The attempt before this one has not ended, as far as its records tell.
        report: Any = run_flow(backfill_inference, flow_run=run, parameters=parameters)

    assert (doubling, {"2026-11-04": "scored"}) == (report.model, states_of(report))
