"""A notice of the machine's cloud ends a run early, and Prefect takes it up again."""

from __future__ import annotations

import itertools
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Generator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelling, Scheduled

from infra.local.prefect_server import PrefectServer
from serving.errors import Interrupted
from serving.model.forward import Forward
from tasks.batch.chunk_scheduler import ChunkScheduler
from tasks.batch.options import BatchOptions
from tasks.spot.cloud_notices import METADATA_URL, Aws
from tasks.spot.notice_poller import poll_notices
from tests.child_environment import add_project
from tests.eventually import eventually
from tests.flows.children import PULL_STEPS, list_flow_runs, score
from tests.metadata import Imds, serving
from tests.support import digests, write_customers

ROWS, CHUNK, BATCH = 3_200, 200, 20
# Ten batches of a twentieth of a second: a chunk takes half a second at least.
OPTIONS = BatchOptions(key_columns=("customer",), batch_size=BATCH, rows_per_chunk=CHUNK, slots=2, experiment=None)

# Long enough for a process of its own to ask at the provider's rate, every five seconds.
LONG = OPTIONS.model_copy(update={"batch_size": 10})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_customers(tmp_path_factory.mktemp("notices") / "customers", rows=ROWS, files=2, rows_per_group=CHUNK)


@pytest.fixture(scope="module")
def undisturbed(
    sleepy: str, source: Path, prefect: PrefectServer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    return score(sleepy, source, tmp_path_factory.mktemp("undisturbed"), OPTIONS)


@pytest.fixture
def imds(monkeypatch: pytest.MonkeyPatch) -> Generator[Imds]:
    """AWS's metadata service, which this process and its children ask often."""
    service = Imds()
    monkeypatch.setattr(Aws, "poll_seconds", 0.05)
    with serving(service):
        monkeypatch.setenv(METADATA_URL, service.url)
        yield service


def announce_at_batch(number: int, imds: Imds, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have an interruption announced as a batch of the run begins, which goes on once the run has read it."""
    begin, numbers = Forward._begin_batch, itertools.count(1)

    def announce(*arguments: Any) -> Any:
        if next(numbers) == number:
            imds.interrupt("terminate", 120)
            # An answer has been taken when the next question comes.
            path = "/latest/meta-data/spot/instance-action"
            eventually(lambda: (path, 200) in [each for each in imds.asked if each[0] == path][:-1])
        return begin(*arguments)

    monkeypatch.setattr(Forward, "_begin_batch", announce)


def ask(server: PrefectServer, kind: str, destination: Path) -> list[dict[str, Any]]:
    """What the server has of the only flow run into a destination."""
    found = list_flow_runs(server, destination)
    if kind == "flow_runs":
        return found
    body = {"flow_runs": {"id": {"any_": [run["id"] for run in found]}}}
    return list(httpx.post(f"{server.api_url}/{kind}/filter", json=body).json())


def test_an_interruption_by_aws_drains_a_run_and_the_same_call_completes_it_to_the_same_bytes(
    sleepy: str,
    source: Path,
    undisturbed: dict[str, str],
    prefect: PrefectServer,
    imds: Imds,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flows.batch import batch_inference

    # Two slots have finished two chunks at least by then.
    announce_at_batch(45, imds, monkeypatch)
    with pytest.raises(Interrupted, match=r"^Interrupted by AWS \(terminate\): .* the same call resumes\.$") as caught:
        batch_inference(sleepy, str(source), str(tmp_path), OPTIONS)
    left = digests(tmp_path)
    (run,) = ask(prefect, "flow_runs", tmp_path)
    artifacts = {artifact["key"]: artifact["data"] for artifact in ask(prefect, "artifacts", tmp_path)}
    imds.action = None
    report = batch_inference(sleepy, str(source), str(tmp_path), OPTIONS)

    assert "dropped" not in str(caught.value)
    assert 2 <= len(left) < len(undisturbed)
    assert left.items() <= undisturbed.items()
    assert f"{CHUNK * len(left):,} of 3,200 rows" in str(caught.value)
    assert ("CRASHED", str(caught.value)) == (run["state_type"], run["state"]["message"])
    assert str(caught.value) in artifacts["batch-summary"]
    assert f"| rows left | {ROWS - CHUNK * len(left):,} |" in artifacts["batch-summary"]
    assert 100 * CHUNK * len(left) / ROWS == pytest.approx(float(artifacts["batch-progress"]))
    assert ROWS - CHUNK * len(left) == report.rows_scored
    assert undisturbed == digests(tmp_path)


def test_an_interruption_that_is_withdrawn_lets_the_run_go_on_to_its_end(
    sleepy: str,
    source: Path,
    undisturbed: dict[str, str],
    imds: Imds,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flows.batch import batch_inference

    is_stopping, stopped = ChunkScheduler.is_stopping, []

    def stop_and_withdraw(scheduler: ChunkScheduler) -> bool:
        found = is_stopping(scheduler)
        if found and not stopped:
            # A slot comes to rest, and only then is the notice withdrawn.
            stopped.append(scheduler)
            imds.action = None
            eventually(lambda: scheduler._drain.notice is None)
        return found

    monkeypatch.setattr(ChunkScheduler, "is_stopping", stop_and_withdraw)
    announce_at_batch(45, imds, monkeypatch)
    report = batch_inference(sleepy, str(source), str(tmp_path), OPTIONS)

    assert 1 == len(stopped)
    assert ("scored", ROWS, ROWS) == (report.status, report.rows, report.rows_scored)
    assert undisturbed == digests(tmp_path)


def test_a_notice_in_the_last_chunk_does_not_keep_the_run_from_its_end(
    sleepy: str,
    source: Path,
    undisturbed: dict[str, str],
    imds: Imds,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flows.batch import batch_inference

    # Every chunk has been begun by then.
    announce_at_batch((ROWS - CHUNK) // BATCH + 1, imds, monkeypatch)
    report = batch_inference(sleepy, str(source), str(tmp_path), OPTIONS)

    assert "scored" == report.status
    assert undisturbed == digests(tmp_path)


def test_a_run_that_wants_no_notices_asks_for_none(
    sleepy: str, source: Path, prefect: PrefectServer, imds: Imds, tmp_path: Path
) -> None:
    from flows.batch import batch_inference

    imds.interrupt("terminate", 0)
    small = OPTIONS.model_copy(update={"notices": "none", "batch_size": CHUNK})
    report = batch_inference(sleepy, str(source), str(tmp_path), small)

    assert "scored" == report.status
    assert [] == imds.asked


def test_a_metadata_service_that_never_answers_does_not_hold_up_a_run(
    sleepy: str, source: Path, prefect: PrefectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.batch import batch_inference

    warned: list[str] = []
    monkeypatch.setattr("flows.batch.poll_notices", lambda drain, wanted, _: poll_notices(drain, wanted, warned.append))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv(METADATA_URL, f"http://127.0.0.1:{silent.getsockname()[1]}")
        small = OPTIONS.model_copy(update={"batch_size": CHUNK})
        report = batch_inference(sleepy, str(source), str(tmp_path), small)

    assert ("scored", ROWS) == (report.status, report.rows_scored)
    assert [] == warned


class Deployed:
    """A flow run of a deployment, and processes that execute it as Prefect's workers start them."""

    def __init__(self, client: SyncPrefectClient, parameters: dict[str, Any], log: Path) -> None:
        from flows.batch import batch_inference

        self._client, self._log = client, log
        self.children: list[subprocess.Popen[bytes]] = []
        deployment = client.create_deployment(
            flow_id=client.create_flow(batch_inference),
            name=log.parent.name,
            entrypoint="flows.batch.batch_inference",
            pull_steps=PULL_STEPS,
        )
        self.id: UUID = client.create_flow_run_from_deployment(deployment, parameters=parameters).id

    def engine(self) -> subprocess.Popen[bytes]:
        """Execute the run in the engine's process, as a process worker does."""
        return self._start("-m", "prefect.engine", str(self.id), PREFECT__FLOW_ENTRYPOINT="flows.batch.batch_inference")

    def supervised(self) -> subprocess.Popen[bytes]:
        """Execute the run below `prefect flow-run execute`, as a container of Kubernetes does."""
        return self._start(
            *("-m", "prefect", "flow-run", "execute", str(self.id)),
            PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR="reschedule",
        )

    def _start(self, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            child = subprocess.Popen(
                [sys.executable, *arguments],
                env={**add_project(), **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.children.append(child)
        return child

    @property
    def run(self) -> FlowRun:
        return self._client.read_flow_run(self.id)

    @property
    def log(self) -> str:
        return self._log.read_text()


@pytest.fixture
def deployed(sleepy: str, source: Path, prefect: PrefectServer, tmp_path: Path) -> Generator[Deployed]:
    parameters = {
        "model": sleepy,
        "source": str(source),
        "destination": str(tmp_path / "scores"),
        "options": LONG.model_dump(mode="json"),
    }
    with get_client(sync_client=True) as client:
        run = Deployed(client, parameters, tmp_path / "log")
        yield run
        for child in run.children:
            child.kill()
            child.wait()


def ended(child: subprocess.Popen[bytes], destination: Path, act: Callable[[], None]) -> int:
    """Act once two parts are there, and return how the child ended."""
    eventually(lambda: len(list(destination.glob("run=*/part-*"))), lambda count: count >= 2, process=child)
    act()
    return child.wait(200)


@pytest.mark.machines
@pytest.mark.timeout(600)
def test_a_deployed_run_is_scheduled_anew_for_when_its_machine_is_gone_and_then_completed(
    deployed: Deployed, sleepy: str, source: Path, imds: Imds, tmp_path: Path
) -> None:
    scores = tmp_path / "scores"
    undisturbed = score(sleepy, source, tmp_path / "undisturbed", LONG)
    before = datetime.now(UTC)
    code = ended(deployed.engine(), scores, lambda: imds.interrupt("terminate", 120))
    state, after = deployed.run.state, datetime.now(UTC)

    assert 0 == code, deployed.log
    assert state is not None
    assert "AwaitingRetry" == state.name
    assert state.message is not None
    assert state.message.startswith("Interrupted by AWS (terminate): ")
    assert "it resumes by itself after" in state.message
    when = state.state_details.scheduled_time
    assert when is not None
    # Its machine goes 120 s after the announcement, and workers take a run up 10 s before its time.
    assert before + timedelta(seconds=119) <= when <= after + timedelta(seconds=136)
    assert digests(scores).items() < undisturbed.items()

    imds.action = None
    deployed._client.set_flow_run_state(deployed.id, Scheduled(), force=True)
    assert 0 == deployed.engine().wait(200), deployed.log
    assert "COMPLETED" == deployed.run.state_type
    assert 2 == deployed.run.run_count
    assert undisturbed == digests(scores)


@pytest.mark.machines
@pytest.mark.timeout(600)
def test_a_deployed_run_that_gets_sigterm_is_scheduled_anew_at_once(deployed: Deployed, tmp_path: Path) -> None:
    child = deployed.engine()
    code = ended(child, tmp_path / "scores", lambda: child.send_signal(signal.SIGTERM))
    state = deployed.run.state

    assert 0 == code, deployed.log
    assert state is not None
    assert "AwaitingRetry" == state.name
    assert str(state.message).startswith("Interrupted by SIGTERM: ")
    when = state.state_details.scheduled_time
    assert when is not None
    assert when <= datetime.now(UTC)


@pytest.mark.machines
@pytest.mark.timeout(600)
def test_a_supervisor_that_reschedules_a_run_lets_it_finish_its_chunks_and_settles_its_state(
    deployed: Deployed, tmp_path: Path
) -> None:
    child = deployed.supervised()
    code = ended(child, tmp_path / "scores", lambda: child.send_signal(signal.SIGTERM))
    state = deployed.run.state

    assert 0 == code, deployed.log
    assert state is not None
    assert ("AwaitingRetry", None) == (state.name, state.message)
    assert "Flow run successfully rescheduled." in deployed.log
    assert "are left; the sender of the signal decides what becomes of the run." in deployed.log


@pytest.mark.machines
@pytest.mark.timeout(600)
def test_a_run_that_is_cancelled_stays_cancelled(deployed: Deployed, tmp_path: Path) -> None:
    def cancel() -> None:
        deployed._client.set_flow_run_state(deployed.id, Cancelling(), force=True)

    code = ended(deployed.supervised(), tmp_path / "scores", cancel)

    assert 0 == code, deployed.log
    assert "CANCELLED" == deployed.run.state_type
    assert "are left; the sender of the signal decides what becomes of the run." in deployed.log
