"""AWS is opened, or what is missing is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.aws.session import Aws, AwsRefused, is_quota, open_aws
from infra.aws.stack import find_stack
from tests.aws_server import AwsServer, refuse


def test_a_region_that_aws_does_not_have_is_refused_with_those_near_it(server: AwsServer) -> None:
    with pytest.raises(AwsRefused, match=r"got 'eu-centrl-1'\. Near it are eu-central-1, .*Correct --region"):
        open_aws("eu-centrl-1")


def test_no_region_says_how_to_name_one(server: AwsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_REGION")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")

    with pytest.raises(AwsRefused, match=r"A region must be given, got none\. Name it by --region, or set AWS_REGION"):
        open_aws()


def test_missing_credentials_say_how_to_give_them(
    server: AwsServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / name))

    with pytest.raises(AwsRefused, match=r"must be given credentials, got: Unable to locate .*Set AWS_PROFILE, or"):
        open_aws()


def test_an_unknown_profile_is_named(server: AwsServer) -> None:
    with pytest.raises(AwsRefused, match=r"credentials, got: The config profile \(nobody\) could not be found"):
        open_aws(profile="nobody")


def test_credentials_that_aws_does_not_take_say_so(aws: Aws, server: AwsServer) -> None:
    server.answers["DescribeStacks"] = refuse("InvalidClientTokenId", "The security token is invalid.", 403)

    with pytest.raises(AwsRefused, match=r"valid in this region, but AWS answers InvalidClientTokenId: .*Renew them"):
        find_stack(aws, "overnight")


def test_aws_that_does_not_answer_is_told(server: AwsServer, monkeypatch: pytest.MonkeyPatch, held_port: int) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{held_port}")

    with pytest.raises(AwsRefused, match=r"AWS must answer, got: .*Check the network, the region, and AWS_ENDPOINT"):
        find_stack(open_aws(), "overnight")


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("You have requested more vCPU capacity than your current vCPU limit of 32 allows", True),
        ("MaxSpotInstanceCountExceeded: Max spot instance count exceeded", True),
        ("The maximum number of VPCs has been reached: quota exceeded", True),
        ("TooManyBuckets", True),
        ("We currently do not have sufficient g6.xlarge capacity in zone eu-central-1a", False),
        ("User is not authorized to perform iam:CreateRole", False),
    ],
)
def test_a_reason_is_told_to_be_a_quota_or_not(reason: str, *, expected: bool) -> None:
    assert expected == is_quota(reason)
