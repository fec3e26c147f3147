from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from serving.gateway.route import Rollout
from serving.gateway.trial import Tally, judge

answers = st.lists(st.tuples(st.booleans(), st.floats(0, 100)), max_size=300)
rules = st.builds(
    Rollout,
    version=st.just("2"),
    requests_min=st.integers(1, 200),
    seconds_min=st.sampled_from([0.0, 60.0]),
    error_rate_max=st.floats(0, 0.5),
    p99_ms_max=st.none() | st.floats(1, 100),
)


def tallied(rule: Rollout, each: list[tuple[bool, float]]) -> Tally:
    tally = Tally()
    for failed, latency_ms in each:
        tally = tally.plus(rule, failed=failed, latency_ms=latency_ms)
    return tally


@given(rules, answers)
def test_who_wins_had_enough_requests_and_kept_to_the_rule(rule: Rollout, each: list[tuple[bool, float]]) -> None:
    ended = judge(rule, tallied(rule, each), age_s=30)
    if ended is None or ended[0] != "promoted":
        return

    assert rule.requests_min <= len(each)
    assert 0 == rule.seconds_min
    assert sum(failed for failed, _ in each) <= rule.error_rate_max * len(each)
    if rule.p99_ms_max is not None:
        p99 = np.quantile([latency for _, latency in each], 0.99, method="inverted_cdf")
        assert p99 <= rule.p99_ms_max


@given(rules, answers)
def test_who_broke_the_rule_over_enough_requests_loses(rule: Rollout, each: list[tuple[bool, float]]) -> None:
    if len(each) < rule.requests_min:
        return
    failed = sum(failed for failed, _ in each) / len(each) > rule.error_rate_max
    slow = rule.p99_ms_max is not None and sum(ms > rule.p99_ms_max for _, ms in each) / len(each) > 0.01
    ended = judge(rule, tallied(rule, each), age_s=1e9)

    assert ended is not None
    assert ("rolled back" if failed or slow else "promoted") == ended[0]


@given(rules, answers, st.lists(st.just((False, 0.0)), min_size=1, max_size=300))
def test_who_lost_before_there_were_enough_requests_could_not_have_won_any_more(
    rule: Rollout, each: list[tuple[bool, float]], good: list[tuple[bool, float]]
) -> None:
    early = judge(rule, tallied(rule, each), age_s=1e9)
    if early is None or early[0] != "rolled back" or len(each) >= rule.requests_min:
        return
    rest = good * (rule.requests_min // len(good) + 1)
    late = judge(rule, tallied(rule, (each + rest)[: rule.requests_min]), age_s=1e9)

    assert late is not None
    assert "rolled back" == late[0]


def test_a_verdict_says_the_figures_that_decided() -> None:
    rule = Rollout(version="2", requests_min=10, error_rate_max=0.1, p99_ms_max=50)

    assert judge(rule, Tally(requests=9), age_s=0) is None
    assert ("promoted", "1 of 10 requests failed, 0 took over 50 ms") == judge(
        rule, Tally(requests=10, errors=1), age_s=0
    )
    assert ("rolled back", "2 of 4 requests failed; 10.00% may") == judge(rule, Tally(requests=4, errors=2), age_s=0)
    assert ("rolled back", "1 of 10 requests took over 50 ms; 1.00% may") == judge(
        rule, Tally(requests=10, slow=1), age_s=0
    )
