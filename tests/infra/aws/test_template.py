"""The template holds against AWS's schemas, gives no more rights than are needed, and starts a worker."""

from __future__ import annotations

import base64
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.aws.stack import Stack, read_template
from tests.aws_server import AwsServer

ROOT = Path(__file__).parents[3]


class Tags(yaml.SafeLoader):
    """Reads the short forms of CloudFormation's functions as their long ones."""


def _construct(loader: Any, tag: str, node: Any) -> Any:
    construct = {
        yaml.ScalarNode: loader.construct_scalar,
        yaml.SequenceNode: loader.construct_sequence,
        yaml.MappingNode: loader.construct_mapping,
    }[type(node)]
    value = construct(node) if isinstance(node, yaml.ScalarNode) else construct(node, deep=True)
    return {tag if tag in ("Ref", "Condition") else f"Fn::{tag}": value}


Tags.add_multi_constructor("!", _construct)
RESOURCES: dict[str, Any] = yaml.load(read_template(), Loader=Tags)["Resources"]  # noqa: S506 - it is a SafeLoader


def properties(name: str) -> Any:
    return RESOURCES[name]["Properties"]


def test_the_template_holds_against_the_schemas_of_aws() -> None:
    pytest.importorskip("cfnlint", reason="pip install -e '.[dev]' brings cfn-lint")
    done = subprocess.run(
        [Path(sys.executable).with_name("cfn-lint"), ROOT / "infra/aws/template.yaml"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (0, "") == (done.returncode, done.stdout)


def test_the_bucket_is_closed_to_the_public_and_kept() -> None:
    assert {"BlockPublicAcls", "BlockPublicPolicy", "IgnorePublicAcls", "RestrictPublicBuckets"} == {
        name for name, blocked in properties("DataBucket")["PublicAccessBlockConfiguration"].items() if blocked
    }
    assert "Enabled" == properties("DataBucket")["VersioningConfiguration"]["Status"]
    assert ["Retain"] * 2 == [RESOURCES["DataBucket"][name] for name in ("DeletionPolicy", "UpdateReplacePolicy")]
    (denied,) = properties("DataBucketPolicy")["PolicyDocument"]["Statement"]
    assert ("Deny", {"Bool": {"aws:SecureTransport": "false"}}) == (denied["Effect"], denied["Condition"])


def test_nobody_is_allowed_everything_or_everywhere() -> None:
    documents = [
        *(policy["PolicyDocument"] for policy in properties("WorkerRole")["Policies"]),
        *(properties(name)["PolicyDocument"] for name in ("SourcePolicy", "SecretPolicy", "ScalingPolicy")),
    ]
    for statement in (each for document in documents for each in document["Statement"]):
        actions = [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]

        assert not any("*" in action for action in actions)
        # Actions that only describe know no resources.
        assert "*" != statement["Resource"] or all(":Describe" in action for action in actions)


def test_a_worker_can_not_change_what_the_next_one_installs() -> None:
    (policy,) = properties("WorkerRole")["Policies"]
    (denied,) = (each for each in policy["PolicyDocument"]["Statement"] if each["Effect"] == "Deny")

    assert {"s3:PutObject", "s3:DeleteObject"} == set(denied["Action"])
    assert {"Fn::Sub": "${DataBucket.Arn}/releases/*"} == denied["Resource"]


@pytest.mark.parametrize("name", ["CpuLaunchTemplate", "GpuLaunchTemplate"])
def test_a_machine_answers_about_itself_by_imdsv2_alone_and_its_disk_is_encrypted(name: str) -> None:
    data = properties(name)["LaunchTemplateData"]

    assert ("required", 1) == (
        data["MetadataOptions"]["HttpTokens"],
        data["MetadataOptions"]["HttpPutResponseHopLimit"],
    )
    assert all(each["Ebs"]["Encrypted"] for each in data["BlockDeviceMappings"])


def test_spot_machines_are_replaced_before_they_are_taken_and_both_groups_go_to_zero() -> None:
    assert properties("SpotGroup")["CapacityRebalance"]
    for name in ("SpotGroup", "OnDemandGroup"):
        assert "0" == properties(name)["MinSize"]
        # An update of the stack leaves the machines of a night alone.
        assert "DesiredCapacity" not in properties(name)


def test_the_budget_warns_by_mail_before_it_is_spent() -> None:
    notices = properties("MonthlyBudget")["NotificationsWithSubscribers"]

    assert [("ACTUAL", 80), ("FORECASTED", 100)] == [
        (each["Notification"]["NotificationType"], each["Notification"]["Threshold"]) for each in notices
    ]


FAKES = {
    "curl": 'case "$*" in *token) echo token ;; *instance-id) echo i-0abc ;; *life-cycle) echo {life_cycle} ;; esac',
    "aws": 'case "$*" in "s3 cp"*) {copy} ;; secretsmanager*) echo PREFECT_API_KEY=key-of-the-secret ;; esac',
    "python3.12": 'mkdir -p "$3/bin"; cp {fakes}/python "$3/bin/python"; cp {fakes}/overnight "$3/bin/overnight"',
    "python": 'echo "pip $*" >> {log}',
    "overnight": "exec {python} -m deployments.command_line worker --systemd",
    "hostnamectl": 'echo "hostname $2" >> {log}',
    "systemctl": 'echo "systemctl $*" >> {log}',
    "dnf": 'echo "dnf $*" >> {log}',
    "useradd": ":",
    "id": "exit 1",
}


def run_script(stack: Stack, server: AwsServer, folder: Path, *, life_cycle: str, copy: str) -> tuple[int, str, str]:
    """Run what a machine runs once, with its folders below another and programs that only note what they are told."""
    fakes, log = folder / "fakes", folder / "log"
    fakes.mkdir(parents=True)
    log.touch()
    words = {"life_cycle": life_cycle, "fakes": fakes, "log": log, "python": sys.executable, "copy": copy}
    for name, line in FAKES.items():
        (fakes / name).write_text(f"#!/bin/bash\n{line.format(**words)}\n")
        (fakes / name).chmod(stat.S_IRWXU)
    agent = folder / "opt/aws/amazon-cloudwatch-agent/bin/amazon-cloudwatch-agent-ctl"
    agent.parent.mkdir(parents=True)
    agent.write_text("#!/bin/bash\n")
    agent.chmod(stat.S_IRWXU)
    (folder / "etc/systemd/system").mkdir(parents=True)
    script = server.client("ssm").get_parameter(Name=stack.resource("WorkerScript"))["Parameter"]["Value"]
    for top in ("/etc/", "/opt/", "/var/log/"):
        script = script.replace(top, f"{folder}{top}")
    done = subprocess.run(
        ["bash", "-c", script],
        env={"PATH": f"{fakes}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": os.environ.get("HOME", "/")},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.returncode, log.read_text(), done.stderr


@pytest.mark.parametrize(("life_cycle", "pool"), [("spot", "overnight-spot"), ("on-demand", "overnight-on-demand")])
def test_a_machine_installs_the_wheel_and_starts_the_worker_of_its_pool(
    stack: Stack, server: AwsServer, tmp_path: Path, life_cycle: str, pool: str
) -> None:
    copy = f"touch {tmp_path}/opt/overnight-wheels/overnight-0.1.0-py3-none-any.whl"
    code, log, error = run_script(stack, server, tmp_path, life_cycle=life_cycle, copy=copy)
    environment = (tmp_path / "etc/overnight/worker.env").read_text().splitlines()
    logs = json.loads((tmp_path / "etc/overnight/logs.json").read_text())
    unit = (tmp_path / "etc/systemd/system/overnight-worker@.service").read_text()

    assert 0 == code, error
    assert "hostname i-0abc" in log
    assert "dnf install -y -q amazon-cloudwatch-agent python3.12" in log
    assert f"--find-links {tmp_path}/opt/overnight-wheels {tmp_path}/opt/overnight-wheels/overnight-0.1.0-py3" in log
    assert log.rstrip().endswith(f"systemctl enable --now overnight-worker@{pool}")
    assert "PREFECT_API_URL=https://prefect.example.com/api" in environment
    assert "MLFLOW_TRACKING_URI=https://mlflow.example.com" in environment
    assert 0o600 == stat.S_IMODE((tmp_path / "etc/overnight/worker.env").stat().st_mode)
    assert {"/overnight/overnight"} == {
        each["log_group_name"] for each in logs["logs"]["logs_collected"]["files"]["collect_list"]
    }
    assert "infra.worker --pool %i --name %H --grace 60" in unit
    assert "KillMode=mixed" in unit


def test_a_machine_without_a_wheel_and_without_an_index_says_so_and_starts_no_worker(
    stack: Stack, server: AwsServer, tmp_path: Path
) -> None:
    code, log, error = run_script(stack, server, tmp_path, life_cycle="spot", copy=":")

    assert 1 == code
    assert "The wheel of Overnight 0.1.0 must be in s3://" in error
    assert "systemctl" not in log


@pytest.mark.parametrize("name", ["CpuLaunchTemplate", "GpuLaunchTemplate"])
def test_a_machine_runs_that_script_and_ends_where_it_can_not_be_had(
    stack: Stack, server: AwsServer, tmp_path: Path, name: str
) -> None:
    versions = server.client("ec2").describe_launch_template_versions(LaunchTemplateId=stack.resource(name))
    started = base64.b64decode(versions["LaunchTemplateVersions"][0]["LaunchTemplateData"]["UserData"]).decode()
    (tmp_path / "aws").write_text(
        '#!/bin/bash\n[ "$7" = Parameter.Value ] || exit 9\n[ -z "$GONE" ] && echo "echo ran $6"\n'
    )
    (tmp_path / "aws").chmod(stat.S_IRWXU)
    codes = []
    for gone in ("", "yes"):
        done = subprocess.run(
            ["bash", "-c", started.replace("--query Parameter.Value", "Parameter.Value")],
            env={"PATH": f"{tmp_path}:/usr/bin:/bin", "GONE": gone},
            capture_output=True,
            text=True,
            check=False,
        )
        codes.append((done.returncode, done.stdout.strip()))

    assert started.startswith("#!/bin/bash\n")
    assert [(0, "ran /overnight/overnight/worker"), (1, "")] == codes
