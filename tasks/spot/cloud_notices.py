"""Interruption notices of AWS, GCP and Azure, read from the metadata service of the machine.

OVERNIGHT_METADATA_URL is the address of the service where it is not the one that all three clouds use; `off` for none.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Protocol, Self

import httpx
from pydantic import BaseModel, Field

from tasks.spot.drain import Notice, NoticeSource

METADATA_URL = "OVERNIGHT_METADATA_URL"
_LINK_LOCAL = "http://169.254.169.254"
# A service answers within milliseconds; where there is none, this is all that finding out costs.
_TIMEOUT_SECONDS = 0.5
_TOKEN_SECONDS = 6 * 3600
_AWS_NOTICE_SECONDS = 120.0
_GCP_NOTICE_SECONDS = 30.0


class Cloud(Protocol):
    """A kind of metadata service."""

    def detect(self, client: httpx.Client) -> NoticeSource | None:
        """Return the source of notices where the client's service is of this kind, else None."""
        ...


def find_metadata_url() -> str | None:
    """Return the address of the metadata service, None where none is to be asked."""
    url = os.environ.get(METADATA_URL, _LINK_LOCAL).strip()
    return None if url.lower() in {"", "off"} else url


def open_metadata(url: str) -> httpx.Client:
    """Return a client for a metadata service; it uses no proxy, which would answer for another machine.

    Raises ValueError for an address that is not one of HTTP.
    """
    if not url.startswith(("http://", "https://")):
        message = f"{METADATA_URL} must be an http:// address or 'off', got {url!r}. No notices are read."
        raise ValueError(message)
    return httpx.Client(base_url=url, timeout=_TIMEOUT_SECONDS, trust_env=False)


def detect_source(client: httpx.Client, clouds: Sequence[Cloud]) -> NoticeSource | None:
    """Ask once for each cloud, all at the same time, and return the first that answers as it should.

    None, without an error, where none does: most machines are in no cloud.
    """
    found: list[NoticeSource | None] = [None] * len(clouds)

    def ask(index: int) -> None:
        try:
            found[index] = clouds[index].detect(client)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError):
            return

    # Daemons, so that the end of the process waits for none of them.
    threads = [threading.Thread(target=ask, args=(index,), daemon=True) for index in range(len(clouds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return next((source for source in found if source is not None), None)


class Aws:
    """A spot instance's interruption notice and rebalance recommendation, by IMDSv2 only."""

    name = "AWS"
    poll_seconds = 5.0  # the interval that AWS asks for

    def __init__(self, client: httpx.Client, token: str) -> None:
        self._client, self._token = client, token

    @classmethod
    def detect(cls, client: httpx.Client) -> Self | None:
        """Return the source where the service hands out a token."""
        response = _request_token(client)
        return cls(client, response.text) if response.status_code == HTTPStatus.OK and response.text else None

    def read_notice(self) -> Notice | None:
        """Return the interruption that is announced, else the current recommendation."""
        response = self._get("/latest/meta-data/spot/instance-action")
        if response.status_code == HTTPStatus.OK:
            announced = _InstanceAction.model_validate_json(response.content)
            # Hibernation begins as it is announced.
            left = 0.0 if announced.action == "hibernate" else seconds_until(announced.time, response)
            return Notice(source=self.name, action=announced.action, seconds_left=left)
        if self._get("/latest/meta-data/events/recommendations/rebalance").status_code == HTTPStatus.OK:
            return Notice(
                source=self.name,
                action="rebalance recommendation",
                seconds_left=_AWS_NOTICE_SECONDS,
                certain=False,
            )
        return None

    def _get(self, path: str) -> httpx.Response:
        """Return the answer, which may be 404; a token that has expired is replaced, once."""
        response = self._client.get(path, headers={"X-aws-ec2-metadata-token": self._token})
        if response.status_code == HTTPStatus.UNAUTHORIZED:
            self._token = _request_token(self._client).raise_for_status().text
            response = self._client.get(path, headers={"X-aws-ec2-metadata-token": self._token})
        return response if response.status_code == HTTPStatus.NOT_FOUND else response.raise_for_status()


def _request_token(client: httpx.Client) -> httpx.Response:
    return client.put("/latest/api/token", headers={"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_SECONDS)})


class _InstanceAction(BaseModel, frozen=True):
    """AWS's announcement of an interruption; fields that it may add are ignored."""

    action: str = Field(description="terminate, stop or hibernate.")
    time: datetime = Field(description="When, in UTC.")


class Gcp:
    """A Spot VM's preemption.

    Announced maintenance is not read: it moves a machine to another host while it runs, or ends it like a preemption.
    Machines with GPUs learn of it an hour before, in which they can go on scoring.
    """

    name = "GCP"
    poll_seconds = 1.0

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    @classmethod
    def detect(cls, client: httpx.Client) -> Self | None:
        """Return the source where the service signs its answer as GCP's does."""
        response = _get_preempted(client)
        is_gcp = response.status_code == HTTPStatus.OK and response.headers.get("metadata-flavor") == "Google"
        return cls(client) if is_gcp else None

    def read_notice(self) -> Notice | None:
        """Return the preemption; it carries no time, and comes 30 s after its announcement."""
        if _get_preempted(self._client).raise_for_status().text.strip() != "TRUE":
            return None
        return Notice(source=self.name, action="preempt", seconds_left=_GCP_NOTICE_SECONDS)


def _get_preempted(client: httpx.Client) -> httpx.Response:
    return client.get("/computeMetadata/v1/instance/preempted", headers={"Metadata-Flavor": "Google"})


class Azure:
    """A VM's Scheduled Events that end it or its local disks; the service lists those of its neighbours too."""

    name = "Azure"
    poll_seconds = 1.0

    def __init__(self, client: httpx.Client, machine: str) -> None:
        self._client, self._machine = client, machine

    @classmethod
    def detect(cls, client: httpx.Client) -> Self | None:
        """Return the source where the service knows the name of this VM.

        The events themselves are not asked for: that enables them for the VM, which takes minutes the first time.
        """
        parameters = {"api-version": "2021-02-01", "format": "text"}
        response = client.get("/metadata/instance/compute/name", params=parameters, headers={"Metadata": "true"})
        found = response.status_code == HTTPStatus.OK and response.text
        return cls(client, response.text.strip()) if found else None

    def read_notice(self) -> Notice | None:
        """Return the next event that takes this VM away."""
        response = self._client.get(
            "/metadata/scheduledevents", params={"api-version": "2020-07-01"}, headers={"Metadata": "true"}
        ).raise_for_status()
        notices = [
            Notice(source=self.name, action=event.type.lower(), seconds_left=event.seconds_left(response))
            for event in _ScheduledEvents.model_validate_json(response.content).events
            if event.type in _ENDING_EVENTS and self._machine in event.resources
        ]
        return min(notices, key=lambda notice: notice.seconds_left, default=None)


# A freeze lasts seconds, after which the machine goes on.
_ENDING_EVENTS = {"Preempt", "Terminate", "Reboot", "Redeploy"}


class _ScheduledEvent(BaseModel, frozen=True):
    """One event of Azure; fields that are not read here are ignored."""

    type: str = Field(alias="EventType", description="What is going to happen.")
    resources: tuple[str, ...] = Field(alias="Resources", description="The names of the VMs that it happens to.")
    not_before: str = Field(alias="NotBefore", description="An HTTP date; empty once it has started.")

    def seconds_left(self, response: httpx.Response) -> float:
        if not self.not_before:
            return 0.0
        when = parsedate_to_datetime(self.not_before)
        return seconds_until(when if when.tzinfo else when.replace(tzinfo=UTC), response)


class _ScheduledEvents(BaseModel, frozen=True):
    events: tuple[_ScheduledEvent, ...] = Field(alias="Events", description="Every current event.")


CLOUDS = (Aws, Gcp, Azure)


def seconds_until(when: datetime, response: httpx.Response) -> float:
    """Return the seconds until then, 0 where it is past, by the clock of the server that answered.

    This machine's own clock may be off by more than a notice is long.
    """
    date = response.headers.get("date")
    now = parsedate_to_datetime(date) if date else datetime.now(UTC)
    return max(0.0, (when - now).total_seconds())
