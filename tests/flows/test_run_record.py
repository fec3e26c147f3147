"""What calls of batch runs leave for operators: metrics as they go on, a file at their end, and what they cost."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import threading
import time
import urllib.request
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from serving.errors import BadInput, ModelFailed, ModelNotFound
from tasks.batch.costs import read_run_costs
from tasks.batch.manifest import Manifest
from tasks.batch.options import BatchOptions
from tasks.batch.plan import manifest_path
from tasks.batch.report import BatchReport
from tasks.common.metrics import get_run_metrics
from tasks.spot.purchase import Move, NightlyReport, PurchaseOptions
from tasks.storage import open_storage
from tests.flows.children import call, start_child
from tests.support import write_customers
from tests.tasks.batch.small import PIN
from tests.tasks.common.test_metrics import read_samples

pytestmark = pytest.mark.usefixtures("serverless")

# A busy machine takes its time.
SECONDS_MAX = 600
OPTIONS = BatchOptions(key_columns=("customer",), batch_size=20, rows_per_chunk=200, slots=2, experiment=None)
FILE = "overnight_runs.prom"


def infer(model: str, source: Path, destination: Path, options: BatchOptions = OPTIONS) -> BatchReport:
    from flows.batch import batch_inference

    return batch_inference(model, str(source), str(destination), options)


def run_child(
    script: str, how: tuple[str, ...], model: str, source: Path, destination: Path, folder: Path
) -> subprocess.CompletedProcess[str]:
    """Make the call in a process of its own, whose metrics go to a folder and whose machine costs 3.6 dollars."""
    with start_child(
        *(script, *how, *call(model, source, destination, OPTIONS)),
        environment={
            **os.environ,
            "PREFECT_LOGGING_LEVEL": "CRITICAL",
            "OVERNIGHT_METRICS_FOLDER": str(folder),
            "OVERNIGHT_DOLLARS_PER_HOUR": "3.6",
            "OVERNIGHT_ON_DEMAND_DOLLARS_PER_HOUR": "10.8",
        },
        stdout=subprocess.PIPE,
    ) as child:
        stdout, stderr = child.communicate(timeout=SECONDS_MAX)
    return subprocess.CompletedProcess(child.args, child.returncode, stdout, stderr)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_customers(tmp_path / "customers", rows=3_200, files=2, rows_per_group=200)


def test_a_run_has_its_metrics_on_a_port_while_it_goes_on(
    sleepy: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_port: int
) -> None:
    monkeypatch.setenv("OVERNIGHT_METRICS_PORT", str(held_port))
    pages: list[str] = []
    done = threading.Event()

    def scrape() -> None:
        while not done.wait(0.05):
            try:
                pages.append(urllib.request.urlopen(f"http://127.0.0.1:{held_port}/metrics", timeout=5).read().decode())
            except (OSError, HTTPException):
                time.sleep(0.05)

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        infer(sleepy, source, tmp_path / "scores")
    finally:
        done.set()
        thread.join()
    label = f'{{destination="{tmp_path / "scores"}",model="sleepy",version="{sleepy.rpartition("/")[2]}"}}'
    name = f"overnight_run_rows_scored_total{label}"
    scored = [float(line.split()[-1]) for page in pages for line in page.splitlines() if line.startswith(name)]

    assert scored == sorted(scored)
    assert any(0 < rows < 3_200 for rows in scored)


@pytest.mark.machines
def test_calls_of_a_machine_add_up_in_a_file_through_notices_and_resumes_and_leave_records_of_their_cost(
    doubling: str, source: Path, tmp_path: Path
) -> None:
    folder, scores = tmp_path / "textfile", tmp_path / "scores"
    folder.mkdir()
    killed = run_child("kill_child.py", ("after a part", "2"), doubling, source, scores, folder)
    interrupted = run_child("notice_child.py", ("real", "1", "after a part", "2"), doubling, source, scores, folder)
    complete = run_child("kill_child.py", ("never", "1"), doubling, source, scores, folder)
    again = run_child("kill_child.py", ("never", "1"), doubling, source, scores, folder)
    found = read_samples((folder / FILE).read_text())
    report = json.loads(complete.stdout.splitlines()[-1])

    assert (-9, 0, 0) == (killed.returncode, complete.returncode, again.returncode), complete.stderr
    assert 0 < report["rows_scored"] < 3_200, interrupted.stderr
    by_label = {
        f"overnight_run_finished_total {state} 1": 1.0 for state in ("interrupted", "complete", "already complete")
    } | {
        "overnight_run_interruptions_total SIGTERM 1": 1.0,
        "overnight_run_rows 1": 3_200.0,
        "overnight_run_rows_done 1": 3_200.0,
        "overnight_run_chunks 1": 16.0,
        "overnight_run_chunks_left 1": 0.0,
    }
    assert by_label == {name: found.get(name) for name in by_label}
    # The killed call has counted nothing.
    parts = found["overnight_run_parts_put_total 1"]
    assert 16 > parts == found["overnight_run_chunks_scored_total 1"]
    assert 200 * parts == found["overnight_run_rows_scored_total 1"]
    assert found["overnight_run_written_bytes_total 1"] > 0
    assert found["overnight_run_read_bytes_total 1"] >= 4 * 200 * parts
    for name in ("step_seconds_total score", "step_seconds_total resolve", "stage_seconds_total forward"):
        assert found[f"overnight_run_{name} 1"] > 0
    assert found["overnight_run_cost_dollars_total 1"] > 0

    (cost,) = read_run_costs(open_storage(str(scores)))
    assert (report["run"], 3_200) == (cost.run, cost.rows)
    assert cost.machine_seconds is not None
    assert cost.spent == pytest.approx(cost.machine_seconds * 3.6 / 3600)
    assert cost.on_demand == pytest.approx(cost.machine_seconds * 10.8 / 3600)
    assert ("1 call was killed and left no record: it cost at least this much",) == cost.notes[:1]
    assert cost.always_on is None


def test_a_call_that_fails_or_is_refused_is_counted_as_that(
    failing: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OVERNIGHT_METRICS_FOLDER", str(tmp_path))
    with pytest.raises(ModelFailed):
        infer(failing, source, tmp_path / "failed")
    with pytest.raises(ModelNotFound):
        infer("models:/nothing-of-this-name/1", source, tmp_path / "refused")
    lines = (tmp_path / FILE).read_text().splitlines()
    ends = {line.rpartition(" ")[0] for line in lines if line.startswith("overnight_run_finished_total")}
    version = failing.rpartition("/")[2]

    assert (
        f'overnight_run_finished_total{{destination="{tmp_path / "failed"}",model="failing",state="failed",'
        f'version="{version}"}}'
    ) in ends
    assert (
        f'overnight_run_finished_total{{destination="{tmp_path / "refused"}",model="nothing-of-this-name",'
        'state="refused",version=""}'
    ) in ends


def test_a_price_that_is_none_is_refused_before_anything_is_scored(
    linear: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OVERNIGHT_DOLLARS_PER_HOUR", "cheap")

    with pytest.raises(BadInput, match="OVERNIGHT_DOLLARS_PER_HOUR must be the price of an hour in dollars"):
        infer(linear, source, tmp_path / "scores")
    assert not (tmp_path / "scores").exists()


def test_a_night_that_has_ended_is_in_the_metrics_and_its_cost_is_kept(tmp_path: Path) -> None:
    from flows.runtime.run_record import record_deadline, record_night

    storage = open_storage(str(tmp_path / "scores"))
    due = datetime(2030, 1, 1, 6, tzinfo=UTC)
    report = NightlyReport(
        run="night",
        rows=1_000,
        workers=2,
        deadline=due,
        seconds=3_600,
        slack_seconds=-30,
        rows_per_second=10,
        changeover_seconds=20,
        spot_seconds=3_600,
        on_demand_seconds=360,
        cost=0.5,
        cost_on_demand=1.5,
        rows_recomputed_max=0,
        moves=(Move(seconds=0, to="spot", rows_done=0, why="cheap"),),
    )
    buying = PurchaseOptions(spot_price=0.4, on_demand_price=1.2)
    recorder = record_deadline(PIN, storage, due)
    record_night(recorder, report, buying, storage, logging.getLogger("test"))
    storage.put_new(manifest_path("night"), a_manifest("night").model_dump_json().encode())
    page = generate_latest(get_run_metrics().registry).decode()
    mine = {line.rpartition(" ")[0].split("{")[0]: line for line in page.splitlines() if storage.url in line}
    (cost,) = read_run_costs(storage)

    assert mine["overnight_night_deadline_margin_seconds"].endswith(" -30.0")
    assert due.timestamp() == float(mine["overnight_night_deadline_timestamp_seconds"].split()[-1])
    assert 'model="churn",version="3"' in mine["overnight_night_cost_dollars_total"]
    assert (3_960, 0.5, 1.5, ()) == (cost.machine_seconds, cost.spent, cost.on_demand, cost.notes[1:])


def a_manifest(run: str) -> Manifest:
    return Manifest(
        key=run,
        run=run,
        planned_at=datetime(2030, 1, 1, tzinfo=UTC),
        model=PIN,
        source="s",
        output="parquet",
        rows=1_000,
        rejects=(),
        parts=(),
    )
