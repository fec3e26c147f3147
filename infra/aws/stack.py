"""The stack: planned as a change set, which is shown before anything is made; carried out; read; deleted."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from botocore.exceptions import ClientError

from infra.aws.session import Aws, AwsRefused, explain_refusals, is_quota

RELEASE_TAG = "overnight-release"
_STABLE = ("CREATE_COMPLETE", "UPDATE_COMPLETE", "UPDATE_ROLLBACK_COMPLETE", "IMPORT_COMPLETE")
_DONE = ("CREATE_COMPLETE", "UPDATE_COMPLETE")
# Such a stack was never whole: all that can be done with it is to delete it.
_NEVER_WHOLE = ("CREATE_FAILED", "ROLLBACK_COMPLETE", "ROLLBACK_FAILED", "DELETE_FAILED")
_PLANNED = "REVIEW_IN_PROGRESS"
_DELETED = "DELETE_COMPLETE"
_NO_CHANGES = ("didn't contain changes", "No updates are to be performed")
_WAIT_SECONDS = 45 * 60
_POLL_SECONDS = 3.0
_SHOWN_MAX = 4

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A stack as it stands; `resources` has the name in AWS of each resource, by its name in the template."""

    name: str
    id: str
    status: str
    reason: str
    parameters: Mapping[str, str]
    tags: Mapping[str, str]
    resources: Mapping[str, str]

    @property
    def is_whole(self) -> bool:
        """Whether all of it is there, and nothing of it is being changed."""
        return self.status in _STABLE

    def resource(self, name: str) -> str:
        """Return the name in AWS of a resource; raises AwsRefused where it is not there."""
        if name not in self.resources:
            message = (
                f"The stack {self.name} must have {name}, but is {self.status} and has none. Look at it by `overnight "
                "aws status`; `overnight aws deploy` makes what is missing."
            )
            raise AwsRefused(message)
        return self.resources[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceChange:
    """What a change set does with one resource; `replaces` where the resource is made again under another name."""

    action: str
    name: str
    kind: str
    replaces: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StackPlan:
    """A change set that waits to be carried out; of no changes, `change_set` is None.

    `parameters` has those that change: name, value before (None for a new stack), value after.
    """

    stack: str
    kind: Literal["CREATE", "UPDATE"]
    change_set: str | None
    changes: tuple[ResourceChange, ...]
    parameters: tuple[tuple[str, str | None, str], ...]


def read_template() -> str:
    """Return the CloudFormation template."""
    return (files("infra.aws") / "template.yaml").read_text()


def read_stack(aws: Aws, name: str) -> Stack | None:
    """Return a stack, None where there is none of that name or id."""
    with explain_refusals("read"):
        try:
            found = aws.cloudformation.describe_stacks(StackName=name)["Stacks"][0]
        except ClientError as error:
            if "does not exist" in error.response["Error"].get("Message", ""):
                return None
            raise
        is_gone = found["StackStatus"] == _DELETED
        resources = (
            [] if is_gone else aws.cloudformation.describe_stack_resources(StackName=found["StackId"])["StackResources"]
        )
    return Stack(
        name=found["StackName"],
        id=found["StackId"],
        status=found["StackStatus"],
        reason=found.get("StackStatusReason", ""),
        parameters={each["ParameterKey"]: each.get("ParameterValue", "") for each in found.get("Parameters", [])},
        tags={each["Key"]: each["Value"] for each in found.get("Tags", [])},
        resources={
            each["LogicalResourceId"]: each["PhysicalResourceId"]
            for each in resources
            if each.get("PhysicalResourceId") and not each.get("ResourceStatus", "").startswith("DELETE_COMPLETE")
        },
    )


def find_stack(aws: Aws, name: str) -> Stack:
    """Return a stack of Overnight; raises AwsRefused where there is none of that name, or another's."""
    found = read_stack(aws, name)
    if found is None or found.status in (_PLANNED, _DELETED):
        others = [each for each in list_stacks(aws) if each != name]
        near = f" Stacks of Overnight there: {', '.join(others[:_SHOWN_MAX])}." if others else ""
        message = (
            f"The stack {name} must exist in {aws.region}, got none.{near} Make it by `overnight aws deploy`, or name "
            "another by --stack or --region."
        )
        raise AwsRefused(message)
    return check_owner(found)


def list_stacks(aws: Aws) -> list[str]:
    """Return the names of all stacks of Overnight in the region."""
    with explain_refusals("listed"):
        pages = aws.cloudformation.get_paginator("describe_stacks").paginate()
        return [
            each["StackName"]
            for page in pages
            for each in page["Stacks"]
            if each["StackStatus"] != _PLANNED and any(tag["Key"] == RELEASE_TAG for tag in each.get("Tags", []))
        ]


def check_owner(stack: Stack) -> Stack:
    """Return a stack that Overnight has made; raises AwsRefused for one of somebody else, which is left alone."""
    if RELEASE_TAG not in stack.tags:
        message = (
            f"The stack {stack.name} must be one of Overnight's, which have the tag {RELEASE_TAG}, but is somebody "
            "else's: nothing of it is changed. Choose another name by --stack."
        )
        raise AwsRefused(message)
    return stack


def plan_stack(aws: Aws, name: str, parameters: Mapping[str, str]) -> StackPlan:
    """Have AWS say what it would change, as a change set that is yet to be carried out.

    Raises:
        AwsRefused: AWS does not take the template or a parameter; or the stack is somebody else's, is being changed,
            or failed before it was ever whole.
    """
    standing = _check_changeable(read_stack(aws, name), name)
    kind: Literal["CREATE", "UPDATE"] = "CREATE" if standing is None else "UPDATE"
    before = standing.parameters if standing else {}
    change_set = f"overnight-{uuid.uuid4().hex[:12]}"
    with explain_refusals("planned"):
        try:
            made = aws.cloudformation.create_change_set(
                StackName=name,
                ChangeSetName=change_set,
                ChangeSetType=kind,
                TemplateBody=read_template(),
                Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()],
                Capabilities=["CAPABILITY_IAM"],
                Tags=[{"Key": RELEASE_TAG, "Value": parameters["Release"]}],
            )
        except ClientError as error:
            if any(words in error.response["Error"].get("Message", "") for words in _NO_CHANGES):
                return StackPlan(stack=name, kind=kind, change_set=None, changes=(), parameters=())
            raise
        described = _wait_for_change_set(aws, name, made["Id"])
    plan = StackPlan(
        stack=name,
        kind=kind,
        change_set=made["Id"],
        changes=tuple(_read_change(each["ResourceChange"]) for each in described["Changes"]),
        parameters=tuple(
            (key, before.get(key), value) for key, value in parameters.items() if value != before.get(key)
        ),
    )
    failed = described["Status"] == "FAILED"
    has_none = any(words in described.get("StatusReason", "") for words in _NO_CHANGES)
    if not failed and (plan.changes or plan.parameters):
        return plan
    drop_plan(aws, plan)
    if failed and not has_none:
        message = f"AWS must take the stack {name}, got: {described.get('StatusReason')}. Correct that, and call again."
        raise AwsRefused(message)
    return StackPlan(stack=name, kind=kind, change_set=None, changes=(), parameters=())


def _check_changeable(stack: Stack | None, name: str) -> Stack | None:
    """Return a stack that a change set can be made for; None where one is to be made."""
    if stack is None or stack.status in (_PLANNED, _DELETED):
        return None
    check_owner(stack)
    if stack.status in _NEVER_WHOLE:
        message = (
            f"The stack {name} must be whole to be changed, but is {stack.status}: {stack.reason or 'it failed'}. "
            f"Delete what is left of it by `overnight aws destroy --stack {name}`, which keeps its bucket, and deploy "
            "again."
        )
        raise AwsRefused(message)
    if not stack.is_whole:
        next_step = (
            "Continue its rollback in the console of CloudFormation, then call again."
            if stack.status.endswith("FAILED")
            else f"Wait until it has ended: `overnight aws status --stack {name}`."
        )
        message = f"The stack {name} must be at rest to be changed, but is {stack.status}. {next_step}"
        raise AwsRefused(message)
    return stack


def _wait_for_change_set(aws: Aws, stack: str, change_set: str) -> dict[str, Any]:
    """Return a change set with all of its changes once AWS has worked it out."""
    until = time.monotonic() + _WAIT_SECONDS
    changes: list[Any] = []
    token: dict[str, str] = {}
    while True:
        found = aws.cloudformation.describe_change_set(ChangeSetName=change_set, StackName=stack, **token)
        if found["Status"] not in ("CREATE_PENDING", "CREATE_IN_PROGRESS"):
            changes += found.get("Changes", [])
            if "NextToken" not in found:
                return {**found, "Changes": changes}
            token = {"NextToken": found["NextToken"]}
        elif time.monotonic() > until:
            message = f"AWS must have planned {stack} by now, but is still at it. Call again later."
            raise AwsRefused(message)
        else:
            time.sleep(_POLL_SECONDS)


def _read_change(change: Mapping[str, Any]) -> ResourceChange:
    return ResourceChange(
        action=change["Action"],
        name=change["LogicalResourceId"],
        kind=change["ResourceType"],
        replaces=change.get("Replacement") == "True",
    )


def drop_plan(aws: Aws, plan: StackPlan) -> None:
    """Delete a change set that is not to be carried out, and the stack that AWS has put down for it alone."""
    with explain_refusals("dropped"):
        if plan.change_set is not None:
            aws.cloudformation.delete_change_set(ChangeSetName=plan.change_set, StackName=plan.stack)
        stack = read_stack(aws, plan.stack)
        if stack is not None and stack.status == _PLANNED:
            aws.cloudformation.delete_stack(StackName=stack.id)


def carry_out(aws: Aws, plan: StackPlan, say: Say, *, poll_seconds: float = _POLL_SECONDS) -> Stack:
    """Carry out a change set, and wait until the stack is whole; `say` is told of each resource.

    A new stack that fails is rolled back with its empty bucket, a changed one to what it was.

    Raises:
        AwsRefused: It failed; the message says of what, what stands now, and how to go on.
    """
    if plan.change_set is None:
        return find_stack(aws, plan.stack)
    began = _find_newest_event(aws, plan.stack)
    retaining = {"RetainExceptOnCreate": True} if plan.kind == "CREATE" else {}
    try:
        with explain_refusals("deployed"):
            aws.cloudformation.execute_change_set(ChangeSetName=plan.change_set, StackName=plan.stack, **retaining)
        stack = _wait_for_stack(aws, plan.stack, began, say, poll_seconds)
    except AwsRefused as error:
        standing = None
        with suppress(AwsRefused):
            standing = read_stack(aws, plan.stack)
        if standing is None:
            raise
        message = f"{error}\n{_describe_rest(standing)}"
        raise AwsRefused(message) from None
    if stack.status not in _DONE:
        raise AwsRefused(_describe_failure(aws, stack, plan, began))
    return stack


def _wait_for_stack(aws: Aws, name: str, after: str | None, say: Say, poll_seconds: float) -> Stack:
    """Return a stack once nothing of it is being changed, by id, since a deleted one has no name."""
    until = time.monotonic() + _WAIT_SECONDS
    told: set[str] = set()
    while True:
        stack = read_stack(aws, name)
        if stack is None:
            message = f"The stack {name} must be there until it is whole, but somebody deleted it. Deploy again."
            raise AwsRefused(message)
        events = _list_events(aws, stack.id, after)
        for event in reversed(events):
            if event["EventId"] not in told and event.get("LogicalResourceId") != stack.name:
                told.add(event["EventId"])
                say(f"{event['ResourceStatus']}  {event.get('LogicalResourceId')}")
        # Until the first event AWS may still show what was before.
        if stack.status == _DELETED or (events and not stack.status.endswith("IN_PROGRESS")):
            return stack
        if time.monotonic() > until:
            message = (
                f"The stack {name} must be done within {_WAIT_SECONDS // 60} min, but is {stack.status}. AWS goes on "
                "with it: look again by `overnight aws status`."
            )
            raise AwsRefused(message)
        time.sleep(poll_seconds)


def _list_events(aws: Aws, stack: str, after: str | None) -> list[dict[str, Any]]:
    """Return the events of a stack since an event, the newest first."""
    found: list[dict[str, Any]] = []
    with explain_refusals("read"):
        for page in aws.cloudformation.get_paginator("describe_stack_events").paginate(StackName=stack):
            for event in page["StackEvents"]:
                if event["EventId"] == after:
                    return found
                found.append(event)
    return found


def _find_newest_event(aws: Aws, name: str) -> str | None:
    stack = read_stack(aws, name)
    events = _list_events(aws, stack.id, None) if stack else []
    return str(events[0]["EventId"]) if events else None


def _describe_failure(aws: Aws, stack: Stack, plan: StackPlan, after: str | None) -> str:
    """Return what failed first, what stands, and how to go on."""
    failed = [
        f"{event['LogicalResourceId']} ({event.get('ResourceType')}): {event.get('ResourceStatusReason', '')}"
        for event in reversed(_list_events(aws, stack.id, after))
        if event["ResourceStatus"].endswith("FAILED") and "cancelled" not in event.get("ResourceStatusReason", "")
    ]
    verb = "created" if plan.kind == "CREATE" else "changed"
    reasons = failed[:_SHOWN_MAX] or [stack.reason or "no reason told"]
    quota = " A quota of the account is used up: have it raised (Service Quotas, in this region), or ask for less."
    return "\n".join(
        [
            f"The stack {stack.name} must be {verb}, but ended as {stack.status}. It failed of:",
            *(f"  - {' '.join(each.split())[:300]}" for each in reasons),
            f"{_describe_rest(stack)}{quota if any(map(is_quota, failed)) else ''}",
        ]
    )


def _describe_rest(stack: Stack) -> str:
    """Return what stands of a stack that failed, and how to go on."""
    standing = ", ".join(f"{name} ({physical})" for name, physical in list(stack.resources.items())[:_SHOWN_MAX])
    more = len(stack.resources) - _SHOWN_MAX
    rest = f"What stands: {standing or 'nothing'}{f' and {more} more' if more > 0 else ''}."
    if stack.is_whole:
        return f"{rest} It is as it was before. Correct the cause, and deploy again."
    return (
        f"{rest} Correct the cause, delete the rest by `overnight aws destroy --stack {stack.name}`, and deploy again."
    )


def delete_stack(aws: Aws, stack: Stack, say: Say, *, poll_seconds: float = _POLL_SECONDS) -> None:
    """Delete a stack, and wait until it is gone; its bucket stays.

    Raises AwsRefused where something of it can't be deleted, with its reason; the same call goes on.
    """
    after = _find_newest_event(aws, stack.id)
    with explain_refusals("deleted"):
        aws.cloudformation.delete_stack(StackName=stack.id)
    gone = _wait_for_stack(aws, stack.id, after, say, poll_seconds)
    if gone.status != _DELETED:
        reasons = [
            f"  - {event['LogicalResourceId']}: {event.get('ResourceStatusReason', '')}"
            for event in _list_events(aws, stack.id, after)
            if event["ResourceStatus"] == "DELETE_FAILED" and event["LogicalResourceId"] != stack.name
        ]
        message = "\n".join(
            [
                f"The stack {stack.name} must be deleted, but is {gone.status}:",
                *reasons[:_SHOWN_MAX],
                "Correct that, and call again: the same call goes on with what is left.",
            ]
        )
        raise AwsRefused(message)
