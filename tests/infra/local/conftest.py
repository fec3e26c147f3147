"""The servers are started once for all tests of this folder."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra.local.prefect_server import PrefectServer, prefect_server
from infra.local.process import ServerCommand
from infra.local.s3 import S3Server, s3_server


@pytest.fixture(scope="session")
def template_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("templates")


@pytest.fixture(scope="session")
def prefect(tmp_path_factory: pytest.TempPathFactory, template_folder: Path) -> Iterator[PrefectServer]:
    with prefect_server(tmp_path_factory.mktemp("prefect"), template_folder=template_folder) as server:
        yield server


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        server.create_bucket("bucket")
        yield server


@pytest.fixture
def python_server(tmp_path: Path) -> Callable[..., ServerCommand]:
    """Make the command of a server that runs `code` and is ready once its log has a line `ready`."""
    log_path = tmp_path / "server.log"

    def command(code: str, **changes: float) -> ServerCommand:
        return ServerCommand(
            argv=(sys.executable, "-c", code),
            environment={},
            folder=tmp_path,
            log_path=log_path,
            ready=lambda: "ready" in log_path.read_text().splitlines(),
            **changes,  # type: ignore[arg-type] # the tests change seconds only
        )

    return command
