"""A gateway and a V2 server behind it, each in its own process, for the whole session."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator

import pytest

from infra.local.gateway import GatewayServer, gateway_server
from serving.gateway.client import GatewayClient
from serving.gateway.route import Route
from tests.serving.gateway.support import EndpointClient, V2Server, v2_server

FIXED_KEY = "the-fixed-key-of-the-tests"


@pytest.fixture(scope="session")
def v2(tmp_path_factory: pytest.TempPathFactory) -> Generator[V2Server]:
    server = v2_server(tmp_path_factory.mktemp("v2"))
    yield server
    server.process.stop()


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Generator[GatewayServer]:
    with gateway_server(tmp_path_factory.mktemp("gateway"), {"OVERNIGHT_API_KEYS": f"fixed:{FIXED_KEY}"}) as server:
        yield server


@pytest.fixture(scope="session")
def admin(gateway: GatewayServer) -> Generator[GatewayClient]:
    with GatewayClient(gateway.url, gateway.admin_key) as client:
        yield client


Put = Callable[[Route], EndpointClient]


@pytest.fixture
def put(admin: GatewayClient, gateway: GatewayServer, request: pytest.FixtureRequest) -> Generator[Put]:
    """Puts a route under a name of its own, until the end of the test."""
    endpoints: list[EndpointClient] = []

    def put(route: Route) -> EndpointClient:
        name = hashlib.sha256(f"{request.node.nodeid} {len(endpoints)}".encode()).hexdigest()[:16]
        endpoints.append(EndpointClient(f"e{name}", gateway.url))
        admin.put(endpoints[-1].name, route)
        return endpoints[-1]

    yield put
    for endpoint in endpoints:
        admin.delete(endpoint.name)
        endpoint.http.close()
