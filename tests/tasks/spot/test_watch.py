"""The watch tells the drain what the cloud announces."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Generator

import pytest

from infra.local.ports import free_ports
from tasks.spot.clouds import CLOUDS, Aws
from tasks.spot.drain import Drain
from tasks.spot.metadata import METADATA_URL, find_source, open_metadata
from tasks.spot.notice import Notice
from tasks.spot.watch import Ear, Wanted, presses, watching
from tests.metadata import AzureMetadata, GcpMetadata, Imds, Service


def until(true: Callable[[], bool]) -> None:
    stop = time.monotonic() + 60
    while not true():
        assert time.monotonic() < stop
        time.sleep(0.01)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def ear(said: list[str]) -> Generator[Callable[[Service, Drain, Wanted], Ear]]:
    clients = []

    def make(service: Service, drain: Drain, wanted: Wanted = "interruption") -> Ear:
        client = open_metadata(service.url)
        clients.append(client)
        source = find_source(client, CLOUDS)
        assert source is not None
        return Ear(source, drain, wanted, said.append)

    yield make
    for client in clients:
        client.close()


@pytest.mark.parametrize(
    ("left", "certain", "wanted", "expected"),
    [
        (120, True, "interruption", True),
        (121, True, "interruption", False),
        (120, False, "interruption", False),
        (120, False, "rebalance", True),
        (0, True, "rebalance", True),
    ],
)
def test_a_notice_presses_when_it_is_near_and_certain_or_forecasts_are_wanted(
    left: float, *, certain: bool, wanted: Wanted, expected: bool
) -> None:
    assert expected == presses(Notice(source="AWS", action="a", seconds_left=left, certain=certain), wanted)


def test_a_notice_is_heard_and_said_once_and_its_withdrawal_too(
    imds: Imds, ear: Callable[..., Ear], said: list[str]
) -> None:
    drain = Drain()
    aws = ear(imds, drain)
    aws.listen()
    assert drain.notice is None
    imds.interrupt("terminate", 60)
    aws.listen()
    aws.listen()
    assert drain.notice is not None
    imds.action = None
    aws.listen()
    aws.listen()

    assert drain.notice is None
    assert 2 == len(said), said
    assert said[0].startswith("AWS is going to terminate this machine in ")
    assert said[0].endswith(" s: chunks in hand are finished where they fit, and nothing new is begun.")
    assert "AWS has withdrawn its notice." == said[1]


def test_what_was_heard_holds_while_the_service_fails(imds: Imds, ear: Callable[..., Ear], said: list[str]) -> None:
    drain = Drain()
    aws = ear(imds, drain)
    imds.interrupt("terminate", 60)
    aws.listen()
    imds.failing = True
    aws.listen()

    assert drain.notice is not None
    assert 1 == len(said)


def test_a_rebalance_recommendation_ends_nothing_unless_it_is_wanted(
    imds: Imds, ear: Callable[..., Ear], said: list[str]
) -> None:
    imds.rebalance = True
    heedless, wanting = Drain(), Drain()
    ear(imds, heedless).listen()
    ear(imds, wanting, "rebalance").listen()

    assert heedless.notice is None
    assert wanting.notice is not None
    assert said[0] == (
        "AWS sees this machine at risk (rebalance recommendation): work goes on for now; each finished chunk stays."
    )


def test_an_event_far_away_presses_once_it_is_near(
    azure: AzureMetadata, ear: Callable[..., Ear], said: list[str]
) -> None:
    drain = Drain()
    events = ear(azure, drain)
    azure.announce("Reboot", 900)
    events.listen()
    assert drain.notice is None
    azure.events.clear()
    azure.announce("Reboot", 100)
    events.listen()

    assert drain.notice is not None
    assert ["work goes on for now", "chunks in hand are finished"] == [
        words
        for line, words in zip(said, ("work goes on for now", "chunks in hand are finished"), strict=True)
        if words in line
    ]


def test_the_end_of_a_preemption_is_counted_from_when_it_was_first_seen(
    gcp: GcpMetadata, ear: Callable[..., Ear]
) -> None:
    now = 0.0
    drain = Drain(lambda: now)
    preemption = ear(gcp, drain)
    gcp.preempted = True
    preemption.listen()
    now = 20.0
    preemption.listen()

    assert 10.0 == drain.seconds_left


def test_the_thread_polls_until_the_block_ends(imds: Imds, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(METADATA_URL, imds.url)
    monkeypatch.setattr(Aws, "every_seconds", 0.02)
    drain = Drain()
    with watching(drain, "interruption", said.append):
        until(lambda: imds.answers("/latest/meta-data/spot/instance-action", 404) > 1)
        imds.interrupt("terminate", 60)
        until(lambda: drain.notice is not None)
        imds.action = None
        until(lambda: drain.notice is None)
    until(lambda: "notices" not in {thread.name for thread in threading.enumerate()})

    assert 2 == len(said)


@pytest.mark.parametrize("kind", ["closed", "silent", "off", "none wanted"])
def test_a_machine_without_a_service_costs_a_thread_for_a_moment_and_no_word(
    kind: str, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (port,) = free_ports(1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = silent.getsockname()[1] if kind == "silent" else port
        monkeypatch.setenv(METADATA_URL, "off" if kind == "off" else f"http://127.0.0.1:{address}")
        drain = Drain()
        with watching(drain, "none" if kind == "none wanted" else "interruption", said.append):
            until(lambda: "notices" not in {thread.name for thread in threading.enumerate()})

    assert drain.notice is None
    assert [] == said


def test_an_address_that_is_none_is_said(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(METADATA_URL, "metadata.local")
    with watching(Drain(), "interruption", said.append):
        until(lambda: said != [])

    assert said == [
        "OVERNIGHT_METADATA_URL must be an http:// address or 'off', got 'metadata.local'. No notices are read."
    ]
