"""A stack in AWS by the command line: planned, deployed, changed, looked at, destroyed; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import typer.testing
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.states import Running
from typer.testing import CliRunner

from deployments.command_line import app
from deployments.command_line.console import LINES_MAX
from infra.local.prefect_server import PrefectServer
from tests.aws_server import AwsServer, aws_server, refuse, use_aws


@pytest.fixture(scope="module")
def running_aws() -> Generator[AwsServer]:
    with aws_server() as running:
        yield running


@pytest.fixture
def away(running_aws: AwsServer, monkeypatch: pytest.MonkeyPatch) -> Generator[AwsServer]:
    """AWS with nothing in it, and polls that do not wait."""
    running_aws.reset()
    with use_aws(running_aws):
        yield running_aws


@pytest.fixture
def settings(away: AwsServer, tmp_path: Path) -> str:
    path = tmp_path / "aws.yaml"
    path.write_text(
        f"subnets: {json.dumps(away.list_subnets())}\n"
        "prefect_api_url: https://prefect.example.com/api\n"
        "mlflow_tracking_uri: https://mlflow.example.com\n"
    )
    return str(path)


@pytest.fixture
def wheel(tmp_path: Path) -> str:
    path = tmp_path / "overnight-0.1.0-py3-none-any.whl"
    path.write_bytes(b"the code of 0.1.0")
    return str(path)


def call(*arguments: str, answer: str | None = None) -> typer.testing.Result:
    return CliRunner().invoke(app, ["aws", *arguments], input=answer, env={"COLUMNS": "200"})


def call_json(*arguments: str) -> dict[str, Any]:
    result = call(*arguments, "--json")
    assert 0 == result.exit_code, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def list_stacks(away: AwsServer) -> list[str]:
    return [each["StackName"] for each in away.client("cloudformation").describe_stacks()["Stacks"]]


def list_buckets(away: AwsServer) -> list[str]:
    return [each["Name"] for each in away.client("s3").list_buckets()["Buckets"]]


def assert_refused(result: typer.testing.Result, *words: str) -> None:
    said = " ".join(result.stderr.split())
    assert 1 == result.exit_code, result.output
    assert [] == [each for each in words if each not in said], said
    assert "Traceback" not in result.output
    assert len(result.stderr.splitlines()) <= LINES_MAX


def test_a_plan_shows_what_would_be_made_and_leaves_nothing(away: AwsServer, settings: str, wheel: str) -> None:
    result = call("plan", settings, "--wheel", wheel)

    assert 0 == result.exit_code, result.output
    for words in ("The stack overnight in eu-central-1 is to be made", "SpotGroup", "AWS::S3::Bucket", "Release"):
        assert words in result.stdout
    assert [] == list_stacks(away)


def test_a_stack_is_deployed_changed_looked_at_and_destroyed_with_its_data_kept(
    away: AwsServer, settings: str, wheel: str
) -> None:
    made = call_json("deploy", settings, "--wheel", wheel, "--yes")
    again = call_json("deploy", settings, "--wheel", wheel, "--yes")
    changed = call_json("deploy", '{"spot_workers_max": 7}', "--yes")
    status = call_json("status")
    shown = call("status")
    bucket = status["resources"]["DataBucket"]
    gone = call_json("destroy", "--yes")

    assert ("CREATE", "UPDATE", "UPDATE") == (made["kind"], again["kind"], changed["kind"])
    assert ([], []) == (again["changes"], again["parameters"])
    assert [{"name": "SpotWorkersMax", "before": "4", "after": "7"}] == changed["parameters"]
    assert ("overnight", "eu-central-1", "0.1.0") == (
        status["name"],
        status["region"],
        status["parameters"]["Release"],
    )
    assert [("spot", 0, 7, []), ("on-demand", 0, 4, [])] == [
        (each["kind"], each["wanted"], each["workers_max"], each["machines"]) for each in status["machines"]
    ]
    assert [] == status["in_use_by"]
    assert "nobody" in shown.stdout
    assert ([], [bucket]) == (list_stacks(away), list_buckets(away))
    assert {"stack": "overnight", "bucket": bucket, "kept": True, "versions_deleted": 0} == gone
    assert ["releases/0.1.0/overnight-0.1.0-py3-none-any.whl"] == [
        each["Key"] for each in away.client("s3").list_objects_v2(Bucket=bucket)["Contents"]
    ]


def test_nothing_is_made_and_nothing_is_deleted_without_a_yes(away: AwsServer, settings: str, wheel: str) -> None:
    refused = call("deploy", settings, "--wheel", wheel, answer="n\n")

    assert 1 == refused.exit_code
    assert "SpotGroup" in refused.stdout
    assert [] == list_stacks(away)

    made = call("deploy", settings, "--wheel", wheel, answer="y\n")
    kept = call("destroy", answer="\n")

    assert (0, 1) == (made.exit_code, kept.exit_code)
    assert 'machines=AwsMachines(stack="overnight")' in made.stdout
    assert ["overnight"] == list_stacks(away)


def test_data_is_deleted_by_a_flag_of_its_own(away: AwsServer, settings: str, wheel: str) -> None:
    call_json("deploy", settings, "--wheel", wheel, "--yes")
    gone = call_json("destroy", "--delete-data", "--yes")

    assert (False, 1) == (gone["kept"], gone["versions_deleted"])
    assert ([], []) == (list_stacks(away), list_buckets(away))


def test_a_stack_whose_machines_run_is_destroyed_by_force_alone(away: AwsServer, settings: str, wheel: str) -> None:
    made = call_json("deploy", settings, "--wheel", wheel, "--yes")
    away.client("autoscaling").set_desired_capacity(
        AutoScalingGroupName=made["resources"]["SpotGroup"], DesiredCapacity=2
    )

    assert_refused(call("destroy", "--yes"), "No run may be in progress", "2 spot machines", "--force goes on")
    assert ["overnight"] == list_stacks(away)

    assert 0 == call("destroy", "--yes", "--force").exit_code
    assert [] == list_stacks(away)


def test_a_stack_whose_pools_have_a_run_in_progress_is_kept_and_the_run_is_named(
    server: PrefectServer, away: AwsServer, settings: str, wheel: str
) -> None:
    with get_client(sync_client=True) as client:
        pool = client.create_work_pool(WorkPoolCreate(name="spot-in-use", type="process")).name
        deployment = client.create_deployment(client.create_flow_from_name("any"), "in-use", work_pool_name=pool)
        run = client.create_flow_run_from_deployment(deployment, name="churn v3 → scores")
        client.set_flow_run_state(run.id, Running(), force=True)
    call_json("deploy", settings, "--wheel", wheel, "--yes")
    call_json("deploy", json.dumps({"spot_pool": pool}), "--yes")

    assert_refused(call("destroy", "--yes"), "got the flow run 'churn v3 → scores'. Wait for them, or cancel them")

    with get_client(sync_client=True) as client:
        client.delete_flow_run(run.id)
    assert 0 == call("destroy", "--yes").exit_code


def test_a_release_is_not_changed_under_runs_in_progress(away: AwsServer, settings: str, wheel: str) -> None:
    made = call_json("deploy", settings, "--wheel", wheel, "--yes")
    away.client("autoscaling").set_desired_capacity(
        AutoScalingGroupName=made["resources"]["OnDemandGroup"], DesiredCapacity=1
    )
    newer = Path(wheel).with_name("overnight-0.2.0-py3-none-any.whl")
    newer.write_bytes(b"the code of 0.2.0")

    assert_refused(
        call("deploy", "--wheel", str(newer), "--yes"),
        "changed from release 0.1.0 to 0.2.0, got 1 on-demand machines",
    )
    assert "0.1.0" == call_json("status")["parameters"]["Release"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "{}", "--region", "eu-centrl-1"], "got 'eu-centrl-1'. Near it are eu-central-1"),
        (["plan", "{}", "--profile", "nobody"], "The config profile (nobody) could not be found"),
        (["plan", "{}", "--stack", "a_b"], "letters, digits and hyphens, a letter first, got 'a_b'"),
        (["plan", "{}"], "Machines must have a release of Overnight to install, got none. Give its wheel by --wheel"),
        (["plan", '{"index_url": "https://packages.example.com"}'], "must have subnets, prefect_api_url, mlflow_track"),
        (["plan", '{"subnet": "subnet-1"}'], "subnet: there is no such field"),
        (["plan", '{"prefect_api_url": "http://127.0.0.1:4200/api"}'], "known to this machine alone"),
        (["plan", "nowhere.yaml"], "nowhere.yaml, which the settings names, must be a file"),
        (["deploy", "{}", "--wheel", "dist/x.whl"], "--wheel must be a wheel of Overnight"),
        (["status"], "The stack overnight must exist in eu-central-1, got none. Make it by `overnight aws deploy`"),
        (["destroy", "--yes"], "The stack overnight must exist in eu-central-1, got none."),
    ],
)
def test_bad_input_is_said_with_what_to_do(away: AwsServer, arguments: list[str], words: str) -> None:
    assert_refused(call(*arguments), words)


def test_missing_credentials_are_said(away: AwsServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / name))

    assert_refused(call("status"), "AWS must be given credentials", "Set AWS_PROFILE")


def test_a_quota_that_is_used_up_is_said(away: AwsServer, settings: str, wheel: str) -> None:
    away.answers["CreateChangeSet"] = refuse("LimitExceededException", "Limit of 2000 stacks is reached")

    assert_refused(
        call("plan", settings, "--wheel", wheel), "quotas of the account must allow what is asked for", "Service Quotas"
    )
    assert [] == list_stacks(away)


def test_a_name_that_somebody_else_has_is_said(away: AwsServer, settings: str, wheel: str) -> None:
    away.client("cloudformation").create_stack(
        StackName="overnight", TemplateBody='{"Resources": {"Topic": {"Type": "AWS::SNS::Topic"}}}'
    )

    for arguments in (["deploy", settings, "--wheel", wheel, "--yes"], ["destroy", "--yes", "--force"]):
        assert_refused(call(*arguments), "must be one of Overnight's", "Choose another name by --stack")
    assert ["overnight"] == list_stacks(away)


def test_another_wheel_of_a_release_is_refused(away: AwsServer, settings: str, wheel: str) -> None:
    call_json("deploy", settings, "--wheel", wheel, "--yes")
    Path(wheel).write_bytes(b"other code of 0.1.0")

    assert_refused(call("deploy", "--wheel", wheel, "--yes"), "The wheel of release 0.1.0 must be the one that s3://")
