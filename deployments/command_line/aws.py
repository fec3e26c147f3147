"""Commands about AWS: plan, deploy, look at and delete the stack that nights get their machines from."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deployments.command_line.console import (
    AsJson,
    build_model,
    keep_stdout,
    print_json,
    print_table,
    print_text,
    say,
    show_status,
)
from infra.aws import STACK
from serving.errors import OvernightError

if TYPE_CHECKING:
    from infra.aws.session import Aws
    from infra.aws.stack import Stack, StackPlan

_SHOWN_MAX = 3

SettingsFile = Annotated[
    str | None,
    typer.Argument(
        help="The settings of the stack, as @FILE or JSON. Without: those that it has.", metavar="[@FILE|JSON]"
    ),
]
StackName = Annotated[str, typer.Option("--stack", help="The stack's name.", envvar="OVERNIGHT_STACK")]
Region = Annotated[str | None, typer.Option(help="The region. Without: that of AWS_REGION, or of the profile.")]
Profile = Annotated[str | None, typer.Option(help="A profile of the AWS configuration. Without: AWS_PROFILE.")]
Wheel = Annotated[
    Path | None,
    typer.Option(help="The wheel of the release that machines install; index_url may have it instead.", metavar="FILE"),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing.")]


class AwsUnusable(OvernightError):
    """AWS refuses, or what it has is not what the command needs; the message says what to do."""


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this module."""
    aws = typer.Typer(help="Have machines in an AWS account of your own.", no_args_is_help=True)
    settings = (
        "Where aws.yaml is, at the least:\n\n"
        "  subnets: [subnet-0a1b2c3d, subnet-4e5f6a7b]\n"
        "  prefect_api_url: https://prefect.example.com/api\n"
        "  mlflow_tracking_uri: https://mlflow.example.com"
    )
    wheel = "--wheel dist/overnight-0.1.0-py3-none-any.whl"
    aws.command(epilog=f"Example:\n\n  overnight aws plan aws.yaml {wheel}\n\n{settings}")(plan)
    aws.command(epilog=f"Example:\n\n  overnight aws deploy aws.yaml {wheel}\n\n{settings}")(deploy)
    aws.command(epilog="Example:\n\n  overnight aws status")(status)
    aws.command(epilog="Examples:\n\n  overnight aws destroy\n  overnight aws destroy --delete-data")(destroy)
    app.add_typer(aws, name="aws")


@contextmanager
def _say_refusals() -> Generator[None]:
    from infra.aws.session import AwsRefused  # noqa: PLC0415 - help needs none

    try:
        yield
    except AwsRefused as error:
        raise AwsUnusable(str(error)) from None


def plan(
    settings: SettingsFile = None,
    *,
    stack: StackName = STACK,
    region: Region = None,
    profile: Profile = None,
    wheel: Wheel = None,
    as_json: AsJson = False,
) -> None:
    """Show what `overnight aws deploy` would make or change, and change nothing."""
    from infra.aws.stack import drop_plan  # noqa: PLC0415 - help needs none

    with keep_stdout(for_json=as_json), _say_refusals():
        opened = _open(region, profile)
        made = _plan(opened, stack, settings, wheel)
        drop_plan(opened, made)
    if as_json:
        print_json(_list_plan(made, opened.region))
    else:
        _print_plan(made, opened.region)


def deploy(
    settings: SettingsFile = None,
    *,
    stack: StackName = STACK,
    region: Region = None,
    profile: Profile = None,
    wheel: Wheel = None,
    yes: Yes = False,
    force: Annotated[
        bool, typer.Option("--force", help="Change the release although runs are in progress, which then fail.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make the stack, or change it to what the settings say; show first what that is. Twice changes nothing."""
    from infra.aws.stack import carry_out, drop_plan, find_stack  # noqa: PLC0415 - help needs none

    with keep_stdout(for_json=as_json), _say_refusals():
        opened = _open(region, profile)
        made = _plan(opened, stack, settings, wheel, force=force)
        if not as_json:
            _print_plan(made, opened.region)
        if made.change_set is not None:
            with ExitStack() as undo:
                undo.callback(drop_plan, opened, made)
                _confirm("Carry that out?", yes=yes)
                undo.pop_all()
            carry_out(opened, made, say)
        standing = find_stack(opened, stack)
        _upload(opened, standing, wheel)
    if as_json:
        print_json(_list_plan(made, opened.region) | {"resources": dict(standing.resources)})
        return
    bucket = standing.resource("DataBucket")
    print_text(
        f"The stack {stack} is {standing.status}. Tables go below s3://{bucket}/, and machines start when a night asks"
        ' for them:\nbuying=PurchaseOptions(..., machines=AwsMachines(stack="' + stack + '"))\n'
        f"The role or user that runs nights needs the policy {standing.resource('ScalingPolicy')}"
    )


def status(
    *,
    stack: StackName = STACK,
    region: Region = None,
    profile: Profile = None,
    as_json: AsJson = False,
) -> None:
    """Show how the stack stands, and which machines there are."""
    from infra.aws.capacity import describe_uses, list_groups  # noqa: PLC0415 - help needs none
    from infra.aws.stack import find_stack  # noqa: PLC0415 - the same

    with keep_stdout(for_json=as_json), _say_refusals():
        opened = _open(region, profile)
        standing = find_stack(opened, stack)
        groups = list_groups(opened, standing)
        uses = describe_uses(opened, standing)
    if as_json:
        machines = [{"kind": each.kind, **asdict(each.group), "problem": each.problem} for each in groups]
        print_json({**asdict(standing), "region": opened.region, "machines": machines, "in_use_by": uses})
        return
    print_table(
        [
            {"": "status", "value": f"{standing.status}{f': {standing.reason}' if standing.reason else ''}"},
            {"": "release", "value": standing.parameters.get("Release", "")},
            {"": "bucket", "value": standing.resources.get("DataBucket", "none")},
            {"": "log", "value": standing.resources.get("WorkerLog", "none")},
            {"": "in use by", "value": ", ".join(uses) or "nobody"},
        ],
        f"Stack {stack} in {opened.region}",
        header=False,
    )
    if groups:
        print_table(
            [
                {
                    "kind": each.kind,
                    "asked for": str(each.group.wanted),
                    "there": str(len(each.group.machines)),
                    "at most": str(each.group.workers_max),
                    "last problem": each.problem or "",
                }
                for each in groups
            ]
        )


def destroy(
    *,
    stack: StackName = STACK,
    region: Region = None,
    profile: Profile = None,
    delete_data: Annotated[
        bool, typer.Option("--delete-data", help="Delete the bucket too, with every version of every object in it.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Go on although runs are in progress: they lose their machines.")
    ] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Delete the stack. Its bucket stays, with the tables in it, unless --delete-data is given."""
    from infra.aws.bucket import count_objects, delete_bucket  # noqa: PLC0415 - help needs none
    from infra.aws.stack import delete_stack, find_stack  # noqa: PLC0415 - the same

    with keep_stdout(for_json=as_json), _say_refusals():
        opened = _open(region, profile)
        standing = find_stack(opened, stack)
        if not force:
            _refuse_where_in_use(opened, standing, "destroyed")
        bucket = standing.resources.get("DataBucket")
        objects = count_objects(opened, bucket) if bucket else 0
        fate = "deleted with them" if delete_data else "kept"
        say(f"The stack {stack} in {opened.region} goes. Its bucket {bucket} has {objects:,} objects, and is {fate}.")
        _confirm(f"Delete the stack{' and its data' if delete_data else ''}?", yes=yes)
        delete_stack(opened, standing, say)
        deleted = delete_bucket(opened, bucket) if delete_data and bucket else 0
    if as_json:
        print_json({"stack": stack, "bucket": bucket, "kept": not delete_data, "versions_deleted": deleted})
    elif delete_data:
        print_text(f"The stack {stack} is deleted, and its bucket {bucket} with {deleted:,} versions of objects.")
    else:
        print_text(f"The stack {stack} is deleted. Its bucket s3://{bucket}/ stays, with {objects:,} objects.")


def _open(region: str | None, profile: str | None) -> Aws:
    with show_status("Opening AWS"):
        from infra.aws.session import open_aws  # noqa: PLC0415 - help needs none

        return open_aws(region, profile)


def _plan(aws: Aws, stack: str, document: str | None, wheel: Path | None, *, force: bool = False) -> StackPlan:
    """Return the plan for a stack. Raises AwsRefused, also where its release would change under runs."""
    from infra.aws.settings import (  # noqa: PLC0415 - help needs none
        Settings,
        check_stack_name,
        make_parameters,
    )
    from infra.aws.stack import plan_stack, read_stack  # noqa: PLC0415 - the same

    # A path is meant by the name of a file too.
    named = document if document is None or document.lstrip().startswith(("{", "@")) else f"@{document}"
    settings = build_model(Settings, {}, named, "the settings")
    standing = read_stack(aws, check_stack_name(stack))
    has = standing.parameters if standing is not None and standing.is_whole else None
    release = _choose_release(settings.index_url, wheel, has)
    if has is not None and standing is not None and has.get("Release") != release and not force:
        _refuse_where_in_use(aws, standing, f"changed from release {has.get('Release')} to {release}")
    with show_status("Having AWS work out the changes"):
        return plan_stack(aws, stack, make_parameters(aws, settings, release, has))


def _choose_release(index_url: str | None, wheel: Path | None, has: object) -> str:
    """Return the release that machines install: the wheel's; else what the stack has, or this program's."""
    from infra.aws.session import AwsRefused  # noqa: PLC0415 - help needs none
    from infra.aws.settings import read_release  # noqa: PLC0415 - the same
    from serving.machine import find_release  # noqa: PLC0415 - the same

    if wheel is not None:
        return read_release(wheel)
    if index_url is not None:
        return find_release()
    if isinstance(has, dict) and has.get("Release"):
        return str(has["Release"])
    message = (
        "Machines must have a release of Overnight to install, got none. Give its wheel by --wheel FILE (`pip wheel "
        "--no-deps -w dist .` in a clone makes one), or the package index that has it as index_url of the settings."
    )
    raise AwsRefused(message)


def _refuse_where_in_use(aws: Aws, stack: Stack, verb: str) -> None:
    """Raise AwsRefused where machines, a night or flow runs of its work pools show that runs are in progress."""
    from infra.aws.capacity import describe_uses  # noqa: PLC0415 - help needs none
    from infra.aws.session import AwsRefused  # noqa: PLC0415 - the same

    pools = [stack.parameters[name] for name in ("SpotPool", "OnDemandPool") if stack.parameters.get(name)]
    runs = _list_runs(pools)
    uses = [*describe_uses(aws, stack), *(f"the flow run {name!r}" for name in runs[:_SHOWN_MAX])]
    if uses:
        message = (
            f"No run may be in progress when the stack {stack.name} is {verb}, got {', '.join(uses)}. Wait for them, "
            "or cancel them; --force goes on, and they lose their machines. What is scored stays."
        )
        raise AwsRefused(message)


def _list_runs(pools: Sequence[str]) -> list[str]:
    """Return the flow runs of work pools that go on, nothing where no Prefect server is named."""
    import httpx  # noqa: PLC0415 - help needs none
    from prefect.client.orchestration import get_client  # noqa: PLC0415 - the same
    from prefect.exceptions import PrefectHTTPStatusError  # noqa: PLC0415 - the same

    from tasks.common.prefect_server import is_server_named  # noqa: PLC0415 - the same
    from tasks.spot.work_pools import list_runs_in_progress  # noqa: PLC0415 - the same

    if not is_server_named():
        say("PREFECT_API_URL names no server: only the machines tell whether runs are in progress.")
        return []
    try:
        with get_client(sync_client=True) as client:
            return list_runs_in_progress(client, pools)
    except (PrefectHTTPStatusError, httpx.HTTPError) as error:
        say(f"Prefect does not answer ({error}): only the machines tell whether runs are in progress.")
        return []


def _upload(aws: Aws, stack: Stack, wheel: Path | None) -> None:
    """Put the wheel into the bucket; without one, raise AwsRefused where the machines could install nothing."""
    from infra.aws.bucket import has_wheel, put_wheel  # noqa: PLC0415 - help needs none
    from infra.aws.session import AwsRefused  # noqa: PLC0415 - the same

    bucket, release = stack.resource("DataBucket"), stack.parameters["Release"]
    if wheel is not None:
        is_new = put_wheel(aws, bucket, wheel, release)
        say(f"{wheel.name} is {'put into' if is_new else 'already in'} s3://{bucket}/")
    elif not stack.parameters.get("IndexUrl") and not has_wheel(aws, bucket, release):
        message = (
            f"The bucket {bucket} must have the wheel of release {release}, which machines install, got none. Deploy "
            "again with --wheel FILE."
        )
        raise AwsRefused(message)


def _confirm(question: str, *, yes: bool) -> None:
    """Ask, unless told not to; raises Abort for anything but yes."""
    if not yes:
        typer.confirm(question, abort=True, err=True)


def _list_plan(plan: StackPlan, region: str) -> dict[str, object]:
    return {
        "stack": plan.stack,
        "region": region,
        "kind": plan.kind,
        "changes": [asdict(change) for change in plan.changes],
        "parameters": [{"name": name, "before": before, "after": after} for name, before, after in plan.parameters],
    }


def _print_plan(plan: StackPlan, region: str) -> None:
    if plan.change_set is None:
        print_text(f"The stack {plan.stack} in {region} is as it should be: nothing is to be changed.")
        return
    verb = "is to be made" if plan.kind == "CREATE" else "is to be changed"
    if plan.changes:
        rows = [
            {
                "": "Replace" if change.replaces else change.action,
                "resource": change.name,
                "type": change.kind,
            }
            for change in plan.changes
        ]
        print_table(rows, f"The stack {plan.stack} in {region} {verb}")
    if plan.parameters:
        print_table(
            [{"parameter": name, "before": before or "", "after": after} for name, before, after in plan.parameters],
            "Parameters",
        )
