"""Ctrl-C ends a run at once, with one sentence, and loses nothing but what was in hand."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from infra.local.prefect_server import PrefectServer
from tasks.batch.options import BatchOptions, Ray
from tasks.batch.parts import list_parts
from tasks.batch.run_records import load_plan
from tasks.storage import open_storage
from tests.eventually import PROCESS_SECONDS, eventually
from tests.flows.children import call, list_flow_runs, of_session, score, start_child
from tests.support import digests, write_customers

CHUNKS = 120
OPTIONS = BatchOptions(key_columns=("customer",), batch_size=50, rows_per_chunk=50, slots=2, experiment=None)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupts") / "customers"
    return write_customers(folder, rows=50 * CHUNKS, files=2, rows_per_group=50 * CHUNKS // 2)


@pytest.fixture(scope="module")
def undisturbed(
    sleepy: str, source: Path, prefect: PrefectServer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    return score(sleepy, source, tmp_path_factory.mktemp("undisturbed"), OPTIONS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How an interrupted child ended: exit code, what it said, and its process group."""

    code: int
    stderr: str
    group: int


def interrupted(
    model: str,
    source: Path,
    destination: Path,
    environment: Mapping[str, str],
    *,
    times: int = 1,
    options: BatchOptions = OPTIONS,
) -> Ended:
    """Run a child in a process group of its own, as a shell does, and press Ctrl-C once it is scoring."""
    with start_child(
        *("kill_child.py", "never", "1", *call(model, source, destination, options)),
        environment=environment,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    ) as child:
        eventually(lambda: len(list(destination.glob("run=*/part-*"))), lambda count: count >= 5, process=child)
        for _ in range(times):
            os.killpg(child.pid, signal.SIGINT)
            time.sleep(0.3)
        stderr = child.communicate(timeout=PROCESS_SECONDS)[1]
    return Ended(code=child.returncode, stderr=stderr, group=child.pid)


def shard_states(server: PrefectServer, destination: Path) -> dict[int, str]:
    """What the server says of each shard of the run into a destination, once it has taken note of all."""

    (run,) = list_flow_runs(server, destination)
    assert "CRASHED" == run["state_type"]
    states = {"": "RUNNING"}
    while "RUNNING" in states.values():
        of_run = {"flow_runs": {"id": {"any_": [run["id"]]}}}
        found = httpx.post(f"{server.api_url}/task_runs/filter", json=of_run).json()
        states = {task["name"]: task["state_type"] for task in found}
    shards = {tuple(name.split()): state for name, state in states.items() if name.startswith("shard ")}
    return {int(number) - 1: state for (_, number, *_), state in shards.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """What an interrupted child left: its files, the states of its shards, and those that have all their parts."""

    ended: Ended
    destination: Path
    states: dict[int, str]
    complete: set[int]


@pytest.fixture(scope="module")
def left_by_one(sleepy: str, source: Path, prefect: PrefectServer, tmp_path_factory: pytest.TempPathFactory) -> Left:
    destination = tmp_path_factory.mktemp("interrupted")
    ended = interrupted(sleepy, source, destination, os.environ)
    (run,) = destination.glob("run=*")
    storage = open_storage(str(destination))
    plan = load_plan(storage, run.name.removeprefix("run="))
    assert plan is not None
    parts = Counter(shard for shard, _ in list_parts(storage, plan))
    complete = {shard for shard, chunks in enumerate(plan.shards) if parts[shard] == len(chunks)}
    return Left(ended=ended, destination=destination, states=shard_states(prefect, destination), complete=complete)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_a_run_with_a_sentence_and_the_same_call_completes_it_to_the_same_bytes(
    sleepy: str, source: Path, undisturbed: dict[str, str], left_by_one: Left, tmp_path: Path, times: int
) -> None:
    from flows.batch import batch_inference

    destination = left_by_one.destination if times == 1 else tmp_path
    ended = left_by_one.ended if times == 1 else interrupted(sleepy, source, destination, os.environ, times=times)
    left = digests(destination)
    report = batch_inference(sleepy, str(source), str(destination), OPTIONS)

    assert -signal.SIGINT == ended.code
    assert 1 == ended.stderr.count("Traceback"), ended.stderr
    told = re.fullmatch(
        r"KeyboardInterrupt: Interrupted: ([\d,]+) of 6,000 rows of run \w+ are done and stay; the same call resumes\.",
        ended.stderr.strip().splitlines()[-1],
    )
    assert told, ended.stderr
    assert 50 * len(left) == int(told[1].replace(",", ""))
    assert 5 <= len(left) < CHUNKS
    assert left.items() <= undisturbed.items()
    assert 6_000 - 50 * len(left) == report.rows_scored
    assert undisturbed == digests(destination)


@pytest.mark.machines
def test_ctrl_c_ends_a_run_on_ray_the_same_way_and_leaves_no_process_behind(
    sleepy: str, source: Path, undisturbed: dict[str, str], prefect: PrefectServer, tmp_path: Path
) -> None:
    pytest.importorskip("prefect_ray", reason="Ray is an extra: pip install 'overnight[ray]'")
    options = OPTIONS.model_copy(update={"runner": Ray()})
    ended = interrupted(sleepy, source, tmp_path, os.environ, times=2, options=options)
    left = digests(tmp_path)
    completed = score(sleepy, source, tmp_path, OPTIONS)

    assert -signal.SIGINT == ended.code
    assert 1 == ended.stderr.count("Traceback"), ended.stderr
    assert "are done and stay; the same call resumes." in ended.stderr.splitlines()[-1]
    assert 5 <= len(left) < CHUNKS
    assert set() == of_session(ended.group)
    assert undisturbed == completed


def test_only_a_shard_with_all_its_parts_shows_as_completed(left_by_one: Left) -> None:
    states = left_by_one.states

    assert "CANCELLED" in states.values()
    assert states == {shard: "COMPLETED" if shard in left_by_one.complete else "CANCELLED" for shard in states}


def test_an_impatient_second_ctrl_c_is_ignored_and_a_later_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.runtime import interruption

    monkeypatch.setattr(interruption, "_IGNORE_SECONDS", 0.2)
    # A flow that was interrupted in this process leaves a handler of its own.
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        interruption.ignore_repeated_sigint(ValueError())
        assert signal.default_int_handler is signal.getsignal(signal.SIGINT)
        interruption.ignore_repeated_sigint(KeyboardInterrupt())
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.3)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

        assert signal.default_int_handler is signal.getsignal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, earlier)
