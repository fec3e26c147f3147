"""A run as spans, as a receiver of OTLP gets them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Generator, Mapping
from pathlib import Path
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId

from flows.runtime.tracing import choose_exporter
from tasks.batch.options import BatchOptions, Ray
from tests.child_environment import add_project
from tests.flows.children import PULL_STEPS, call, start_child
from tests.otlp_receiver import OtlpReceiver, ReceivedSpan, otlp_receiver
from tests.support import register_script

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="traces are an extra: pip install -e '.[traces]'")

pytestmark = pytest.mark.usefixtures("prefect", "registry")

# A busy machine takes its time.
SECONDS_MAX = 600
OPTIONS = BatchOptions(key_columns=("customer",), batch_size=128, rows_per_chunk=1024, slots=2, experiment=None)


@pytest.fixture
def receiver() -> Generator[OtlpReceiver]:
    with otlp_receiver() as receiver:
        yield receiver


def run_child(
    point: str,
    times: int,
    model: str,
    source: Path,
    destination: Path,
    environment: Mapping[str, str],
    options: BatchOptions = OPTIONS,
) -> subprocess.CompletedProcess[str]:
    with start_child(
        *("kill_child.py", point, str(times), *call(model, source, destination, options)),
        environment={**os.environ, "PREFECT_LOGGING_LEVEL": "CRITICAL", **environment},
        stdout=subprocess.PIPE,
    ) as child:
        stdout, stderr = child.communicate(timeout=SECONDS_MAX)
    return subprocess.CompletedProcess(child.args, child.returncode, stdout, stderr)


def find_flow(receiver: OtlpReceiver) -> ReceivedSpan:
    """The only span that has no parent."""
    (flow,) = (span for span in receiver.spans if not span.parent)
    return flow


def test_a_run_is_a_tree_of_spans_from_the_flow_to_its_shards(
    doubling: str, customers: Path, receiver: OtlpReceiver, tmp_path: Path
) -> None:
    done = run_child("never", 1, doubling, customers, tmp_path / "scores", receiver.environment)
    assert done.returncode == 0, done.stderr
    flow, score = find_flow(receiver), receiver.find("score")
    shards = [span for span in receiver.spans if span.name.startswith("shard ")]

    assert {flow.trace} == {span.trace for span in receiver.spans}
    assert "doubling v1 → scores" == flow.name
    assert ["check keys", "load", "plan", "publish", "report", "resolve", "score"] == receiver.list_children(flow)
    # A slot that helps with what is left of a shard has a task of its own.
    assert {f"shard {at} of 4" for at in (1, 2, 3, 4)} == set(receiver.list_children(score))
    assert len(receiver.list_children(score)) == len(shards) == len(receiver.spans) - 8
    expected = {
        "overnight.run": json.loads(done.stdout.splitlines()[-1])["run"],
        "overnight.model": doubling,
        "overnight.destination": str(tmp_path / "scores"),
        "overnight.rows": 10_000,
        "overnight.rows_scored": 10_000,
        "overnight.rows_rejected": 0,
        "overnight.shards": 4,
    }
    assert expected == {name: flow.attributes.get(name) for name in expected}
    assert 10_000 == sum(span.attributes["overnight.rows_scored"] for span in shards)
    assert {expected["overnight.run"]} == {span.attributes["overnight.run"] for span in shards}
    assert {"overnight"} == {span.resource["service.name"] for span in receiver.spans}
    assert not any(span.failed for span in receiver.spans)


def test_a_failed_run_is_an_error_with_its_kind_and_message_and_without_secrets(
    customers: Path, receiver: OtlpReceiver, tmp_path: Path
) -> None:
    secret = "s3cr3t-0f-mine"  # noqa: S105 - of nothing
    model = register_script("leaking", f"raise ValueError('no access to https://me:{secret}@host/x?token={secret}')")
    environment = receiver.environment | {"OTEL_SERVICE_NAME": "night", "OTEL_RESOURCE_ATTRIBUTES": "team=churn"}
    done = run_child("never", 1, model, customers, tmp_path / "scores", environment)
    flow = find_flow(receiver)

    assert 1 == done.returncode
    assert (True, True) == (flow.failed, receiver.find("score").failed)
    assert "ModelFailed" == flow.attributes["error.type"]
    assert "https://***@host" in flow.message
    assert "exception" in {name for name, _ in flow.events}
    assert ("night", "churn") == (flow.resource["service.name"], flow.resource["team"])
    assert all(secret.encode() not in body for body in receiver.bodies)


@pytest.mark.machines
def test_the_resume_of_a_killed_run_is_linked_to_what_was_killed(
    doubling: str, customers: Path, receiver: OtlpReceiver, tmp_path: Path
) -> None:
    killed = run_child("after a part", 3, doubling, customers, tmp_path / "scores", receiver.environment)
    start = json.loads(next((tmp_path / "scores/_overnight").glob("*/trace.json")).read_text())
    seen_before = len(receiver.spans)
    resumed = run_child("never", 1, doubling, customers, tmp_path / "scores", receiver.environment)
    flow = find_flow(receiver)

    assert (-9, 0) == (killed.returncode, resumed.returncode), resumed.stderr
    assert (start["traceparent"].split("-")[2],) == flow.links
    assert start["traceparent"].split("-")[1] != flow.trace
    assert seen_before < len(receiver.spans)
    assert 0 < flow.attributes["overnight.rows_scored"] < 10_000


@pytest.mark.machines
def test_a_run_that_a_notice_ends_sends_its_span_and_says_so(
    doubling: str, customers: Path, receiver: OtlpReceiver, tmp_path: Path
) -> None:
    with start_child(
        *("notice_child.py", "real", "1", "after a part", "3"),
        *call(doubling, customers, tmp_path / "scores", OPTIONS),
        environment={**os.environ, "PREFECT_LOGGING_LEVEL": "CRITICAL", **receiver.environment},
        stdout=subprocess.PIPE,
    ) as child:
        _, stderr = child.communicate(timeout=SECONDS_MAX)
    flow = find_flow(receiver)

    assert flow.attributes.get("overnight.interrupted") is True, stderr
    assert "interrupted" in {name for name, _ in flow.events}
    assert not flow.failed


@pytest.mark.machines
def test_shards_on_ray_are_in_the_trace_of_their_run(
    doubling: str, customers: Path, receiver: OtlpReceiver, tmp_path: Path
) -> None:
    pytest.importorskip("prefect_ray", reason="Ray is an extra: pip install 'overnight[ray]'")
    options = OPTIONS.model_copy(update={"runner": Ray()})
    done = run_child("never", 1, doubling, customers, tmp_path / "scores", receiver.environment, options)
    assert done.returncode == 0, done.stderr
    shards = [span for span in receiver.spans if span.name.startswith("shard ")]

    assert 4 == len(shards)
    assert {receiver.find("score").id} == {span.parent for span in shards}
    assert {find_flow(receiver).trace} == {span.trace for span in shards}
    assert 10_000 == sum(span.attributes["overnight.rows_scored"] for span in shards)
    instances = {span.resource["service.instance.id"] for span in shards}
    assert find_flow(receiver).resource["service.instance.id"] not in instances


@pytest.mark.machines
def test_workers_that_a_run_starts_are_in_its_trace(
    doubling: str, customers: Path, receiver: OtlpReceiver, tmp_path: Path
) -> None:
    from deployments.apply import make_process_pool
    from flows.batch import batch_inference

    parameters = {"model": doubling, "source": str(customers), "destination": str(tmp_path / "scores")}
    options = OPTIONS.model_copy(update={"workers": 2}).model_dump(mode="json")
    with get_client(sync_client=True) as client:
        pool = client.create_work_pool(make_process_pool()).name
        deployment = client.create_deployment(
            client.create_flow(batch_inference),
            "traced",
            work_pool_name=pool,
            entrypoint="flows.batch.batch_inference",
            pull_steps=PULL_STEPS,
        )
        first = client.create_flow_run_from_deployment(deployment, parameters={**parameters, "options": options})
        execute_flow_run(first.id, receiver)
        of_deployment = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
        (second,) = (run for run in client.read_flow_runs(deployment_filter=of_deployment) if run.id != first.id)
        execute_flow_run(second.id, receiver)
    flows = [span for span in receiver.spans if span.attributes["prefect.run.type"] == "flow"]

    assert {str(first.id), str(second.id)} == {span.attributes["prefect.run.id"] for span in flows}
    assert 1 == len({span.trace for span in receiver.spans})
    by_id = {span.attributes["prefect.run.id"]: span for span in flows}
    assert by_id[str(first.id)].id == by_id[str(second.id)].parent


def execute_flow_run(flow_run: UUID, receiver: OtlpReceiver) -> None:
    """Run a flow run of a deployment in a process of its own, as a worker does."""
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "flow-run", "execute", str(flow_run)],
        env={**add_project(), **receiver.environment},
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.machines
def test_a_receiver_that_is_not_there_never_ends_a_run(
    doubling: str, customers: Path, tmp_path: Path, held_port: int
) -> None:
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{held_port}", "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
    done = run_child("never", 1, doubling, customers, tmp_path / "scores", environment)

    assert done.returncode == 0, done.stderr
    assert "scored" == json.loads(done.stdout.splitlines()[-1])["status"]


@pytest.mark.machines
def test_an_exporter_that_is_not_installed_is_a_warning(doubling: str, customers: Path, tmp_path: Path) -> None:
    environment = {"OTEL_TRACES_EXPORTER": "carrier_pigeon", "PREFECT_LOGGING_LEVEL": "WARNING"}
    done = run_child("never", 1, doubling, customers, tmp_path / "scores", environment)

    assert done.returncode == 0, done.stderr
    assert "no exporter of the name carrier_pigeon is installed. Run: pip install" in done.stderr


@pytest.mark.machines
def test_without_an_exporter_none_is_imported_and_no_file_is_written(
    doubling: str, customers: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; from flows.batch import batch_inference; from tasks.batch.options import BatchOptions;"
        "batch_inference(*sys.argv[1:4], BatchOptions.model_validate_json(sys.argv[4]));"
        "print([name for name in sys.modules if name.startswith('opentelemetry.exporter.')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *call(doubling, customers, tmp_path / "scores", OPTIONS)],
        env={**add_project(), "PREFECT_LOGGING_LEVEL": "CRITICAL"},
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )

    assert "[]" == done.stdout.strip().splitlines()[-1], done.stderr
    assert [] == list(tmp_path.rglob("trace.json"))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}, "otlp_proto_http"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318/v1/traces"}, "otlp_proto_http"),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "otlp_proto_http"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "otlp_proto_grpc"),
        ({"OTEL_TRACES_EXPORTER": "console"}, "console"),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}, None),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_TRACES_EXPORTER": "otlp"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": " "}, None),
    ],
)
def test_the_exporter_is_the_one_that_the_variables_of_opentelemetry_name(
    environment: dict[str, str], expected: str | None
) -> None:
    assert expected == choose_exporter(environment)
