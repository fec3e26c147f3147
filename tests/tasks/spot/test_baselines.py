from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tasks.spot.policy import Placement, decide_placements
from tasks.spot.replay import Job, replay
from tests.benchmarks.spot_baselines import UniformProgress, greedy, optimum
from tests.tasks.spot.situations import HOUR, PARAMETERS, jobs, make_situation, traces

# Ten hours of work in twenty: half an hour's work falls due in each hour.
UNIFORM = UniformProgress(10 * HOUR, 20 * HOUR)


def test_greedy_takes_spot_and_else_waits_until_the_last_moment() -> None:
    assert Placement.SPOT == greedy(make_situation(spot_up=True), PARAMETERS)
    assert Placement.IDLE == greedy(make_situation(), PARAMETERS)
    assert Placement.IDLE == greedy(make_situation(left_seconds=10 * HOUR + 2 * 720 + 60), PARAMETERS)
    assert Placement.ON_DEMAND == greedy(make_situation(left_seconds=10 * HOUR + 2 * 720 + 59), PARAMETERS)


def test_at_the_last_moment_spot_is_kept_but_no_longer_taken() -> None:
    late = {"left_seconds": 10 * HOUR + 720, "spot_up": True}

    assert Placement.ON_DEMAND == greedy(make_situation(**late), PARAMETERS)
    assert Placement.SPOT == greedy(make_situation(placement=Placement.SPOT, **late), PARAMETERS)
    assert Placement.ON_DEMAND == greedy(
        make_situation(placement=Placement.SPOT, **late | {"spot_up": False}), PARAMETERS
    )


@pytest.mark.parametrize(
    ("situation", "placement"),
    [
        # Five hours on, five of the work are due in ten.
        ({"work_seconds": 7.5 * HOUR}, Placement.IDLE),
        ({"work_seconds": 7.6 * HOUR}, Placement.ON_DEMAND),
        ({"work_seconds": 7.6 * HOUR, "spot_up": True}, Placement.SPOT),
        # From on-demand only once work has reached where the line is in two changeovers, 24 min on: 12 min more.
        ({"work_seconds": 7.35 * HOUR, "spot_up": True, "placement": Placement.ON_DEMAND}, Placement.ON_DEMAND),
        ({"work_seconds": 7.35 * HOUR, "placement": Placement.ON_DEMAND}, Placement.ON_DEMAND),
        ({"work_seconds": 7.3 * HOUR, "spot_up": True, "placement": Placement.ON_DEMAND}, Placement.SPOT),
        ({"work_seconds": 7.3 * HOUR, "placement": Placement.ON_DEMAND}, Placement.IDLE),
        ({"work_seconds": 7.6 * HOUR, "spot_up": True, "placement": Placement.SPOT}, Placement.SPOT),
    ],
)
def test_uniform_progress_keeps_to_its_line(situation: dict[str, Any], placement: Placement) -> None:
    assert placement == UNIFORM(make_situation(left_seconds=15 * HOUR, **situation), PARAMETERS)


def test_both_stop_when_the_work_is_done() -> None:
    done = make_situation(work_seconds=0.0, spot_up=True, placement=Placement.SPOT)

    assert [Placement.IDLE, Placement.IDLE] == [int(greedy(done, PARAMETERS)), int(UNIFORM(done, PARAMETERS))]


@settings(max_examples=150)
@given(st.data(), jobs())
def test_neither_is_late_on_any_trace(data: st.DataObject, job: Job) -> None:
    spot_NT: NDArray[np.bool_] = data.draw(traces(ticks=40))
    uniform = UniformProgress(job.work_seconds, job.deadline_seconds)

    assert not replay(greedy, spot_NT, job).late_N.any()
    assert not replay(uniform, spot_NT, job).late_N.any()


def test_work_of_no_more_than_a_rounding_error_is_done() -> None:
    job = Job(work_seconds=1e-6, deadline_seconds=100.0, changeover_seconds=0.0, tick_seconds=100.0, price_ratio=2.0)

    assert not replay(greedy, np.zeros((1, 1), np.bool_), job).late_N.any()


def test_the_last_moments_before_a_deadline_are_worked_in_too() -> None:
    job = Job(work_seconds=6e-5, deadline_seconds=100.00006, changeover_seconds=0, tick_seconds=100)

    assert not replay(greedy, np.zeros((1, 2), dtype=bool), job).late_N.any()


PLAIN = Job(work_seconds=6, deadline_seconds=10, changeover_seconds=1, tick_seconds=1)


def at(trace: str, job: Job = PLAIN) -> float:
    """Return the least cost in seconds of on-demand."""
    return optimum(np.array([tick == "1" for tick in trace]), job) * job.work_seconds


@pytest.mark.parametrize(
    ("trace", "seconds"),
    [
        ("1111111111", 7 / 3),  # all on spot
        ("0001111111", 7 / 3),  # waits for it
        ("0000000000", 7),  # all on on-demand
        ("1000000000", 7),  # too short a spell to be worth a changeover more
        ("1111000000", 4 / 3 + 1 + 3),  # three seconds of work on spot, the rest on on-demand
        ("1111000111", 4 / 3 + 1 + 1 + 3 / 3),  # on-demand for one of the three seconds between
        ("1111001111", 4 / 3 + 4 / 3),  # waits between, done at the deadline
    ],
)
def test_the_optimum_of_small_traces_is_right(trace: str, seconds: float) -> None:
    assert seconds == pytest.approx(at(trace))


def test_past_the_end_of_a_trace_spot_is_gone() -> None:
    assert at("1111000000") == at("1111")


def test_no_work_costs_nothing() -> None:
    assert 0 == at("0101", replace(PLAIN, work_seconds=0))


def test_on_demand_all_the_way_is_the_cheapest_where_spot_is_dearer() -> None:
    assert 7 == pytest.approx(at("1111111111", replace(PLAIN, price_ratio=0.5)))


def test_a_coarser_unit_never_makes_it_dearer() -> None:
    job = Job(work_seconds=5000, deadline_seconds=9100, changeover_seconds=130, tick_seconds=100)
    spot_T = np.random.default_rng(0).random(91) < 0.5

    assert optimum(spot_T, job, 100) <= optimum(spot_T, job) + 1e-12


@settings(max_examples=60)
@given(
    st.lists(st.booleans(), min_size=1, max_size=12), st.integers(1, 8), st.integers(0, 3), st.sampled_from([1.0, 2, 8])
)
def test_the_optimum_equals_that_of_an_exhaustive_search(
    spot: list[bool], work: int, changeover: int, ratio: float
) -> None:
    deadline = len(spot)
    if work + changeover > deadline:
        return
    job = Job(
        work_seconds=work,
        deadline_seconds=deadline,
        changeover_seconds=changeover,
        tick_seconds=1,
        price_ratio=ratio,
    )

    assert _by_trying_all(tuple(spot), work, changeover, ratio) == pytest.approx(optimum(np.array(spot), job) * work)


def _by_trying_all(spot: tuple[bool, ...], work: int, changeover: int, ratio: float) -> float:
    """Return the least cost over every choice of machine in every second; a changeover given up is lost."""

    @cache
    def least(second: int, left: int, placement: str, booting: int) -> float:
        if left == 0:
            return 0.0
        if second == len(spot):
            return float("inf")
        costs = [least(second + 1, left, "idle", 0)]
        for machine, price in {"on-demand": 1.0, "spot": 1 / ratio}.items():
            if machine == "spot" and not spot[second]:
                continue
            kept = machine == placement and (machine == "on-demand" or spot[second - 1])
            boots = booting if kept else changeover
            after = least(second + 1, left if boots else left - 1, machine, max(boots - 1, 0))
            costs.append(price + after)
        return min(costs)

    return least(0, work, "idle", 0)


@settings(max_examples=50)
@given(st.data(), jobs(whole=True))
def test_no_policy_is_cheaper_on_any_trace(data: st.DataObject, job: Job) -> None:
    spot_NT: NDArray[np.bool_] = data.draw(traces(ticks=40))
    least_N = np.array([optimum(trace, job, 10) for trace in spot_NT])

    for policy in (greedy, UniformProgress(job.work_seconds, job.deadline_seconds), decide_placements):
        assert (replay(policy, spot_NT, job).cost_N >= least_N - 1e-6).all()


@settings(max_examples=50)
@given(st.data(), jobs(whole=True), st.integers(0, 3000))
def test_more_time_never_costs_more(data: st.DataObject, job: Job, more: int) -> None:
    spot_T = data.draw(traces(ticks=30))[0]
    later = replace(job, deadline_seconds=job.deadline_seconds + more)

    assert optimum(spot_T, later, 10) <= optimum(spot_T, job, 10) + 1e-9


@settings(max_examples=50)
@given(st.data(), jobs(whole=True))
def test_more_spot_never_costs_more(data: st.DataObject, job: Job) -> None:
    spot_NT = data.draw(traces(ticks=30))

    assert optimum(spot_NT.any(axis=0), job, 10) <= min(optimum(trace, job, 10) for trace in spot_NT) + 1e-9
