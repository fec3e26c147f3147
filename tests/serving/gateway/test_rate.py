from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serving.gateway.rate import Bucket, retry_after_s, take

rates = st.floats(0.1, 1000)
gaps = st.lists(st.floats(0, 2), min_size=1, max_size=200)


@given(rates, st.integers(1, 50), gaps)
def test_no_stretch_of_time_lets_in_more_than_burst_and_rate_allow(rate: float, burst: int, each: list[float]) -> None:
    bucket, now_s, let_in = Bucket(tokens=float(burst), at_s=0.0), 0.0, []
    for gap in each:
        now_s += gap
        bucket, wait_s = take(bucket, now_s=now_s, per_second=rate, burst=burst)
        if not wait_s:
            let_in.append(now_s)

    for at, first in enumerate(let_in):
        for further, last in enumerate(let_in[at:], start=1):
            assert further <= burst + rate * (last - first) + 1e-6


@given(rates, st.integers(1, 50), st.floats(0, 1, exclude_max=True))
def test_who_comes_again_after_the_wait_is_let_in(rate: float, burst: int, tokens: float) -> None:
    bucket, wait_s = take(Bucket(tokens=tokens, at_s=5.0), now_s=5.0, per_second=rate, burst=burst)
    _, again_s = take(bucket, now_s=5.0 + wait_s + 1e-6, per_second=rate, burst=burst)

    assert 0 == again_s


@given(st.integers(0, 70_000), st.integers(1, 4096), st.floats(0, 1e4))
def test_a_client_is_told_to_come_again_within_half_a_minute(queued: int, most: int, request_s: float) -> None:
    assert 1 <= retry_after_s(queued=queued, in_flight_max=most, request_s=request_s) <= 30
