from __future__ import annotations

from dataclasses import replace

import pytest

from tasks.scheduler.problem import Candidate, late_flaw, rank
from tests.tasks.scheduler.values import THIS, problem

# 7,200 requests of which 72 may be late.


@pytest.mark.parametrize(
    ("late", "flaw"),
    [
        (0.0, None),
        (0.008, None),
        (0.009, "0.900% of the rows came late; 1.000% may, too near for a promise"),
        (0.02, "2.000% of the rows came late, 1.000% may"),
    ],
)
def test_a_promise_is_kept_with_room_to_spare(late: float, flaw: str | None) -> None:
    assert flaw == late_flaw(problem(), late)


def test_rows_that_are_late_together_make_the_room_larger() -> None:
    # Forty rows at once may be eighty another time; forty one by one are forty or so.
    assert late_flaw(problem(), 40 / 7200, episodes=1) is not None
    assert late_flaw(problem(), 40 / 7200, episodes=40) is None
    assert late_flaw(replace(problem(), chance=0.0), 40 / 7200, episodes=1) is None


def test_those_that_keep_the_promise_come_first_and_the_cheapest_of_them() -> None:
    dear, cheap = (
        Candidate(mode="online", policy="always-on", machines=1, paid_seconds=seconds) for seconds in (9.0, 5.0)
    )
    broken = replace(cheap, paid_seconds=1.0, late=0.5, flaw="late")

    assert [cheap, dear, broken] == sorted([broken, dear, cheap], key=rank)
    assert 5 * THIS.on_demand == cheap.usd(THIS)
