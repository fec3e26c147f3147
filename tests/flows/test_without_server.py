"""Flows without a Prefect server: the same steps in this process, no server started, and what needs one says so."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Generator
from concurrent.futures import wait
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.exceptions import TerminationSignal

from flows import (
    BackfillOptions,
    BatchOptions,
    Gate,
    Partitions,
    Ray,
    backfill_inference,
    batch_inference,
    choose_mode,
    nightly_inference,
    review_modes,
)
from serving.errors import BadInput, Interrupted, ModelNotFound, OvernightError, ServerUnreachable
from tasks.batch.score import Scorer
from tasks.batch.scoring_result import ScoringResult
from tasks.scheduler.workload import Machine, Prices, Table, Workload
from tasks.spot.purchase import PurchaseOptions
from tests.eventually import eventually
from tests.flows.children import call, of_session, score, start_child
from tests.support import digests, write_customers

pytestmark = pytest.mark.usefixtures("serverless")

ROWS = 3_000
OPTIONS = BatchOptions(key_columns=("customer",), batch_size=50, rows_per_chunk=50, slots=2, experiment=None)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("without") / "customers"
    return write_customers(folder, rows=ROWS, files=2, rows_per_group=ROWS // 2)


@pytest.fixture(scope="module")
def undisturbed(sleepy: str, source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return score(sleepy, source, tmp_path_factory.mktemp("undisturbed"), OPTIONS)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a person who has set nothing up: Prefect would start a temporary server."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return own | {"PREFECT_HOME": str(tmp_path / "home")}


@pytest.mark.parametrize(
    ("number", "code", "end"),
    [
        (None, 0, "is complete: 3,000 rows"),
        (signal.SIGINT, -signal.SIGINT, "are done and stay; the same call resumes."),
        (signal.SIGTERM, 1, "are left; the same call resumes."),
        (signal.SIGKILL, -signal.SIGKILL, ""),
    ],
)
def test_a_call_that_a_signal_ends_leaves_no_process_and_the_same_call_completes_it_to_the_same_bytes(
    number: signal.Signals | None,
    code: int,
    end: str,
    sleepy: str,
    source: Path,
    undisturbed: dict[str, str],
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    destination = tmp_path / "scores"
    with start_child(
        *("kill_child.py", "never", "1", *call(sleepy, source, destination, OPTIONS)),
        environment=environment,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    ) as child:
        eventually(lambda: list(destination.glob("run=*/part-*")), lambda parts: len(parts) >= 5, process=child)
        if number is not None:
            child.send_signal(number)
        stderr = child.communicate()[1]
    left = {name: digest for name, digest in digests(destination).items() if not name.startswith(".")}
    eventually(lambda: of_session(child.pid), lambda alive: not alive)

    assert code == child.returncode, stderr
    assert end in stderr
    assert 1 == stderr.count("PREFECT_API_URL names no Prefect server"), stderr
    assert not (tmp_path / "home" / "prefect.db").exists()
    assert 5 <= len(left)
    assert left.items() <= undisturbed.items()
    assert (number is None) == (len(left) == len(undisturbed))
    assert undisturbed == score(sleepy, source, destination, OPTIONS)


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Generator[list[int]]:
    """SIGTERM comes once, when scoring has begun; the program's own handler keeps what it hears."""
    numbers: list[int] = []
    signals = iter([signal.SIGTERM])

    def wait_and_signal(*arguments: Any, **options: Any) -> Any:
        found = wait(*arguments, **options)
        if (number := next(signals, None)) is not None:
            signal.raise_signal(number)
        return found

    monkeypatch.setattr("flows.runtime.task_runners.wait", wait_and_signal)
    before = signal.signal(signal.SIGTERM, lambda number, _: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGTERM, before)


def test_sigterm_is_a_notice_that_the_caller_s_own_handler_hears_too(
    sleepy: str, source: Path, undisturbed: dict[str, str], heard: list[int], tmp_path: Path
) -> None:
    with pytest.raises(Interrupted, match="the same call resumes"):
        batch_inference(sleepy, str(source), str(tmp_path), OPTIONS)

    assert [signal.SIGTERM] == heard
    assert undisturbed == score(sleepy, source, tmp_path, OPTIONS)


def test_a_thread_that_outlasts_the_notice_does_not_hold_up_the_end(
    linear: str, source: Path, heard: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    release = threading.Event()
    monkeypatch.setattr(Scorer, "score_shard", lambda *_: (release.wait(), ScoringResult())[1])
    try:
        with pytest.raises(TerminationSignal):
            batch_inference(linear, str(source), str(tmp_path), OPTIONS.model_copy(update={"notice_seconds": 1.0}))

        assert [signal.SIGTERM] == heard
        assert not release.is_set()
    finally:
        release.set()


def test_a_call_may_return_its_state_as_within_prefect(linear: str, customers: Path, tmp_path: Path) -> None:
    done = batch_inference(linear, str(customers), str(tmp_path), BatchOptions(experiment=None), return_state=True)
    failed = batch_inference("models:/linaer/1", str(customers), str(tmp_path), return_state=True)

    assert (True, 10_000) == (done.is_completed(), done.result().rows)
    assert str(failed.message).startswith("ModelNotFound: models:/linaer/1 must be registered")
    with pytest.raises(ModelNotFound):
        failed.result()


def test_the_flow_runs_of_a_backfill_say_once_that_there_is_no_server(
    linear: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="prefect.overnight")
    for day in (1, 2):
        write_customers(tmp_path / f"in/date=2026-11-0{day}", rows=100, files=1, rows_per_group=100)
    report = backfill_inference(
        linear, str(tmp_path / "in"), str(tmp_path / "out"), Partitions(column="date"), options=OPTIONS
    )

    assert 2 == report.count("scored")
    assert 1 == caplog.text.count("PREFECT_API_URL names no Prefect server")


BUYING = PurchaseOptions(spot_price=1, on_demand_price=2)
WORKLOAD = Workload(
    name="w",
    model="models:/linear/1",
    consumer=Table(rows=5, ready="01:00"),
    machines=(Machine(prices=Prices(on_demand=0.1)),),
)


def infer(linear: str, source: Path, destination: Path, **changes: Any) -> object:
    return batch_inference(linear, str(source), str(destination), OPTIONS.model_copy(update=changes))


NEED_A_SERVER: dict[str, tuple[type[OvernightError], Callable[[str, Path, Path], object]]] = {
    "a registry's block": (ServerUnreachable, lambda _, source, to: infer("block:mlflow/linear/1", source, to)),
    "a source's block": (ServerUnreachable, lambda model, _, to: batch_inference(model, "block:lake", str(to))),
    "a flow run to join": (ServerUnreachable, lambda *call: infer(*call, joins=UUID(int=1))),
    "a gate that asks": (BadInput, lambda *call: infer(*call, gate=Gate(on_refusal="pause"))),
    "a night": (
        ServerUnreachable,
        lambda model, source, to: nightly_inference(model, str(source), str(to), "06:00", BUYING),
    ),
    "a backfill by a deployment": (
        ServerUnreachable,
        lambda model, source, to: backfill_inference(
            model, str(source), str(to), Partitions(column="date"), BackfillOptions(deployment="a/b")
        ),
    ),
    "a decision that is applied": (ServerUnreachable, lambda *_: choose_mode(WORKLOAD, apply=True)),
    "a review": (ServerUnreachable, lambda *_: review_modes(WORKLOAD)),
}


@pytest.mark.parametrize("name", NEED_A_SERVER)
def test_what_needs_a_server_says_so_and_scores_nothing(
    name: str, linear: str, customers: Path, tmp_path: Path
) -> None:
    error, make_call = NEED_A_SERVER[name]
    with pytest.raises(error, match="PREFECT_API_URL") as raised:
        make_call(linear, customers, tmp_path / "scores")

    assert len(str(raised.value).splitlines()) <= 12
    assert not list((tmp_path / "scores").glob("run=*/*"))


def test_ray_needs_a_server(linear: str, customers: Path, tmp_path: Path) -> None:
    pytest.importorskip("prefect_ray", reason="Ray is an extra: pip install 'overnight[ray]'")
    with pytest.raises(ServerUnreachable, match="needs a Prefect server, but PREFECT_API_URL names none"):
        infer(linear, customers, tmp_path / "scores", runner=Ray())


def test_a_process_that_was_forked_after_a_call_is_told_so(registry: Path, tmp_path: Path) -> None:
    def fail() -> str:
        with pytest.raises(BadInput) as refused:
            batch_inference("models:/nobody/1", tmp_path, tmp_path / "scores", OPTIONS)
        return str(refused.value)

    fail()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writer, fail().encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        said = answer.read()
    os.waitpid(child, 0)

    assert 'Start it by multiprocessing.get_context("spawn")' in said
    assert "nobody" in fail()
