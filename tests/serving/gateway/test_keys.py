"""Authentication, by itself and through a real gateway."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import httpx
import pytest

from infra.local.gateway import GatewayServer, gateway_server
from serving.errors import BadRequest, EndpointFailed
from serving.gateway.client import GatewayClient
from serving.gateway.keys import Keys, hash_key
from tests.serving.gateway.conftest import FIXED_KEY, Put
from tests.serving.gateway.support import ROW, V2Server, error, route

KEY, OTHER = "0123456789abcdef", "fedcba9876543210"


def refused_status(keys: Keys, authorization: str | None, *allowed: str) -> int:
    with pytest.raises(BadRequest) as caught:
        keys.check_api_key(authorization, allowed)
    return caught.value.status


def test_a_key_is_accepted_only_where_it_is_allowed(tmp_path: Path) -> None:
    keys = Keys(tmp_path, {"OVERNIGHT_API_KEYS": f"app:{KEY} batch:{OTHER}"})
    keys.check_api_key(f"Bearer {KEY}", ("app",))
    keys.check_api_key(f"bearer  {KEY}", ("batch", "app"))

    assert 403 == refused_status(keys, f"Bearer {KEY}", "batch")
    assert 401 == refused_status(keys, f"Bearer {KEY}x", "app")
    assert 401 == refused_status(keys, f"Basic {KEY}", "app")
    assert 401 == refused_status(keys, KEY, "app")
    assert 401 == refused_status(keys, "", "app")
    assert 401 == refused_status(keys, None, "app")


def test_added_keys_are_stored_as_digests_and_survive_a_restart(tmp_path: Path) -> None:
    Keys(tmp_path, {}).put("app", hash_key(KEY))
    keys = Keys(tmp_path, {})
    keys.check_api_key(f"Bearer {KEY}", ("app",))
    kept = tmp_path / "keys.json"

    assert 0o600 == kept.stat().st_mode & 0o777
    assert KEY not in kept.read_text()

    keys.delete("app")
    assert 401 == refused_status(Keys(tmp_path, {}), f"Bearer {KEY}", "app")


def test_the_administrators_key_is_created_once_and_readable_only_by_its_owner(tmp_path: Path) -> None:
    keys = Keys(tmp_path, {})
    made = (tmp_path / "admin.key").read_text()
    keys.check_admin_key(f"Bearer {made}")
    Keys(tmp_path, {}).check_admin_key(f"Bearer {made}")

    assert 0o600 == (tmp_path / "admin.key").stat().st_mode & 0o777
    with pytest.raises(BadRequest, match="administrator's key"):
        keys.check_admin_key(f"Bearer {made}x")


def test_the_environment_may_hold_the_administrators_key(tmp_path: Path) -> None:
    Keys(tmp_path, {"OVERNIGHT_ADMIN_KEY": KEY}).check_admin_key(f"Bearer {KEY}")

    assert not (tmp_path / "admin.key").exists()
    with pytest.raises(EndpointFailed, match="OVERNIGHT_ADMIN_KEY must hold a key of at least 16 characters, got 5"):
        Keys(tmp_path, {"OVERNIGHT_ADMIN_KEY": "short"})


@pytest.mark.parametrize("held", ["", " \n", "short"])
def test_a_file_without_an_administrators_key_is_refused(tmp_path: Path, held: str) -> None:
    (tmp_path / "admin.key").write_text(held)

    with pytest.raises(EndpointFailed, match=r"admin\.key must hold a key of at least 16 characters"):
        Keys(tmp_path, {})


@pytest.mark.parametrize("stated", [KEY, "app:short", f"app:{KEY} app:{OTHER}", f":{KEY}", f"a/b:{KEY}"])
def test_keys_that_are_not_pairs_of_name_and_key_are_refused_and_not_shown(tmp_path: Path, stated: str) -> None:
    with pytest.raises(EndpointFailed, match="must be NAME:KEY pairs") as caught:
        Keys(tmp_path, {"OVERNIGHT_API_KEYS": stated})

    assert KEY not in str(caught.value)


PUT_KEY = "the-key-that-is-put-by-a-test"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_an_endpoint_with_keys_answers_only_requests_with_them(put: Put, v2: V2Server, admin: GatewayClient) -> None:
    admin.put_key("app", PUT_KEY)
    endpoint = put(route(v2.url, keys=("app",)))

    assert 10 == endpoint.score(headers=bearer(PUT_KEY))
    assert 401 == error(endpoint.infer())[0]
    assert 401 == error(endpoint.infer(headers=bearer("a-key-that-is-unknown")))[0]
    assert 403 == error(endpoint.infer(headers=bearer(FIXED_KEY)))[0]
    assert "Bearer" == endpoint.infer().headers["WWW-Authenticate"]
    for path in ("", "/ready", "/versions/1", "/versions/1/ready"):
        assert 401 == error(endpoint.get(path))[0]
        assert 200 == endpoint.get(path, headers=bearer(PUT_KEY)).status_code

    admin.delete_key("app")
    assert 401 == error(endpoint.infer(headers=bearer(PUT_KEY)))[0]


def test_a_key_of_the_environment_is_accepted(put: Put, v2: V2Server) -> None:
    assert 10 == put(route(v2.url, keys=("fixed",))).score(headers=bearer(FIXED_KEY))


def test_a_route_may_name_only_known_keys(v2: V2Server, admin: GatewayClient) -> None:
    with pytest.raises(EndpointFailed, match=r"409.*must be known to the gateway, got \['unknown'\]"):
        admin.put("refused", route(v2.url, keys=("unknown",)))

    assert admin.get("refused") is None


def test_a_short_key_is_refused(admin: GatewayClient) -> None:
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
def test_admin_routes_need_the_administrators_key(gateway: GatewayServer, method: str, path: str) -> None:
    for headers in ({}, bearer(FIXED_KEY), {"Authorization": gateway.admin_key}, {"Authorization": ""}):
        assert 401 == error(httpx.request(method, f"{gateway.url}{path}", headers=headers, content=b"{}"))[0]


PAGES = ("/metrics", "/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect")


@pytest.mark.parametrize("path", PAGES)
def test_metrics_and_api_pages_need_the_administrators_key(gateway: GatewayServer, path: str) -> None:
    url = f"{gateway.url}{path}"
    key = gateway.admin_key

    for headers in ({}, bearer(FIXED_KEY), {"Authorization": key}, {"Authorization": "Basic ?"}):
        assert 401 == error(httpx.get(url, headers=headers))[0]
    assert 401 == error(httpx.get(url, auth=(key, "another")))[0]
    assert httpx.get(url).headers["WWW-Authenticate"].startswith("Basic ")
    assert 200 == httpx.get(url, headers=bearer(key)).status_code
    assert 200 == httpx.get(url, auth=("admin", key)).status_code


def test_admin_routes_refuse_a_password(gateway: GatewayServer) -> None:
    url = f"{gateway.url}/admin/endpoints"

    assert 401 == error(httpx.get(url, auth=("admin", gateway.admin_key)))[0]


def test_health_needs_no_key(gateway: GatewayServer) -> None:
    assert [200, 200] == [httpx.get(f"{gateway.url}/v2/health/{which}").status_code for which in ("live", "ready")]


def test_a_key_is_checked_before_the_body_is_sent(put: Put, v2: V2Server, admin: GatewayClient) -> None:
    admin.put_key("early", PUT_KEY)
    endpoint = put(route(v2.url, keys=("early",)))
    host, port = endpoint.url.removeprefix("http://").partition("/")[0].split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        head = f"POST /v2/models/{endpoint.name}/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 8000000\r\n\r\n"
        client.sendall(head.encode())

        assert client.recv(1000).startswith(b"HTTP/1.1 401 ")


def test_the_gateways_files_are_readable_only_by_their_owner(tmp_path: Path, v2: V2Server) -> None:
    folder = tmp_path / "made" / "by it"
    umask = os.umask(0)
    try:
        with gateway_server(folder) as server, GatewayClient(server.url, server.admin_key) as admin:
            admin.put_key("app", PUT_KEY)
            admin.put("toy", route(v2.url))
            httpx.post(f"{server.url}/v2/models/toy/infer", json=ROW, timeout=60)
        Keys(folder, {})
    finally:
        os.umask(umask)
    modes = {str(path.relative_to(folder)): path.stat().st_mode & 0o777 for path in [folder, *folder.rglob("*")]}

    (log,) = [name for name in modes if name.endswith("access.jsonl")]
    assert {0o700} == {modes[name] for name in (".", "routes", "metering")}
    assert {0o600} == {
        modes[name]
        for name in ("admin.key", "keys.json", "gateway.lock", "routes/toy.json", "routes.json", "envoy.log", log)
    }


def test_no_key_is_written_to_a_file_or_the_log(
    gateway: GatewayServer, put: Put, v2: V2Server, admin: GatewayClient
) -> None:
    admin.put_key("secret", PUT_KEY)
    endpoint = put(route(v2.url, keys=("secret",)))
    endpoint.score(headers=bearer(PUT_KEY))
    endpoint.infer(headers=bearer(f"{PUT_KEY}-but-wrong"))
    texts = [path.read_text(errors="replace") for path in Path(gateway.folder).rglob("*") if path.is_file()]

    assert texts
    assert not [text for text in texts for key in (PUT_KEY, FIXED_KEY, gateway.admin_key) if key in text]


def test_an_invalid_body_of_an_admin_request_is_refused_with_the_reason(gateway: GatewayServer) -> None:
    def put(content: bytes) -> tuple[int, str]:
        url = f"{gateway.url}/admin/endpoints/any"
        return error(httpx.put(url, headers=bearer(gateway.admin_key), content=content))

    assert 400 == put(b"{")[0]
    assert (422, "versions: Field required") == (put(b"{}")[0], put(b"{}")[1].split("got ")[1].split(";")[0])
    assert 413 == put(b" " * (9 << 20))[0]
    assert 400 == error(httpx.put(f"{gateway.url}/admin/endpoints/A_B", headers=bearer(gateway.admin_key)))[0]
