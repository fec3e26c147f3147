"""A run that is killed at any step is completed by the next call, to the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra.local.prefect_server import PrefectServer
from tasks.batch.manifest import open_predictions
from tasks.batch.options import BatchOptions
from tests.eventually import PROCESS_SECONDS
from tests.flows.children import call, score, start_child
from tests.support import digests, write_customers

OPTIONS = BatchOptions(key_columns=("customer",), batch_size=64, rows_per_chunk=512, experiment=None)

KILLS = [
    ("before the plan", 1),
    ("after the plan", 1),
    ("after the start", 1),
    ("reading", 5),
    ("forward", 3),
    ("encoding a part", 2),
    ("a part half written", 3),
    ("before the link", 4),
    ("after the link", 4),
    ("after a part", 7),
    ("before the audit", 1),
    ("before the page", 1),
    ("before the manifest", 1),
    ("after the manifest", 1),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_customers(tmp_path_factory.mktemp("kills") / "customers", rows=9_000, files=3, rows_per_group=1_100)


def run_child(
    point: str, times: int, model: str, source: Path, destination: Path, options: BatchOptions = OPTIONS
) -> subprocess.CompletedProcess[str]:
    with start_child(
        *("kill_child.py", point, str(times), *call(model, source, destination, options)),
        environment={**os.environ, "PREFECT_LOGGING_LEVEL": "CRITICAL"},
        stdout=subprocess.PIPE,
    ) as child:
        stdout, stderr = child.communicate(timeout=PROCESS_SECONDS)
    return subprocess.CompletedProcess(child.args, child.returncode, stdout, stderr)


@pytest.mark.machines
def test_a_run_killed_at_any_step_is_completed_to_the_same_bytes(
    doubling: str, source: Path, serverless: None, tmp_path: Path
) -> None:
    def killed(point: str, times: int) -> int:
        return run_child(point, times, doubling, source, tmp_path / point).returncode

    def completed(point: str) -> dict[str, str]:
        return score(doubling, source, tmp_path / point, OPTIONS)

    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(lambda kill: killed(*kill), KILLS))
    expected = score(doubling, source, tmp_path / "undisturbed", OPTIONS)

    assert len(expected) == 24
    assert [-9] * len(KILLS) == codes
    assert {point: expected for point, _ in KILLS} == {point: completed(point) for point, _ in KILLS}


def test_a_run_killed_again_and_again_is_completed_to_the_same_bytes(
    linear: str, source: Path, prefect: PrefectServer, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    codes = [run_child("after a part", 6, linear, source, killed).returncode for _ in range(2)]
    report = json.loads(run_child("never", 1, linear, source, killed).stdout.splitlines()[-1])

    assert [-9, -9] == codes
    assert score(linear, source, tmp_path / "undisturbed", OPTIONS) == digests(killed)
    assert report["rows_scored"] < 9_000


def test_two_processes_on_one_run_end_in_one_exact_output_and_share_the_work(
    sleepy: str, serverless: None, tmp_path: Path
) -> None:
    source = write_customers(tmp_path / "customers", rows=10_000, files=2, rows_per_group=5_000)
    destination = tmp_path / "scores"
    options = BatchOptions(key_columns=("customer",), batch_size=50, rows_per_chunk=50, slots=2, experiment=None)

    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run_child, "never", 1, sleepy, source, destination, options) for _ in range(2)]
        children = [run.result() for run in runs]

    assert [0, 0] == [child.returncode for child in children], [child.stderr[-2000:] for child in children]
    reports = [json.loads(child.stdout.splitlines()[-1]) for child in children]
    table = open_predictions(str(destination)).collect().sort("customer")
    assert list(range(10_000)) == table["customer"].to_list()
    assert all(report["rows_scored"] >= 1_000 for report in reports), reports
    # tests/simulation/test_fleet.py holds how few are scored twice. A worker that waits for a processor seems dead.
    assert 10_000 <= sum(report["rows_scored"] for report in reports) < 15_000
