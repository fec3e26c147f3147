"""A gateway and a V2 server behind it, each in a process of its own, for the whole of the session."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator

import pytest

from infra.local.gateway import GatewayServer, gateway_server
from serving.gateway.client import GatewayClient
from serving.gateway.route import Route
from tests.serving.gateway.support import Door, V2Server, v2_server

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


Put = Callable[[Route], Door]


@pytest.fixture
def put(admin: GatewayClient, gateway: GatewayServer, request: pytest.FixtureRequest) -> Generator[Put]:
    """Puts a route under a name of its own, for as long as the test takes."""
    doors: list[Door] = []

    def put(route: Route) -> Door:
        name = hashlib.sha256(f"{request.node.nodeid} {len(doors)}".encode()).hexdigest()[:16]
        doors.append(Door(f"e{name}", gateway.url))
        admin.put(doors[-1].name, route)
        return doors[-1]

    yield put
    for door in doors:
        admin.delete(door.name)
        door.http.close()
