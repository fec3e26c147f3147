"""The watch tells the drain what the cloud announces."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Generator

import pytest

from tasks.spot.cloud_notices import CLOUDS, METADATA_URL, Aws, detect_source, open_metadata
from tasks.spot.drain import Drain, Notice
from tasks.spot.notice_poller import NoticeLevel, NoticePoller, poll_notices, requires_drain
from tests.eventually import eventually
from tests.metadata import AzureMetadata, GcpMetadata, Imds, Service


@pytest.fixture
def logged() -> list[str]:
    return []


@pytest.fixture
def make_poller(logged: list[str]) -> Generator[Callable[[Service, Drain, NoticeLevel], NoticePoller]]:
    clients = []

    def make(service: Service, drain: Drain, level: NoticeLevel = "interruption") -> NoticePoller:
        client = open_metadata(service.url)
        clients.append(client)
        source = detect_source(client, CLOUDS)
        assert source is not None
        return NoticePoller(source, drain, level, logged.append)

    yield make
    for client in clients:
        client.close()


@pytest.mark.parametrize(
    ("left", "certain", "level", "expected"),
    [
        (120, True, "interruption", True),
        (121, True, "interruption", False),
        (120, False, "interruption", False),
        (120, False, "rebalance", True),
        (0, True, "rebalance", True),
    ],
)
def test_a_notice_requires_a_drain_once_it_is_near_and_certain_or_forecasts_count(
    left: float, *, certain: bool, level: NoticeLevel, expected: bool
) -> None:
    assert expected == requires_drain(Notice(source="AWS", action="a", seconds_left=left, certain=certain), level)


def test_a_notice_and_its_withdrawal_are_logged_once(
    imds: Imds, make_poller: Callable[..., NoticePoller], logged: list[str]
) -> None:
    drain = Drain()
    aws = make_poller(imds, drain)
    aws.poll()
    assert drain.notice is None
    imds.interrupt("terminate", 60)
    aws.poll()
    aws.poll()
    assert drain.notice is not None
    imds.action = None
    aws.poll()
    aws.poll()

    assert drain.notice is None
    assert 2 == len(logged), logged
    assert logged[0].startswith("AWS is going to terminate this machine in ")
    assert logged[0].endswith(" s: chunks in progress are finished where they fit, and no other is begun.")
    assert "AWS has withdrawn its notice." == logged[1]


def test_the_last_answer_holds_while_the_service_fails(
    imds: Imds, make_poller: Callable[..., NoticePoller], logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drain = Drain()
    aws = make_poller(imds, drain)
    imds.interrupt("terminate", 60)
    aws.poll()
    imds.failing = True
    aws.poll()
    assert 1 == len(logged)

    def answer_oddly(_: Aws) -> Notice:
        message = "no such key"
        raise KeyError(message)

    monkeypatch.setattr(Aws, "read_notice", answer_oddly)
    aws.poll()
    assert "KeyError('no such key')" in logged[-1]
    assert drain.notice is not None


def test_a_rebalance_recommendation_starts_no_drain_unless_forecasts_count(
    imds: Imds, make_poller: Callable[..., NoticePoller], logged: list[str]
) -> None:
    imds.rebalance = True
    unforecast, forecast = Drain(), Drain()
    make_poller(imds, unforecast).poll()
    make_poller(imds, forecast, "rebalance").poll()

    assert unforecast.notice is None
    assert forecast.notice is not None
    assert logged[0] == (
        "AWS sees this machine at risk (rebalance recommendation): work goes on for now; each finished chunk is kept."
    )


def test_an_event_far_away_starts_a_drain_once_it_is_near(
    azure: AzureMetadata, make_poller: Callable[..., NoticePoller], logged: list[str]
) -> None:
    drain = Drain()
    events = make_poller(azure, drain)
    azure.announce("Reboot", 900)
    events.poll()
    assert drain.notice is None
    azure.events.clear()
    azure.announce("Reboot", 100)
    events.poll()

    assert drain.notice is not None
    assert ["work goes on for now", "chunks in progress are finished"] == [
        words
        for line, words in zip(logged, ("work goes on for now", "chunks in progress are finished"), strict=True)
        if words in line
    ]


def test_the_end_of_a_preemption_is_counted_from_when_it_was_first_read(
    gcp: GcpMetadata, make_poller: Callable[..., NoticePoller]
) -> None:
    now = 0.0
    drain = Drain(lambda: now)
    preemption = make_poller(gcp, drain)
    gcp.preempted = True
    preemption.poll()
    now = 20.0
    preemption.poll()

    assert 10.0 == drain.seconds_left


def test_the_thread_polls_until_the_block_ends(imds: Imds, logged: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(METADATA_URL, imds.url)
    monkeypatch.setattr(Aws, "poll_seconds", 0.02)
    drain = Drain()
    with poll_notices(drain, "interruption", logged.append):
        eventually(lambda: imds.answers("/latest/meta-data/spot/instance-action", 404) > 1)
        imds.interrupt("terminate", 60)
        eventually(lambda: drain.notice is not None)
        imds.action = None
        eventually(lambda: drain.notice is None)
    eventually(lambda: "notices" not in {thread.name for thread in threading.enumerate()})

    assert 2 == len(logged)


@pytest.mark.parametrize("kind", ["closed", "silent", "off", "none"])
def test_a_machine_without_a_service_costs_a_thread_for_a_moment_and_logs_nothing(
    kind: str, logged: list[str], monkeypatch: pytest.MonkeyPatch, held_port: int
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = silent.getsockname()[1] if kind == "silent" else held_port
        monkeypatch.setenv(METADATA_URL, "off" if kind == "off" else f"http://127.0.0.1:{address}")
        drain = Drain()
        with poll_notices(drain, "none" if kind == "none" else "interruption", logged.append):
            eventually(lambda: "notices" not in {thread.name for thread in threading.enumerate()})

    assert drain.notice is None
    assert [] == logged


def test_an_address_that_is_none_is_logged(logged: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(METADATA_URL, "metadata.local")
    with poll_notices(Drain(), "interruption", logged.append):
        eventually(lambda: logged != [])

    assert logged == [
        "OVERNIGHT_METADATA_URL must be an http:// address or 'off', got 'metadata.local'. No notices are read."
    ]
