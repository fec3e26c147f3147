"""A change where the servers fail; tests/flows/test_endpoint.py has those where they work."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from serving.errors import EndpointFailed
from serving.gateway.route import EndpointState, Route
from serving.targets import Address
from tasks.endpoint.change import Change
from tasks.endpoint.deploy import make_release_to_remove
from tests.serving.toys import matrix
from tests.tasks.endpoint.values import route, served, spec

CURRENT = route(served("1"), served("2", 100))


class Busy:
    """A gateway with requests that never end."""

    def __init__(self) -> None:
        self.route = CURRENT
        self.seen: list[tuple[str, ...]] = []

    def get(self, _name: str) -> EndpointState:
        return EndpointState(route=self.route, in_flight={"1": 1}, waiting=0, models="awake")

    def put(self, _name: str, put: Route) -> None:
        self.route = put
        self.seen.append(tuple(each.version for each in put.versions))

    def wait_until_idle(self, *_arguments: Any, **_options: Any) -> None:
        message = "must become idle"
        raise EndpointFailed(message)


def test_a_version_whose_requests_never_end_is_logged_and_left_to_the_next_call(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gateway: Any = Busy()
    logger = logging.Logger("change")  # noqa: LOG001 - MLflow silences all that there were when it migrates
    logger.addHandler(caplog.handler)
    change = Change(
        spec=spec(),
        gateway=gateway,
        release=make_release_to_remove("churn", "2", matrix(4)),
        models=(Path("model"),),
        current_route=None,
        previous_release=None,
        logger=logger,
    )

    assert () == change.remove_idle_versions(Address(url="http://127.0.0.1:1", model="churn", version="2"))
    assert [("2",), ("1", "2")] == gateway.seen
    assert CURRENT == gateway.route
    assert "Version 1 must have no requests any more, got: must become idle" in caplog.text
