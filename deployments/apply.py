"""Make a Prefect server have the work pools, deployments and automations of this project: `make deploy`.

Called again it changes nothing, and says so. What prefect.yaml says goes: a schedule or a parameter that was
changed in the UI is set back, by name. A work pool that is there is left as it is, whatever its type.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from prefect.automations import AutomationCore
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.settings import PREFECT_API_URL
from prefect.utilities.callables import parameter_schema

from deployments.automations import automations
from deployments.pools import pools

FILE = Path(__file__).with_name("prefect.yaml")

Fields = Mapping[str, Any]


class DeployFailed(RuntimeError):
    """The server does not have what was asked for; the message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What became of one thing on the server."""

    kind: str
    name: str
    what: str = "unchanged"


def main() -> None:
    """Apply everything to the server of PREFECT_API_URL, and say what that changed."""
    try:
        changes = asyncio.run(apply())
    except DeployFailed as failure:
        sys.exit(str(failure))
    for change in changes:
        sys.stdout.write(f"{change.kind:<12}{change.name:<42}{change.what}\n")
    changed = sum(change.what != "unchanged" for change in changes)
    sys.stdout.write(f"{changed} changes at {PREFECT_API_URL.value()}.\n" if changed else "Nothing has changed.\n")


async def apply(file: Path = FILE, wanted: Iterable[AutomationCore] | None = None) -> list[Change]:
    """Create or change what differs from `file` and `wanted`; return every thing, with what became of it.

    Raises DeployFailed where there is no server, where a pool is missing that no code here makes, or
    where the server does not take something. Called twice at once, both may create an automation.
    """
    if not PREFECT_API_URL.value():
        message = (
            "PREFECT_API_URL must name the Prefect server to deploy to, got none. `python -m infra.local` starts one "
            "and prints what to export; `prefect config set PREFECT_API_URL=http://HOST:4200/api` names your own."
        )
        raise DeployFailed(message)
    try:
        async with get_client() as client:
            changes = [await _apply_pool(client, pool) for pool in pools()]
            changes += await _apply_deployments(client, file, read_deployments(file))
            return changes + [await _apply_automation(client, each) for each in wanted or automations()]
    except httpx.TransportError as error:
        address = PREFECT_API_URL.value()
        message = f"The Prefect server at {address} must answer, got: {error!r}. Start it, or mend the address."
        raise DeployFailed(message) from error


async def _apply_pool(client: PrefectClient, pool: WorkPoolCreate) -> Change:
    try:
        await client.read_work_pool(pool.name)
    except ObjectNotFound:
        await client.create_work_pool(pool)
        return Change(kind="work pool", name=pool.name, what="created")
    return Change(kind="work pool", name=pool.name)


async def _apply_deployments(client: PrefectClient, file: Path, wanted: Mapping[str, Fields]) -> list[Change]:
    """Have Prefect deploy those that differ, by its own reading of the file."""
    await _check_pools(client, file, {name: fields["work_pool_name"] for name, fields in wanted.items()})
    changes = [await _compare(client, name, fields) for name, fields in wanted.items()]
    names = [change.name for change in changes if change.what != "unchanged"]
    if names:
        _deploy(file, names)
        for name in names:
            left = await _compare(client, name, wanted[name])
            if left.what != "unchanged":
                message = f"Deployment {name} must be as {file} says once it is deployed, but is still {left.what}."
                raise DeployFailed(message)
    return changes


def read_deployments(file: Path = FILE) -> dict[str, Fields]:
    """Return, by name, what the server has in the fields of each deployment once the file is deployed."""
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


async def _check_pools(client: PrefectClient, file: Path, names: Mapping[str, str]) -> None:
    for deployment, pool in names.items():
        try:
            await client.read_work_pool(pool)
        except ObjectNotFound:
            message = (
                f"The work pool {pool!r} of deployment {deployment} must be there, but the server has none of that "
                f"name. Create it (`prefect work-pool create {pool} --type process`), or name another in {file}."
            )
            raise DeployFailed(message) from None


async def _compare(client: PrefectClient, name: str, fields: Fields) -> Change:
    try:
        standing = await client.read_deployment_by_name(name)
    except ObjectNotFound:
        return Change(kind="deployment", name=name, what="created")
    differ = differences(fields, standing)
    return Change(kind="deployment", name=name, what=f"changed: {', '.join(differ)}" if differ else "unchanged")


def differences(fields: Fields, standing: DeploymentResponse) -> list[str]:
    """Return the fields in which a deployment of the server is not what it is wanted to be."""
    has = standing.model_dump(mode="json", include=set(fields))
    has["schedules"] = [
        # Of a schedule counts what the file says of it; the server adds ids, times and defaults.
        {key: {**schedule, **schedule["schedule"]}.get(key) for key in wanted}
        for schedule, wanted in zip(has["schedules"], fields["schedules"], strict=False)
    ] + has["schedules"][len(fields["schedules"]) :]
    return [name for name, value in fields.items() if has[name] != value]


def _deploy(file: Path, names: list[str]) -> None:
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--prefect-file", str(file)]
    done = subprocess.run(  # noqa: S603 - Prefect's own program, on a file of this project
        [*command, *(part for name in names for part in ("--name", name.rpartition("/")[2]))],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        message = f"Prefect must take the deployments of {file}, but says:\n{done.stdout}{done.stderr}"
        raise DeployFailed(message)


async def _apply_automation(client: PrefectClient, wanted: AutomationCore) -> Change:
    standing = await client.read_automations_by_name(wanted.name)
    if not standing:
        await client.create_automation(wanted)
        return Change(kind="automation", name=wanted.name, what="created")
    # Every field is given, defaults too: the client sends those alone.
    has, wants = (AutomationCore(**each.model_dump(exclude={"owner_resource"})) for each in (standing[0], wanted))
    differ = [name for name, value in wants if getattr(has, name) != value]
    if not differ:
        return Change(kind="automation", name=wanted.name)
    await client.update_automation(standing[0].id, wants)
    return Change(kind="automation", name=wanted.name, what=f"changed: {', '.join(differ)}")


if __name__ == "__main__":
    main()
