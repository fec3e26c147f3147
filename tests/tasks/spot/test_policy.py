from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tasks.spot.policy import Decision, Rule, decide, places, rules
from tasks.spot.situation import Place, Situation, Terms
from tests.tasks.spot.situations import HOUR, TERMS, seen, traces

CHANGEOVER = TERMS.changeover_seconds


def with_slack(seconds: float, **changed: Any) -> Situation:
    """Return ten hours of work, and so much more time."""
    return seen(left_seconds=10 * HOUR + seconds, **changed)


def test_no_machine_is_kept_once_the_work_is_done() -> None:
    for place in Place:
        assert Rule.DONE == decide(seen(work_seconds=0.0, place=place, spot_up=True), TERMS).rule


def test_spot_is_kept_until_it_is_taken_however_late_it_is() -> None:
    late = with_slack(-HOUR, place=Place.SPOT, spot_up=True)

    assert (Place.SPOT, "Spot is kept until it is taken.") == _of(decide(late, TERMS))
    assert Place.ON_DEMAND == decide(replace(late, spot_up=False), TERMS).place


def test_spot_that_boots_is_kept_only_while_on_demand_would_be_in_time_were_it_taken() -> None:
    booting = {"place": Place.SPOT, "spot_up": True, "booting_seconds": CHANGEOVER}

    assert Rule.SPOT_KEPT == decide(with_slack(CHANGEOVER + 60, **booting), TERMS).rule
    assert Rule.SPOT_BOOTS_TOO_LONG == decide(with_slack(CHANGEOVER + 59, **booting), TERMS).rule
    assert Rule.SPOT_KEPT == decide(with_slack(CHANGEOVER + 30, **booting | {"booting_seconds": 30}), TERMS).rule


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_spot_that_is_not_cheaper_is_never_bought(ratio: float) -> None:
    terms = replace(TERMS, price_ratio=ratio)

    assert Rule.SPOT_NOT_CHEAPER == decide(seen(spot_up=True, spell_seconds=1e6), terms).rule
    assert Rule.SPOT_NOT_CHEAPER == decide(seen(spot_up=True, spell_seconds=1e6, place=Place.ON_DEMAND), terms).rule
    assert Rule.SPOT_KEPT == decide(seen(spot_up=True, place=Place.SPOT), terms).rule


def test_from_nowhere_spot_is_taken_as_soon_as_it_is_up() -> None:
    assert _of(decide(seen(spot_up=True), TERMS)) == (
        Place.SPOT,
        "Spot is up for 0 s, likely to last 1 h more; a move pays from 18 min.",
    )
    assert Rule.SPOT_PAYS == decide(with_slack(2 * CHANGEOVER, spot_up=True), TERMS).rule


def test_with_less_slack_than_two_changeovers_spot_is_no_longer_taken() -> None:
    assert Rule.LAST_MOMENT == decide(with_slack(2 * CHANGEOVER - 1, spot_up=True), TERMS).rule


def test_spot_that_is_hardly_cheaper_must_first_have_lasted() -> None:
    terms = replace(TERMS, price_ratio=1.1)

    # A changeover of 12 min at 11 times, 2 h 12 min, less the hour that each spell is given: 36 min twice.
    assert Rule.SLACK_ENOUGH == decide(seen(spot_up=True, spell_seconds=35 * 60), terms).rule
    assert Rule.SPOT_PAYS == decide(seen(spot_up=True, spell_seconds=36 * 60), terms).rule


def test_on_demand_is_left_for_spot_once_the_spell_pays_for_two_changeovers_and_their_slack() -> None:
    # 1.5 times 24 min and 0.4 times 3 h 40 min are 2 h 48 min, less the hour: 54 min twice.
    on_demand = with_slack(HOUR, place=Place.ON_DEMAND, spot_up=True)

    assert (
        Place.ON_DEMAND,
        "On-demand is kept: spot is up for 50 min, likely to last 2 h 40 min more; a move pays from 2 h 48 min.",
    ) == _of(decide(replace(on_demand, spell_seconds=50 * 60), TERMS))
    assert Place.SPOT == decide(replace(on_demand, spell_seconds=54 * 60), TERMS).place


def test_on_demand_is_not_left_to_wait_nor_without_slack_for_two_changeovers() -> None:
    assert "On-demand is kept: spot is gone." == decide(seen(place=Place.ON_DEMAND), TERMS).reason
    assert (
        "On-demand is kept: 20 min of slack, and two changeovers take 24 min."
        == decide(with_slack(1200, place=Place.ON_DEMAND, spot_up=True, spell_seconds=1e6), TERMS).reason
    )


def test_at_the_last_moment_it_is_on_demand_to_the_end() -> None:
    assert _of(decide(with_slack(2 * CHANGEOVER + 59), TERMS)) == (
        Place.ON_DEMAND,
        "On-demand to the end: 24 min 59 s of slack, and two changeovers take 24 min, with 1 min to the next decision.",
    )


def test_spot_is_waited_for_while_a_fifth_of_the_time_and_a_changeover_are_slack() -> None:
    # 0.2 * left + 720 s of slack, left being the work and the slack.
    enough = (0.2 * 10 * HOUR + CHANGEOVER) / 0.8
    gone = {"spell_seconds": 10 * HOUR}

    assert Rule.SLACK_ENOUGH == decide(with_slack(enough + 1, **gone), TERMS).rule
    assert Rule.SHORT_OF_SLACK == decide(with_slack(enough - 1, **gone), TERMS).rule
    assert (
        "Waiting for spot: 10 h of the 20 h left need not be worked, 20% and a changeover are enough (spot is gone)."
        == decide(seen(**gone), TERMS).reason
    )


def test_a_short_gap_is_waited_out_with_less_slack() -> None:
    # 0.05 * left + 720 s of slack.
    enough = (0.05 * 10 * HOUR + CHANGEOVER) / 0.95

    assert Rule.SHORT_GAP == decide(with_slack(enough + 1, spell_seconds=660), TERMS).rule
    assert Rule.SHORT_OF_SLACK == decide(with_slack(enough + 1, spell_seconds=661), TERMS).rule
    assert Rule.SHORT_OF_SLACK == decide(with_slack(enough - 1, spell_seconds=0), TERMS).rule
    assert _of(decide(with_slack(3000, spell_seconds=300), TERMS)) == (
        Place.IDLE,
        "Waiting: spot is gone for 5 min, a changeover takes 12 min.",
    )


def test_one_interval_is_waited_even_where_a_changeover_takes_less() -> None:
    quick = replace(TERMS, changeover_seconds=5.0)

    assert Rule.SHORT_GAP == decide(with_slack(HOUR), quick).rule
    assert Rule.SHORT_OF_SLACK == decide(with_slack(HOUR, spell_seconds=60), quick).rule


def test_where_on_demand_is_not_to_be_had_spot_will_do() -> None:
    refused = {"on_demand_up": False}

    assert Rule.REFUSED == decide(with_slack(60, **refused), TERMS).rule
    assert Rule.REFUSED_BUT_SPOT == decide(with_slack(60, spot_up=True, **refused), TERMS).rule
    assert Rule.ON_DEMAND_KEPT == decide(with_slack(60, place=Place.ON_DEMAND, **refused), TERMS).rule
    booting = {"place": Place.SPOT, "spot_up": True, "booting_seconds": CHANGEOVER}
    assert Rule.SPOT_KEPT == decide(with_slack(60, **booting, **refused), TERMS).rule


def test_the_reserve_is_no_time_to_be_used() -> None:
    reserved = replace(TERMS, reserve_seconds=HOUR)

    assert decide(with_slack(2 * HOUR), TERMS).rule == decide(with_slack(3 * HOUR), reserved).rule


figures = {
    "work_seconds": st.floats(-1, 2e5),
    "left_seconds": st.floats(-2e5, 4e5),
    "place": st.sampled_from([int(place) for place in Place]),
    "spot_up": st.booleans(),
    "spell_seconds": st.floats(-2e5, 2e5),
    "booting_seconds": st.floats(-10, 5000),
    "on_demand_up": st.booleans(),
}
situations = st.builds(Situation, **figures)
terms = st.builds(
    Terms,
    changeover_seconds=st.floats(0, 1e4) | st.just(0.0),
    price_ratio=st.floats(0, 20),
    interval_seconds=st.floats(0, 1e4),
    spell_seconds=st.floats(0, 1e5),
    reserve_seconds=st.floats(0, 1e4),
)

# Spot that is worth a move, and moves that take time: where a decision may let the last moment pass.
moving_terms = st.builds(
    Terms,
    changeover_seconds=st.floats(1, 5000),
    price_ratio=st.floats(2, 20),
    interval_seconds=st.floats(1, 5000),
    spell_seconds=st.floats(1e4, 1e5),
    reserve_seconds=st.floats(0, 1e4),
)


@settings(deadline=None, max_examples=150)
@given(situations, terms)
def test_whatever_a_clock_says_there_is_a_decision_with_a_reason(situation: Situation, given_terms: Terms) -> None:
    decision = decide(situation, given_terms)

    assert decision.reason.endswith(".")
    assert situation.spot_up or decision.place != Place.SPOT
    assert situation.on_demand_up or decision.place != Place.ON_DEMAND or situation.place == Place.ON_DEMAND


@settings(deadline=None, max_examples=150)
@given(st.lists(situations, min_size=1, max_size=8), terms)
def test_many_machines_are_decided_as_each_alone(several: list[Situation], given_terms: Terms) -> None:
    together = Situation(**{name: np.array([getattr(one, name) for one in several]) for name in figures})

    assert [decide(one, given_terms).rule for one in several] == list(rules(together, given_terms))
    assert [decide(one, given_terms).place for one in several] == list(places(together, given_terms))


@settings(deadline=None, max_examples=1500)
@given(situations, moving_terms, st.floats(0, 2))
def test_no_decision_lets_the_last_moment_pass(situation: Situation, given_terms: Terms, beyond: float) -> None:
    """Whatever happens until the next decision, on-demand is still in time then, if it is now."""
    d, e = given_terms.changeover_seconds, given_terms.interval_seconds
    booting = float(np.clip(situation.booting_seconds, 0, d))
    # A machine that boots has used up some of the two changeovers of slack that it was started with.
    at_least = d + booting if situation.place == Place.SPOT else d
    if situation.place == Place.ON_DEMAND:
        at_least = booting
    left = situation.work_seconds + given_terms.reserve_seconds + at_least + beyond * max(d, e)
    now = replace(situation, left_seconds=left, booting_seconds=booting, on_demand_up=True)
    if now.work_seconds <= 0:
        return

    place, slack = decide(now, given_terms).place, float(now.slack(given_terms))
    if place == Place.IDLE:
        assert slack - e >= d - 1e-3
    elif place == Place.SPOT:
        boots = booting if place == now.now_on else d
        # Taken at the next decision, it has wasted what it booted; kept, it may be taken later and waste the rest.
        assert slack - min(e, boots) >= d + max(boots - e, 0.0) - 1e-3


def test_spot_that_was_taken_is_decided_as_from_nowhere() -> None:
    for slack in (60, 3000, HOUR, 10 * HOUR):
        taken, nowhere = with_slack(slack, place=Place.SPOT, booting_seconds=600), with_slack(slack)

        assert decide(nowhere, TERMS).rule == decide(taken, TERMS).rule


@settings(deadline=None, max_examples=60)
@given(st.data(), st.floats(0, 3000), st.floats(0, 3000), st.floats(0, 9000))
def test_workers_that_share_their_work_are_not_late(
    data: st.DataObject, changeover: float, each: float, slack: float
) -> None:
    spot_NT: NDArray[np.bool_] = data.draw(traces(ticks=40))
    workers, tick = len(spot_NT), 300.0
    shared = Terms(changeover_seconds=changeover, price_ratio=3.0, interval_seconds=tick)
    deadline, left = each + changeover + slack, each * workers
    place, booting, spell = [Place.IDLE] * workers, [0.0] * workers, [0.0] * workers

    for at in range(int(deadline // tick) + 1):
        up = [bool(spot_NT[worker, min(at, 39)]) for worker in range(workers)]
        for worker in range(workers):
            spell[worker] = spell[worker] + tick if at and up[worker] == spot_NT[worker, min(at - 1, 39)] else 0.0
            now = Situation(
                work_seconds=left / workers,
                left_seconds=deadline - at * tick,
                place=place[worker],
                spot_up=up[worker],
                spell_seconds=spell[worker],
                booting_seconds=booting[worker],
            )
            goes = decide(now, shared).place
            if goes != now.now_on:
                booting[worker] = changeover
            place[worker] = goes
        for worker in range(workers):
            if place[worker] != Place.IDLE:
                used = min(tick, deadline - at * tick)
                left -= max(used - booting[worker], 0.0)
                booting[worker] = max(booting[worker] - used, 0.0)

    assert left <= 1e-3


def _of(decision: Decision) -> tuple[Place, str]:
    return decision.place, decision.reason
