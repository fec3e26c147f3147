"""The groups of a stack have as many machines as a night asks for, and none where nobody asks any more."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from infra.aws.capacity import (
    AutoScalingGroups,
    MachineKind,
    describe_uses,
    find_lease,
    list_groups,
    open_capacity,
    read_group,
)
from infra.aws.session import Aws, AwsRefused
from infra.aws.stack import Stack
from tests.aws_server import AwsServer, refuse

POOLS: Mapping[MachineKind, str] = {"spot": "overnight-spot", "on-demand": "overnight-on-demand"}
NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
def groups(stack: Stack) -> AutoScalingGroups:
    return open_groups()


def open_groups(owner: str = "night", release: str = "0.1.0", workers: int = 2, **options: Any) -> AutoScalingGroups:
    return open_capacity(options, owner=owner, release=release, pools=POOLS, workers=workers)


def list_leases(server: AwsServer) -> list[tuple[str, int]]:
    found = server.client("autoscaling").describe_scheduled_actions()["ScheduledUpdateGroupActions"]
    return [(each["ScheduledActionName"], each["DesiredCapacity"]) for each in found]


def test_machines_come_and_go_as_they_are_asked_for(groups: AutoScalingGroups, aws: Aws, stack: Stack) -> None:
    counts = []
    for spot, on_demand in ((2, 0), (2, 1), (0, 1), (0, 1)):
        groups.set_workers("spot", spot)
        groups.set_workers("on-demand", on_demand)
        counts.append((groups.count_workers("spot"), groups.count_workers("on-demand")))

    assert [(2, 0), (2, 1), (0, 1), (0, 1)] == counts
    assert ["1 on-demand machines", "the night night"] == describe_uses(aws, stack)

    groups.close()
    groups.close()

    assert [0, 0] == [each.group.wanted for each in list_groups(aws, stack)]
    assert [] == describe_uses(aws, stack)


def test_a_machine_that_is_busy_ends_last(groups: AutoScalingGroups, aws: Aws) -> None:
    groups.set_workers("spot", 3)
    machines = read_group(aws, groups.groups["spot"]).machines
    groups.set_workers("spot", 1, busy=frozenset({machines[0]}))

    assert (machines[0],) == read_group(aws, groups.groups["spot"]).machines
    assert 1 == read_group(aws, groups.groups["spot"]).wanted


def test_machines_that_nobody_asks_for_any_more_go_by_themselves(
    groups: AutoScalingGroups, server: AwsServer, aws: Aws
) -> None:
    groups.now = lambda: NOW
    groups.set_workers("spot", 1)
    lease = find_lease(aws, groups.groups, now=NOW)

    # The other group has no machine, and needs no end.
    assert [("overnight-night", 0)] == list_leases(server)
    assert ("night", NOW + timedelta(minutes=30)) == lease

    groups.now = lambda: NOW + timedelta(minutes=10)
    groups.set_workers("spot", 1)
    early = find_lease(aws, groups.groups, now=NOW)
    groups.now = lambda: NOW + timedelta(minutes=20)
    groups.set_workers("spot", 1)

    assert lease == early
    assert ("night", NOW + timedelta(minutes=50)) == find_lease(aws, groups.groups, now=NOW)
    assert find_lease(aws, groups.groups, now=NOW + timedelta(hours=1)) is None

    groups.close()

    assert [] == list_leases(server)


def test_a_second_night_is_refused_while_the_first_has_the_groups(groups: AutoScalingGroups) -> None:
    groups.set_workers("on-demand", 1)

    with pytest.raises(AwsRefused, match=r"One night at a time has the groups of the stack overnight, but night has"):
        open_groups("second")
    # A retry of the same night takes over.
    again = open_groups("night")
    again.close()

    assert "second" == open_groups("second").owner


def test_workers_of_another_release_are_refused_with_both(stack: Stack) -> None:
    with pytest.raises(
        AwsRefused, match=r"overnight must be of the release that the night is, 0\.2\.0, but install 0\.1\.0"
    ):
        open_groups(release="0.2.0")


def test_machines_that_serve_another_pool_are_refused(stack: Stack) -> None:
    pools: Mapping[MachineKind, str] = {**POOLS, "spot": "elsewhere"}

    with pytest.raises(
        AwsRefused, match=r"The spot machines .* elsewhere, but serve overnight-spot\. .*spot_pool: elsew"
    ):
        open_capacity({}, owner="night", release="0.1.0", pools=pools, workers=1)


def test_more_machines_than_a_stack_may_have_are_refused(stack: Stack) -> None:
    with pytest.raises(AwsRefused, match=r"allowed 9 spot machines.* has 4 at most\. .*spot_workers_max: 9"):
        open_groups(workers=9)


def test_another_stack_and_another_region_are_named(stack: Stack) -> None:
    with pytest.raises(AwsRefused, match=r"The stack other must exist in eu-central-1, got none"):
        open_groups(stack="other")
    with pytest.raises(AwsRefused, match=r"The stack overnight must exist in us-east-1, got none"):
        open_groups(region="us-east-1")


def test_a_quota_that_is_used_up_is_told_as_the_problem(
    groups: AutoScalingGroups, server: AwsServer, aws: Aws, stack: Stack
) -> None:
    groups.set_workers("on-demand", 1)

    assert groups.find_problem("on-demand") is None

    reason = "You have requested more vCPU capacity than your current vCPU limit of 32 allows"
    server.answers["DescribeScalingActivities"] = 200, describe_activities(("Failed", reason))

    assert reason == groups.find_problem("on-demand")
    assert [reason] * 2 == [each.problem for each in list_groups(aws, stack)]

    server.answers["DescribeScalingActivities"] = 200, describe_activities(("Successful", ""), ("Failed", reason))

    assert groups.find_problem("on-demand") is None


def describe_activities(*activities: tuple[str, str]) -> str:
    members = "".join(
        f"<member><ActivityId>{at}</ActivityId><AutoScalingGroupName>g</AutoScalingGroupName><Cause>asked</Cause>"
        f"<StartTime>2090-01-01T00:00:00Z</StartTime><StatusCode>{status}</StatusCode>"
        f"<StatusMessage>{message}</StatusMessage></member>"
        for at, (status, message) in enumerate(activities)
    )
    return (
        "<DescribeScalingActivitiesResponse><DescribeScalingActivitiesResult><Activities>"
        f"{members}</Activities></DescribeScalingActivitiesResult></DescribeScalingActivitiesResponse>"
    )


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("ScalingActivityInProgress", r"It must be scaled, but AWS answers ScalingActivityInProgress to SetDesiredC"),
        ("AccessDenied", r"must allow SetDesiredCapacity, but AWS answers AccessDenied: no\. Have it allowed"),
        (
            "LimitExceeded",
            r"quotas of the account must allow what is asked for.*Have the quota raised \(Service Quotas",
        ),
        ("ExpiredToken", r"credentials must be valid.*ExpiredToken: no\. Renew them"),
    ],
)
def test_what_aws_refuses_is_told_and_what_stands_stays(
    groups: AutoScalingGroups, server: AwsServer, code: str, words: str
) -> None:
    groups.set_workers("spot", 1)
    server.answers["SetDesiredCapacity"] = refuse(code, "no")

    with pytest.raises(AwsRefused, match=words):
        groups.set_workers("spot", 2)

    assert 1 == groups.count_workers("spot")


def test_a_group_that_was_deleted_since_is_named(groups: AutoScalingGroups, server: AwsServer) -> None:
    server.client("autoscaling").delete_auto_scaling_group(AutoScalingGroupName=groups.groups["spot"], ForceDelete=True)

    with pytest.raises(AwsRefused, match=r"must exist, but was deleted since\. `overnight aws deploy`"):
        groups.count_workers("spot")
