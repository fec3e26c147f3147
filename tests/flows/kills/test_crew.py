"""Two real workers on one run under the killer come out as one that nothing disturbed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from infra.local.prefect_server import PrefectServer
from tasks.batch.options import BatchOptions
from tasks.storage import open_storage
from tests.benchmarks.kills.command import worker_command
from tests.benchmarks.kills.compare import compare, read_keys, read_output
from tests.benchmarks.kills.crew import run_workers
from tests.benchmarks.kills.killer import Killer, Usual
from tests.benchmarks.kills.schedule import make_schedule
from tests.support import register_slow, write_customers

SECONDS_MAX = 250.0


@pytest.mark.machines
def test_a_run_of_two_workers_that_are_killed_three_times_is_complete_and_the_same(
    registry: Path, prefect: PrefectServer, tmp_path: Path
) -> None:
    from flows.batch import batch_inference

    source = write_customers(tmp_path / "customers", rows=4_000, files=2, rows_per_group=1_000)
    model = register_slow("slow-under-kills", ("a", "b", "c"), seconds=0.1)
    options = BatchOptions(key_columns=("customer",), batch_size=50, rows_per_chunk=100, slots=2, experiment=None)
    run = batch_inference(model, str(source), str(tmp_path / "calm"), options).run
    killer = Killer(
        make_schedule(0, workers=2, seconds=4.0, timed=3, aimed=1, startups=0, publishes=0),
        Usual(startup=5.0, write=0.01, publish=1.0),
    )
    command = worker_command(model, str(source), str(tmp_path / "wild"), options.model_dump(mode="json"))
    attempts = run_workers(command, tmp_path / "logs", workers=2, killer=killer, seconds_max=SECONDS_MAX)

    outputs = [read_output(open_storage(str(tmp_path / folder)), run, "customer") for folder in ("calm", "wild")]
    keys = read_keys(open_storage(str(source)), ["customers-00.parquet", "customers-01.parquet"], "customer")
    killed = [attempt for attempt in attempts if attempt.killed]
    assert compare(keys, *outputs).kept
    assert 40 == len(outputs[1].published)
    assert [{"time": 2, "write": 1}, 5] == [
        {aim: sum(attempt.aim == aim for attempt in killed) for aim in ("time", "write")},
        len(attempts),
    ]
    assert all(set(attempt.phases) & {"forward", "write"} for attempt in killed), killed
    assert 4_000 <= sum(attempt.rows for attempt in attempts) < 8_000
    assert all(attempt.startup_seconds > 0 for attempt in attempts)
    assert all(attempt.working_seconds > 0 for attempt in killed)


def test_a_worker_that_fails_by_itself_is_told_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"must end with 0, got 1: (.|\n)*No module named tests"):
        run_workers((sys.executable, "-m", "tests.nothing"), tmp_path / "logs", workers=2, seconds_max=SECONDS_MAX)


def test_workers_that_do_not_end_in_time_are_stopped(tmp_path: Path) -> None:
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text("import time; time.sleep(600)")
    command = [sys.executable, str(sleeper), json.dumps({})]

    with pytest.raises(RuntimeError, match=r"must come to an end within 0 s, got \[0, 1\] still running"):
        run_workers(command, tmp_path / "logs", workers=2, seconds_max=0.2)
