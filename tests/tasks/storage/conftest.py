"""A fresh place to write to, on a local disk and on a server of each cloud."""

from __future__ import annotations

import uuid
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.azurite import AzuriteServer, azurite_server
from tests.gcs_server import GcsServer, gcs_server
from tests.servers import set_environment


@pytest.fixture(scope="session")
def running_gcs() -> Generator[GcsServer]:
    """A server that speaks Google Cloud Storage's XML API."""
    with gcs_server() as server:
        yield server


@pytest.fixture
def gcs(running_gcs: GcsServer) -> Generator[GcsServer]:
    """That server, and for this test the environment that points at it."""
    with set_environment(running_gcs.environment):
        yield running_gcs


@pytest.fixture(scope="session")
def running_azure(tmp_path_factory: pytest.TempPathFactory) -> Generator[AzuriteServer]:
    """A real Azurite with a container named lake; skipped without Azurite."""
    try:
        started = azurite_server(tmp_path_factory.mktemp("azurite"))
    except FileNotFoundError as error:
        pytest.skip(str(error))
    with started as server:
        server.create_container("lake")
        yield server


@pytest.fixture
def azure(running_azure: AzuriteServer) -> Generator[AzuriteServer]:
    """That server, and for this test the environment that points at it."""
    with set_environment(running_azure.environment):
        yield running_azure


@pytest.fixture(params=["local", "s3", "gcs", "azure"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty folder, or of an empty prefix."""
    if request.param == "local":
        return str(tmp_path / "place")
    request.getfixturevalue(request.param)
    scheme = {"s3": "s3", "gcs": "gs", "azure": "az"}[request.param]
    return f"{scheme}://lake/{uuid.uuid4().hex}"
