from __future__ import annotations

from tasks.scheduler.deployment_plan import CurrentDeployment
from tasks.scheduler.review import Hysteresis, judge_change, name_alternative
from tests.tasks.scheduler.decisions import FRAUD, MACHINE, alternative, decision

ONLINE, BATCH, STREAM = (
    alternative("online", "always-on", 60),
    alternative("batch", "on-demand", 50),
    alternative("streaming", "micro-batches", 59),
)
CURRENT = CurrentDeployment(mode="online", policy="always-on", machine=MACHINE)
PROPOSED = name_alternative(BATCH)
TWICE = Hysteresis(saving_min=0.1, reviews_min=2)


def test_the_cheapest_way_stays() -> None:
    verdict = judge_change(decision(FRAUD, ONLINE, alternative("batch", "on-demand", 70)), CURRENT, [], TWICE)

    assert "keep" == verdict.outcome


def test_a_change_waits_until_it_was_proposed_often_enough_in_a_row() -> None:
    decided = decision(FRAUD, BATCH, ONLINE)
    outcomes = [
        judge_change(decided, CURRENT, earlier, TWICE).outcome
        for earlier in ([], [PROPOSED], [PROPOSED, name_alternative(ONLINE)], [name_alternative(ONLINE), PROPOSED])
    ]

    assert ["wait", "change", "wait", "change"] == outcomes


def test_a_change_that_saves_too_little_is_not_made_however_often_it_is_proposed() -> None:
    verdict = judge_change(decision(FRAUD, STREAM, ONLINE), CURRENT, [name_alternative(STREAM)] * 9, TWICE)

    assert "keep" == verdict.outcome
    assert "saves 1.7%" in verdict.reason
    assert 10 == verdict.reviews_in_a_row


def test_a_broken_promise_is_changed_even_at_a_higher_cost() -> None:
    broken = alternative("online", "always-on", 40, is_feasible=False)
    verdict = judge_change(decision(FRAUD, BATCH, broken), CURRENT, [PROPOSED], TWICE)

    assert "change" == verdict.outcome
    assert "breaks its promise" in verdict.reason


def test_a_workload_that_nothing_serves_is_changed_at_once() -> None:
    assert "change" == judge_change(decision(FRAUD, BATCH), None, [], TWICE).outcome


def test_a_machine_that_the_workload_no_longer_allows_is_changed() -> None:
    elsewhere = CurrentDeployment(mode="online", policy="always-on", machine="m5.large")

    assert "change" == judge_change(decision(FRAUD, BATCH, ONLINE), elsewhere, [PROPOSED], TWICE).outcome


def test_alternatives_without_cost_have_no_saving() -> None:
    free = alternative("online", "always-on", 0.0)

    assert (
        "keep"
        == judge_change(decision(FRAUD, alternative("batch", "on-demand", 0.0), free), CURRENT, [], TWICE).outcome
    )
