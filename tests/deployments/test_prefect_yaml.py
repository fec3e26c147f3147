"""The deployments of prefect.yaml, run by real workers in folders of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from infra.local.prefect_server import PrefectServer, PrefectWorker
from tasks.batch.manifest import open_predictions
from tasks.batch.options import BatchOptions
from tests.deployments.flow_runs import read, start, table, wait_for, workers_of

ROOT = Path(__file__).parents[2]
OPTIONS = BatchOptions(key_columns=("customer",), batch_size=10, rows_per_chunk=50, slots=1, experiment=None)


@pytest.mark.machines
def test_prefects_own_command_deploys_all_from_the_root(deployed: PrefectServer) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "deploy", "--all", "--prefect-file", "deployments/prefect.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        # A server on a busy machine answers 503 while its database is locked, for longer than five retries take.
        env={**os.environ, "PREFECT_CLIENT_MAX_RETRIES": "20"},
    )

    assert (0, 13) == (done.returncode, done.stdout.count("successfully created with id")), done.stderr


@pytest.mark.machines
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
    # tests/simulation/test_fleet.py holds how few are scored twice. A worker that waits for a processor seems dead.
    assert 10_000 <= sum(rows) < 15_000
    assert {"resumes"} == set(read(other.id).tags)
