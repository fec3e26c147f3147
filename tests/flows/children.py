"""Processes that make one call of batch_inference, to be ended by a test, and what the call puts out undisturbed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from infra.local.prefect_server import PrefectServer
from tasks.batch.options import BatchOptions
from tests.child_environment import add_project
from tests.support import digests

ROOT = Path(__file__).parents[2]
# Of deployments that tests make: without them Prefect would copy the whole folder for each flow run, packages and all.
PULL_STEPS = [{"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}]


def start_child(
    script: str, *arguments: str, environment: Mapping[str, str] | None = None, **how: Any
) -> subprocess.Popen[str]:
    """Start a script of this folder with the project on its path; its stderr is a pipe."""
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name(script)), *arguments],
        env=add_project(environment),
        stderr=subprocess.PIPE,
        text=True,
        **how,
    )


def call(model: str, source: Path, destination: Path, options: BatchOptions) -> tuple[str, str, str, str]:
    """The call as the last four arguments of a child."""
    return model, str(source), str(destination), options.model_dump_json()


def score(model: str, source: Path, destination: Path, options: BatchOptions) -> dict[str, str]:
    """Make the call in this process, and return every file of the run by its digest."""
    from flows.batch import batch_inference

    batch_inference(model, str(source), str(destination), options)
    return digests(destination)


def list_flow_runs(server: PrefectServer, destination: Path) -> list[dict[str, Any]]:
    """Return the flow runs into a destination, of the newest 200: a page has no more, and other tests make many."""
    runs = httpx.post(f"{server.api_url}/flow_runs/filter", json={"sort": "EXPECTED_START_TIME_DESC"}).json()
    return [run for run in runs if run["parameters"].get("destination") == str(destination)]


def of_session(session: int) -> set[int]:
    """Every process of a session that is left; Ray gives its processes groups of their own."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, of = stat.read_text().rpartition(")")[2].split()[:4]
            if int(of) == session and state != "Z":
                found.add(int(stat.parent.name))
    return found
