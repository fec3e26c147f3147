from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serving.gateway.split import choose

weights = st.lists(st.floats(0, 100), min_size=1, max_size=8).filter(lambda each: sum(each) > 1e-3)


@given(weights, st.integers(0, 1 << 50))
def test_a_version_without_weight_is_never_chosen(each: list[float], count: int) -> None:
    assert each[choose(each, count)] > 0


@given(weights, st.integers(0, 1 << 40), st.integers(1, 500))
def test_in_every_stretch_of_requests_each_version_gets_its_share_within_a_few(
    each: list[float], first: int, requests: int
) -> None:
    chosen = [choose(each, first + at) for at in range(requests)]
    off = [abs(chosen.count(at) - requests * weight / sum(each)) for at, weight in enumerate(each)]

    assert max(off) <= 4


def test_a_tenth_is_every_tenth_request_or_so() -> None:
    chosen = [choose([90, 10], count) for count in range(1000)]

    assert 100 == chosen.count(1)
    assert "1" * 2 not in "".join(map(str, chosen))
