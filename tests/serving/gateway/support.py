"""The model server of the tests, the routes to it, and the client of an endpoint."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from infra.local.gateway import GatewayServer
from infra.local.process import ServerCommand, ServerProcess, base_environment, send_request, start_on_free_ports
from serving.gateway.client import GatewayClient
from serving.gateway.route import Route, ServedVersion, Verdict
from tests.serving.gateway.v2_child import CONTRACT

CHILD = Path(__file__).with_name("v2_child.py")
ROW = {
    "inputs": [
        {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1.0, 2.0, 3.0]},
        {"name": "n", "datatype": "INT64", "shape": [1, 1], "data": [4]},
    ]
}


@dataclass(frozen=True, slots=True, kw_only=True)
class V2Server:
    process: ServerProcess
    url: str

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def seen(self, what: str) -> int:
        """How often a version, or a verb such as "sleepy load", was requested."""
        return int(httpx.get(f"{self.url}/seen").json().get(what, 0))


def v2_server(folder: Path, port: int | None = None) -> V2Server:
    def command(ports: Sequence[int]) -> ServerCommand:
        chosen = port or ports[0]
        return ServerCommand(
            argv=(sys.executable, str(CHILD), str(chosen)),
            environment=base_environment(),
            folder=folder,
            log_path=folder / "v2.log",
            ready=lambda: send_request("GET", chosen, "/v2/health/ready").ok,
        )

    process, (free,) = start_on_free_ports(1, command)
    return V2Server(process=process, url=f"http://127.0.0.1:{port or free}")


def served(url: str, version: str = "1", weight: float = 100, model: str = "toy") -> ServedVersion:
    return ServedVersion(version=version, url=url, upstream_model=model, upstream_version=version, weight=weight)


def route(url: str, *versions: tuple[str, float], model: str = "toy", **options: Any) -> Route:
    """A route to versions of the V2 server of the tests: only to version 1, unless others are given."""
    versions = versions or (("1", 100.0),)
    return Route(
        versions=tuple(served(url, version, weight, model) for version, weight in versions),
        contract=CONTRACT,
        **options,
    )


class EndpointClient:
    """An endpoint as its clients see it."""

    def __init__(self, name: str, url: str) -> None:
        self.name = name
        self.url = f"{url}/v2/models/{name}"
        self.http = httpx.Client(timeout=120)

    def get(self, path: str = "", **options: Any) -> httpx.Response:
        return self.http.get(f"{self.url}{path}", **options)

    def infer(self, body: Any = ROW, *, version: str | None = None, **options: Any) -> httpx.Response:
        path = "/infer" if version is None else f"/versions/{version}/infer"
        content = {"content": body} if isinstance(body, bytes) else {"json": body}
        return self.http.post(f"{self.url}{path}", **content, **options)

    def score(self, **options: Any) -> float:
        response = self.infer(**options)
        assert response.status_code == 200, response.text
        return float(response.json()["outputs"][0]["data"][0])


def read_metrics(gateway: GatewayServer) -> str:
    """The page that Prometheus scrapes."""
    return httpx.get(f"{gateway.url}/metrics", headers={"Authorization": f"Bearer {gateway.admin_key}"}).text


def error(response: httpx.Response) -> tuple[int, str]:
    """The status and the message of an error, whose body holds nothing else."""
    assert ["error"] == list(response.json())
    return response.status_code, response.json()["error"]


def wait_for_verdict(admin: GatewayClient, name: str, *, timeout_s: float) -> Verdict:
    """How the canary of an endpoint ended, once it has."""
    verdict = admin.wait_until(name, lambda state: state.verdict is not None, timeout_s=timeout_s).verdict
    assert verdict is not None
    return verdict


def write_access_line(folder: Path, **fields: Any) -> None:
    """Add a line to the access log of a gateway's folder, as Envoy writes it."""
    line = {
        "at_us": 0,
        "attempts": 1,
        "endpoint": "churn",
        "flags": "-",
        "grpc_status": None,
        "is_canary": None,
        "latency_us": 2000,
        "rows": None,
        "size": 99,
        "status": 200,
        "version": None,
        **fields,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "access.jsonl").open("a") as log:
        log.write(json.dumps({**line, "at_us": str(line["at_us"])}) + "\n")
