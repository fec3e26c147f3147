from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from tasks.spot.situation import Place, Situation, Terms, reach
from tests.tasks.spot.situations import HOUR, TERMS, seen


@pytest.mark.parametrize("name", ["changeover_seconds", "price_ratio", "interval_seconds", "reserve_seconds"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_terms_are_finite_and_not_negative(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be finite and not negative, got {value}"):
        replace(TERMS, **{name: value})


@pytest.mark.parametrize("name", ["work_seconds", "left_seconds", "spell_seconds", "booting_seconds"])
def test_a_situation_is_of_finite_figures(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be finite, got nan"):
        seen(**{name: math.nan})


def test_slack_is_the_time_that_need_not_be_worked_and_is_no_part_of_the_reserve() -> None:
    assert (10 * HOUR, 9 * HOUR) == (seen().slack(TERMS), seen().slack(replace(TERMS, reserve_seconds=HOUR)))


def test_on_spot_that_is_gone_is_nowhere() -> None:
    place = np.array([Place.SPOT, Place.SPOT, Place.ON_DEMAND])
    up = np.array([True, False, False])

    assert [Place.SPOT, Place.IDLE, Place.ON_DEMAND] == list(np.asarray(seen(place=place, spot_up=up).now_on))


def test_a_spell_is_expected_to_last_the_longer_the_longer_it_has_lasted() -> None:
    assert 3600 == float(seen(spot_up=True).life(TERMS))
    assert 3600 + 2 * 1800 == float(seen(spot_up=True, spell_seconds=1800).life(TERMS))
    assert 600 == float(seen(spot_up=True).life(replace(TERMS, spell_seconds=600)))


def test_a_spell_that_a_clock_says_to_be_negative_has_just_begun() -> None:
    assert 3600 == float(seen(spot_up=True, spell_seconds=-50).life(TERMS))
    assert 0 == float(seen(spell_seconds=-50).gone())


def test_a_move_from_nowhere_must_earn_one_changeover() -> None:
    assert 1.5 * 720 == pytest.approx(float(seen(spot_up=True).life_to_pay(TERMS)))


def test_a_move_from_on_demand_must_earn_two_and_the_slack_they_use_up() -> None:
    tight, loose = (seen(place=Place.ON_DEMAND, left_seconds=hours * HOUR) for hours in (11, 20))

    # One hour of slack less two changeovers holds three of them: one falls due every 3 h 40 min.
    assert 1.5 * (2 * 720 + 0.4 * 720 * 11 * 3600 / 2160) == pytest.approx(float(tight.life_to_pay(TERMS)))
    assert float(loose.life_to_pay(TERMS)) < float(tight.life_to_pay(TERMS))


def test_no_spell_pays_where_spot_is_not_cheaper() -> None:
    assert math.inf == seen(spot_up=True).life_to_pay(replace(TERMS, price_ratio=1.0))


def test_what_floating_point_drops_is_no_time() -> None:
    assert [True, False] == list(reach(np.array([0.1 + 0.2, 0.29]), 0.30000000001))


def test_figures_may_be_arrays_of_many_machines() -> None:
    many = Situation(
        work_seconds=np.array([HOUR, 2 * HOUR]),
        left_seconds=3 * HOUR,
        place=Place.IDLE,
        spot_up=np.array([True, False]),
        spell_seconds=np.array([600.0, 60.0]),
    )

    assert [2 * HOUR, HOUR] == list(np.asarray(many.slack(Terms(**_plain()))))
    assert [0, 60] == list(np.asarray(many.gone()))


def _plain() -> dict[str, float]:
    return {"changeover_seconds": 0.0, "price_ratio": 3.0, "interval_seconds": 60.0}
