from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import BadInput
from serving.gateway.client import GatewayClient
from serving.gateway.route import (
    CanaryTally,
    EndpointState,
    Rollout,
    Route,
    Shadow,
    SleepRule,
    Trial,
    Verdict,
    promote_canary,
)
from serving.targets import Address
from tasks.endpoint.spec import OF_EACH_CALL, EndpointSpec
from tasks.endpoint.targets import RayServe, default_target
from tasks.endpoint.traffic import (
    choose_keep_warm_seconds,
    complete_spec,
    describe_callers,
    describe_canary,
    describe_share,
    find_route_to_restore,
    find_target,
    keep_awake,
    list_idle_versions,
    list_serving_versions,
    list_used_versions,
    make_route,
    remove_versions,
    shift_traffic,
    validate_rollout,
)
from tests.serving.toys import matrix
from tests.tasks.endpoint.values import route, served, spec

BUDGET = {"latency_ms": 5000, "rate": 5}


def test_given_seconds_are_kept() -> None:
    assert 90 == choose_keep_warm_seconds(spec(keep_warm=90), 3)
    assert choose_keep_warm_seconds(spec(), 3) is None


def test_auto_waits_as_long_as_a_cold_start_takes() -> None:
    assert 3 == choose_keep_warm_seconds(spec(keep_warm="auto", budget=BUDGET), 3)
    assert 1 == choose_keep_warm_seconds(spec(keep_warm="auto", budget=BUDGET), 0.2)


def test_auto_keeps_one_where_a_cold_start_breaks_the_budget() -> None:
    assert choose_keep_warm_seconds(spec(keep_warm="auto", budget=BUDGET), 5.1) is None


ADDRESS = Address(url="http://127.0.0.1:2/", model="churn", version="2")
CANARY = {"kind": "canary", "percent": 20, "requests_min": 7}
SHADOW = {"kind": "shadow"}


def roll_out(given: EndpointSpec, current: Route | None, sleep: SleepRule | None = None) -> Route:
    return make_route(given, current, matrix(4), ADDRESS, "2", sleep)


def weights(found: Route) -> dict[str, float]:
    return {each.version: each.weight for each in found.versions}


def test_the_first_version_has_all_traffic_whatever_the_rollout() -> None:
    for rollout in ({"kind": "all-at-once"}, CANARY):
        found = roll_out(spec(rollout=rollout), None)

        assert {"2": 100} == weights(found)
        assert found.rollout is None


def test_all_at_once_leaves_the_earlier_versions_without_traffic() -> None:
    found = roll_out(spec(), route(served("1", 100)))

    assert {"1": 0, "2": 100} == weights(found)
    assert ("1",) == list_idle_versions(found)
    assert "version 2 has all traffic" == describe_share(found, "2")


def test_a_canary_gets_its_share_and_its_rule() -> None:
    found = roll_out(spec(rollout=CANARY), route(served("1", 3), served("0", 1)))

    assert {"1": 60, "0": 20, "2": 20} == weights(found)
    assert Rollout(version="2", requests_min=7, seconds_max=600) == found.rollout
    assert "version 2 has 20% of the traffic" == describe_share(found, "2")


class PromotingGateway(GatewayClient):
    """A gateway that promotes the canary of version 2 once it has been asked for it twice."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:9", "a-key-that-nobody-asks-for")
        self.asked = 0

    def put(self, _name: str, route: Route) -> EndpointState:
        self.route = route
        return self._describe()

    def get(self, _name: str) -> EndpointState:
        self.asked += 1
        now = datetime.now(UTC)
        if self.asked == 1:
            return self._describe(
                trial=Trial(began=now - timedelta(seconds=30), tally=CanaryTally(requests=4, errors=1))
            )
        self.route = promote_canary(self.route)
        tally = CanaryTally(requests=7)
        return self._describe(
            verdict=Verdict(version="2", outcome="promoted", reason="0 of 7 failed", tally=tally, at=now)
        )

    def _describe(self, **found: Any) -> EndpointState:
        return EndpointState.model_validate(
            {"route": self.route, "in_flight": {}, "waiting": 0, "models": "awake", **found}
        )


def shift_to_canary(**rollout: object) -> tuple[str, list[str], int]:
    given = spec(rollout={**CANARY, **rollout})
    lines: list[str] = []
    with PromotingGateway() as gateway:
        outcome = shift_traffic(gateway, given, roll_out(given, route(served("1", 100))), "2", lines.append)
    return outcome, lines, gateway.asked


def test_a_canary_is_waited_for_and_says_how_far_it_has_come() -> None:
    outcome, lines, _ = shift_to_canary()

    assert "version 2 has all traffic, after a canary: 0 of 7 failed" == outcome
    assert ["Canary of version 2: 4 of 7 requests, 25.0% failed, 570 s left"] == lines


def test_a_canary_that_is_not_waited_for_is_left_to_the_gateway() -> None:
    assert ("version 2 has 20% of the traffic, as a canary that the gateway decides about", [], 0) == shift_to_canary(
        wait=False
    )


def test_the_time_that_a_canary_has_left_is_never_below_zero() -> None:
    rule = Rollout(version="2", requests_min=7, seconds_max=60)

    assert "Canary of version 2: 0 of 7 requests, 0.0% failed, 0 s left" == describe_canary(
        rule, CanaryTally(), age_s=61
    )


def test_an_endpoint_is_retired_where_it_was_put_online() -> None:
    elsewhere = RayServe(dashboard="http://127.0.0.1:1", folder="/srv/releases")
    put_there = roll_out(spec(target=elsewhere), None)

    assert elsewhere == find_target(put_there)
    assert [default_target()] * 2 == [find_target(None), find_target(route(served("1", 100)))]


def test_a_shadow_answers_nobody() -> None:
    found = roll_out(spec(rollout=SHADOW), route(served("1", 100)))

    assert {"1": 100, "2": 0} == weights(found)
    assert found.shadow is not None
    assert () == list_idle_versions(found)
    assert "copies of requests" in describe_share(found, "2")


def test_a_shadow_that_gets_traffic_is_one_no_more() -> None:
    shadowed = roll_out(spec(rollout=SHADOW), route(served("1", 100)))
    found = roll_out(spec(), shadowed)

    assert {"1": 0, "2": 100} == weights(found)
    assert found.shadow is None


def test_keys_go_by_name_and_the_sleep_by_seconds() -> None:
    found = roll_out(spec(access={"environment": ["A_KEY"], "secrets": ["b-key"]}), None, SleepRule(keep_warm_s=60))

    assert ("A_KEY", "b-key") == found.keys
    assert found.sleep is not None
    assert 60 == found.sleep.keep_warm_s


@given(before=st.lists(st.floats(0.1, 1e3), min_size=1, max_size=6), percent=st.floats(0.1, 50), again=st.booleans())
def test_a_canary_never_changes_how_the_others_share(before: list[float], percent: float, *, again: bool) -> None:
    current = route(*(served(f"v{at}", weight) for at, weight in enumerate(before)))
    given_spec = spec(rollout={**CANARY, "percent": percent})
    found = roll_out(given_spec, current)
    found = roll_out(given_spec, found) if again else found
    others = [each.weight for each in found.versions if each.version != "2"]

    assert percent == weights(found)["2"]
    assert 100 == pytest.approx(sum(weights(found).values()))
    assert [weight / sum(before) for weight in before] == pytest.approx([weight / sum(others) for weight in others])


TRIAL = route(served("1", 80), served("2", 20), rollout=Rollout(version="2"))


@pytest.mark.parametrize(
    ("changes", "current", "version", "said"),
    [
        ({"rollout": SHADOW}, None, "2", "has none. Roll it out first"),
        ({"rollout": SHADOW}, route(served("2", 100)), "2", "another version than the one that serves"),
        ({}, TRIAL, "3", "version 2 of churn is one"),
        ({"rollout": CANARY}, route(served("1", 1), contract=matrix(5)), "2", "the same tensors"),
        ({"rollout": SHADOW}, route(served("1", 1), contract=matrix(5)), "2", "the same tensors"),
    ],
)
def test_an_impossible_rollout_is_refused(
    changes: dict[str, Any], current: Route | None, version: str, said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        validate_rollout(spec(**changes), current, matrix(4), version)


def test_other_tensors_may_come_all_at_once() -> None:
    validate_rollout(spec(), route(served("1", 1), contract=matrix(5)), matrix(4), "2")


def test_a_canary_that_a_killed_run_left_is_dropped_for_its_own_version_alone() -> None:
    found = find_route_to_restore(TRIAL, "2")

    assert route(served("1", 80)) == found
    assert TRIAL == find_route_to_restore(TRIAL, "3")
    assert find_route_to_restore(None, "2") is None


@pytest.mark.parametrize(("keep_warm_s", "meanwhile"), [(1, 3600), (7200, 7200)])
def test_models_are_not_unloaded_while_a_version_is_deployed(keep_warm_s: float, meanwhile: float) -> None:
    sleeping = route(served("1", 1), sleep=SleepRule(keep_warm_s=keep_warm_s, grpc="127.0.0.1:8001"))

    assert SleepRule(keep_warm_s=meanwhile, grpc="127.0.0.1:8001") == keep_awake(sleeping).sleep
    assert route(served("1", 1)) == keep_awake(route(served("1", 1)))


def test_what_has_no_traffic_can_go() -> None:
    current = route(served("1"), served("2", 5), served("3"), shadow=Shadow(version="3"))

    assert ("1",) == list_idle_versions(current)
    assert ("2",) == list_serving_versions(current)
    assert () == list_serving_versions(None)
    assert ("2", "3") == list_used_versions(current)
    assert () == list_used_versions(None)
    assert route(served("2", 5)) == remove_versions(current, ("1", "3"))


# For every field of a spec what makes it another than its default.
CHANGES: dict[str, dict[str, Any]] = {
    "name": {"name": "another"},
    "model": {"model": "models:/churn/1"},
    "steps": {"model": None, "steps": ["models:/a/1", "models:/b/1"]},
    "ensemble": {"model": None, "ensemble": ["models:/a/1", "models:/b/1"]},
    "gateway": {"gateway": "http://127.0.0.1:9"},
    "admin_secret": {"admin_secret": "admin"},
    "target": {"target": {"kind": "seldon", "folder": "f", "python": "p"}},
    "budget": {"budget": BUDGET},
    "batching": {"batching": {"batch_size_max": 4}},
    "scaling": {"scaling": {"replicas_max": 3}},
    "keep_warm": {"keep_warm": "auto", "budget": BUDGET},
    "rollout": {"rollout": CANARY},
    "access": {"access": {"environment": ["A_KEY"], "secrets": ["b-key"]}},
    "limits": {"limits": {"rows_max": 7, "requests_per_second": 5}},
    "input_columns": {"input_columns": {"x": ["a", "b"]}},
    "policies": {"policies": {"a": {"cast": "round"}}},
    "params": {"params": {"weight": 3}},
    "allow_pickle": {"allow_pickle": True},
    "environment": {"environment": "model", "target": {"kind": "seldon", "folder": "f", "python": "p"}},
    "packages": {"packages": {"offline": True}},
    "tolerance": {"tolerance": 0.25},
    "measure_seconds": {"measure_seconds": 0},
}


@pytest.mark.parametrize("field", EndpointSpec.model_fields)
def test_what_a_call_leaves_out_stays_but_for_what_is_of_each_call(field: str) -> None:
    before, call = spec(**CHANGES[field]), spec()
    found = complete_spec(call, roll_out(before, None))

    assert getattr(before, field) != getattr(call, field)
    assert getattr(call if field in OF_EACH_CALL else before, field) == getattr(found, field)


def test_a_field_that_a_call_names_is_taken_whole() -> None:
    before = roll_out(spec(budget=BUDGET, limits={"rows_max": 7}, access={"environment": ["A_KEY"]}), None)
    found = complete_spec(
        spec(budget=None, limits={"bytes_max": 5}, access={"secrets": ["b-key"]}, allow_pickle=True), before
    )

    assert spec(limits={"bytes_max": 5}, access={"secrets": ["b-key"]}, allow_pickle=True) == found


@pytest.mark.parametrize(
    ("access", "names"), [({}, ("A_KEY",)), ({"anyone": False}, ("A_KEY",)), ({"anyone": True}, ())]
)
def test_keys_are_taken_off_by_a_word_of_its_own_alone(access: dict[str, Any], names: tuple[str, ...]) -> None:
    keyed = roll_out(spec(access={"environment": ["A_KEY"]}), None)
    of_an_earlier_release = keyed.model_copy(update={"spec": {}})

    for before in (keyed, of_an_earlier_release):
        assert names == complete_spec(spec(access=access), before).access.names


def test_what_stays_must_fit_what_a_call_names() -> None:
    before = roll_out(spec(keep_warm=60), None)
    bento = {"kind": "bentoml", "folder": "f", "python": "p"}

    with pytest.raises(BadInput, match=r"leaves out stays.*keep_warm must be left out on bentoml.*Give that field too"):
        complete_spec(spec(target=bento), before)
    assert complete_spec(spec(target=bento, keep_warm=None), before).keep_warm is None


@pytest.mark.parametrize(
    ("keys", "said"),
    [((), "Anyone who reaches the gateway"), (("A",), "need the key A."), (("A", "B"), "need one of the keys A, B.")],
)
def test_who_may_call_is_said(keys: tuple[str, ...], said: str) -> None:
    assert said in describe_callers(keys)
