"""Flow runs that join another's run, and that start more of themselves: on a real server."""

from __future__ import annotations

import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.states import Crashed, Running

from flows.runtime import joining
from infra.local.prefect_server import PrefectServer
from serving.errors import BadInput, ReleaseMismatch, RunnerUnusable
from tasks.batch.options import BatchOptions
from tasks.batch.report import BatchReport
from tests.support import write_customers

pytestmark = pytest.mark.usefixtures("prefect")

OPTIONS = BatchOptions(key_columns=("customer",), batch_size=128, rows_per_chunk=1024, experiment=None)


class Log:
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, line: str, *values: object) -> None:
        self.lines.append(line % values)


def infer(model: str, source: Path, destination: Path, options: BatchOptions = OPTIONS) -> BatchReport:
    from flows.batch import batch_inference

    return batch_inference(model, str(source), str(destination), options)


@contextmanager
def running(flow_run: FlowRun) -> Generator[None]:
    """Be inside a flow run."""
    from flows.batch import batch_inference

    with FlowRunContext.model_construct(flow=batch_inference, flow_run=flow_run, parameters=flow_run.parameters):
        yield


def start(pool: str | None, **parameters: Any) -> FlowRun:
    """A flow run of a deployment that has this work pool."""
    with get_client(sync_client=True) as client:
        flow = client.create_flow_from_name(f"flow-{uuid.uuid4()}")
        deployment = client.create_deployment(flow, "adhoc", work_pool_name=pool, tags=["resumes"])
        return client.create_flow_run_from_deployment(deployment, parameters=parameters, name="night")


@pytest.fixture(scope="module")
def pool(prefect: PrefectServer) -> str:
    from deployments.apply import make_process_pool

    with get_client(sync_client=True) as client:
        return client.create_work_pool(make_process_pool()).name


class TestJoining:
    def test_a_run_is_joined_whatever_the_files_are_by_now(self, linear: str, customers: Path, tmp_path: Path) -> None:
        first = infer(linear, customers, tmp_path / "scores")
        (started,) = (tmp_path / "scores/_overnight/starts").iterdir()
        write_customers(customers / "more", rows=500, files=1, rows_per_group=500)
        joined = infer(linear, customers, tmp_path / "scores", OPTIONS.model_copy(update={"joins": UUID(started.stem)}))
        anew = infer(linear, customers, tmp_path / "scores")

        assert ("already complete", first.run) == (joined.status, joined.run)
        assert ("scored", 10_500) == (anew.status, anew.rows)

    def test_one_who_joined_may_be_joined_and_stays_with_the_run(
        self, linear: str, customers: Path, tmp_path: Path
    ) -> None:
        from tasks.storage import open_storage

        first = infer(linear, customers, tmp_path / "scores")
        (started,) = (tmp_path / "scores/_overnight/starts").iterdir()
        storage = open_storage(str(tmp_path / "scores"))

        begun = joining.find_start(storage, "second", UUID(started.stem))

        assert begun is not None
        assert first.run == begun.run
        assert begun == joining.find_start(storage, "second", uuid.uuid4())
        assert joining.find_start(storage, "third", None) is None

    def test_a_worker_of_another_release_is_refused_with_both_and_nothing_is_scored(
        self, linear: str, customers: Path, tmp_path: Path
    ) -> None:
        from serving.machine import find_release
        from tasks.batch.run_records import load_start, save_start
        from tasks.storage import open_storage

        first = infer(linear, customers, tmp_path / "scores")
        (started,) = (tmp_path / "scores/_overnight/starts").iterdir()
        storage = open_storage(str(tmp_path / "scores"))
        begun = load_start(storage, started.stem)
        older = uuid.uuid4()
        assert begun is not None
        save_start(storage, str(older), begun.model_copy(update={"release": "0.0.9"}))
        before = sorted(path for path in (tmp_path / "scores").rglob("*"))

        with pytest.raises(ReleaseMismatch) as refused:
            infer(linear, customers, tmp_path / "scores", OPTIONS.model_copy(update={"joins": older}))

        assert (first.run, find_release()) == (begun.run, begun.release)
        assert "that began the run which it joins, 0.0.9, but the one on " in str(refused.value)
        assert f" is of {find_release()}. Install 0.0.9 there, or have all of them on one release" in str(refused.value)
        assert before == sorted(path for path in (tmp_path / "scores").rglob("*"))

    def test_a_flow_run_that_began_nothing_there_is_named(
        self, linear: str, customers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(joining, "_START_SECONDS_MAX", 0.5)
        stranger = uuid.uuid4()

        with pytest.raises(BadInput, match=f"Flow run {stranger} must have begun a run at"):
            infer(linear, customers, tmp_path / "scores", OPTIONS.model_copy(update={"joins": stranger}))
        assert not (tmp_path / "scores").exists()

    def test_it_knows_whether_the_one_that_it_joins_is_there(self, pool: str) -> None:
        first = start(pool)
        beside = OPTIONS.model_copy(update={"joins": first.id})
        known = [joining.is_beside_another(OPTIONS), joining.is_beside_another(beside)]
        with get_client(sync_client=True) as client:
            for state in (Running(), Crashed()):
                client.set_flow_run_state(first.id, state, force=True)
                known.append(joining.is_beside_another(beside))

        assert [False, False, True, False] == known
        assert not joining.is_beside_another(OPTIONS.model_copy(update={"joins": uuid.uuid4()}))


class TestStarting:
    def test_a_call_of_no_deployment_can_not_start_workers_and_says_how_to(
        self, linear: str, customers: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(RunnerUnusable, match=r"but this call, for 3 workers, is of none\. Run a deployment"):
            infer(linear, customers, tmp_path / "scores", OPTIONS.model_copy(update={"workers": 3}))
        assert not (tmp_path / "scores").exists()

    def test_each_is_a_run_of_the_same_deployment_that_joins_and_a_retry_starts_none_again(self, pool: str) -> None:
        options = OPTIONS.model_copy(update={"workers": 3})
        first = start(pool, model="models:/m/1", options=options.model_dump(mode="json"))
        log = Log()
        with running(first):
            started = joining.start_workers(options, log)  # type: ignore[arg-type]
            again = joining.start_workers(options, log)  # type: ignore[arg-type]

        assert ["night (worker 2)", "night (worker 3)"] == [each.name for each in started]
        assert [each.id for each in started] == [each.id for each in again]
        assert {first.deployment_id} == {each.deployment_id for each in started}
        assert ["More workers score this run: night (worker 2), night (worker 3)."] * 2 == log.lines
        asked = BatchOptions.model_validate(started[0].parameters["options"])
        assert OPTIONS.model_copy(update={"joins": first.id}) == asked
        assert "models:/m/1" == started[0].parameters["model"]

    def test_workers_of_one_that_joined_join_the_same(self, pool: str) -> None:
        joins = uuid.uuid4()
        options = OPTIONS.model_copy(update={"workers": 2, "joins": joins})
        with running(start(pool, options=options.model_dump(mode="json"))):
            (other,) = joining.start_workers(options, Log())  # type: ignore[arg-type]

        assert str(joins) == other.parameters["options"]["joins"]

    def test_one_worker_starts_none(self, pool: str) -> None:
        with running(start(pool)):
            assert [] == joining.start_workers(OPTIONS, Log())  # type: ignore[arg-type]

    def test_a_deployment_without_its_work_pool_is_named(self) -> None:
        options = OPTIONS.model_copy(update={"workers": 2})
        with running(start(None)), pytest.raises(RunnerUnusable, match="Deployment 'adhoc' must have a work pool"):
            joining.start_workers(options, Log())  # type: ignore[arg-type]

    def test_a_relative_path_in_a_run_of_a_deployment_is_refused(self, pool: str) -> None:
        with running(start(pool)):
            joining.check_workers("s3://lake/customers", "/data/scores", OPTIONS)
            with pytest.raises(BadInput, match="destination of a deployment's run must be an absolute path"):
                joining.check_workers("s3://lake/customers", "scores", OPTIONS)
            table = {"source": "features", "join_keys": "customer", "time": "at"}
            joined = BatchOptions.model_validate({"spine_time": "as_of", "features": [table]})
            with pytest.raises(BadInput, match="feature table of a deployment's run must be an absolute path"):
                joining.check_workers("s3://lake/customers", "/data/scores", joined)
