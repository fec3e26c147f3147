from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from serving.errors import DeadlineImpossible
from tasks.spot.policy import (
    Decision,
    Placement,
    PolicyParameters,
    Rule,
    Situation,
    check_deadline_feasible,
    count_workers_needed,
    decide,
    decide_placements,
    find_rules,
    is_at_least,
)
from tests.tasks.spot.situations import HOUR, PARAMETERS, make_situation, traces

CHANGEOVER = PARAMETERS.changeover_seconds


def with_slack(seconds: float, **changed: Any) -> Situation:
    """Return ten hours of work, and so much more time."""
    return make_situation(left_seconds=10 * HOUR + seconds, **changed)


def test_no_machine_is_kept_once_the_work_is_done() -> None:
    for placement in Placement:
        assert Rule.DONE == decide(make_situation(work_seconds=0.0, placement=placement, spot_up=True), PARAMETERS).rule


def test_spot_is_kept_until_it_is_taken_however_late_it_is() -> None:
    late = with_slack(-HOUR, placement=Placement.SPOT, spot_up=True)

    assert (Placement.SPOT, "Spot is kept until it is taken.") == _of(decide(late, PARAMETERS))
    assert Placement.ON_DEMAND == decide(replace(late, spot_up=False), PARAMETERS).placement


def test_spot_that_boots_is_kept_only_while_on_demand_would_be_in_time_were_it_taken() -> None:
    booting = {"placement": Placement.SPOT, "spot_up": True, "booting_seconds": CHANGEOVER}

    assert Rule.SPOT_KEPT == decide(with_slack(CHANGEOVER + 60, **booting), PARAMETERS).rule
    assert Rule.SPOT_BOOTS_TOO_LONG == decide(with_slack(CHANGEOVER + 59, **booting), PARAMETERS).rule
    assert Rule.SPOT_KEPT == decide(with_slack(CHANGEOVER + 30, **booting | {"booting_seconds": 30}), PARAMETERS).rule


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_spot_that_is_not_cheaper_is_never_bought(ratio: float) -> None:
    parameters = replace(PARAMETERS, price_ratio=ratio)

    assert Rule.SPOT_NOT_CHEAPER == decide(make_situation(spot_up=True, spell_seconds=1e6), parameters).rule
    assert (
        Rule.SPOT_NOT_CHEAPER
        == decide(make_situation(spot_up=True, spell_seconds=1e6, placement=Placement.ON_DEMAND), parameters).rule
    )
    assert Rule.SPOT_KEPT == decide(make_situation(spot_up=True, placement=Placement.SPOT), parameters).rule


def test_an_idle_machine_takes_spot_as_soon_as_it_is_up() -> None:
    assert _of(decide(make_situation(spot_up=True), PARAMETERS)) == (
        Placement.SPOT,
        "Spot is up for 0 s, likely to last 1 h more; a move pays from 18 min.",
    )
    assert Rule.SPOT_PAYS == decide(with_slack(2 * CHANGEOVER, spot_up=True), PARAMETERS).rule


def test_with_less_slack_than_two_changeovers_spot_is_no_longer_taken() -> None:
    assert Rule.LAST_MOMENT == decide(with_slack(2 * CHANGEOVER - 1, spot_up=True), PARAMETERS).rule


def test_spot_that_is_hardly_cheaper_must_first_have_lasted() -> None:
    parameters = replace(PARAMETERS, price_ratio=1.1)

    # A changeover of 12 min at 11 times, 2 h 12 min, less the hour that each spell is given: 36 min twice.
    assert Rule.SLACK_ENOUGH == decide(make_situation(spot_up=True, spell_seconds=35 * 60), parameters).rule
    assert Rule.SPOT_PAYS == decide(make_situation(spot_up=True, spell_seconds=36 * 60), parameters).rule


def test_on_demand_is_left_for_spot_once_the_spell_pays_for_two_changeovers_and_their_slack() -> None:
    # 1.5 times 24 min and 0.4 times 3 h 40 min are 2 h 48 min, less the hour: 54 min twice.
    on_demand = with_slack(HOUR, placement=Placement.ON_DEMAND, spot_up=True)

    assert (
        Placement.ON_DEMAND,
        "On-demand is kept: spot is up for 50 min, likely to last 2 h 40 min more; a move pays from 2 h 48 min.",
    ) == _of(decide(replace(on_demand, spell_seconds=50 * 60), PARAMETERS))
    assert Placement.SPOT == decide(replace(on_demand, spell_seconds=54 * 60), PARAMETERS).placement


def test_on_demand_is_not_left_to_wait_nor_without_slack_for_two_changeovers() -> None:
    assert (
        "On-demand is kept: spot is gone." == decide(make_situation(placement=Placement.ON_DEMAND), PARAMETERS).reason
    )
    assert (
        "On-demand is kept: 20 min of slack, and two changeovers take 24 min."
        == decide(with_slack(1200, placement=Placement.ON_DEMAND, spot_up=True, spell_seconds=1e6), PARAMETERS).reason
    )


def test_at_the_last_moment_it_is_on_demand_to_the_end() -> None:
    assert _of(decide(with_slack(2 * CHANGEOVER + 59), PARAMETERS)) == (
        Placement.ON_DEMAND,
        "On-demand to the end: 24 min 59 s of slack, and two changeovers take 24 min, with 1 min to the next decision.",
    )


def test_spot_is_waited_for_while_a_fifth_of_the_time_and_a_changeover_are_slack() -> None:
    # 0.2 * left + 720 s of slack, left being the work and the slack.
    enough = (0.2 * 10 * HOUR + CHANGEOVER) / 0.8
    gone = {"spell_seconds": 10 * HOUR}

    assert Rule.SLACK_ENOUGH == decide(with_slack(enough + 1, **gone), PARAMETERS).rule
    assert Rule.SHORT_OF_SLACK == decide(with_slack(enough - 1, **gone), PARAMETERS).rule
    assert (
        "Waiting for spot: 10 h of the 20 h left need not be worked, 20% and a changeover are enough (spot is gone)."
        == decide(make_situation(**gone), PARAMETERS).reason
    )


def test_a_short_gap_is_waited_out_with_less_slack() -> None:
    # 0.05 * left + 720 s of slack.
    enough = (0.05 * 10 * HOUR + CHANGEOVER) / 0.95

    assert Rule.SHORT_GAP == decide(with_slack(enough + 1, spell_seconds=660), PARAMETERS).rule
    assert Rule.SHORT_OF_SLACK == decide(with_slack(enough + 1, spell_seconds=661), PARAMETERS).rule
    assert Rule.SHORT_OF_SLACK == decide(with_slack(enough - 1, spell_seconds=0), PARAMETERS).rule
    assert _of(decide(with_slack(3000, spell_seconds=300), PARAMETERS)) == (
        Placement.IDLE,
        "Waiting: spot is gone for 5 min, a changeover takes 12 min.",
    )


def test_one_interval_is_waited_even_where_a_changeover_takes_less() -> None:
    quick = replace(PARAMETERS, changeover_seconds=5.0)

    assert Rule.SHORT_GAP == decide(with_slack(HOUR), quick).rule
    assert Rule.SHORT_OF_SLACK == decide(with_slack(HOUR, spell_seconds=60), quick).rule


def test_where_on_demand_is_not_to_be_had_spot_will_do() -> None:
    refused = {"on_demand_up": False}

    assert Rule.REFUSED == decide(with_slack(60, **refused), PARAMETERS).rule
    assert Rule.REFUSED_BUT_SPOT == decide(with_slack(60, spot_up=True, **refused), PARAMETERS).rule
    assert Rule.ON_DEMAND_KEPT == decide(with_slack(60, placement=Placement.ON_DEMAND, **refused), PARAMETERS).rule
    booting = {"placement": Placement.SPOT, "spot_up": True, "booting_seconds": CHANGEOVER}
    assert Rule.SPOT_KEPT == decide(with_slack(60, **booting, **refused), PARAMETERS).rule


def test_the_reserve_is_no_time_to_be_used() -> None:
    reserved = replace(PARAMETERS, reserve_seconds=HOUR)

    assert decide(with_slack(2 * HOUR), PARAMETERS).rule == decide(with_slack(3 * HOUR), reserved).rule


figures = {
    "work_seconds": st.floats(-1, 2e5),
    "left_seconds": st.floats(-2e5, 4e5),
    "placement": st.sampled_from([int(placement) for placement in Placement]),
    "spot_up": st.booleans(),
    "spell_seconds": st.floats(-2e5, 2e5),
    "booting_seconds": st.floats(-10, 5000),
    "on_demand_up": st.booleans(),
}
situations = st.builds(Situation, **figures)
any_parameters = st.builds(
    PolicyParameters,
    changeover_seconds=st.floats(0, 1e4) | st.just(0.0),
    price_ratio=st.floats(0, 20),
    interval_seconds=st.floats(0, 1e4),
    spell_seconds=st.floats(0, 1e5),
    reserve_seconds=st.floats(0, 1e4),
)

# Spot that is worth a move, and moves that take time: where a decision may let the last moment pass.
moving_parameters = st.builds(
    PolicyParameters,
    changeover_seconds=st.floats(1, 5000),
    price_ratio=st.floats(2, 20),
    interval_seconds=st.floats(1, 5000),
    spell_seconds=st.floats(1e4, 1e5),
    reserve_seconds=st.floats(0, 1e4),
)


@settings(max_examples=150)
@given(situations, any_parameters)
def test_any_reading_of_the_clock_leads_to_a_decision_with_a_reason(
    situation: Situation, parameters: PolicyParameters
) -> None:
    decision = decide(situation, parameters)

    assert decision.reason.endswith(".")
    assert situation.spot_up or decision.placement != Placement.SPOT
    assert (
        situation.on_demand_up
        or decision.placement != Placement.ON_DEMAND
        or situation.placement == Placement.ON_DEMAND
    )


@settings(max_examples=150)
@given(st.lists(situations, min_size=1, max_size=8), any_parameters)
def test_many_machines_are_decided_as_each_alone(several: list[Situation], parameters: PolicyParameters) -> None:
    together = Situation(**{name: np.array([getattr(one, name) for one in several]) for name in figures})

    assert [decide(one, parameters).rule for one in several] == list(find_rules(together, parameters))
    assert [decide(one, parameters).placement for one in several] == list(decide_placements(together, parameters))


@settings(max_examples=1500)
@given(situations, moving_parameters, st.floats(0, 2))
def test_no_decision_lets_the_last_moment_pass(
    situation: Situation, parameters: PolicyParameters, beyond: float
) -> None:
    """Whatever happens until the next decision, on-demand is still in time then, if it is now."""
    d, e = parameters.changeover_seconds, parameters.interval_seconds
    booting = float(np.clip(situation.booting_seconds, 0, d))
    # A machine that boots has used up some of the two changeovers of slack that it was started with.
    at_least = d + booting if situation.placement == Placement.SPOT else d
    if situation.placement == Placement.ON_DEMAND:
        at_least = booting
    left = situation.work_seconds + parameters.reserve_seconds + at_least + beyond * max(d, e)
    now = replace(situation, left_seconds=left, booting_seconds=booting, on_demand_up=True)
    if now.work_seconds <= 0:
        return

    placement, slack_seconds = decide(now, parameters).placement, float(now.slack_seconds(parameters))
    if placement == Placement.IDLE:
        assert slack_seconds - e >= d - 1e-3
    elif placement == Placement.SPOT:
        boots = booting if placement == now.current_placement else d
        # Taken at the next decision, it has wasted what it booted; kept, it may be taken later and waste the rest.
        assert slack_seconds - min(e, boots) >= d + max(boots - e, 0.0) - 1e-3


def test_spot_that_was_taken_counts_as_idle() -> None:
    for slack_seconds in (60, 3000, HOUR, 10 * HOUR):
        taken, nowhere = (
            with_slack(slack_seconds, placement=Placement.SPOT, booting_seconds=600),
            with_slack(slack_seconds),
        )

        assert decide(nowhere, PARAMETERS).rule == decide(taken, PARAMETERS).rule


@settings(max_examples=60)
@given(st.data(), st.floats(0, 3000), st.floats(0, 3000), st.floats(0, 9000))
def test_workers_that_share_their_work_are_not_late(
    data: st.DataObject, changeover: float, each: float, slack_seconds: float
) -> None:
    spot_NT: NDArray[np.bool_] = data.draw(traces(ticks=40))
    workers, tick = len(spot_NT), 300.0
    shared = PolicyParameters(changeover_seconds=changeover, price_ratio=3.0, interval_seconds=tick)
    deadline, left = each + changeover + slack_seconds, each * workers
    placement, booting, spell = [Placement.IDLE] * workers, [0.0] * workers, [0.0] * workers

    for at in range(int(deadline // tick) + 1):
        up = [bool(spot_NT[worker, min(at, 39)]) for worker in range(workers)]
        for worker in range(workers):
            spell[worker] = spell[worker] + tick if at and up[worker] == spot_NT[worker, min(at - 1, 39)] else 0.0
            now = Situation(
                work_seconds=left / workers,
                left_seconds=deadline - at * tick,
                placement=placement[worker],
                spot_up=up[worker],
                spell_seconds=spell[worker],
                booting_seconds=booting[worker],
            )
            goes = decide(now, shared).placement
            if goes != now.current_placement:
                booting[worker] = changeover
            placement[worker] = goes
        for worker in range(workers):
            if placement[worker] != Placement.IDLE:
                used = min(tick, deadline - at * tick)
                left -= max(used - booting[worker], 0.0)
                booting[worker] = max(booting[worker] - used, 0.0)

    assert left <= 1e-3


def _of(decision: Decision) -> tuple[Placement, str]:
    return decision.placement, decision.reason


@pytest.mark.parametrize("name", ["changeover_seconds", "price_ratio", "interval_seconds", "reserve_seconds"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_terms_are_finite_and_not_negative(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be finite and not negative, got {value}"):
        replace(PARAMETERS, **{name: value})


@pytest.mark.parametrize("name", ["work_seconds", "left_seconds", "spell_seconds", "booting_seconds"])
def test_a_situation_is_of_finite_figures(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be finite, got nan"):
        make_situation(**{name: math.nan})


def test_slack_is_the_time_that_need_not_be_worked_and_is_no_part_of_the_reserve() -> None:
    assert (10 * HOUR, 9 * HOUR) == (
        make_situation().slack_seconds(PARAMETERS),
        make_situation().slack_seconds(replace(PARAMETERS, reserve_seconds=HOUR)),
    )


def test_a_placement_on_spot_that_is_gone_is_idle() -> None:
    placement = np.array([Placement.SPOT, Placement.SPOT, Placement.ON_DEMAND])
    up = np.array([True, False, False])

    assert [Placement.SPOT, Placement.IDLE, Placement.ON_DEMAND] == list(
        np.asarray(make_situation(placement=placement, spot_up=up).current_placement)
    )


def test_a_spell_is_expected_to_last_the_longer_the_longer_it_has_lasted() -> None:
    assert 3600 == float(make_situation(spot_up=True).expected_spell_seconds(PARAMETERS))
    assert 3600 + 2 * 1800 == float(make_situation(spot_up=True, spell_seconds=1800).expected_spell_seconds(PARAMETERS))
    assert 600 == float(make_situation(spot_up=True).expected_spell_seconds(replace(PARAMETERS, spell_seconds=600)))


def test_a_negative_spell_has_just_begun() -> None:
    assert 3600 == float(make_situation(spot_up=True, spell_seconds=-50).expected_spell_seconds(PARAMETERS))
    assert 0 == float(make_situation(spell_seconds=-50).gap_seconds())


def test_a_move_from_idle_must_earn_one_changeover() -> None:
    assert 1.5 * 720 == pytest.approx(float(make_situation(spot_up=True).break_even_seconds(PARAMETERS)))


def test_a_move_from_on_demand_must_earn_two_and_the_slack_they_use_up() -> None:
    tight, loose = (make_situation(placement=Placement.ON_DEMAND, left_seconds=hours * HOUR) for hours in (11, 20))

    # One hour of slack less two changeovers holds three of them: one falls due every 3 h 40 min.
    assert 1.5 * (2 * 720 + 0.4 * 720 * 11 * 3600 / 2160) == pytest.approx(float(tight.break_even_seconds(PARAMETERS)))
    assert float(loose.break_even_seconds(PARAMETERS)) < float(tight.break_even_seconds(PARAMETERS))


def test_no_spell_pays_where_spot_is_not_cheaper() -> None:
    assert math.inf == make_situation(spot_up=True).break_even_seconds(replace(PARAMETERS, price_ratio=1.0))


def test_what_floating_point_drops_is_no_time() -> None:
    assert [True, False] == list(is_at_least(np.array([0.1 + 0.2, 0.29]), 0.30000000001))


def test_figures_may_be_arrays_of_many_machines() -> None:
    many = Situation(
        work_seconds=np.array([HOUR, 2 * HOUR]),
        left_seconds=3 * HOUR,
        placement=Placement.IDLE,
        spot_up=np.array([True, False]),
        spell_seconds=np.array([600.0, 60.0]),
    )

    assert [2 * HOUR, HOUR] == list(np.asarray(many.slack_seconds(PolicyParameters(**_plain()))))
    assert [0, 60] == list(np.asarray(many.gap_seconds()))


def _plain() -> dict[str, float]:
    return {"changeover_seconds": 0.0, "price_ratio": 3.0, "interval_seconds": 60.0}


spans = st.integers(0, 10**6)


def test_a_deadline_that_on_demand_alone_would_miss_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(DeadlineImpossible) as refused:
        check_deadline_feasible(6 * 3600, 5.5 * 3600, 240, reserve_seconds=60)

    assert str(refused.value) == (
        "On-demand from now on must be done by the deadline: 6 h of work over 1 worker(s) take 6 h, with 4 min of "
        "changeover and 1 min of reserve 6 h 5 min, got 5 h 30 min. Move the deadline by at least 35 min, or allow 2 "
        "workers."
    )


def test_workers_are_no_help_where_the_changeover_alone_takes_too_long() -> None:
    with pytest.raises(DeadlineImpossible, match=r"Move the deadline by at least 10 min 10 s\.$"):
        check_deadline_feasible(10, 0, 600)


def test_a_deadline_that_is_just_met_is_possible() -> None:
    check_deadline_feasible(3600, 3660, 60)
    check_deadline_feasible(0, 0, 60)


def test_a_deadline_that_has_passed_is_refused() -> None:
    with pytest.raises(DeadlineImpossible, match="got -1 min"):
        check_deadline_feasible(3600, -60, 60)


@pytest.mark.parametrize(
    ("work", "left", "changeover", "workers"),
    # (work / n + 2d) / left: 0.8 exactly with 1; 0.81 with 1; 10 h in 2 h less two changeovers; nothing to do.
    [(8000, 10000, 0, 1), (8100, 10000, 0, 2), (36000, 7200, 360, 8), (0, 100, 60, 1)],
)
def test_workers_are_as_many_as_leave_a_fifth(work: float, left: float, changeover: float, workers: int) -> None:
    assert workers == count_workers_needed(work, left, changeover, workers_max=64)


def test_all_the_workers_allowed_where_they_are_in_time_but_leave_no_fifth() -> None:
    assert 4 == count_workers_needed(36000, 9100, 60, workers_max=4)
    assert 4 == count_workers_needed(36000, 9100, 4000 / 2 - 1900, workers_max=4)


def test_a_deadline_that_all_workers_would_miss_is_refused() -> None:
    with pytest.raises(DeadlineImpossible, match="over 2 worker"):
        count_workers_needed(36000, 9100, 60, workers_max=2)


def test_there_must_be_a_worker() -> None:
    with pytest.raises(ValueError, match="workers_max must be at least 1, got 0"):
        count_workers_needed(1, 1, 0, workers_max=0)


@settings(max_examples=150)
@given(spans.filter(bool), spans.filter(bool), st.floats(0, 1e5), st.integers(1, 50))
def test_one_worker_less_would_leave_too_little_slack(work: int, left: int, changeover: float, most: int) -> None:
    try:
        workers = count_workers_needed(work, left, changeover, workers_max=most)
    except DeadlineImpossible:
        assert work / most + changeover > left
        return

    share = lambda n: (work / n + 2 * changeover) / left
    assert workers == 1 or share(workers - 1) > 0.8 - 1e-6
    assert workers == most or share(workers) <= 0.8 + 1e-6
