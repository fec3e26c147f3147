"""A change where the servers fail; tests/flows/test_endpoint.py has those where they work."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serving.errors import EndpointFailed, VerifyFailed
from serving.gateway.route import EndpointState, Route
from serving.targets import Address
from tasks.endpoint import change as change_module
from tasks.endpoint.change import Change
from tasks.endpoint.deploy import make_release_to_remove
from tasks.endpoint.traffic import dump_spec
from tests.serving.toys import matrix
from tests.tasks.endpoint.values import route, served, spec

CURRENT = route(served("1"), served("2", 100))


class Busy:
    """A gateway with requests that never end."""

    def __init__(self, first: Route | None = CURRENT) -> None:
        self.route = first
        self.seen: list[tuple[str, ...]] = []

    def get(self, _name: str) -> EndpointState | None:
        return self.route and EndpointState(route=self.route, in_flight={"1": 1}, waiting=0, models="awake")

    def put(self, _name: str, put: Route) -> None:
        self.route = put
        self.seen.append(tuple(each.version for each in put.versions))

    def delete(self, _name: str) -> None:
        self.route = None

    def wait_until_idle(self, *_arguments: Any, **_options: Any) -> None:
        message = "must become idle"
        raise EndpointFailed(message)


def change_at(gateway: Any, caplog: pytest.LogCaptureFixture, version: str = "2", **given: Any) -> Change:
    """A change to a version, which logs where the test reads."""
    logger = logging.Logger("change")  # noqa: LOG001 - MLflow silences all that there were when it migrates
    logger.addHandler(caplog.handler)
    fields = {"spec": spec(), "models": (Path("model"),), "current_route": None, "previous_release": None} | given
    release = make_release_to_remove("churn", version, matrix(4))
    return Change(gateway=gateway, release=release, logger=logger, **fields)


def test_a_version_whose_requests_never_end_is_logged_and_left_to_the_next_call(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gateway: Any = Busy()
    change = change_at(gateway, caplog)

    assert () == change.remove_idle_versions(Address(url="http://127.0.0.1:1", model="churn", version="2"))
    assert [("2",), ("1", "2")] == gateway.seen
    assert CURRENT == gateway.route
    assert "Version 1 must have no requests any more, got: must become idle" in caplog.text


OWN, OTHER = dump_spec(spec()), {"model": "models:/churn/9"}
FIRST, ANOTHER = route(served("1", 100)), route(served("3", 100), spec=OTHER)


@pytest.mark.parametrize(
    ("before", "found", "stays", "taken_down", "outcome"),
    [
        pytest.param(FIRST, route(served("2", 100), spec=OWN), False, ["2"], "version 1 serves on", id="its own route"),
        pytest.param(FIRST, FIRST, True, ["2"], "version 1 serves on", id="the route of before"),
        pytest.param(
            None, route(served("2", 100), spec=OWN), False, ["2"], "nothing serves now", id="the first route, its own"
        ),
        pytest.param(None, None, True, ["2"], "nothing serves now", id="no route yet"),
        pytest.param(None, ANOTHER, True, ["2"], "version 3 serves on", id="another call was first"),
        pytest.param(FIRST, ANOTHER, True, ["2"], "version 3 serves on", id="another call's"),
        pytest.param(
            FIRST, route(served("2", 100), spec=OTHER), True, [], "Version 2 serves on", id="another call's, of it"
        ),
        pytest.param(FIRST, None, True, ["2"], "nothing serves now", id="retired meanwhile"),
    ],
)
def test_an_undo_restores_its_own_route_alone_and_takes_down_what_no_route_has(
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    before: Route | None,
    found: Route | None,
    stays: bool,  # noqa: FBT001 - a column of the table
    taken_down: list[str],
    outcome: str,
) -> None:
    removed: list[str] = []
    host = SimpleNamespace(remove=lambda release: removed.append(release.version))
    monkeypatch.setattr(change_module, "make_host", lambda _target: host)
    monkeypatch.setattr(change_module, "wait_until_idle", lambda *_given: None)
    gateway: Any = Busy(found)
    change = change_at(gateway, caplog, current_route=before)
    with pytest.raises(VerifyFailed, match=rf"{outcome}\.$"), change.undo_on_failure():
        raise VerifyFailed

    assert (found if stays else before) == gateway.route
    assert taken_down == removed
    replaced = stays and found != before
    assert replaced == ("Another call has changed the route of churn, which stays." in caplog.text)
