"""AWS on loopback, started once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

from infra.aws.session import Aws, open_aws
from infra.aws.settings import Settings, make_parameters
from infra.aws.stack import Stack, carry_out, plan_stack
from tests.aws_server import AwsServer, aws_server, use_aws


@pytest.fixture(scope="session")
def running_aws() -> Generator[AwsServer]:
    with aws_server() as server:
        yield server


@pytest.fixture
def server(running_aws: AwsServer) -> Generator[AwsServer]:
    """AWS with nothing in it."""
    running_aws.reset()
    with use_aws(running_aws):
        yield running_aws


@pytest.fixture(scope="session")
def opened_aws(running_aws: AwsServer) -> Aws:
    with use_aws(running_aws):
        return open_aws()


@pytest.fixture
def aws(server: AwsServer, opened_aws: Aws) -> Aws:
    """That region, whose clients are those of all tests."""
    return opened_aws


@pytest.fixture
def settings(server: AwsServer) -> Settings:
    """The least that a new stack needs."""
    return Settings(
        subnets=tuple(server.list_subnets()),
        prefect_api_url="https://prefect.example.com/api",
        mlflow_tracking_uri="https://mlflow.example.com",
    )


@pytest.fixture
def stack(aws: Aws, settings: Settings) -> Stack:
    """A stack of release 0.1.0 with no machine."""
    plan = plan_stack(aws, "overnight", make_parameters(aws, settings, "0.1.0", None))
    return carry_out(aws, plan, lambda _: None, poll_seconds=0)


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "overnight-0.1.0-py3-none-any.whl"
    path.write_bytes(b"the code of 0.1.0")
    return path
