"""Real servers that tests start, or skip where they are missing."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from uv import find_uv_bin

from infra.local.prefect_server import PrefectServer, prefect_server
from infra.local.triton import TritonServer, triton_server
from infra.local.venv import RegistryUnreachable, make_venv

_tritons: list[TritonServer] = []


def triton_or_skip(folder: Path) -> TritonServer:
    """Start a real Triton below a folder, or skip; what is raised names the command that brings the wheel."""
    try:
        server = triton_server(folder / "repository", folder / "server")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    _tritons.append(server)
    return server


def has_triton_crashed() -> bool:
    """Return whether the Triton that was started last has ended by a fault of its own, or does within some seconds."""
    return bool(_tritons) and _tritons[-1].has_crashed()


def python_or_skip(name: str) -> Path:
    """Return the interpreter of what infra/local/NAME.txt pins, installed where it is not there yet, or skip."""
    try:
        return make_venv(Path(__file__).parents[1] / f"infra/local/{name}.txt", uv=find_uv_bin()) / "bin/python"
    except RegistryUnreachable as failure:
        pytest.skip(f"What infra/local/{name}.txt pins must be had from a registry: {failure}")


@contextmanager
def use_prefect(folder: Path, template_folder: Path, *, services: bool = True) -> Generator[PrefectServer]:
    """Run a real Prefect server that this process and its children talk to; it has all log lines before it stops."""
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_LEVEL, temporary_settings

    with (
        prefect_server(folder, services=services, template_folder=template_folder) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in server.environment.items():
            patch.setenv(name, value)
        with temporary_settings({PREFECT_API_URL: server.api_url, PREFECT_LOGGING_LEVEL: "CRITICAL"}):
            yield server
            APILogWorker.drain_all(timeout=10)
