"""A stack is planned, made, changed and deleted; what fails says what stands and how to go on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from infra.aws.session import Aws, AwsRefused
from infra.aws.settings import Settings, make_parameters
from infra.aws.stack import (
    Stack,
    carry_out,
    check_owner,
    delete_stack,
    drop_plan,
    find_stack,
    list_stacks,
    plan_stack,
    read_stack,
)
from tests.aws_server import AwsServer


def say_nothing(_: str) -> None:
    """Say nothing."""


def test_a_plan_shows_every_resource_and_makes_none(aws: Aws, settings: Settings, server: AwsServer) -> None:
    plan = plan_stack(aws, "overnight", make_parameters(aws, settings, "0.1.0", None))

    assert "CREATE" == plan.kind
    assert {"Add"} == {change.action for change in plan.changes}
    assert {"DataBucket", "WorkerRole", "CpuLaunchTemplate", "GpuLaunchTemplate", "SpotGroup", "OnDemandGroup"} <= {
        change.name for change in plan.changes
    }
    assert ("Release", None, "0.1.0") in plan.parameters
    assert [] == server.client("s3").list_buckets()["Buckets"]

    drop_plan(aws, plan)

    assert read_stack(aws, "overnight") is None


def test_a_stack_is_made_with_its_groups_at_zero(stack: Stack, aws: Aws, server: AwsServer) -> None:
    groups = server.client("autoscaling").describe_auto_scaling_groups()["AutoScalingGroups"]

    assert stack.is_whole
    assert [(0, 0, 4)] * 2 == [(each["DesiredCapacity"], each["MinSize"], each["MaxSize"]) for each in groups]
    assert {stack.resource("SpotGroup"), stack.resource("OnDemandGroup")} == {
        each["AutoScalingGroupName"] for each in groups
    }
    assert ["overnight"] == list_stacks(aws)


def test_the_spot_group_buys_several_types_in_several_zones_where_there_is_most_of_them(
    stack: Stack, server: AwsServer
) -> None:
    (group,) = server.client("autoscaling").describe_auto_scaling_groups(
        AutoScalingGroupNames=[stack.resource("SpotGroup")]
    )["AutoScalingGroups"]
    policy = group["MixedInstancesPolicy"]

    assert "price-capacity-optimized" == policy["InstancesDistribution"]["SpotAllocationStrategy"]
    assert 0 == policy["InstancesDistribution"]["OnDemandPercentageAboveBaseCapacity"]
    assert ["c7i.xlarge", "m7i.xlarge", "r7i.xlarge"] == [
        each["InstanceType"] for each in policy["LaunchTemplate"]["Overrides"]
    ]
    assert len(group["AvailabilityZones"]) == 3


def test_the_same_again_changes_nothing(stack: Stack, aws: Aws, settings: Settings) -> None:
    plan = plan_stack(aws, stack.name, make_parameters(aws, settings, "0.1.0", stack.parameters))

    assert plan.change_set is None
    assert () == plan.changes


def test_a_change_keeps_what_is_not_said_again(stack: Stack, aws: Aws, server: AwsServer) -> None:
    changed = make_parameters(aws, Settings(spot_workers_max=9), "0.1.0", stack.parameters)
    plan = plan_stack(aws, stack.name, changed)
    after = carry_out(aws, plan, say_nothing, poll_seconds=0)
    (group,) = server.client("autoscaling").describe_auto_scaling_groups(
        AutoScalingGroupNames=[after.resource("SpotGroup")]
    )["AutoScalingGroups"]

    assert (("SpotWorkersMax", "4", "9"),) == plan.parameters
    assert 9 == group["MaxSize"]
    assert stack.resource("DataBucket") == after.resource("DataBucket")
    assert {**stack.parameters, "SpotWorkersMax": "9"} == after.parameters


def test_a_stack_of_machines_with_a_gpu_uses_their_launch_template_and_types(
    aws: Aws, settings: Settings, server: AwsServer
) -> None:
    gpu = settings.model_copy(update={"machines": "gpu", "instance_types": ("g5.xlarge", "g5.2xlarge", "g5.4xlarge")})
    plan = plan_stack(aws, "cards", make_parameters(aws, gpu, "0.1.0", None))
    made = carry_out(aws, plan, say_nothing, poll_seconds=0)
    (group,) = server.client("autoscaling").describe_auto_scaling_groups(
        AutoScalingGroupNames=[made.resource("SpotGroup")]
    )["AutoScalingGroups"]
    template = group["MixedInstancesPolicy"]["LaunchTemplate"]

    assert made.resource("GpuLaunchTemplate") == template["LaunchTemplateSpecification"]["LaunchTemplateId"]
    assert ["g5.xlarge", "g5.2xlarge", "g5.4xlarge"] == [each["InstanceType"] for each in template["Overrides"]]


def test_the_bucket_stays_when_the_stack_is_deleted(stack: Stack, aws: Aws, server: AwsServer) -> None:
    server.client("s3").put_object(Bucket=stack.resource("DataBucket"), Key="scores/part", Body=b"1")
    delete_stack(aws, stack, say_nothing, poll_seconds=0)

    assert read_stack(aws, stack.name) is None
    assert [] == server.client("autoscaling").describe_auto_scaling_groups()["AutoScalingGroups"]
    assert [stack.resource("DataBucket")] == [each["Name"] for each in server.client("s3").list_buckets()["Buckets"]]


def test_a_stack_of_somebody_else_with_the_same_name_is_left_alone(
    aws: Aws, settings: Settings, server: AwsServer
) -> None:
    template = '{"Resources": {"Topic": {"Type": "AWS::SNS::Topic"}}}'
    server.client("cloudformation").create_stack(StackName="overnight", TemplateBody=template)

    for refuse in (
        lambda: plan_stack(aws, "overnight", make_parameters(aws, settings, "0.1.0", None)),
        lambda: find_stack(aws, "overnight"),
    ):
        with pytest.raises(AwsRefused, match=r"overnight must be one of Overnight's.*somebody else's.*--stack"):
            refuse()


def test_a_bucket_whose_name_is_taken_says_so(aws: Aws, settings: Settings, server: AwsServer) -> None:
    server.client("s3").create_bucket(Bucket="scores", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    taken = settings.model_copy(update={"bucket_name": "scores"})
    plan = plan_stack(aws, "overnight", make_parameters(aws, taken, "0.1.0", None))

    with pytest.raises(
        AwsRefused, match=r"AWS answers BucketAlreadyExists to ExecuteChangeSet: .*name is not available.*again\."
    ):
        carry_out(aws, plan, say_nothing, poll_seconds=0)


def test_a_stack_that_is_not_there_is_named_with_those_that_are(stack: Stack, aws: Aws) -> None:
    with pytest.raises(AwsRefused, match=r"stack other must exist in eu-central-1, got none\. .*there: overnight\."):
        find_stack(aws, "other")


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("ROLLBACK_COMPLETE", r"must be whole to be changed, but is ROLLBACK_COMPLETE: .*`overnight aws destroy"),
        ("UPDATE_IN_PROGRESS", r"must be at rest.*UPDATE_IN_PROGRESS\. Wait until it has ended: `overnight aws status"),
        ("UPDATE_ROLLBACK_FAILED", r"UPDATE_ROLLBACK_FAILED\. Continue its rollback in the console"),
    ],
)
def test_a_stack_that_can_not_be_changed_says_what_to_do(
    stack: Stack, aws: Aws, settings: Settings, server: AwsServer, status: str, words: str
) -> None:
    server.answers["DescribeStacks"] = 200, describe_stack(stack, status)

    with pytest.raises(AwsRefused, match=words):
        plan_stack(aws, stack.name, make_parameters(aws, settings, "0.1.0", stack.parameters))


def describe_stack(stack: Stack, status: str) -> str:
    """An answer of AWS with a stack of Overnight in a status."""
    tags = "<Tags><member><Key>overnight-release</Key><Value>0.1.0</Value></member></Tags>"
    return (
        "<DescribeStacksResponse><DescribeStacksResult><Stacks><member>"
        f"<StackName>{stack.name}</StackName><StackId>{stack.id}</StackId><StackStatus>{status}</StackStatus>"
        f"<CreationTime>2026-01-01T00:00:00Z</CreationTime>{tags}"
        "</member></Stacks></DescribeStacksResult></DescribeStacksResponse>"
    )


def describe_events(stack: Stack, *events: tuple[str, str, str, str]) -> str:
    """An answer of AWS with events, the newest first: resource, kind, status, reason."""
    members = "".join(
        f"<member><StackId>{stack.id}</StackId><EventId>later-{at}</EventId><StackName>{stack.name}</StackName>"
        f"<LogicalResourceId>{name}</LogicalResourceId><ResourceType>{kind}</ResourceType>"
        f"<Timestamp>2026-01-01T00:00:00Z</Timestamp><ResourceStatus>{status}</ResourceStatus>"
        f"<ResourceStatusReason>{reason}</ResourceStatusReason></member>"
        for at, (name, kind, status, reason) in enumerate(events)
    )
    return (
        "<DescribeStackEventsResponse><DescribeStackEventsResult><StackEvents>"
        f"{members}</StackEvents></DescribeStackEventsResult></DescribeStackEventsResponse>"
    )


def test_a_change_that_fails_half_way_says_of_what_and_that_the_stack_is_as_it_was(
    stack: Stack, aws: Aws, server: AwsServer
) -> None:
    plan = plan_stack(aws, stack.name, make_parameters(aws, Settings(spot_workers_max=900), "0.1.0", stack.parameters))
    server.answers["ExecuteChangeSet"] = (
        200,
        "<ExecuteChangeSetResponse><ExecuteChangeSetResult/></ExecuteChangeSetResponse>",
    )
    server.answers["DescribeStacks"] = 200, describe_stack(stack, "UPDATE_ROLLBACK_COMPLETE")
    failed = "You've reached your quota for maximum Auto Scaling groups"
    told: list[str] = []
    server.asked.clear()

    def answer(_: dict[str, str]) -> tuple[int, str]:
        # The first question is what was there before.
        seen = server.asked.count("ExecuteChangeSet")
        later = [
            ("SpotGroup", "AWS::AutoScaling::AutoScalingGroup", "UPDATE_FAILED", failed),
            ("OnDemandGroup", "AWS::AutoScaling::AutoScalingGroup", "UPDATE_FAILED", "Resource update cancelled"),
        ]
        return 200, describe_events(stack, *later * seen)

    server.answers["DescribeStackEvents"] = answer
    with pytest.raises(AwsRefused) as refused:
        carry_out(aws, plan, told.append, poll_seconds=0)

    message = str(refused.value)
    assert "must be changed, but ended as UPDATE_ROLLBACK_COMPLETE. It failed of:" in message
    assert f"  - SpotGroup (AWS::AutoScaling::AutoScalingGroup): {failed}" in message
    assert "cancelled" not in message
    assert f"What stands: DataBucket ({stack.resource('DataBucket')})" in message
    assert "It is as it was before. Correct the cause, and deploy again. A quota of the account is used up" in message
    assert len(message.splitlines()) <= 12
    assert "UPDATE_FAILED  SpotGroup" in told


def test_a_new_stack_that_fails_half_way_says_what_stands_and_how_it_is_deleted(
    aws: Aws, settings: Settings, server: AwsServer
) -> None:
    plan = plan_stack(aws, "overnight", make_parameters(aws, settings, "0.1.0", None))
    planned = read_stack(aws, "overnight")
    assert planned is not None
    server.answers["ExecuteChangeSet"] = (
        200,
        "<ExecuteChangeSetResponse><ExecuteChangeSetResult/></ExecuteChangeSetResponse>",
    )
    server.answers["DescribeStacks"] = 200, describe_stack(planned, "ROLLBACK_COMPLETE")
    reason = "API: iam:CreateRole User is not authorized"

    def answer(_: dict[str, str]) -> tuple[int, str]:
        later = [("WorkerRole", "AWS::IAM::Role", "CREATE_FAILED", reason)]
        return 200, describe_events(planned, *later * server.asked.count("ExecuteChangeSet"))

    server.answers["DescribeStackEvents"] = answer
    with pytest.raises(AwsRefused) as refused:
        carry_out(aws, plan, say_nothing, poll_seconds=0)

    assert (
        "The stack overnight must be created, but ended as ROLLBACK_COMPLETE. It failed of:\n"
        f"  - WorkerRole (AWS::IAM::Role): {reason}\n"
        "What stands: nothing. Correct the cause, delete the rest by `overnight aws destroy --stack overnight`, and "
        "deploy again."
    ) == str(refused.value)


def test_a_stack_that_can_not_be_deleted_says_of_what(stack: Stack, aws: Aws, server: AwsServer) -> None:
    server.answers["DeleteStack"] = 200, "<DeleteStackResponse/>"
    server.answers["DescribeStacks"] = 200, describe_stack(stack, "DELETE_FAILED")
    server.asked.clear()

    def answer(_: dict[str, str]) -> tuple[int, str]:
        later = [("WorkerSecurityGroup", "AWS::EC2::SecurityGroup", "DELETE_FAILED", "has a dependent object")]
        return 200, describe_events(stack, *later * server.asked.count("DeleteStack"))

    server.answers["DescribeStackEvents"] = answer
    with pytest.raises(AwsRefused, match=r"is DELETE_FAILED:\n  - WorkerSecurityGroup: has a dependent object\n.*goes"):
        delete_stack(aws, stack, say_nothing, poll_seconds=0)


def test_what_a_stack_lacks_is_named(stack: Stack) -> None:
    with pytest.raises(AwsRefused, match=r"must have SpotGroup, but is CREATE_COMPLETE and has none"):
        replace(stack, resources={}).resource("SpotGroup")
    assert stack is check_owner(stack)
