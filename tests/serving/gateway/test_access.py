"""Who may ask, seen through a real gateway."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import httpx
import pytest

from infra.local.gateway import GatewayServer, gateway_server
from serving.errors import EndpointFailed
from serving.gateway.client import GatewayClient
from serving.gateway.keys import Keys
from tests.serving.gateway.conftest import FIXED_KEY, Put
from tests.serving.gateway.support import ROW, V2Server, error, route

KEY = "the-key-that-is-put-by-a-test"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_an_endpoint_with_keys_answers_those_alone(put: Put, v2: V2Server, admin: GatewayClient) -> None:
    admin.put_key("app", KEY)
    door = put(route(v2.url, keys=("app",)))

    assert 10 == door.score(headers=bearer(KEY))
    assert 401 == error(door.infer())[0]
    assert 401 == error(door.infer(headers=bearer("a-key-that-nobody-knows")))[0]
    assert 403 == error(door.infer(headers=bearer(FIXED_KEY)))[0]
    assert "Bearer" == door.infer().headers["WWW-Authenticate"]
    for path in ("", "/ready", "/versions/1", "/versions/1/ready"):
        assert 401 == error(door.get(path))[0]
        assert 200 == door.get(path, headers=bearer(KEY)).status_code

    admin.delete_key("app")
    assert 401 == error(door.infer(headers=bearer(KEY)))[0]


def test_a_key_of_the_environment_opens_too(put: Put, v2: V2Server) -> None:
    assert 10 == put(route(v2.url, keys=("fixed",))).score(headers=bearer(FIXED_KEY))


def test_a_route_names_only_keys_that_are_known(v2: V2Server, admin: GatewayClient) -> None:
    with pytest.raises(EndpointFailed, match=r"409.*must be known to the gateway, got \['nobody'\]"):
        admin.put("refused", route(v2.url, keys=("nobody",)))

    assert admin.get("refused") is None


def test_a_short_key_is_not_taken(admin: GatewayClient) -> None:
    with pytest.raises(EndpointFailed, match="at least 16 characters, got 5"):
        admin.put_key("app", "short")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/admin/endpoints"),
        ("GET", "/admin/endpoints/any"),
        ("PUT", "/admin/endpoints/any"),
        ("DELETE", "/admin/endpoints/any"),
        ("PUT", "/admin/keys/any"),
        ("DELETE", "/admin/keys/any"),
    ],
)
def test_only_the_administrators_key_opens_the_administrators_door(
    gateway: GatewayServer, method: str, path: str
) -> None:
    for headers in ({}, bearer(FIXED_KEY), {"Authorization": gateway.admin_key}, {"Authorization": ""}):
        assert 401 == error(httpx.request(method, f"{gateway.url}{path}", headers=headers, content=b"{}"))[0]


PAGES = ("/metrics", "/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect")


@pytest.mark.parametrize("path", PAGES)
def test_the_pages_about_the_gateway_are_for_the_administrator(gateway: GatewayServer, path: str) -> None:
    url = f"{gateway.url}{path}"
    key = gateway.admin_key

    for headers in ({}, bearer(FIXED_KEY), {"Authorization": key}, {"Authorization": "Basic ?"}):
        assert 401 == error(httpx.get(url, headers=headers))[0]
    assert 401 == error(httpx.get(url, auth=(key, "another")))[0]
    assert httpx.get(url).headers["WWW-Authenticate"].startswith("Basic ")
    assert 200 == httpx.get(url, headers=bearer(key)).status_code
    assert 200 == httpx.get(url, auth=("admin", key)).status_code


def test_a_password_that_a_browser_sends_on_its_own_changes_nothing(gateway: GatewayServer) -> None:
    url = f"{gateway.url}/admin/endpoints"

    assert 401 == error(httpx.get(url, auth=("admin", gateway.admin_key)))[0]


def test_anybody_may_ask_whether_the_gateway_is_there(gateway: GatewayServer) -> None:
    assert [200, 200] == [httpx.get(f"{gateway.url}/v2/health/{which}").status_code for which in ("live", "ready")]


def test_a_key_is_checked_before_the_body_is_sent(put: Put, v2: V2Server, admin: GatewayClient) -> None:
    admin.put_key("early", KEY)
    door = put(route(v2.url, keys=("early",)))
    host, port = door.url.removeprefix("http://").partition("/")[0].split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        head = f"POST /v2/models/{door.name}/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 8000000\r\n\r\n"
        client.sendall(head.encode())

        assert client.recv(1000).startswith(b"HTTP/1.1 401 ")


def test_what_the_gateway_keeps_is_its_owners_alone(tmp_path: Path, v2: V2Server) -> None:
    folder = tmp_path / "made" / "by it"
    umask = os.umask(0)
    try:
        with gateway_server(folder) as server, GatewayClient(server.url, server.admin_key) as admin:
            admin.put_key("app", KEY)
            admin.put("toy", route(v2.url))
            httpx.post(f"{server.url}/v2/models/toy/infer", json=ROW, timeout=60)
        Keys(folder, {})
    finally:
        os.umask(umask)
    modes = {str(path.relative_to(folder)): path.stat().st_mode & 0o777 for path in [folder, *folder.rglob("*")]}

    (log,) = [name for name in modes if name.endswith(".jsonl")]
    assert {0o700} == {modes[name] for name in (".", "routes", "metering")}
    assert {0o600} == {modes[name] for name in ("admin.key", "keys.json", "gateway.lock", "routes/toy.json", log)}


def test_no_key_is_in_a_file_or_in_the_log(
    gateway: GatewayServer, put: Put, v2: V2Server, admin: GatewayClient
) -> None:
    admin.put_key("secret", KEY)
    door = put(route(v2.url, keys=("secret",)))
    door.score(headers=bearer(KEY))
    door.infer(headers=bearer(f"{KEY}-but-wrong"))
    texts = [path.read_text(errors="replace") for path in Path(gateway.folder).rglob("*") if path.is_file()]

    assert texts
    assert not [text for text in texts for key in (KEY, FIXED_KEY, gateway.admin_key) if key in text]


def test_a_body_for_the_administrator_that_is_none_is_refused_with_the_reason(gateway: GatewayServer) -> None:
    def put(content: bytes) -> tuple[int, str]:
        url = f"{gateway.url}/admin/endpoints/any"
        return error(httpx.put(url, headers=bearer(gateway.admin_key), content=content))

    assert 400 == put(b"{")[0]
    assert (422, "versions: Field required") == (put(b"{}")[0], put(b"{}")[1].split("got ")[1].split(";")[0])
    assert 413 == put(b" " * (9 << 20))[0]
    assert 400 == error(httpx.put(f"{gateway.url}/admin/endpoints/A_B", headers=bearer(gateway.admin_key)))[0]
