"""Weights, canaries and shadows, as functions of values and through a real gateway."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.local.gateway import GatewayServer
from serving.errors import EndpointFailed
from serving.gateway.access_log import LoggedRequest
from serving.gateway.client import GatewayClient
from serving.gateway.envoy.bootstrap import BootstrapOptions
from serving.gateway.gateway import Gateway
from serving.gateway.keys import Keys
from serving.gateway.rollout import compare_replies, judge_canary, tally_request
from serving.gateway.route import CanaryTally, Limits, Rollout, Shadow
from serving.gateway.store import Store
from serving.gateway.upstreams import Reply
from serving.model.contract import Contract, Output
from serving.protocol.oip import InferRequest, OutputChoice, encode_response
from tests.eventually import eventually
from tests.serving.gateway.conftest import Put
from tests.serving.gateway.support import EndpointClient, V2Server, read_metrics, route, wait_for_verdict
from tests.serving.gateway.v2_child import CONTRACT

answers = st.lists(st.tuples(st.booleans(), st.floats(0, 100)), max_size=300)
rules = st.builds(
    Rollout,
    version=st.just("2"),
    requests_min=st.integers(1, 200),
    seconds_min=st.sampled_from([0.0, 60.0]),
    error_rate_max=st.floats(0, 0.5),
    p99_ms_max=st.none() | st.floats(1, 100),
)


def tally_answers(rule: Rollout, answered: list[tuple[bool, float]]) -> CanaryTally:
    tally = CanaryTally()
    for failed, latency_ms in answered:
        tally = tally.add(rule, failed=failed, latency_ms=latency_ms)
    return tally


@given(rules, answers)
def test_a_promoted_canary_had_enough_requests_and_satisfied_the_rule(
    rule: Rollout, answered: list[tuple[bool, float]]
) -> None:
    decision = judge_canary(rule, tally_answers(rule, answered), age_s=30)
    if decision is None or decision[0] != "promoted":
        return

    assert rule.requests_min <= len(answered)
    assert 0 == rule.seconds_min
    assert sum(failed for failed, _ in answered) <= rule.error_rate_max * len(answered)
    if rule.p99_ms_max is not None:
        p99 = np.quantile([latency for _, latency in answered], 0.99, method="inverted_cdf")
        assert p99 <= rule.p99_ms_max


@given(rules, answers)
def test_a_canary_that_broke_the_rule_over_enough_requests_is_rolled_back(
    rule: Rollout, answered: list[tuple[bool, float]]
) -> None:
    if len(answered) < rule.requests_min:
        return
    failed = sum(failed for failed, _ in answered) / len(answered) > rule.error_rate_max
    slow = rule.p99_ms_max is not None and sum(ms > rule.p99_ms_max for _, ms in answered) / len(answered) > 0.01
    decision = judge_canary(rule, tally_answers(rule, answered), age_s=1e9)

    assert decision is not None
    assert ("rolled back" if failed or slow else "promoted") == decision[0]


@given(rules, answers, st.lists(st.just((False, 0.0)), min_size=1, max_size=300))
def test_a_canary_that_was_rolled_back_early_could_not_have_been_promoted(
    rule: Rollout, answered: list[tuple[bool, float]], good: list[tuple[bool, float]]
) -> None:
    early = judge_canary(rule, tally_answers(rule, answered), age_s=1e9)
    if early is None or early[0] != "rolled back" or len(answered) >= rule.requests_min:
        return
    rest = good * (rule.requests_min // len(good) + 1)
    late = judge_canary(rule, tally_answers(rule, (answered + rest)[: rule.requests_min]), age_s=1e9)

    assert late is not None
    assert "rolled back" == late[0]


def test_a_verdict_states_the_figures_that_decided() -> None:
    rule = Rollout(version="2", requests_min=10, error_rate_max=0.1, p99_ms_max=50)

    assert judge_canary(rule, CanaryTally(requests=9), age_s=0) is None
    assert ("promoted", "1 of 10 requests failed, 0 took over 50 ms") == judge_canary(
        rule, CanaryTally(requests=10, errors=1), age_s=0
    )
    assert ("rolled back", "2 of 4 requests failed; 10.00% may") == judge_canary(
        rule, CanaryTally(requests=4, errors=2), age_s=0
    )
    assert ("rolled back", "1 of 10 requests took over 50 ms; 1.00% may") == judge_canary(
        rule, CanaryTally(requests=10, slow=1), age_s=0
    )
    exact = rule.model_copy(update={"requests_min": 100})
    assert ("promoted", "0 of 100 requests failed, 1 took over 50 ms") == judge_canary(
        exact, CanaryTally(requests=100, slow=1), age_s=0
    )
    assert ("rolled back", "2 of 100 requests took over 50 ms; 1.00% may") == judge_canary(
        exact, CanaryTally(requests=100, slow=2), age_s=0
    )
    late = rule.model_copy(update={"seconds_max": 60.0})
    assert judge_canary(late, CanaryTally(requests=9), age_s=59) is None
    assert ("rolled back", "got 9 of 10 requests in 60 s") == judge_canary(late, CanaryTally(requests=9), age_s=60)
    assert ("promoted", "0 of 10 requests failed, 0 took over 50 ms") == judge_canary(
        late, CanaryTally(requests=10), age_s=60
    )


@pytest.mark.parametrize(
    ("change", "tally"),
    [
        ({}, CanaryTally(requests=1)),
        ({"latency_ms": 50.5}, CanaryTally(requests=1, slow=1)),
        ({"attempts": 2}, CanaryTally(requests=1, errors=1)),
        ({"is_canary": False}, CanaryTally()),
        ({"status": 500}, CanaryTally()),
        ({"is_canary": False, "status": 500}, CanaryTally()),
    ],
)
def test_a_request_counts_where_the_canary_was_asked_and_a_version_answered(
    change: dict[str, Any], tally: CanaryTally
) -> None:
    rule = Rollout(version="2", p99_ms_max=50)
    fields: dict[str, Any] = {"at_us": 1, "endpoint": "e", "version": "2", "rows": 1, "size": 1, "status": 200}
    request = LoggedRequest(**(fields | {"latency_ms": 50.0, "is_canary": True} | change))

    assert tally == tally_request(rule, CanaryTally(), request)


def ask(endpoint: EndpointClient, requests: int) -> list[str]:
    """The versions that answered; every request must be answered."""
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: endpoint.infer(), range(requests)))
    assert {200} == {answer.status_code for answer in answers}
    return [answer.headers["Overnight-Version"] for answer in answers]


def read_weights(admin: GatewayClient, endpoint: EndpointClient) -> dict[str, float]:
    state = admin.get(endpoint.name)
    assert state is not None
    return {served.version: served.weight for served in state.route.versions}


def test_two_versions_share_the_requests_by_weight(put: Put, v2: V2Server) -> None:
    answered = ask(put(route(v2.url, ("1", 3), ("2", 1))), 400)

    # Five standard deviations.
    assert 57 <= answered.count("2") <= 143


def test_a_good_version_is_promoted(put: Put, v2: V2Server, admin: GatewayClient) -> None:
    endpoint = put(route(v2.url, ("1", 75), ("2", 25), rollout=Rollout(version="2", requests_min=10)))
    ask(endpoint, 100)
    verdict = wait_for_verdict(admin, endpoint.name, timeout_s=10)

    assert ("2", "promoted", 0) == (verdict.version, verdict.outcome, verdict.tally.errors)
    assert verdict.tally.requests >= 10
    assert {"1": 0, "2": 100} == read_weights(admin, endpoint)
    assert {"2"} == {*ask(endpoint, 10)}


def test_a_verdict_is_returned_once_requests_are_routed_by_it(put: Put, v2: V2Server, admin: GatewayClient) -> None:
    def is_decided(endpoint: EndpointClient) -> bool:
        state = admin.get(endpoint.name)
        return state is not None and state.verdict is not None

    for _ in range(3):
        endpoint = put(route(v2.url, ("1", 80), ("2", 20), rollout=Rollout(version="2", requests_min=5)))
        while not is_decided(endpoint):
            endpoint.infer()

        assert ["2"] * 10 == [endpoint.infer().headers["Overnight-Version"] for _ in range(10)]


def test_a_verdict_that_comes_while_an_endpoint_is_described_is_returned_once_requests_are_routed_by_it(
    tmp_path: Path,
) -> None:
    options = BootstrapOptions(folder=tmp_path)
    canary = route("http://127.0.0.1:9", ("1", 80), ("2", 20), rollout=Rollout(version="2", requests_min=1))

    async def decide_during_description(gateway: Gateway, name: str, turns: int) -> bool:
        await gateway.put(name, canary)
        before = options.routes_file.read_bytes()
        describing = asyncio.create_task(gateway.describe(name))
        for _ in range(turns):
            await asyncio.sleep(0)
        endpoint = gateway.endpoint(name)
        endpoint.observe(
            LoggedRequest(
                at_us=time.time_ns() // 1000,
                endpoint=name,
                version="2",
                rows=1,
                size=1,
                status=200,
                latency_ms=1,
                is_canary=True,
            )
        )
        assert endpoint.decide_canary()
        state = await describing
        return state.verdict is None or options.routes_file.read_bytes() != before

    async def decide_at_every_turn() -> list[bool]:
        with Store(tmp_path) as store:
            async with Gateway(store, Keys(tmp_path, {}), options) as gateway:
                return [await decide_during_description(gateway, f"e{turns}", turns) for turns in range(60)]

    assert {True} == {*asyncio.run(decide_at_every_turn())}


def test_an_error_that_nobody_foresaw_does_not_end_the_periodic_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = BootstrapOptions(folder=tmp_path)
    turns, has_gone_on = itertools.count(), asyncio.Event()

    async def work(_gateway: Gateway, *, is_saving: bool) -> None:
        if next(turns) < 3:
            message = "no such key"
            raise KeyError(message)
        has_gone_on.set()

    async def wait_for_turns() -> None:
        with Store(tmp_path) as store:
            async with Gateway(store, Keys(tmp_path, {}), options), asyncio.timeout(60):
                await has_gone_on.wait()

    monkeypatch.setattr(Gateway, "_work", work)
    asyncio.run(wait_for_turns())

    # An error that stays is told once, with where it came from.
    assert 1 == caplog.text.count("KeyError: 'no such key'") == caplog.text.count("Traceback")


@pytest.mark.parametrize("bad", ["broken", "html"])
def test_a_version_that_fails_is_rolled_back_and_no_request_is_lost(
    put: Put, v2: V2Server, admin: GatewayClient, bad: str
) -> None:
    rule = Rollout(version=bad, requests_min=50, error_rate_max=0.05)
    endpoint = put(route(v2.url, ("1", 75), (bad, 25), rollout=rule))

    assert {"1"} == {*ask(endpoint, 60)}
    verdict = wait_for_verdict(admin, endpoint.name, timeout_s=10)
    assert "rolled back" == verdict.outcome
    assert verdict.tally.errors >= 3
    assert {"1": 75, bad: 0} == read_weights(admin, endpoint)


def test_a_version_that_cannot_be_reached_is_rolled_back_and_no_request_is_lost(
    put: Put, v2: V2Server, admin: GatewayClient
) -> None:
    good = route(v2.url, ("1", 50), ("2", 50), rollout=Rollout(version="2", requests_min=10, error_rate_max=0))
    there, nowhere = good.versions
    endpoint = put(
        good.model_copy(update={"versions": (there, nowhere.model_copy(update={"url": "http://127.0.0.1:9"}))})
    )

    assert {"1"} == {*ask(endpoint, 20)}
    assert "rolled back" == wait_for_verdict(admin, endpoint.name, timeout_s=10).outcome


def test_a_version_that_is_slow_is_rolled_back(put: Put, v2: V2Server, admin: GatewayClient) -> None:
    rule = Rollout(version="slow", requests_min=5, p99_ms_max=200)
    endpoint = put(route(v2.url, ("1", 50), ("slow", 50), rollout=rule))
    ask(endpoint, 30)

    assert "took over 200 ms" in wait_for_verdict(admin, endpoint.name, timeout_s=10).reason


def test_a_version_that_answers_too_late_is_rolled_back_and_no_request_is_lost(
    put: Put, v2: V2Server, admin: GatewayClient
) -> None:
    rule = Rollout(version="slow", requests_min=5, error_rate_max=0)
    endpoint = put(route(v2.url, ("1", 50), ("slow", 50), rollout=rule, limits=Limits(timeout_s=0.6)))

    assert {"1"} == {*ask(endpoint, 20)}
    assert "rolled back" == wait_for_verdict(admin, endpoint.name, timeout_s=10).outcome


def test_a_failure_of_every_version_does_not_count_against_the_canary(
    put: Put, v2: V2Server, admin: GatewayClient
) -> None:
    rule = Rollout(version="html", requests_min=5, error_rate_max=0)
    endpoint = put(route(v2.url, ("broken", 50), ("html", 50), rollout=rule))

    assert {500} == {endpoint.infer().status_code for _ in range(10)}
    state = admin.get(endpoint.name)
    assert state is not None
    assert state.verdict is None
    assert state.trial is not None
    assert 0 == state.trial.tally.requests


def test_a_canary_lasts_at_least_seconds_min(put: Put, v2: V2Server, admin: GatewayClient) -> None:
    endpoint = put(route(v2.url, ("1", 50), ("2", 50), rollout=Rollout(version="2", requests_min=1, seconds_min=2.0)))
    ask(endpoint, 10)
    state = admin.get(endpoint.name)

    assert state is not None
    assert state.verdict is None
    assert "promoted" == wait_for_verdict(admin, endpoint.name, timeout_s=20).outcome


def test_putting_the_same_route_again_keeps_the_tally_of_its_canary(
    put: Put, v2: V2Server, admin: GatewayClient
) -> None:
    canary = route(v2.url, ("1", 50), ("2", 50), rollout=Rollout(version="2"))
    endpoint = put(canary)
    ask(endpoint, 10)
    before = admin.wait_until(
        endpoint.name, lambda state: bool(state.trial and state.trial.tally.requests), timeout_s=9
    )
    after = admin.put(endpoint.name, canary)

    assert before.trial is not None
    assert after.trial is not None
    assert before.trial.began == after.trial.began
    assert before.trial.tally.requests <= after.trial.tally.requests


def test_a_request_that_names_the_canary_does_not_count(put: Put, v2: V2Server, admin: GatewayClient) -> None:
    endpoint = put(route(v2.url, ("1", 50), ("broken", 50), rollout=Rollout(version="broken", error_rate_max=0)))

    assert 500 == endpoint.infer(version="broken").status_code
    state = admin.get(endpoint.name)
    assert state is not None
    assert state.verdict is None


def test_a_wait_that_times_out_states_what_it_found(put: Put, v2: V2Server, admin: GatewayClient) -> None:
    endpoint = put(route(v2.url, ("1", 50), ("2", 50), rollout=Rollout(version="2")))

    with pytest.raises(EndpointFailed, match=r'must be in the expected state within 0\.2 s, got \{"trial"'):
        wait_for_verdict(admin, endpoint.name, timeout_s=0.2)
    with pytest.raises(EndpointFailed, match="must have the endpoint 'unknown'"):
        wait_for_verdict(admin, "unknown", timeout_s=0.2)


@pytest.fixture
def count_shadows(gateway: GatewayServer) -> Callable[[EndpointClient, str], int]:
    def count_shadows(endpoint: EndpointClient, outcome: str) -> int:
        """How many answers of an endpoint's shadow were counted under an outcome."""
        page = read_metrics(gateway)
        series = f'overnight_shadows_total{{compared="{outcome}",endpoint="{endpoint.name}"}} '
        return sum(int(float(line.removeprefix(series))) for line in page.splitlines() if line.startswith(series))

    return count_shadows


@pytest.mark.parametrize(
    ("shadow", "outcome"), [("same", "equal"), ("2", "different"), ("broken", "failed"), ("wrong", "different")]
)
def test_the_shadow_gets_copies_and_its_answers_are_only_counted(
    put: Put, v2: V2Server, count_shadows: Callable[[EndpointClient, str], int], shadow: str, outcome: str
) -> None:
    before = v2.seen(shadow)
    endpoint = put(route(v2.url, ("1", 1), (shadow, 0), shadow=Shadow(version=shadow)))

    assert [10] * 3 == [endpoint.score() for _ in range(3)]
    eventually(lambda: count_shadows(endpoint, outcome) + count_shadows(endpoint, "dropped") == 3)
    assert v2.seen(shadow) == before + count_shadows(endpoint, outcome)
    assert count_shadows(endpoint, outcome) >= 1


def test_a_slow_shadow_delays_no_request_and_its_excess_copies_are_dropped(
    put: Put, v2: V2Server, count_shadows: Callable[[EndpointClient, str], int]
) -> None:
    endpoint = put(route(v2.url, ("1", 1), ("slow", 0), shadow=Shadow(version="slow", in_flight_max=1)))
    assert [10] * 10 == [endpoint.score() for _ in range(10)]

    eventually(lambda: count_shadows(endpoint, "equal") + count_shadows(endpoint, "dropped") == 10)
    assert count_shadows(endpoint, "dropped") > 0


def test_a_copy_is_compared_where_the_shadow_leaves_the_route_meanwhile(
    put: Put, v2: V2Server, admin: GatewayClient, count_shadows: Callable[[EndpointClient, str], int]
) -> None:
    endpoint, before = put(route(v2.url, ("slow", 1), ("same", 0), shadow=Shadow(version="same"))), v2.seen("slow")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(endpoint.infer)
        # The request, and the comparator's.
        eventually(lambda: v2.seen("slow") == before + 2)
        admin.put(endpoint.name, route(v2.url, ("slow", 1)))
        assert 200 == answer.result().status_code

    eventually(lambda: count_shadows(endpoint, "equal") == 1)


def reply(*scores: object, contract: Contract = CONTRACT, binary: bool = True) -> Reply:
    request = InferRequest(id=None, inputs={"n": np.zeros(1)}, outputs=(OutputChoice(name="score", binary=binary),))
    (output,) = contract.outputs
    outputs = {"score": np.array(scores, object if output.dtype == "str" else output.dtype)}
    body = encode_response(request, outputs, contract, model="toy", version="1")
    return Reply(status=200, content=body.content, headers=body.headers)


@pytest.mark.parametrize(("difference", "binary", "outcome"), [(1e-7, True, "equal"), (1e-3, False, "different")])
def test_numbers_are_equal_within_the_tolerance_as_json_and_as_binary(
    difference: float, outcome: str, *, binary: bool
) -> None:
    first = reply(1, 2, binary=binary)

    assert outcome == compare_replies(first, reply(1, 2 + difference, binary=binary), CONTRACT, 1e-5)
    assert "different" == compare_replies(first, reply(1, binary=binary), CONTRACT, 1e-5)
    assert "failed" == compare_replies(first, Reply(status=200, content=b"{"), CONTRACT, 1e-5)


@pytest.mark.parametrize(
    ("dtype", "first", "other", "outcome"),
    [
        ("float32", 0.0, 9e-4, "equal"),
        ("float32", 0.0, 2e-3, "different"),
        ("float32", 1e6, 1e6 + 500, "equal"),
        ("float32", 1e6, 1e6 + 2000, "different"),
        ("float32", np.nan, np.nan, "equal"),
        ("float32", np.nan, 0.0, "different"),
        ("int64", 1_000_000, 1_000_000, "equal"),
        ("int64", 1_000_000, 1_000_001, "different"),
        ("str", "yes", "yes", "equal"),
        ("str", "yes", "no", "different"),
    ],
)
def test_answers_are_equal_as_their_type_has_it(dtype: str, first: object, other: object, outcome: str) -> None:
    contract = CONTRACT.model_copy(update={"outputs": (Output(name="score", dtype=dtype),)})

    assert outcome == compare_replies(reply(first, contract=contract), reply(other, contract=contract), contract, 1e-3)
