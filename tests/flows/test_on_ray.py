"""Shards on a real Ray cluster on this machine: the same bytes, limits and errors as in threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator
from pathlib import Path

import polars as pl
import pytest

from infra.local.prefect_server import PrefectServer
from serving.errors import RunnerUnusable, SourceCorrupt, TooManyRejects
from tasks.batch.options import BatchOptions, Ray
from tasks.batch.report import BatchReport
from tests.child_environment import add_project
from tests.eventually import eventually
from tests.support import register_script, write_customers

pytest.importorskip("prefect_ray", reason="Ray is an extra: pip install 'overnight[ray]'")

CHILD = Path(__file__).with_name("kill_child.py")
THREADS = BatchOptions(key_columns=("customer",), batch_size=50, rows_per_chunk=100, slots=2, experiment=None)
ON_RAY = THREADS.model_copy(update={"runner": Ray()})


@pytest.fixture(scope="module")
def cluster(registry: Path, prefect: PrefectServer) -> Generator[None]:
    """A real Ray cluster of two CPUs, for the module: runs use the one that the process has."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=128 << 20, log_to_driver=False)
        yield
        ray.shutdown()


def infer(model: str, source: Path, destination: Path, options: BatchOptions) -> BatchReport:
    from flows.batch import batch_inference

    return batch_inference(model, str(source), str(destination), options)


def run_parts(destination: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in destination.glob("run=*/*")}


@pytest.mark.machines
def test_a_process_of_ray_killed_in_the_middle_changes_nothing_in_the_output(cluster: None, tmp_path: Path) -> None:
    seen = tmp_path / "processes"
    seen.mkdir()
    told = f"open({str(seen)!r} + '/' + str(__import__('os').getpid()), 'w').close(); time.sleep(0.02)"
    model = register_script("telling", told)
    source = write_customers(tmp_path / "customers", rows=6_000, files=2, rows_per_group=3_000)
    infer(model, source, tmp_path / "threads", THREADS)
    killed: list[int] = []

    def kill() -> None:
        others = eventually(lambda: {int(path.name) for path in seen.iterdir()} - {os.getpid()}, seconds=240)
        killed.append(others.pop())
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    report = infer(model, source, tmp_path / "ray", ON_RAY)
    killer.join()

    assert len(killed) == 1
    assert 60 == len(run_parts(tmp_path / "threads"))
    assert run_parts(tmp_path / "threads") == run_parts(tmp_path / "ray")
    assert ("scored", 6_000, 0) == (report.status, report.rows, report.rows_rejected)


def test_rejects_are_reported_and_limited_as_in_threads(cluster: None, linear: str, tmp_path: Path) -> None:
    def edit(table: pl.DataFrame) -> pl.DataFrame:
        return table.with_columns(a=pl.when(pl.col("customer") % 50 > 0).then("a"))

    source = write_customers(tmp_path / "customers", rows=3_000, files=2, rows_per_group=500, edit=edit)
    in_threads = infer(linear, source, tmp_path / "threads", THREADS)
    ray_runner = infer(linear, source, tmp_path / "ray", ON_RAY)

    assert 60 == ray_runner.rows_rejected
    assert in_threads.rejects == ray_runner.rejects
    assert (3_000, 2) == (ray_runner.rows_scored, ray_runner.slots)
    assert run_parts(tmp_path / "threads") == run_parts(tmp_path / "ray")
    with pytest.raises(TooManyRejects, match="raise max_reject_fraction"):
        infer(linear, source, tmp_path / "limited", ON_RAY.model_copy(update={"max_reject_fraction": 0.01}))


def test_a_source_file_that_can_not_be_decoded_fails_by_name_and_the_other_parts_stay(
    cluster: None, linear: str, customers: Path, tmp_path: Path
) -> None:
    broken = customers / "customers-02.parquet"
    data = bytearray(broken.read_bytes())
    data[100:2000] = bytes(1900)
    broken.write_bytes(data)

    with pytest.raises(SourceCorrupt, match=r"customers-02\.parquet"):
        infer(linear, customers, tmp_path / "scores", ON_RAY)
    assert len(run_parts(tmp_path / "scores")) > 70


def test_a_slot_that_no_node_has_room_for_is_refused(
    cluster: None, linear: str, customers: Path, tmp_path: Path
) -> None:
    options = ON_RAY.model_copy(update={"runner": Ray(cpus_per_slot=3)})

    with pytest.raises(RunnerUnusable, match="must have the 3 CPUs of a slot, but the largest has 2"):
        infer(linear, customers, tmp_path / "scores", options)


@pytest.mark.machines
def test_a_tasks_file_in_the_callers_folder_is_named_as_what_hides_the_packages(
    linear: str, customers: Path, prefect: PrefectServer, tmp_path: Path
) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "tasks.py").touch()
    done = subprocess.run(
        [sys.executable, str(CHILD), "never", "1", linear, str(customers), str(tmp_path), ON_RAY.model_dump_json()],
        cwd=folder,
        env=add_project(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )

    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("serving.errors.RunnerUnusable: Every process of Ray must import"), done.stderr
    assert "'tasks' is not a package" in said
    assert "call from a folder that has no tasks.py" in said


def test_without_the_package_the_error_says_how_to_install_it(
    linear: str, customers: Path, prefect: PrefectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.runtime import ray_runner

    monkeypatch.setattr(ray_runner, "find_spec", lambda _: None)

    with pytest.raises(RunnerUnusable, match=r"pip install 'overnight\[ray\]'"):
        infer(linear, customers, tmp_path / "scores", ON_RAY)
    assert not (tmp_path / "scores").exists()


def test_a_cluster_that_does_not_answer_is_refused_before_anything_is_written(
    linear: str, customers: Path, prefect: PrefectServer, tmp_path: Path, held_port: int
) -> None:
    with pytest.raises(RunnerUnusable, match=f"must answer at 127.0.0.1:{held_port}, got: .*refused"):
        infer(
            *(linear, customers, tmp_path / "scores"),
            ON_RAY.model_copy(update={"runner": Ray(address=f"127.0.0.1:{held_port}")}),
        )
    assert not (tmp_path / "scores").exists()
