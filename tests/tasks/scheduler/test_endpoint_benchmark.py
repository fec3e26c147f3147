from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.endpoint.load import LoopStats
from tasks.scheduler.endpoint_benchmark import estimate_jitter, fit_served_cost


def loop(callers: int, per_second: float, p50_ms: float = 1.0, p99_ms: float = 1.0, answers: int = 9999) -> LoopStats:
    return LoopStats(callers=callers, answers=answers, per_second=per_second, p50_ms=p50_ms, p99_ms=p99_ms)


@given(begin=st.floats(0, 50), each=st.floats(0.01, 50), replicas=st.integers(1, 8))
def test_two_numbers_of_callers_show_what_requests_take_together(begin: float, each: float, replicas: int) -> None:
    def measure(callers: int) -> LoopStats:
        together = callers / (replicas + 1)
        return loop(callers, 1000 * replicas * together / (begin + each * together))

    line = fit_served_cost(measure(4), measure(64), replicas)

    assert begin == pytest.approx(1000 * line.fixed_seconds, abs=1e-6)
    assert each == pytest.approx(1000 * line.row_seconds, rel=1e-6)


@pytest.mark.parametrize(("few", "many"), [(loop(1, 100), loop(2, 90)), (loop(1, 5), loop(1, 5))])
def test_a_server_that_is_no_faster_with_more_callers_does_not_batch(few: LoopStats, many: LoopStats) -> None:
    line = fit_served_cost(few, many, 1)

    assert 0 == line.fixed_seconds
    assert 1 / many.per_second == pytest.approx(line.row_seconds)


def test_the_jitter_follows_from_the_slowest_in_a_hundred_of_many_answers() -> None:
    # A sum of two draws of 0.3 has 0.3 / sqrt(2).
    ratio = math.exp(2.326 * 0.3 / math.sqrt(2))

    assert 0.3 == pytest.approx(estimate_jitter(loop(64, 1, 2.0, 2.0 * ratio)))
    assert 0 == estimate_jitter(loop(64, 1, 2.0, 2.0 * ratio, answers=100))
    assert 1 == estimate_jitter(loop(64, 1, 1.0, 1000.0))
