from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.model.batching import CostModel
from tasks.scheduler.scenario import Scenario
from tasks.scheduler.simulate_online import (
    SCALE_DOWN_SECONDS,
    SCALE_INTERVAL_SECONDS,
    choose_autoscaler,
    list_serving_capacities,
    plan_stream_capacity,
    scale_machines,
    simulate_always_on,
    simulate_autoscaler,
    simulate_stream,
    split_serving_cost,
)
from tests.tasks.scheduler.values import HOUR, THIS, profile, scenario


def test_an_endpoint_carries_a_rate_at_which_99_of_100_requests_are_in_time_on_its_fewest_machines() -> None:
    loose, usual = scenario(share_in_time=0.5), scenario()
    capacity = list_serving_capacities(usual, THIS)[0]
    always_on, never_mind = (simulate_always_on(each, capacity) for each in (usual, loose))
    scaled = simulate_autoscaler(usual, capacity, 3, 0.5)

    assert 1 == always_on.machines == never_mind.machines
    assert capacity.requests_per_second_max(usual) == always_on.carried_per_second == never_mind.carried_per_second
    assert 3 * 0.5 * capacity.waits.server.requests_per_second == scaled.carried_per_second


@pytest.mark.parametrize("within", [0.05, 0.2, 5.0])
def test_a_pass_takes_at_most_half_of_the_time(within: float) -> None:
    found = list_serving_capacities(scenario(deadline_seconds=within), THIS)

    for capacity in found:
        server = capacity.waits.server
        assert 2 * server.full_pass_seconds + capacity.overhead_seconds <= within
    rates = [capacity.requests_per_second_max(scenario(deadline_seconds=within)) for capacity in found]
    assert sorted(rates, reverse=True) == rates


def test_a_request_of_many_rows_fits_into_a_pass() -> None:
    found = list_serving_capacities(scenario(rows_per_arrival=40.0, deadline_seconds=20.0), THIS)

    assert all(capacity.batching.batch_size_max >= 40 for capacity in found)


def test_the_overhead_of_a_request_adds_latency_but_keeps_no_slot() -> None:
    heavy = scenario(profile=profile(request_ms=50.0, request_busy_ms=0.0))
    busy = scenario(profile=profile(request_ms=50.0, request_busy_ms=None))

    unblocked, blocked = (simulate_always_on(each, list_serving_capacities(each, THIS)[0]) for each in (heavy, busy))

    assert unblocked.age_p50 > 0.05
    assert blocked.busy_seconds > 2 * unblocked.busy_seconds


def test_what_was_measured_on_a_model_server_counts_instead_of_passes() -> None:
    served = CostModel(fixed_seconds=0.004, row_seconds=0.002)
    known = profile(request_ms=3.0, served=served, jitter=0.2)
    single, beside = split_serving_cost(known, 1.0)
    several, _ = split_serving_cost(known, 3.0)
    found = list_serving_capacities(scenario(profile=known), THIS)[0]

    # One alone takes 3 + 11 ms, of which 6 in the slot.
    assert (served, 0.008) == (single, pytest.approx(beside))
    assert pytest.approx((0.004, 0.022)) == (several.fixed_seconds, several.row_seconds)
    assert (served, 0.2) == (found.waits.server.cost, found.waits.server.jitter)


def test_an_instance_type_that_is_twice_as_fast_takes_twice_as_much() -> None:
    fast = replace(THIS, speed=2.0)

    assert 2 * list_serving_capacities(scenario(deadline_seconds=5.0), THIS)[
        0
    ].waits.server.requests_per_second == pytest.approx(
        list_serving_capacities(scenario(deadline_seconds=5.0), fast)[0].waits.server.requests_per_second, rel=0.02
    )


def poisson(rate: float, seconds: int = 2 * HOUR, seed: int = 1) -> Scenario:
    return scenario(np.random.default_rng(seed).poisson(rate, seconds))


def test_an_endpoint_has_as_many_machines_as_the_promise_needs_and_no_more() -> None:
    asked = poisson(500)
    capacity = list_serving_capacities(asked, THIS)[0]

    found = simulate_always_on(asked, capacity)

    fewer = replace(asked, machines_max=found.machines - 1)
    assert found.violation is None
    assert simulate_always_on(fewer, capacity).violation is not None
    assert found.paid_seconds == found.machines * 2 * HOUR
    assert 500 * 2 * HOUR / capacity.waits.server.requests_per_second == pytest.approx(found.busy_seconds, rel=0.01)


@settings(max_examples=10)
@given(st.floats(0.1, 300), st.floats(1.1, 4))
def test_more_traffic_never_costs_less(rate: float, more: float) -> None:
    one, other = poisson(rate), poisson(rate)
    other = replace(other, counts_T=np.ceil(other.counts_T * more).astype(np.int64))
    capacity = list_serving_capacities(one, THIS)[0]

    assert simulate_always_on(one, capacity).paid_seconds <= simulate_always_on(other, capacity).paid_seconds


def test_a_scaler_reacts_late_and_its_machines_need_their_start() -> None:
    counts_T = np.zeros(HOUR, dtype=np.int64)
    counts_T[600:1200] = 1000
    asked = scenario(counts_T, profile=profile(cold_start_seconds=60))
    capacity = list_serving_capacities(asked, THIS)[0]

    paid_I, ready_I = scale_machines(asked, capacity, 1, 0.5)

    needed = int(np.ceil(1000 / (0.5 * capacity.waits.server.requests_per_second)))
    first = 600 // SCALE_INTERVAL_SECONDS
    assert [1, needed] == paid_I[first : first + 2].tolist()
    assert [1] * 4 + [needed] == ready_I[first + 1 : first + 6].tolist()
    gone = (1200 + SCALE_DOWN_SECONDS) // SCALE_INTERVAL_SECONDS
    assert [needed, 1] == paid_I[gone : gone + 2].tolist()


def test_a_scaler_under_a_varying_load_keeps_the_promise_for_less_than_always_on() -> None:
    second = np.arange(24 * HOUR)
    rate = 300 * (1.2 + np.cos(2 * np.pi * second / (24 * HOUR)))
    asked = scenario(np.random.default_rng(2).poisson(rate))
    capacity = list_serving_capacities(asked, THIS)[0]
    always = simulate_always_on(asked, capacity)

    found = choose_autoscaler(asked, capacity, always)

    assert found.violation is None
    assert found.paid_seconds < 0.85 * always.paid_seconds


def test_a_lower_target_utilisation_pays_for_more_machines_and_is_late_less() -> None:
    asked = poisson(400)
    capacity = list_serving_capacities(asked, THIS)[0]

    found = [simulate_autoscaler(asked, capacity, 1, target) for target in (0.9, 0.6, 0.3)]

    assert sorted(each.paid_seconds for each in found) == [each.paid_seconds for each in found]
    assert sorted((each.late_share for each in found), reverse=True) == [each.late_share for each in found]


def test_a_stream_scores_events_in_time_on_machines_that_are_always_on() -> None:
    asked = scenario(np.full(HOUR, 100), consumer="events", deadline_seconds=5.0)

    found = simulate_stream(asked, THIS)

    assert ("streaming", "micro-batches", None) == (found.mode, found.policy, found.violation)
    assert found.machines * HOUR == found.paid_seconds
    assert found.age_p99 <= 5
    assert 0 < found.batching.wait_seconds_max <= 0.5


def test_a_stream_is_no_faster_than_it_was_measured_from_broker_to_broker() -> None:
    asked = scenario(np.full(HOUR, 100), consumer="events", deadline_seconds=60.0)
    slow = scenario(
        np.full(HOUR, 100), consumer="events", deadline_seconds=60.0, profile=profile(stream_rows_per_second=20.0)
    )

    assert 20 == pytest.approx(plan_stream_capacity(slow, THIS).waits.server.requests_per_second, rel=0.02)
    assert simulate_stream(slow, THIS).machines > 3 * simulate_stream(asked, THIS).machines


def test_the_batching_of_a_stream_leaves_time_for_two_passes() -> None:
    capacity = plan_stream_capacity(scenario(consumer="events", deadline_seconds=1.0), THIS)

    assert capacity.batching.wait_seconds_max + 2 * capacity.waits.server.full_pass_seconds <= 1


def test_a_stream_gives_no_answer_to_requests() -> None:
    found = simulate_stream(scenario(), THIS)

    assert "a stream gives no answer to one who waits for it" == found.violation
