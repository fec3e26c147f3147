"""schemathesis, as a program of its own, over the gateway's OpenAPI page: no 500, and nothing that the page denies."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import httpx
import pytest

from infra.local.gateway import GatewayServer, gateway_server
from serving.gateway.client import GatewayClient
from tests.serving.gateway.support import V2Server, route

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory, v2: V2Server) -> Generator[GatewayServer]:
    """A gateway of its own, since what is put there and deleted is anybody's guess."""
    with (
        gateway_server(tmp_path_factory.mktemp("fuzzed")) as server,
        GatewayClient(server.url, server.admin_key) as admin,
    ):
        admin.put("toy", route(v2.url))
        yield server


def schemathesis(server: GatewayServer, folder: Path, config: str, *options: str) -> None:
    (folder / "schemathesis.toml").write_text(config)
    command = (
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(folder / "schemathesis.toml")),
        *("run", f"{server.url}/openapi.json", "--checks", CHECKS),
        *("--generation-deterministic", "--no-color", *options),
        *("-H", f"Authorization: Bearer {server.admin_key}"),
    )
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)

    assert 0 == done.returncode, done.stdout[-6000:] + done.stderr[-2000:]


def test_anything_that_is_asked_of_the_gateway_gets_an_answer_as_the_page_says(
    fuzzed: GatewayServer, tmp_path: Path
) -> None:
    options = ("--exclude-path-regex", "^/v2/models", "--phases", "fuzzing", "--max-examples", "25")
    schemathesis(fuzzed, tmp_path, "", *options)


def test_anything_that_is_asked_of_an_endpoint_that_is_there_gets_one_too(
    fuzzed: GatewayServer, tmp_path: Path
) -> None:
    config = '[parameters]\n"path.name" = "toy"\n"path.version" = "1"\n'
    options = ("--include-path-regex", "^/v2/models", "--phases", "fuzzing", "--max-examples", "40")
    schemathesis(fuzzed, tmp_path, config, *options)

    assert 200 == httpx.get(f"{fuzzed.url}/v2/models/toy/ready").status_code


def test_the_page_says_what_a_body_must_be(fuzzed: GatewayServer) -> None:
    page = httpx.get(f"{fuzzed.url}/openapi.json", headers={"Authorization": f"Bearer {fuzzed.admin_key}"}).json()
    schemas = page["components"]["schemas"]
    bodies = [
        operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        for path in page["paths"].values()
        for operation in path.values()
        if "requestBody" in operation
    ]

    assert ["KeyDigest", "RequestDocument", "RequestDocument", "Route"] == sorted(bodies)
    assert "$defs" not in json.dumps(schemas)
    assert not [name for name in schemas if not all(each in schemas for each in _referred(schemas[name]))]


def _referred(schema: object) -> set[str]:
    text = json.dumps(schema)
    return {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
