"""Create block types, work pools, deployments and automations on a Prefect server: `overnight deploy`, `make deploy`.

Idempotent. `deploy` creates all of prefect.yaml, which has the last word: a schedule or a parameter that was changed in
the UI is set back, by name. `deploy_call` creates one deployment of batch_inference from what a person says, without
any file. A work pool that exists stays as it is, whatever its type.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from prefect.automations import AutomationCore
from prefect.blocks.core import Block
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.settings import PREFECT_API_URL
from prefect.types.names import BANNED_CHARACTERS
from prefect.utilities.callables import parameter_schema
from prefect.workers.process import ProcessWorker
from pydantic import ValidationError

from deployments.automations import make_automations
from flows.runtime.parameters import refuse_secrets
from serving.errors import OvernightError
from tasks.common.blocks import BLOCKS

PREFECT_FILE = Path(__file__).with_name("prefect.yaml")

Fields = Mapping[str, Any]
# A mistyped number of workers must not take, or buy, any number of machines.
FLOW_RUNS_PER_POOL_MAX = 64


class DeployFailed(OvernightError):
    """The server could not be brought to the configuration; the message states what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What was changed about one object on the server."""

    kind: str
    name: str
    what: str = "unchanged"


def main() -> None:
    """Deploy everything to the server of PREFECT_API_URL, and print what that changed."""
    try:
        changes = asyncio.run(deploy())
    except DeployFailed as failure:
        sys.exit(str(failure))
    sys.stdout.write(describe_changes(changes))


def describe_changes(changes: Sequence[Change]) -> str:
    """Return what was changed, a line for each object, and how much that is together."""
    lines = [f"{change.kind:<12}{change.name:<42}{change.what}\n" for change in changes]
    changed = sum(change.what != "unchanged" for change in changes)
    lines.append(f"{changed} changes at {PREFECT_API_URL.value()}.\n" if changed else "Nothing has changed.\n")
    return "".join(lines)


async def deploy(
    file: Path = PREFECT_FILE,
    automations: Iterable[AutomationCore] | None = None,
    pools: Sequence[WorkPoolCreate] = (),
) -> list[Change]:
    """Create or change what differs from `file` and `automations`; return every object with its change.

    Two calls at the same time may both create an automation.

    Args:
        file: The deployments.
        automations: The automations; None for those of Overnight.
        pools: Work pools that come before those of Overnight, and are changed to what they are here where they exist.

    Raises:
        DeployFailed: There is no server, a work pool does not exist that is not made here, one exists of another type
            than it has in `pools`, or the server refuses something.
    """
    async with _connect() as client:
        changes = [await _apply_block_type(client, each) for each in BLOCKS]
        changes += [await _update_pool(client, pool) for pool in pools]
        named = {pool.name for pool in pools}
        changes += [await _apply_pool(client, pool) for pool in make_work_pools() if pool.name not in named]
        changes += await _apply_deployments(client, file, read_deployments(file))
        return changes + [await _apply_automation(client, each) for each in automations or make_automations()]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallDeployment:
    """A call of batch_inference that a person deploys, on a schedule or not.

    Its other settings are those of the deployment `adhoc` of prefect.yaml.
    """

    name: str
    parameters: Mapping[str, Any]
    pool: str = "overnight"
    cron: str | None = None
    timezone: str = "UTC"


async def deploy_call(call: CallDeployment, automations: Iterable[AutomationCore] | None = None) -> list[Change]:
    """Create the deployment of a call, or change what differs; with its pool, and the automations that resume its runs.

    The call has the last word: a schedule that it does not name is removed. What somebody has paused stays paused.

    Raises:
        DeployFailed: There is no server, the work pool does not exist, the name is one of prefect.yaml's or none of
            Prefect, its schedule or time zone can't be read, or the server refuses something.
        SecretExposed: A parameter holds a password or token.
    """
    refuse_secrets(call.parameters)
    if call.cron is not None:
        _check_schedule(call.cron, call.timezone)
    if any(each in call.name for each in BANNED_CHARACTERS):
        banned = " ".join(sorted(BANNED_CHARACTERS))
        message = f"The name of a deployment must have none of {banned}, got {call.name!r}. Choose another --name."
        raise DeployFailed(message)
    content = yaml.safe_load(PREFECT_FILE.read_text())
    if call.name in {each["name"] for each in content["deployments"]}:
        message = (
            f"The name of a deployment must be none of those that `overnight deploy` creates alone, got {call.name!r}: "
            "that command would set it back. Choose another name."
        )
        raise DeployFailed(message)
    (adhoc,) = (each for each in content["deployments"] if each["name"] == "adhoc")
    name, fields = _read_deployment({**adhoc, "name": call.name}, content["pull"])
    schedule = {"slug": call.name, "cron": call.cron, "timezone": call.timezone}
    fields = {
        **fields,
        "description": "Scores a dataset with a registered model. The same parameters again are the same run.",
        "parameters": dict(call.parameters),
        "schedules": [schedule] if call.cron is not None else [],
        "work_pool_name": call.pool,
    }
    async with _connect() as client:
        pools = [pool for pool in make_work_pools() if pool.name == call.pool]
        changes = [await _apply_pool(client, pool) for pool in pools]
        changes.append(await _apply_call(client, name, fields))
        return changes + [await _apply_automation(client, each) for each in automations or make_automations()]


def _check_schedule(cron: str, timezone: str) -> None:
    try:
        CronSchedule(cron=cron, timezone=timezone)
    except ValidationError as error:
        problem = error.errors()[0]
        option, form = {
            "cron": ("--schedule", "a time as cron, such as '0 1 * * *', every night at one"),
            "timezone": ("--timezone", "a name such as Europe/Berlin"),
        }[str(problem["loc"][0])]
        message = f"{option} must be {form}, got {problem['input']!r}. Correct it."
        raise DeployFailed(message) from error


async def _apply_call(client: PrefectClient, name: str, fields: Fields) -> Change:
    await _check_pools(client, {name: fields["work_pool_name"]}, "--pool")
    deployed = await _find_deployment(client, name)
    change = _compare_deployment(name, fields, deployed)
    if change.what == "unchanged":
        return change
    paused = {each.slug for each in deployed.schedules if not each.active} if deployed else set()
    flow_name, _, short_name = name.partition("/")
    schedules = [
        DeploymentScheduleCreate(
            schedule=CronSchedule(cron=each["cron"], timezone=each["timezone"]),
            active=each["slug"] not in paused,
            slug=each["slug"],
        )
        for each in fields["schedules"]
    ]
    others = {key: value for key, value in fields.items() if key != "schedules"}
    try:
        flow_id = await client.create_flow_from_name(flow_name)
        await client.create_deployment(
            flow_id=flow_id,
            name=short_name,
            schedules=schedules,
            paused=deployed is not None and deployed.paused,
            **others,
        )
    except PrefectHTTPStatusError as error:
        message = f"The Prefect server must take the deployment {name}, got: {error}"
        raise DeployFailed(message) from error
    remaining = _compare_deployment(name, fields, await _find_deployment(client, name))
    if remaining.what != "unchanged":
        message = f"Deployment {name} must be as it was sent, but the server has it {remaining.what}. Look at it there."
        raise DeployFailed(message)
    return change


@asynccontextmanager
async def _connect() -> AsyncGenerator[PrefectClient]:
    """Yield a client of the Prefect server; raises DeployFailed where none is named, or it does not answer."""
    if not PREFECT_API_URL.value():
        message = (
            "PREFECT_API_URL must name the Prefect server to deploy to, got none. `overnight local up` starts one and "
            "prints what to export; `prefect config set PREFECT_API_URL=http://HOST:4200/api` names your own."
        )
        raise DeployFailed(message)
    try:
        async with get_client() as client:
            yield client
    except httpx.TransportError as error:
        address = PREFECT_API_URL.value()
        message = f"The Prefect server at {address} must answer, got: {error!r}. Start it, or correct the address."
        raise DeployFailed(message) from error


async def _apply_block_type(client: PrefectClient, block: type[Block]) -> Change:
    """Register a block type and its fields, which changes nothing where the server has both."""
    what = "unchanged"
    try:
        await client.read_block_type_by_slug(block.get_block_type_slug())
        await client.read_block_schema_by_checksum(block._calculate_schema_checksum())  # noqa: SLF001 - as Prefect asks
    except ObjectNotFound:
        what = "created"
    await block.aregister_type_and_schema()
    return Change(kind="block type", name=block.get_block_type_name(), what=what)


async def _apply_pool(client: PrefectClient, pool: WorkPoolCreate) -> Change:
    try:
        await client.read_work_pool(pool.name)
    except ObjectNotFound:
        await client.create_work_pool(pool)
        return Change(kind="work pool", name=pool.name, what="created")
    return Change(kind="work pool", name=pool.name)


async def _update_pool(client: PrefectClient, pool: WorkPoolCreate) -> Change:
    """Create a work pool, or change its template and its description to what they are here."""
    change = await _apply_pool(client, pool)
    if change.what == "created":
        return change
    has = await client.read_work_pool(pool.name)
    if has.type != pool.type:
        message = (
            f"The work pool {pool.name} must be of type {pool.type}, but the server has one of type {has.type}. Delete "
            f"it, with what is scheduled in it: prefect work-pool delete {pool.name}"
        )
        raise DeployFailed(message)
    wants = WorkPoolUpdate(description=pool.description, base_job_template=pool.base_job_template)
    differ = [name for name in sorted(wants.model_fields_set) if getattr(has, name) != getattr(wants, name)]
    if not differ:
        return change
    await client.update_work_pool(pool.name, wants)
    return Change(kind="work pool", name=pool.name, what=f"changed: {', '.join(differ)}")


def make_work_pools() -> list[WorkPoolCreate]:
    """Return every work pool that prefect.yaml names."""
    return [
        make_process_pool(),
        make_process_pool("overnight-spot", "Cheap machines, which may vanish at any moment"),
        make_process_pool("overnight-on-demand", "Machines at the full price, which stay"),
    ]


def make_process_pool(name: str = "overnight", machines: str = "Machines that are there anyway") -> WorkPoolCreate:
    """Return a pool of machines whose workers start flow runs as processes."""
    return WorkPoolCreate(
        name=name,
        description=f"{machines}. On each runs: overnight worker --pool {name}",
        type=ProcessWorker.type,
        base_job_template=ProcessWorker.get_default_base_job_template(),
        concurrency_limit=FLOW_RUNS_PER_POOL_MAX,
    )


async def _apply_deployments(client: PrefectClient, file: Path, deployments: Mapping[str, Fields]) -> list[Change]:
    """Have Prefect deploy those that differ from the file."""
    await _check_pools(client, {name: fields["work_pool_name"] for name, fields in deployments.items()}, str(file))
    changes = [
        _compare_deployment(name, fields, await _find_deployment(client, name)) for name, fields in deployments.items()
    ]
    names = [change.name for change in changes if change.what != "unchanged"]
    if names:
        _run_prefect_deploy(file, names)
        for name in names:
            remaining = _compare_deployment(name, deployments[name], await _find_deployment(client, name))
            if remaining.what != "unchanged":
                message = f"Deployment {name} must match {file} once it is deployed, but is {remaining.what}."
                raise DeployFailed(message)
    return changes


def read_deployments(file: Path = PREFECT_FILE) -> dict[str, Fields]:
    """Return, by name, the fields that each deployment has on the server once the file is deployed."""
    content = yaml.safe_load(file.read_text())
    return dict(_read_deployment(each, content["pull"]) for each in content["deployments"])


def _read_deployment(each: Mapping[str, Any], pull: list[dict[str, Any]]) -> tuple[str, Fields]:
    flow: Flow[..., Any] = load_flow_from_entrypoint(each["entrypoint"])
    return f"{flow.name}/{each['name']}", {
        "entrypoint": each["entrypoint"],
        "description": each["description"],
        "tags": each["tags"],
        "parameters": each.get("parameters", {}),
        "schedules": each.get("schedules", []),
        "work_pool_name": each["work_pool"]["name"],
        "job_variables": each["work_pool"]["job_variables"],
        "pull_steps": pull,
        "enforce_parameter_schema": each["enforce_parameter_schema"],
        "parameter_openapi_schema": parameter_schema(flow).model_dump(exclude_unset=True),
    }


async def _check_pools(client: PrefectClient, names: Mapping[str, str], where: str) -> None:
    for deployment, pool in names.items():
        try:
            await client.read_work_pool(pool)
        except ObjectNotFound:
            message = (
                f"The work pool {pool!r} of deployment {deployment} must exist, but the server has none of that "
                f"name. Create it (`prefect work-pool create {pool} --type process`), or name another in {where}."
            )
            raise DeployFailed(message) from None


def _compare_deployment(name: str, fields: Fields, deployed: DeploymentResponse | None) -> Change:
    if deployed is None:
        return Change(kind="deployment", name=name, what="created")
    differ = find_differences(fields, deployed)
    return Change(kind="deployment", name=name, what=f"changed: {', '.join(differ)}" if differ else "unchanged")


async def _find_deployment(client: PrefectClient, name: str) -> DeploymentResponse | None:
    try:
        return await client.read_deployment_by_name(name)
    except ObjectNotFound:
        return None


def find_differences(fields: Fields, deployed: DeploymentResponse) -> list[str]:
    """Return the fields in which a deployment on the server differs from its configuration."""
    has = deployed.model_dump(mode="json", include=set(fields))
    has["schedules"] = [
        # Only what the file states of a schedule counts; the server adds ids, times and defaults.
        {key: {**schedule, **schedule["schedule"]}.get(key) for key in stated}
        for schedule, stated in zip(has["schedules"], fields["schedules"], strict=False)
    ] + has["schedules"][len(fields["schedules"]) :]
    return [name for name, value in fields.items() if has[name] != value]


def _run_prefect_deploy(file: Path, names: list[str]) -> None:
    # Without the working folder, whose own `flows` or `tasks` would hide those of this project.
    command = [sys.executable, "-P", "-m", "prefect", "--no-prompt", "deploy", "--prefect-file", str(file)]
    done = subprocess.run(  # noqa: S603 - Prefect's own program, on a file of this project
        [*command, *(part for name in names for part in ("--name", name.rpartition("/")[2]))],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        message = f"Prefect must take the deployments of {file}, but answers:\n{done.stdout}{done.stderr}"
        raise DeployFailed(message)


async def _apply_automation(client: PrefectClient, automation: AutomationCore) -> Change:
    existing = await client.read_automations_by_name(automation.name)
    if not existing:
        await client.create_automation(automation)
        return Change(kind="automation", name=automation.name, what="created")
    # Every field is set, defaults too: the client sends only fields that are set.
    has, wants = (AutomationCore(**each.model_dump(exclude={"owner_resource"})) for each in (existing[0], automation))
    differ = [name for name, value in wants if getattr(has, name) != value]
    if not differ:
        return Change(kind="automation", name=automation.name)
    await client.update_automation(existing[0].id, wants)
    return Change(kind="automation", name=automation.name, what=f"changed: {', '.join(differ)}")


if __name__ == "__main__":
    main()
