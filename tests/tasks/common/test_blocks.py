"""Blocks keep an address with its credentials, on a real Prefect server; a flow is given their names alone."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from contextvars import copy_context
from pathlib import Path

import mlflow
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.types import SecretDict
from pydantic import SecretStr, ValidationError

from infra.local.prefect_server import PrefectServer
from serving.errors import BadInput
from tasks.common.blocks import (
    BLOCKS,
    Addresses,
    OvernightDestination,
    OvernightRegistry,
    OvernightSource,
    open_addresses,
)
from tests.eventually import eventually
from tests.servers import use_prefect

KEY, OTHER = "verysecretkey1", "verysecretkey2"


def open_blocks(model: str, source: str, destination: str) -> AbstractContextManager[Addresses]:
    return open_addresses(model, source, destination, logging.getLogger(__name__))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, prefect_templates: Path) -> Generator[PrefectServer]:
    with use_prefect(tmp_path_factory.mktemp("prefect"), prefect_templates, services=False) as server:
        yield server


@pytest.fixture(scope="module", autouse=True)
def saved(server: PrefectServer) -> None:
    """The blocks of a team: a lake with a key, a destination on it, one of another owner, and a registry."""
    lake = {"aws_access_key_id": SecretStr("AKIA1"), "aws_secret_access_key": SecretStr(KEY), "aws_region": "eu-west-1"}
    OvernightSource(address="s3://lake/customers/", **lake).save("customers")
    OvernightDestination(address="s3://lake/scores", **lake).save("scores")
    OvernightDestination(address="s3://other/scores", aws_secret_access_key=SecretStr(OTHER)).save("other")
    OvernightSource(address="gs://lake", environment=SecretDict({"GOOGLE_APPLICATION_CREDENTIALS": "/k.json"})).save(
        "gs"
    )
    OvernightRegistry(tracking_uri="http://127.0.0.1:9", username="me", password=SecretStr("letmeinplease")).save(
        "central"
    )


def test_names_become_addresses_and_the_credentials_are_in_the_environment_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_REGION", "us-east-2")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")
    with open_blocks("models:/churn/3", "block:customers", "block:scores") as opened:
        inside = [os.environ.get(name) for name in names]

    assert ("models:/churn/3", "s3://lake/customers/", "s3://lake/scores") == (
        *(opened.model, opened.source, opened.destination),
    )
    assert ["AKIA1", KEY, "eu-west-1"] == inside
    assert (None, "us-east-2") == (os.environ.get("AWS_SECRET_ACCESS_KEY"), os.environ["AWS_REGION"])


def test_addresses_that_name_no_block_ask_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(os.environ)
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}),
        open_blocks("models:/churn/3", "s3://lake/customers/", "/data/scores") as opened,
    ):
        assert before == dict(os.environ)

    assert "s3://lake/customers/" == opened.source


def test_what_follows_the_name_is_below_its_address() -> None:
    with open_blocks("models:/churn/3", "block:customers/2026/*.parquet", "block:scores/march") as opened:
        assert ("s3://lake/customers/2026/*.parquet", "s3://lake/scores/march") == (opened.source, opened.destination)
    with open_blocks("models:/churn/3", "block:gs/customers", "/data") as opened:
        assert ("gs://lake/customers", "/k.json") == (opened.source, os.environ["GOOGLE_APPLICATION_CREDENTIALS"])
    assert "GOOGLE_APPLICATION_CREDENTIALS" not in os.environ


def test_a_model_of_a_registrys_block_is_looked_up_there(registry: Path) -> None:
    before = mlflow.get_tracking_uri()
    with open_blocks("block:central/churn@champion", "/data/customers", "/data/scores") as opened:
        inside = (opened.model, mlflow.get_tracking_uri(), os.environ["MLFLOW_TRACKING_PASSWORD"])

    assert ("models:/churn@champion", "http://127.0.0.1:9", "letmeinplease") == inside
    assert before == mlflow.get_tracking_uri() == os.environ["MLFLOW_TRACKING_URI"]
    assert "MLFLOW_TRACKING_PASSWORD" not in os.environ


@pytest.mark.parametrize("other", ["block:other", "/data/scores"])
def test_a_call_that_wants_other_variables_waits_and_one_that_wants_the_same_does_not(
    other: str, caplog: pytest.LogCaptureFixture
) -> None:
    def read_secret(destination: str) -> str | None:
        with open_blocks("models:/churn/3", "/data/customers", destination):
            return os.environ.get("AWS_SECRET_ACCESS_KEY")

    before = os.environ.get("AWS_SECRET_ACCESS_KEY")
    with ThreadPoolExecutor(1) as pool, caplog.at_level("INFO"):
        with open_blocks("models:/churn/3", "/data/customers", "block:scores"):
            waiting = pool.submit(copy_context().run, read_secret, other)
            eventually(lambda: "waits for another one of this process" in caplog.text)
            assert KEY == read_secret("block:scores") == os.environ["AWS_SECRET_ACCESS_KEY"]
            assert not waiting.done()
        assert (OTHER if other == "block:other" else before) == waiting.result()
    assert before == os.environ.get("AWS_SECRET_ACCESS_KEY")


@pytest.mark.usefixtures("registry")
def test_the_registry_of_a_block_is_asked_where_the_process_has_named_another() -> None:
    mlflow.set_registry_uri("http://127.0.0.1:8")
    try:
        with open_blocks("block:central/churn@champion", "/data/customers", "/data/scores"):
            assert "http://127.0.0.1:9" == mlflow.get_registry_uri()
        assert "http://127.0.0.1:8" == mlflow.get_registry_uri()
    finally:
        mlflow.set_registry_uri(None)  # type: ignore[arg-type]  # that of the session, which is the tracking server's
        os.environ.pop("MLFLOW_REGISTRY_URI")


def test_a_missing_block_is_named_with_those_that_there_are() -> None:
    with pytest.raises(BadInput, match=r"source must name a block of the type Overnight Source, got block:custmers\. .*"
        r"has customers, gs\."), open_blocks("models:/churn/3", "block:custmers", "/data/scores"):  # fmt: skip
        pass


def test_blocks_that_disagree_on_a_variable_are_refused_without_its_values() -> None:
    with pytest.raises(BadInput, match="agree on AWS_SECRET_ACCESS_KEY") as refused, open_blocks(
        "models:/churn/3", "block:customers", "block:other"
    ):  # fmt: skip
        pass

    assert KEY not in str(refused.value)
    assert OTHER not in str(refused.value)
    assert "AWS_SECRET_ACCESS_KEY" not in os.environ or os.environ["AWS_SECRET_ACCESS_KEY"] not in (KEY, OTHER)


def test_secrets_are_hidden_where_a_block_is_shown_and_refused_where_they_would_show() -> None:
    block = OvernightSource.load("customers")

    assert KEY not in repr(block)
    assert KEY not in block.model_dump_json()
    with pytest.raises(ValidationError, match="must hold no password"):
        OvernightRegistry(tracking_uri="postgresql://me:letmeinplease@db/mlflow")


def test_prefects_own_command_registers_the_types_and_lists_them(server: PrefectServer) -> None:
    def prefect(*arguments: str) -> str:
        command = [sys.executable, "-m", "prefect", "block", *arguments]
        environment = {**os.environ, **server.environment, "COLUMNS": "200"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    registered = prefect("register", "-m", "tasks.common.blocks")
    listed = prefect("type", "ls")

    for block in BLOCKS:
        assert block.get_block_type_name() in registered
        assert block.get_block_type_slug() in listed
    assert "Successfully registered 3 blocks" in registered


def test_the_package_tells_prefect_of_its_blocks() -> None:
    import tomllib

    content = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())

    assert {"overnight": "tasks.common.blocks"} == content["project"]["entry-points"]["prefect.collections"]
