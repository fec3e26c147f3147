"""Canaries through a real gateway: promoted or rolled back by rule, and no client sees one fail."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from serving.errors import EndpointFailed
from serving.gateway.client import GatewayClient
from serving.gateway.route import Limits, Rollout
from tests.serving.gateway.conftest import Put
from tests.serving.gateway.support import Door, V2Server, route


def ask(door: Door, requests: int) -> list[str]:
    """The versions that answered; every request must be answered."""
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: door.infer(), range(requests)))
    assert {200} == {answer.status_code for answer in answers}
    return [answer.headers["Overnight-Version"] for answer in answers]


def weights(admin: GatewayClient, door: Door) -> dict[str, float]:
    state = admin.get(door.name)
    assert state is not None
    return {each.version: each.weight for each in state.route.versions}


def test_two_versions_share_the_requests_by_weight(put: Put, v2: V2Server) -> None:
    answered = ask(put(route(v2.url, ("1", 3), ("2", 1))), 80)

    assert 18 <= answered.count("2") <= 22


def test_a_good_version_is_promoted(put: Put, v2: V2Server, admin: GatewayClient) -> None:
    door = put(route(v2.url, ("1", 75), ("2", 25), rollout=Rollout(version="2", requests_min=10)))
    ask(door, 60)
    verdict = admin.wait_for_verdict(door.name, timeout_s=10)

    assert ("2", "promoted", "0 of 10 requests failed") == (verdict.version, verdict.outcome, verdict.reason)
    assert {"1": 0, "2": 100} == weights(admin, door)
    assert {"2"} == {*ask(door, 10)}


@pytest.mark.parametrize("bad", ["broken", "html"])
def test_a_version_that_fails_is_rolled_back_and_no_request_is_lost(
    put: Put, v2: V2Server, admin: GatewayClient, bad: str
) -> None:
    rule = Rollout(version=bad, requests_min=50, error_rate_max=0.05)
    door = put(route(v2.url, ("1", 75), (bad, 25), rollout=rule))

    assert {"1"} == {*ask(door, 60)}
    verdict = admin.wait_for_verdict(door.name, timeout_s=10)
    assert ("rolled back", 3) == (verdict.outcome, verdict.tally.errors)
    assert {"1": 75, bad: 0} == weights(admin, door)


def test_a_version_that_cannot_be_reached_is_rolled_back_and_no_request_is_lost(
    put: Put, v2: V2Server, admin: GatewayClient
) -> None:
    good = route(v2.url, ("1", 50), ("2", 50), rollout=Rollout(version="2", requests_min=10, error_rate_max=0))
    there, nowhere = good.versions
    door = put(good.model_copy(update={"versions": (there, nowhere.model_copy(update={"url": "http://127.0.0.1:9"}))}))

    assert {"1"} == {*ask(door, 20)}
    assert "rolled back" == admin.wait_for_verdict(door.name, timeout_s=10).outcome


def test_a_version_that_is_slow_is_rolled_back(put: Put, v2: V2Server, admin: GatewayClient) -> None:
    rule = Rollout(version="slow", requests_min=5, p99_ms_max=200)
    door = put(route(v2.url, ("1", 50), ("slow", 50), rollout=rule))
    ask(door, 8)

    assert "took over 200 ms" in admin.wait_for_verdict(door.name, timeout_s=10).reason


def test_a_version_that_answers_too_late_is_rolled_back_and_no_request_is_lost(
    put: Put, v2: V2Server, admin: GatewayClient
) -> None:
    rule = Rollout(version="slow", requests_min=5, error_rate_max=0)
    door = put(route(v2.url, ("1", 50), ("slow", 50), rollout=rule, limits=Limits(timeout_s=0.6)))

    assert {"1"} == {*ask(door, 8)}
    assert "rolled back" == admin.wait_for_verdict(door.name, timeout_s=10).outcome


def test_where_every_version_fails_the_one_on_trial_is_not_to_blame(
    put: Put, v2: V2Server, admin: GatewayClient
) -> None:
    rule = Rollout(version="html", requests_min=5, error_rate_max=0)
    door = put(route(v2.url, ("broken", 50), ("html", 50), rollout=rule))

    assert {500} == {door.infer().status_code for _ in range(10)}
    state = admin.get(door.name)
    assert state is not None
    assert state.verdict is None
    assert state.trial is not None
    assert 0 == state.trial.tally.requests


def test_a_trial_takes_as_long_as_its_rule_says(put: Put, v2: V2Server, admin: GatewayClient) -> None:
    door = put(route(v2.url, ("1", 50), ("2", 50), rollout=Rollout(version="2", requests_min=1, seconds_min=2.0)))
    ask(door, 10)
    state = admin.get(door.name)

    assert state is not None
    assert state.verdict is None
    assert "promoted" == admin.wait_for_verdict(door.name, timeout_s=20).outcome


def test_the_same_route_put_again_leaves_a_trial_as_it_is(put: Put, v2: V2Server, admin: GatewayClient) -> None:
    trial = route(v2.url, ("1", 50), ("2", 50), rollout=Rollout(version="2"))
    door = put(trial)
    ask(door, 10)
    before = admin.get(door.name)
    after = admin.put(door.name, trial)

    assert before is not None
    assert before.trial is not None
    assert 5 == before.trial.tally.requests
    assert before.trial == after.trial


def test_a_request_that_names_a_version_has_no_part_in_its_trial(put: Put, v2: V2Server, admin: GatewayClient) -> None:
    door = put(route(v2.url, ("1", 50), ("broken", 50), rollout=Rollout(version="broken", error_rate_max=0)))

    assert 500 == door.infer(version="broken").status_code
    state = admin.get(door.name)
    assert state is not None
    assert state.verdict is None


def test_a_wait_that_is_in_vain_says_how_things_stand(put: Put, v2: V2Server, admin: GatewayClient) -> None:
    door = put(route(v2.url, ("1", 50), ("2", 50), rollout=Rollout(version="2")))

    with pytest.raises(EndpointFailed, match=r'must come to be as wanted within 0\.2 s, got \{"trial"'):
        admin.wait_for_verdict(door.name, timeout_s=0.2)
    with pytest.raises(EndpointFailed, match="must have the endpoint 'nobody'"):
        admin.wait_for_verdict("nobody", timeout_s=0.2)
