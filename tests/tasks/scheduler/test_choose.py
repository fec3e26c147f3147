from __future__ import annotations

from dataclasses import replace

import numpy as np

from tasks.scheduler.choose import Choice, best, rated
from tasks.scheduler.problem import Candidate
from tasks.scheduler.simulate import simulate
from tests.tasks.scheduler.values import HOUR, THIS, problem, table_problem


def test_of_what_costs_the_same_the_simpler_is_chosen() -> None:
    found = [
        Choice(kind=THIS, candidate=Candidate(mode="online", policy=policy, machines=1, paid_seconds=seconds))
        for policy, seconds in (("keep-warm", 100.0), ("autoscaled", 100.0 - 1e-10), ("always-on", 100.0 + 1e-10))
    ]

    assert ["always-on", "keep-warm", "autoscaled"] == [each.name[1] for each in sorted(found, key=rated)]


def test_the_cheapest_of_all_kinds_and_modes_that_keeps_the_promise_is_chosen() -> None:
    cheap = replace(THIS, name="cheap", on_demand=THIS.on_demand / 2)
    asked = problem(np.full(HOUR, 20))

    found = best(asked, [THIS, cheap])

    every = [Choice(kind=kind, candidate=each) for kind in (THIS, cheap) for each in simulate(asked, kind)]
    assert "cheap" == found.kind.name
    assert found.usd == min(each.usd for each in every if each.candidate.flaw is None)


def test_quick_choices_are_those_of_the_long_way() -> None:
    for asked in (problem(np.full(HOUR, 20)), table_problem(10**6)):
        assert best(asked, [THIS]).name == best(replace(asked, quick=True), [THIS], beside=False).name


def test_every_mode_is_simulated() -> None:
    requests = {(each.mode, each.policy) for each in simulate(problem(), THIS)}
    events = {(each.mode, each.policy) for each in simulate(problem(consumer="events", within=2.0 * HOUR), THIS)}

    online = {"always-on", "autoscaled", "keep-warm", "keep-warm-10-minutes", "keep-warm-histogram"}
    expected = {("online", policy) for policy in online} | {("batch", "on-demand"), ("streaming", "micro-batches")}
    assert expected == requests
    assert expected <= events
