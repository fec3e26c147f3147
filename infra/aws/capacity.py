"""The machines of a stack: how many spot and on-demand machines its two Auto Scaling groups have.

A night asks for machines, keeps asking while it goes on, and gives all of them back at its end. Its wish is a lease:
where nobody renews it, since the night and its machine are gone, each group goes to zero by itself, by a scheduled
action. The lease names the night, so that two of them can't set one group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from infra.aws import STACK
from infra.aws.session import Aws, AwsRefused, explain_refusals, open_aws
from infra.aws.stack import Stack, find_stack

MachineKind = Literal["spot", "on-demand"]

_GROUPS: dict[MachineKind, str] = {"spot": "SpotGroup", "on-demand": "OnDemandGroup"}
_POOLS: dict[MachineKind, str] = {"spot": "SpotPool", "on-demand": "OnDemandPool"}
_LEASE = "overnight-"
# Long enough for a night to be taken up again on another machine; short enough that forgotten machines cost little.
_LEASE_SECONDS = 1800
# Machines in these states are on their way out, and are not counted.
_ENDING = ("Terminating", "Terminated", "Detach", "Quarantined")
_PROBLEMS_MAX = 20


def _utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """An Auto Scaling group as it stands: machines asked for, the most it may have, and the machines by id."""

    name: str
    wanted: int
    workers_max: int
    machines: tuple[str, ...]


def open_capacity(
    options: Mapping[str, Any], *, owner: str, release: str, pools: Mapping[MachineKind, str], workers: int
) -> AutoScalingGroups:
    """Return the groups of a stack, for one night. Nothing is bought yet.

    Args:
        options: `stack` and `region`; without them, the default name and the region of the environment.
        owner: The night, which no other may set the groups beside.
        release: The release of Overnight that asks.
        pools: The work pools of the night's deployments, by kind.
        workers: The most machines of a kind that the night asks for.

    Raises:
        AwsRefused: There is no such stack; its workers are of another release, or of other pools; it may not have as
            many machines; another night has its groups; or AWS refuses.
    """
    aws = open_aws(options.get("region"))
    stack = find_stack(aws, options.get("stack") or STACK)
    _check_stack(stack, release, pools)
    groups = AutoScalingGroups(
        aws=aws, groups={kind: stack.resource(name) for kind, name in _GROUPS.items()}, owner=owner, stack=stack.name
    )
    groups.check(workers)
    return groups


def _check_stack(stack: Stack, release: str, pools: Mapping[MachineKind, str]) -> None:
    installed = stack.parameters.get("Release", "")
    if installed != release:
        message = (
            f"The workers of the stack {stack.name} must be of the release that the night is, {release}, but install "
            f"{installed}. Deploy that wheel (`overnight aws deploy --wheel FILE`), or call from release {installed}."
        )
        raise AwsRefused(message)
    for kind, pool in pools.items():
        if (served := stack.parameters.get(_POOLS[kind])) != pool:
            message = (
                f"The {kind} machines of the stack {stack.name} must serve the work pool of the night's deployment, "
                f"{pool}, but serve {served}. Name another deployment, or deploy with {_name_field(kind)}_pool: {pool}."
            )
            raise AwsRefused(message)


def _name_field(kind: str) -> str:
    """Return a kind as the settings of a stack call it."""
    return kind.replace("-", "_")


@dataclass(slots=True, kw_only=True)
class AutoScalingGroups:
    """Machines that two Auto Scaling groups start and end; satisfies the Protocol Capacity of tasks.spot."""

    aws: Aws
    groups: Mapping[MachineKind, str]
    owner: str
    stack: str = STACK
    now: Callable[[], datetime] = _utc_now
    _leased_until: dict[MachineKind, datetime] = field(default_factory=dict)
    _began: datetime = field(init=False)

    def __post_init__(self) -> None:
        self._began = self.now()

    @property
    def lease(self) -> str:
        """The name of the scheduled action that sets a group to zero where this night is no more."""
        return f"{_LEASE}{self.owner}"

    def check(self, workers: int) -> None:
        """Raise AwsRefused where another night has the groups, or where they may not have as many machines."""
        if other := find_lease(self.aws, self.groups, apart_from=self.lease, now=self.now()):
            message = (
                f"One night at a time has the groups of the stack {self.stack}, but {other[0]} has them until "
                f"{other[1]:%H:%M} UTC at least. Wait for it, or deploy one more stack for this night."
            )
            raise AwsRefused(message)
        for kind in self.groups:
            if (most := read_group(self.aws, self.groups[kind]).workers_max) < workers:
                message = (
                    f"The stack {self.stack} must be allowed {workers} {kind} machines, which the night may ask for, "
                    f"but has {most} at most. Deploy with {_name_field(kind)}_workers_max: {workers}, or lower "
                    "`workers`."
                )
                raise AwsRefused(message)

    def set_workers(self, kind: MachineKind, count: int, busy: frozenset[str] = frozenset()) -> None:
        """Ask for this many machines, and renew the lease. Idempotent.

        Where fewer are asked for than there are, those that are `busy`, by the names of their workers, end last: a
        worker of a stack is named after its machine.

        Raises AwsRefused where AWS refuses; what stood before stands.
        """
        with explain_refusals("scaled"):
            # Renewed first: no machine is to be bought that nobody would give back.
            self._renew_lease(kind, count)
            group = read_group(self.aws, self.groups[kind])
            # A group that replaces a machine has one more than is wanted for a while, which is no surplus.
            surplus = min(len(group.machines), group.wanted) - count
            for machine in sorted(group.machines, key=lambda each: each in busy)[: max(surplus, 0)]:
                self.aws.autoscaling.terminate_instance_in_auto_scaling_group(
                    InstanceId=machine, ShouldDecrementDesiredCapacity=True
                )
            if surplus > 0 or group.wanted != count:
                self.aws.autoscaling.set_desired_capacity(
                    AutoScalingGroupName=group.name, DesiredCapacity=count, HonorCooldown=False
                )

    def count_workers(self, kind: MachineKind) -> int:
        """Return how many machines there are, those that start up included: they are paid for."""
        with explain_refusals("read"):
            return len(read_group(self.aws, self.groups[kind]).machines)

    def find_problem(self, kind: MachineKind) -> str | None:
        """Return why AWS has last failed to start a machine of the kind in this night, None where it has not."""
        with explain_refusals("read"):
            return find_problem(self.aws, self.groups[kind], self._began)

    def close(self) -> None:
        """Give all machines back, then the lease. Idempotent. Raises AwsRefused; the lease then ends them."""
        for kind in self.groups:
            self.set_workers(kind, 0)
        with explain_refusals("given back"):
            for name in self.groups.values():
                if any(each["ScheduledActionName"] == self.lease for each in _list_leases(self.aws, name)):
                    self.aws.autoscaling.delete_scheduled_action(
                        AutoScalingGroupName=name, ScheduledActionName=self.lease
                    )
        self._leased_until.clear()

    def _renew_lease(self, kind: MachineKind, count: int) -> None:
        now = self.now()
        leased = self._leased_until.get(kind)
        if leased is not None and leased - now > timedelta(seconds=_LEASE_SECONDS / 2):
            return
        if leased is None and count == 0:
            return
        until = now + timedelta(seconds=_LEASE_SECONDS)
        self.aws.autoscaling.put_scheduled_update_group_action(
            AutoScalingGroupName=self.groups[kind],
            ScheduledActionName=self.lease,
            StartTime=until,
            MinSize=0,
            DesiredCapacity=0,
        )
        self._leased_until[kind] = until


def read_group(aws: Aws, name: str) -> Group:
    """Return a group as it stands. Raises AwsRefused where there is none."""
    with explain_refusals("read"):
        found = aws.autoscaling.describe_auto_scaling_groups(AutoScalingGroupNames=[name])["AutoScalingGroups"]
    if not found:
        message = (
            f"The Auto Scaling group {name} must exist, but was deleted since. `overnight aws deploy` makes it again."
        )
        raise AwsRefused(message)
    (group,) = found
    return Group(
        name=name,
        wanted=group["DesiredCapacity"],
        workers_max=group["MaxSize"],
        machines=tuple(
            each["InstanceId"] for each in group["Instances"] if not each["LifecycleState"].startswith(_ENDING)
        ),
    )


def find_problem(aws: Aws, group: str, since: datetime | None = None) -> str | None:
    """Return why the last attempt of a group to start a machine failed, None where it did not, or was before."""
    activities = aws.autoscaling.describe_scaling_activities(AutoScalingGroupName=group, MaxRecords=_PROBLEMS_MAX)
    # The newest comes first, and those that are going on say nothing yet.
    for each in activities["Activities"]:
        if since is not None and each["StartTime"] < since:
            return None
        if each["StatusCode"] in ("Failed", "Cancelled"):
            return " ".join(str(each.get("StatusMessage") or each.get("Cause", "")).split())
        if each["StatusCode"] == "Successful":
            return None
    return None


def find_lease(
    aws: Aws, groups: Mapping[MachineKind, str], *, now: datetime, apart_from: str = ""
) -> tuple[str, datetime] | None:
    """Return the night that has the groups, and until when its lease runs; None where none has."""
    with explain_refusals("read"):
        for name in groups.values():
            for each in _list_leases(aws, name):
                if each["ScheduledActionName"] != apart_from and each["StartTime"] > now:
                    return str(each["ScheduledActionName"]).removeprefix(_LEASE), each["StartTime"]
    return None


def _list_leases(aws: Aws, group: str) -> list[dict[str, Any]]:
    found = aws.autoscaling.describe_scheduled_actions(AutoScalingGroupName=group)["ScheduledUpdateGroupActions"]
    return [each for each in found if each["ScheduledActionName"].startswith(_LEASE)]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStatus:
    """A group of a stack, and what is to be known of it: its last problem, and the night that has it."""

    kind: MachineKind
    group: Group
    problem: str | None


def list_groups(aws: Aws, stack: Stack) -> list[GroupStatus]:
    """Return the groups that a stack has; of one that failed half-way, perhaps none."""
    found = []
    for kind, name in _GROUPS.items():
        if name in stack.resources:
            group = read_group(aws, stack.resources[name])
            with explain_refusals("read"):
                problem = find_problem(aws, group.name)
            found.append(GroupStatus(kind=kind, group=group, problem=problem))
    return found


def describe_uses(aws: Aws, stack: Stack, now: datetime | None = None) -> list[str]:
    """Return what shows that runs are in progress on a stack: its machines, and the lease of a night."""
    groups = list_groups(aws, stack)
    uses = [
        f"{max(len(each.group.machines), each.group.wanted)} {each.kind} machines"
        for each in groups
        if each.group.machines or each.group.wanted
    ]
    lease = find_lease(aws, {each.kind: each.group.name for each in groups}, now=now or _utc_now())
    return [*uses, *([f"the night {lease[0]}"] if lease else [])]
