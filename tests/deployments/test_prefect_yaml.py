"""The deployments of prefect.yaml, run by real workers in folders of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deployments.apply import read_deployments
from infra.local.prefect_server import PrefectServer
from infra.local.prefect_worker import PrefectWorker
from infra.processes import family
from tasks.batch.options import BatchOptions
from tasks.batch.predictions import open_predictions
from tests.deployments.conftest import StartWorkers
from tests.deployments.flow_runs import read, start, state_of, states, table, wait_for, wait_until, workers_of

pytestmark = pytest.mark.machines

ROOT = Path(__file__).parents[2]
OPTIONS = BatchOptions(key_columns=("customer",), batch_size=7, rows_per_chunk=7, slots=1, experiment=None)
PROCESSES_IDLE = 2


def parts(destination: Path) -> int:
    return len(list(destination.glob("run=*/*.parquet")))


def test_prefects_own_command_deploys_all_from_the_root(deployed: PrefectServer) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "deploy", "--all", "--prefect-file", "deployments/prefect.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    created = done.stdout.count("successfully created with id")
    assert (0, len(read_deployments())) == (done.returncode, created), done.stderr


def test_two_workers_share_a_run_that_one_of_them_started(
    deployed: PrefectServer, two_workers: list[PrefectWorker], sleepy: str, customers: Path, tmp_path: Path
) -> None:
    run = start("adhoc", sleepy, customers, tmp_path / "scores", OPTIONS.model_copy(update={"workers": 2}))
    wait_for(run.id, "Completed", "Failed")
    (other,) = workers_of(run.id)
    wait_for(other.id, "Completed", "Failed")

    reports = [table(deployed, each) for each in (run.id, other.id)]
    rows = [int(report["rows scored by this call"].replace(",", "")) for report in reports]
    assert list(range(10_000)) == sorted(open_predictions(str(tmp_path / "scores")).collect()["customer"])
    assert all(rows)
    assert 0 <= sum(rows) - 10_000 <= 0.05 * 10_000
    assert {"resumes"} == set(read(other.id).tags)


def test_a_worker_that_is_told_to_end_has_its_run_run_again_by_another(
    deployed: PrefectServer, start_workers: StartWorkers, sleepy: str, customers: Path, tmp_path: Path
) -> None:
    workers = start_workers("overnight-on-demand", "leaves", "stays")
    options = OPTIONS.model_copy(update={"batch_size": 50, "rows_per_chunk": 50})
    run = start("on-demand", sleepy, customers, tmp_path / "scores", options)
    wait_until(lambda: parts(tmp_path / "scores") > 20, "20 parts are written")
    (busy,) = [worker for worker in workers if len(family(worker.process.pid)) > PROCESSES_IDLE]
    busy.stop()
    standing = parts(tmp_path / "scores")
    wait_for(run.id, "Completed", "Failed")

    names = [name for name, _ in states(deployed, run.id)]
    assert "Completed" == state_of(read(run.id))
    assert 2 == names.count("Running")
    assert "AwaitingRetry" in names
    assert standing < 200
    assert list(range(10_000)) == sorted(open_predictions(str(tmp_path / "scores")).collect()["customer"])
