"""The metadata service is found once, quickly, or not at all."""

from __future__ import annotations

import socket
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from infra.local.ports import free_ports
from tasks.spot.clouds import CLOUDS
from tasks.spot.metadata import METADATA_URL, find_source, metadata_url, open_metadata, seconds_until
from tests.metadata import AzureMetadata, GcpMetadata, Imds, Service


def found(url: str) -> str | None:
    with open_metadata(url) as client:
        source = find_source(client, CLOUDS)
    return source.name if source else None


def test_each_cloud_is_known_by_what_only_its_own_service_answers(
    imds: Imds, gcp: GcpMetadata, azure: AzureMetadata
) -> None:
    assert ("AWS", "GCP", "Azure") == (found(imds.url), found(gcp.url), found(azure.url))


def test_each_question_is_put_once(imds: Imds) -> None:
    found(imds.url)

    assert [
        ("/computeMetadata/v1/instance/preempted", 401),
        ("/latest/api/token", 200),
        ("/metadata/instance/compute/name", 401),
    ] == sorted(imds.asked)


def test_a_server_of_another_kind_is_none(imds: Imds) -> None:
    class Other(Service):
        pass

    imds.failing = True

    assert found(imds.url) is None


def test_a_port_where_nothing_listens_is_no_service_and_no_error() -> None:
    (port,) = free_ports(1)

    assert found(f"http://127.0.0.1:{port}") is None


def test_a_service_that_takes_connections_and_never_answers_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"

        assert found(url) is None


def test_no_proxy_is_asked_in_its_place(imds: Imds, monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)

    assert "AWS" == found(imds.url)


@pytest.mark.parametrize(
    ("told", "url"),
    [(None, "http://169.254.169.254"), ("off", None), ("OFF", None), ("", None), ("http://[::1]:8", "http://[::1]:8")],
)
def test_the_environment_names_the_service_or_turns_it_off(
    told: str | None, url: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(METADATA_URL)
    if told is not None:
        monkeypatch.setenv(METADATA_URL, told)

    assert url == metadata_url()


def test_an_address_that_is_none_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"must be an http:// address or 'off', got '10\.0\.0\.1'"):
        open_metadata("10.0.0.1")


def test_a_time_is_told_by_the_clock_of_the_server_that_told_it() -> None:
    when = datetime(2026, 3, 1, 12, 0, 30, tzinfo=UTC)
    told = httpx.Response(200, headers={"date": "Sun, 01 Mar 2026 12:00:00 GMT"})

    assert 30.0 == seconds_until(when, told)
    assert 0.0 == seconds_until(when - timedelta(hours=1), told)
    assert 90 < seconds_until(datetime.now(UTC) + timedelta(seconds=100), httpx.Response(200)) <= 100
