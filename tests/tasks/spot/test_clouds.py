"""Each cloud's protocol, spoken with a real HTTP server."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import httpx
import pytest

from tasks.spot.clouds import Aws, Azure, Gcp
from tasks.spot.metadata import Cloud, open_metadata
from tasks.spot.notice import Notice, NoticeSource
from tests.metadata import AzureMetadata, GcpMetadata, Imds, Service

ACTION = "/latest/meta-data/spot/instance-action"
TOKEN = "/latest/api/token"  # noqa: S105 - a path


@contextmanager
def source(cloud: Cloud, service: Service) -> Generator[NoticeSource]:
    with open_metadata(service.url) as client:
        found = cloud.find(client)
        assert found is not None
        yield found


def test_aws_tells_of_an_interruption_and_its_time_until_it_is_withdrawn(imds: Imds) -> None:
    with source(Aws, imds) as aws:
        assert aws.look() is None
        imds.interrupt("terminate", 120)
        notice = aws.look()
        imds.action = None

        assert notice is not None
        assert ("AWS", "terminate", True) == (notice.source, notice.action, notice.certain)
        # Times are told in whole seconds.
        assert 110 < notice.seconds_left <= 121
        assert aws.look() is None


def test_aws_hands_out_one_token_that_is_used_until_it_runs_out(imds: Imds) -> None:
    with source(Aws, imds) as aws:
        aws.look()
        imds.interrupt("stop", 90)
        assert aws.look() is not None
        assert 1 == imds.answers(TOKEN)
        imds.tokens.clear()
        notice = aws.look()

        assert notice is not None
        assert "stop" == notice.action
        assert (2, 1) == (imds.answers(TOKEN), imds.answers(ACTION, 401))


def test_aws_fails_and_does_not_withdraw_where_no_new_token_is_to_be_had(imds: Imds) -> None:
    with source(Aws, imds) as aws:
        imds.failing = True

        with pytest.raises(httpx.HTTPStatusError):
            aws.look()


def test_aws_recommends_to_leave_before_an_interruption_is_certain(imds: Imds) -> None:
    with source(Aws, imds) as aws:
        imds.rebalance = True
        assert Notice(source="AWS", action="rebalance recommendation", seconds_left=120, certain=False) == aws.look()
        imds.interrupt("terminate", 120)
        notice = aws.look()

        assert notice is not None
        assert ("terminate", True) == (notice.action, notice.certain)


def test_aws_hibernates_at_once(imds: Imds) -> None:
    with source(Aws, imds) as aws:
        imds.interrupt("hibernate", 120)

        assert Notice(source="AWS", action="hibernate", seconds_left=0) == aws.look()


@pytest.mark.parametrize("clock_off", [-400.0, 400.0])
def test_a_machine_whose_clock_is_off_reads_the_right_time_left(imds: Imds, clock_off: float) -> None:
    imds.clock_off = clock_off
    with source(Aws, imds) as aws:
        imds.interrupt("terminate", 120)
        notice = aws.look()

        assert notice is not None
        assert 110 < notice.seconds_left <= 121


def test_an_answer_that_is_no_notice_is_an_error_and_not_a_withdrawal(imds: Imds) -> None:
    with source(Aws, imds) as aws:
        imds.action = {"action": "terminate", "time": "soon"}

        with pytest.raises(ValueError, match="time"):
            aws.look()


def test_gcp_tells_of_a_preemption_thirty_seconds_before(gcp: GcpMetadata) -> None:
    with source(Gcp, gcp) as preemption:
        assert preemption.look() is None
        gcp.preempted = True

        assert Notice(source="GCP", action="preempt", seconds_left=30) == preemption.look()


def test_a_server_that_answers_like_gcp_without_its_signature_is_not_it(
    gcp: GcpMetadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GcpMetadata, "signature", {})
    with open_metadata(gcp.url) as client:
        assert Gcp.find(client) is None


def test_azure_tells_of_the_next_event_that_takes_this_vm(azure: AzureMetadata) -> None:
    with source(Azure, azure) as events:
        assert events.look() is None
        azure.announce("Freeze", 5)
        azure.announce("Preempt", 10, machine="scorer_4")
        assert events.look() is None
        azure.announce("Reboot", 900)
        azure.announce("Preempt", 30)
        notice = events.look()

        assert notice is not None
        assert ("Azure", "preempt") == (notice.source, notice.action)
        assert 20 < notice.seconds_left <= 31


def test_azure_leaves_no_time_once_an_event_has_started_and_forgets_one_that_is_called_off(
    azure: AzureMetadata,
) -> None:
    with source(Azure, azure) as events:
        azure.announce("Preempt", None)
        assert Notice(source="Azure", action="preempt", seconds_left=0) == events.look()
        azure.events.clear()

        assert events.look() is None
