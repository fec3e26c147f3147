from __future__ import annotations

from dataclasses import replace

import numpy as np

from tasks.scheduler.candidates import Choice, choose_cheapest, rank_choice, simulate_candidates
from tasks.scheduler.scenario import Candidate
from tests.tasks.scheduler.values import HOUR, THIS, scenario, table_scenario


def test_of_candidates_with_the_same_cost_the_simpler_is_chosen() -> None:
    found = [
        Choice(instance_type=THIS, candidate=Candidate(mode="online", policy=policy, machines=1, paid_seconds=seconds))
        for policy, seconds in (("keep-warm", 100.0), ("autoscaled", 100.0 - 1e-10), ("always-on", 100.0 + 1e-10))
    ]

    assert ["always-on", "keep-warm", "autoscaled"] == [each.name[1] for each in sorted(found, key=rank_choice)]


def test_the_cheapest_of_all_kinds_and_modes_that_keeps_the_promise_is_chosen() -> None:
    cheap = replace(THIS, name="cheap", on_demand=THIS.on_demand / 2)
    asked = scenario(np.full(HOUR, 20))

    found = choose_cheapest(asked, [THIS, cheap])

    every = [
        Choice(instance_type=kind, candidate=each)
        for kind in (THIS, cheap)
        for each in simulate_candidates(asked, kind)
    ]
    assert "cheap" == found.instance_type.name
    assert found.usd == min(each.usd for each in every if each.candidate.violation is None)


def test_a_coarse_simulation_makes_the_same_choice() -> None:
    for asked in (scenario(np.full(HOUR, 20)), table_scenario(10**6)):
        assert (
            choose_cheapest(asked, [THIS]).name
            == choose_cheapest(replace(asked, is_coarse=True), [THIS], with_ten_minutes=False).name
        )


def test_every_mode_is_simulated() -> None:
    requests = {(each.mode, each.policy) for each in simulate_candidates(scenario(), THIS)}
    events = {
        (each.mode, each.policy)
        for each in simulate_candidates(scenario(consumer="events", deadline_seconds=2.0 * HOUR), THIS)
    }

    online = {"always-on", "autoscaled", "keep-warm", "keep-warm-10-minutes"}
    expected = {("online", policy) for policy in online} | {("batch", "on-demand"), ("streaming", "micro-batches")}
    assert expected == requests
    assert expected <= events
