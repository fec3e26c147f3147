from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tasks.scheduler.scenario import Candidate, find_late_violation, rank_candidate
from tests.tasks.scheduler.values import THIS, scenario

# 7,200 requests of which 72 may be late.


@pytest.mark.parametrize(
    ("late", "violation"),
    [
        (0.0, None),
        (0.008, None),
        (0.009, "0.900% of the rows came late; 1.000% may, too near for a promise"),
        (0.02, "2.000% of the rows came late, 1.000% may"),
    ],
)
def test_a_promise_is_kept_with_a_margin(late: float, violation: str | None) -> None:
    assert violation == find_late_violation(scenario(), late)


def test_rows_that_are_late_together_need_a_larger_margin() -> None:
    # Forty rows at once may be eighty another time; forty one by one are forty or so.
    assert find_late_violation(scenario(), 40 / 7200, deviation=40) is not None
    assert find_late_violation(scenario(), 40 / 7200, deviation=math.sqrt(40)) is None
    assert find_late_violation(replace(scenario(), deviations=0.0), 40 / 7200, deviation=40) is None


def test_candidates_that_keep_the_promise_come_first_the_cheapest_before_others() -> None:
    expensive, cheap = (
        Candidate(mode="online", policy="always-on", machines=1, paid_seconds=seconds) for seconds in (9.0, 5.0)
    )
    broken = replace(cheap, paid_seconds=1.0, late_share=0.5, violation="late")

    assert [cheap, expensive, broken] == sorted([broken, expensive, cheap], key=rank_candidate)
    assert 5 * THIS.on_demand == cheap.usd(THIS)
