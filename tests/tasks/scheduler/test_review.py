from __future__ import annotations

from tasks.scheduler.effect import Standing
from tasks.scheduler.review import Hysteresis, judge, name_of
from tests.tasks.scheduler.decisions import FRAUD, MACHINE, decision, way

ONLINE, BATCH, STREAM = (
    way("online", "always-on", 60),
    way("batch", "on-demand", 50),
    way("streaming", "micro-batches", 59),
)
STANDING = Standing(mode="online", policy="always-on", machine=MACHINE)
PROPOSED = name_of(BATCH)
TWICE = Hysteresis(saves_min=0.1, times_min=2)


def test_what_serves_in_the_cheapest_way_stays() -> None:
    verdict = judge(decision(FRAUD, ONLINE, way("batch", "on-demand", 70)), STANDING, [], TWICE)

    assert "keep" == verdict.outcome


def test_a_change_waits_until_it_was_proposed_often_enough_in_a_row() -> None:
    decided = decision(FRAUD, BATCH, ONLINE)
    outcomes = [
        judge(decided, STANDING, earlier, TWICE).outcome
        for earlier in ([], [PROPOSED], [PROPOSED, name_of(ONLINE)], [name_of(ONLINE), PROPOSED])
    ]

    assert ["wait", "change", "wait", "change"] == outcomes


def test_a_change_that_saves_too_little_is_not_made_however_often_it_is_proposed() -> None:
    verdict = judge(decision(FRAUD, STREAM, ONLINE), STANDING, [name_of(STREAM)] * 9, TWICE)

    assert "keep" == verdict.outcome
    assert "saves 1.7%" in verdict.reason
    assert 10 == verdict.in_a_row


def test_what_breaks_its_promise_is_changed_though_that_costs_more() -> None:
    broken = way("online", "always-on", 40, stands=False)
    verdict = judge(decision(FRAUD, BATCH, broken), STANDING, [PROPOSED], TWICE)

    assert "change" == verdict.outcome
    assert "breaks its promise" in verdict.reason


def test_what_is_served_by_nothing_yet_is_changed_at_once() -> None:
    assert "change" == judge(decision(FRAUD, BATCH), None, [], TWICE).outcome


def test_a_way_that_the_workload_does_not_allow_any_more_is_left() -> None:
    elsewhere = Standing(mode="online", policy="always-on", machine="m5.large")

    assert "change" == judge(decision(FRAUD, BATCH, ONLINE), elsewhere, [PROPOSED], TWICE).outcome


def test_ways_that_cost_nothing_are_divided_by_nothing() -> None:
    free = way("online", "always-on", 0.0)

    assert "keep" == judge(decision(FRAUD, way("batch", "on-demand", 0.0), free), STANDING, [], TWICE).outcome
