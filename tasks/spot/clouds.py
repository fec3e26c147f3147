"""How AWS, GCP and Azure tell a machine that it is about to go."""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Self

import httpx
from pydantic import BaseModel, Field

from tasks.spot.metadata import seconds_until
from tasks.spot.notice import Notice

_TOKEN_SECONDS = 6 * 3600
_AWS_NOTICE_SECONDS = 120.0
_GCP_NOTICE_SECONDS = 30.0


class Aws:
    """A spot instance's interruption, and AWS's recommendation to leave before one; by IMDSv2 alone."""

    name = "AWS"
    every_seconds = 5.0  # the pace that AWS asks for

    def __init__(self, client: httpx.Client, token: str) -> None:
        self._client, self._token = client, token

    @classmethod
    def find(cls, client: httpx.Client) -> Self | None:
        """Return the source where the service hands out a token."""
        response = _ask_token(client)
        return cls(client, response.text) if response.status_code == HTTPStatus.OK and response.text else None

    def look(self) -> Notice | None:
        """Return the interruption that is announced, else the recommendation that stands."""
        response = self._get("/latest/meta-data/spot/instance-action")
        if response.status_code == HTTPStatus.OK:
            told = _InstanceAction.model_validate_json(response.content)
            # Hibernation begins as it is announced.
            left = 0.0 if told.action == "hibernate" else seconds_until(told.time, response)
            return Notice(source=self.name, action=told.action, seconds_left=left)
        if self._get("/latest/meta-data/events/recommendations/rebalance").status_code == HTTPStatus.OK:
            return Notice(
                source=self.name,
                action="rebalance recommendation",
                seconds_left=_AWS_NOTICE_SECONDS,
                certain=False,
            )
        return None

    def _get(self, path: str) -> httpx.Response:
        """Return what is there or that nothing is; a token that has run out is replaced, once."""
        response = self._client.get(path, headers={"X-aws-ec2-metadata-token": self._token})
        if response.status_code == HTTPStatus.UNAUTHORIZED:
            self._token = _ask_token(self._client).raise_for_status().text
            response = self._client.get(path, headers={"X-aws-ec2-metadata-token": self._token})
        return response if response.status_code == HTTPStatus.NOT_FOUND else response.raise_for_status()


def _ask_token(client: httpx.Client) -> httpx.Response:
    return client.put("/latest/api/token", headers={"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_SECONDS)})


class _InstanceAction(BaseModel, frozen=True):
    """What AWS says of an interruption; fields that it may add are passed over."""

    action: str = Field(description="terminate, stop or hibernate.")
    time: datetime = Field(description="When, in UTC.")


class Gcp:
    """A Spot VM's preemption.

    Announced maintenance is not read: it moves a machine to another host as it runs, or ends it like a preemption, and
    those with GPUs are told of it an hour before, in which they can score on.
    """

    name = "GCP"
    every_seconds = 1.0

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    @classmethod
    def find(cls, client: httpx.Client) -> Self | None:
        """Return the source where the service signs its answer as GCP's does."""
        response = _preempted(client)
        ours = response.status_code == HTTPStatus.OK and response.headers.get("metadata-flavor") == "Google"
        return cls(client) if ours else None

    def look(self) -> Notice | None:
        """Return the preemption, which says of no time but that it is 30 s from when it is announced."""
        if _preempted(self._client).raise_for_status().text.strip() != "TRUE":
            return None
        return Notice(source=self.name, action="preempt", seconds_left=_GCP_NOTICE_SECONDS)


def _preempted(client: httpx.Client) -> httpx.Response:
    return client.get("/computeMetadata/v1/instance/preempted", headers={"Metadata-Flavor": "Google"})


class Azure:
    """A VM's Scheduled Events: those that end it or its local disks, of all that its neighbours are told of too."""

    name = "Azure"
    every_seconds = 1.0

    def __init__(self, client: httpx.Client, machine: str) -> None:
        self._client, self._machine = client, machine

    @classmethod
    def find(cls, client: httpx.Client) -> Self | None:
        """Return the source where the service knows the name of this VM.

        Asking for the events themselves turns them on for the VM, which can take minutes the first time.
        """
        parameters = {"api-version": "2021-02-01", "format": "text"}
        response = client.get("/metadata/instance/compute/name", params=parameters, headers={"Metadata": "true"})
        found = response.status_code == HTTPStatus.OK and response.text
        return cls(client, response.text.strip()) if found else None

    def look(self) -> Notice | None:
        """Return the next event that takes this VM away."""
        response = self._client.get(
            "/metadata/scheduledevents", params={"api-version": "2020-07-01"}, headers={"Metadata": "true"}
        ).raise_for_status()
        notices = [
            Notice(source=self.name, action=event.type.lower(), seconds_left=event.seconds_left(response))
            for event in _Document.model_validate_json(response.content).events
            if event.type in _ENDING and self._machine in event.resources
        ]
        return min(notices, key=lambda notice: notice.seconds_left, default=None)


# A freeze lasts seconds, after which the machine goes on.
_ENDING = {"Preempt", "Terminate", "Reboot", "Redeploy"}


class _Event(BaseModel, frozen=True):
    """What Azure says of one event; fields that are not read here are passed over."""

    type: str = Field(alias="EventType", description="What is going to happen.")
    resources: tuple[str, ...] = Field(alias="Resources", description="The VMs that it happens to, by name.")
    not_before: str = Field(alias="NotBefore", description="An HTTP date; empty once it has started.")

    def seconds_left(self, response: httpx.Response) -> float:
        if not self.not_before:
            return 0.0
        when = parsedate_to_datetime(self.not_before)
        return seconds_until(when if when.tzinfo else when.replace(tzinfo=UTC), response)


class _Document(BaseModel, frozen=True):
    events: tuple[_Event, ...] = Field(alias="Events", description="Every event that stands.")


CLOUDS = (Aws, Gcp, Azure)
