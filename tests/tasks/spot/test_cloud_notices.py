"""The metadata service is found once, quickly, or not at all."""

from __future__ import annotations

import socket
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from tasks.spot.cloud_notices import (
    CLOUDS,
    METADATA_URL,
    Aws,
    Azure,
    Cloud,
    Gcp,
    detect_source,
    find_metadata_url,
    open_metadata,
    seconds_until,
)
from tasks.spot.drain import Notice, NoticeSource
from tests.metadata import AzureMetadata, GcpMetadata, Imds, Service


def found(url: str) -> str | None:
    with open_metadata(url) as client:
        source = detect_source(client, CLOUDS)
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


def test_a_port_where_nothing_listens_is_no_service_and_no_error(held_port: int) -> None:
    assert found(f"http://127.0.0.1:{held_port}") is None


def test_a_service_that_takes_connections_and_never_answers_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"

        assert found(url) is None


def test_no_proxy_is_asked_in_its_place(imds: Imds, monkeypatch: pytest.MonkeyPatch, held_port: int) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{held_port}")
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

    assert url == find_metadata_url()


def test_an_address_that_is_none_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"must be an http:// address or 'off', got '10\.0\.0\.1'"):
        open_metadata("10.0.0.1")


def test_time_left_is_measured_by_the_clock_of_the_server_that_answered() -> None:
    when = datetime(2026, 3, 1, 12, 0, 30, tzinfo=UTC)
    told = httpx.Response(200, headers={"date": "Sun, 01 Mar 2026 12:00:00 GMT"})

    assert 30.0 == seconds_until(when, told)
    assert 0.0 == seconds_until(when - timedelta(hours=1), told)
    assert 0 < seconds_until(datetime.now(UTC) + timedelta(hours=1), httpx.Response(200)) <= 3600


ACTION = "/latest/meta-data/spot/instance-action"
TOKEN = "/latest/api/token"  # noqa: S105 - a path


@contextmanager
def source(cloud: Cloud, service: Service) -> Generator[NoticeSource]:
    """The source of a service whose clock stands still, in the year 2033."""
    service.clock = lambda: 2e9
    with open_metadata(service.url) as client:
        found = cloud.detect(client)
        assert found is not None
        yield found


def test_aws_announces_an_interruption_with_its_time_by_its_own_clock_until_it_is_withdrawn(imds: Imds) -> None:
    with source(Aws, imds) as aws:
        assert aws.read_notice() is None
        imds.interrupt("terminate", 120)
        notice = aws.read_notice()
        imds.action = None

        assert Notice(source="AWS", action="terminate", seconds_left=120) == notice
        assert aws.read_notice() is None


def test_aws_hands_out_one_token_that_is_used_until_it_runs_out(imds: Imds) -> None:
    with source(Aws, imds) as aws:
        aws.read_notice()
        imds.interrupt("stop", 90)
        assert aws.read_notice() is not None
        assert 1 == imds.answers(TOKEN)
        imds.tokens.clear()
        notice = aws.read_notice()

        assert notice is not None
        assert "stop" == notice.action
        assert (2, 1) == (imds.answers(TOKEN), imds.answers(ACTION, 401))


def test_aws_fails_and_does_not_withdraw_where_no_new_token_is_to_be_had(imds: Imds) -> None:
    with source(Aws, imds) as aws:
        imds.failing = True

        with pytest.raises(httpx.HTTPStatusError):
            aws.read_notice()


def test_aws_recommends_a_rebalance_before_an_interruption_is_certain(imds: Imds) -> None:
    with source(Aws, imds) as aws:
        imds.rebalance = True
        assert (
            Notice(source="AWS", action="rebalance recommendation", seconds_left=120, certain=False)
            == aws.read_notice()
        )
        imds.interrupt("terminate", 120)
        notice = aws.read_notice()

        assert notice is not None
        assert ("terminate", True) == (notice.action, notice.certain)


def test_aws_hibernates_at_once(imds: Imds) -> None:
    with source(Aws, imds) as aws:
        imds.interrupt("hibernate", 120)

        assert Notice(source="AWS", action="hibernate", seconds_left=0) == aws.read_notice()


def test_an_answer_that_is_no_notice_is_an_error_and_not_a_withdrawal(imds: Imds) -> None:
    with source(Aws, imds) as aws:
        imds.action = {"action": "terminate", "time": "soon"}

        with pytest.raises(ValueError, match="time"):
            aws.read_notice()


def test_gcp_announces_a_preemption_thirty_seconds_before(gcp: GcpMetadata) -> None:
    with source(Gcp, gcp) as preemption:
        assert preemption.read_notice() is None
        gcp.preempted = True

        assert Notice(source="GCP", action="preempt", seconds_left=30) == preemption.read_notice()


def test_a_server_that_answers_like_gcp_without_its_signature_is_not_it(
    gcp: GcpMetadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GcpMetadata, "signature", {})
    with open_metadata(gcp.url) as client:
        assert Gcp.detect(client) is None


def test_azure_announces_the_next_event_that_takes_this_vm(azure: AzureMetadata) -> None:
    with source(Azure, azure) as events:
        assert events.read_notice() is None
        azure.announce("Freeze", 5)
        azure.announce("Preempt", 10, machine="scorer_4")
        assert events.read_notice() is None
        azure.announce("Reboot", 900)
        azure.announce("Preempt", 30)

        assert Notice(source="Azure", action="preempt", seconds_left=30) == events.read_notice()


def test_azure_leaves_no_time_once_an_event_has_started_and_forgets_one_that_is_called_off(
    azure: AzureMetadata,
) -> None:
    with source(Azure, azure) as events:
        azure.announce("Preempt", None)
        assert Notice(source="Azure", action="preempt", seconds_left=0) == events.read_notice()
        azure.events.clear()

        assert events.read_notice() is None
