from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from serving.errors import DeadlineImpossible
from tasks.spot.policy import Placement, PolicyParameters, Situation, decide_placements
from tasks.spot.replay import Job, Outcome, Policy, replay
from tests.benchmarks.spot_baselines import greedy
from tests.benchmarks.traces import synthetic_traces
from tests.tasks.spot.situations import HOUR, jobs, traces

# Thirty minutes of work within an hour, a changeover of two minutes, in ticks of five.
JOB = Job(work_seconds=1800, deadline_seconds=3600, changeover_seconds=120, lost_seconds=30, tick_seconds=300)


def on(*rows: str) -> NDArray[np.bool_]:
    return np.array([[tick == "1" for tick in row] for row in rows])


def always(placement: Placement) -> Policy:
    return lambda seen, _: np.full(len(np.asarray(seen.spot_up)), placement)


def test_on_demand_all_the_way_costs_the_work_and_one_changeover() -> None:
    outcome = replay(always(Placement.ON_DEMAND), on("000000000000"), JOB)

    assert ([1920 / 1800], [False], [1], [0]) == _of(outcome)


def test_spot_all_the_way_costs_a_third_of_that() -> None:
    assert ([1920 / 1800 / 3], [False], [1], [0]) == _of(replay(greedy, on("111111111111"), JOB))


def test_a_machine_that_is_taken_is_started_again_and_work_is_done_twice() -> None:
    outcome = replay(greedy, on("111011111111", "011111111111"), JOB)

    assert ([2040 / 1800 / 3, 1920 / 1800 / 3], [False, False], [2, 1], [1, 0]) == _of(outcome)
    assert [30, 0] == list(outcome.recomputed_N)


def test_a_machine_taken_while_it_boots_has_done_no_work_that_is_lost() -> None:
    slow = replace(JOB, changeover_seconds=480, deadline_seconds=3900)
    outcome = replay(greedy, on("101111111111"), slow)

    assert ([(300 + 480 + 1800) / 1800 / 3], [False], [2], [1]) == _of(outcome)
    assert [0] == list(outcome.recomputed_N)


def test_a_policy_that_only_waits_is_late_at_no_cost() -> None:
    assert ([0], [True], [0], [0]) == _of(replay(always(Placement.IDLE), on("111111111111"), JOB))


def test_past_the_end_of_a_trace_spot_is_gone() -> None:
    short, long = (replay(greedy, on(row), JOB) for row in ("111", "111000000000"))

    assert _of(long) == _of(short)


def test_what_is_left_of_a_tick_before_the_deadline_is_no_whole_tick() -> None:
    job = replace(JOB, work_seconds=580, deadline_seconds=700, tick_seconds=400)

    assert ([700 / 580], [False], [1], [0]) == _of(replay(always(Placement.ON_DEMAND), on("00"), job))


def test_each_machines_time_is_rounded_up_to_what_is_billed() -> None:
    hourly = replace(JOB, billing_seconds=3600)

    # Two hours of spot: one taken after a quarter of it, one given back before it was over.
    assert 2 * 3600 / 1800 / 3 == pytest.approx(replay(greedy, on("111011111111"), hourly).cost_N[0])


def test_on_demand_that_is_not_to_be_had_is_waited_for() -> None:
    outcome = replay(always(Placement.ON_DEMAND), on("000000000000"), JOB, on("001111111111"))

    assert ([1920 / 1800], [False], [1], [0]) == _of(outcome)
    assert replay(always(Placement.ON_DEMAND), on("000000000000"), JOB, on("000000000011")).late_N.all()


def test_between_decisions_a_machine_that_is_taken_goes_unnoticed() -> None:
    asked: list[float] = []

    def watched(seen: Situation, parameters: PolicyParameters) -> NDArray[np.int64]:
        asked.append(float(np.asarray(seen.left_seconds)[0]))
        assert (600 + 120, 900) == (parameters.changeover_seconds, parameters.interval_seconds)
        return np.where(seen.spot_up, Placement.SPOT, Placement.IDLE)

    outcome = replay(watched, on("101111111111"), replace(JOB, ticks_per_decision=3))

    # Taken in the second tick, and started again in the fourth.
    assert [3600, 2700, 1800, 900][: len(asked)] == asked
    assert ([(300 + 120 + 1800 - 180) / 1800 / 3], [False], [2], [1]) == _of(outcome)


def test_a_job_that_on_demand_alone_would_miss_is_refused() -> None:
    with pytest.raises(DeadlineImpossible):
        replace(JOB, deadline_seconds=1900)
    with pytest.raises(ValueError, match="must be positive"):
        replace(JOB, tick_seconds=0)


def test_a_policy_that_asks_for_spot_that_is_gone_is_mistaken() -> None:
    with pytest.raises(AssertionError):
        replay(always(Placement.SPOT), on("011111111111"), JOB)


@settings(max_examples=150)
@given(st.data(), jobs())
def test_it_is_not_late_on_any_trace(data: st.DataObject, job: Job) -> None:
    assert not replay(decide_placements, data.draw(traces(ticks=60)), job).late_N.any()


@settings(max_examples=150)
@given(st.data(), jobs(), st.integers(2, 5))
def test_it_is_not_late_where_machines_are_taken_between_decisions(data: st.DataObject, job: Job, ticks: int) -> None:
    unnoticed = (ticks - 1) * job.tick_seconds
    rarely = replace(job, ticks_per_decision=ticks, deadline_seconds=job.deadline_seconds + unnoticed)

    assert not replay(decide_placements, data.draw(traces(ticks=60)), rarely).late_N.any()


@settings(max_examples=150)
@given(st.data(), jobs(), st.integers(1, 20), st.integers(0, 60))
def test_a_reserve_keeps_the_promise_where_on_demand_is_refused_once(
    data: st.DataObject, job: Job, ticks: int, start: int
) -> None:
    spot_NT = data.draw(traces(ticks=60))
    refused_NT = np.ones((len(spot_NT), 400), dtype=bool)
    refused_NT[:, start : start + ticks] = False
    reserve = ticks * job.tick_seconds + job.changeover_seconds
    reserved = replace(job, reserve_seconds=reserve, deadline_seconds=job.deadline_seconds + reserve)

    assert not replay(decide_placements, spot_NT, reserved, refused_NT).late_N.any()


def test_it_is_cheaper_than_greedy_on_traces_that_resemble_real_ones() -> None:
    spot_NT = synthetic_traces(60, 360, seed=3)
    job = Job(work_seconds=48 * HOUR, deadline_seconds=60 * HOUR, changeover_seconds=0.2 * HOUR)
    ours, theirs = replay(decide_placements, spot_NT, job), replay(greedy, spot_NT, job)

    assert not (ours.late_N | theirs.late_N).any()
    assert ours.cost_N.mean() < 0.97 * theirs.cost_N.mean()


def _of(outcome: Outcome) -> tuple[list[float], list[bool], list[int], list[int]]:
    return (
        [pytest.approx(cost) for cost in outcome.cost_N],
        list(outcome.late_N),
        list(outcome.moves_N),
        list(outcome.kills_N),
    )


TRACES = synthetic_traces(200, 554, seed=1)


def test_traces_are_the_same_for_the_same_seed_only() -> None:
    assert (TRACES == synthetic_traces(200, 554, seed=1)).all()
    assert (TRACES != synthetic_traces(200, 554, seed=2)).any()


def test_traces_are_of_every_temper() -> None:
    shares = TRACES.mean(axis=1)

    assert (200, 554) == TRACES.shape
    assert shares.min() < 0.2
    assert shares.max() > 0.9


def test_most_gaps_are_short_and_some_last_for_hours() -> None:
    gaps = np.concatenate([_gaps(trace) for trace in TRACES])

    assert np.median(gaps) <= 2
    assert (gaps >= 18).mean() > 0.05


def test_there_may_be_no_traces() -> None:
    assert (0, 10) == synthetic_traces(0, 10, seed=0).shape


def _gaps(trace: np.ndarray) -> np.ndarray:
    edges = np.flatnonzero(np.diff(np.concatenate([[True], trace, [True]]).astype(int)))
    return edges[1::2] - edges[::2]
